"""litgpt: GroupedTopkRouter chooses experts of forbidden groups where selection biases are negative.

Experts outside the chosen groups get the score 0 instead of minus infinity; with biases below zero 0 is
more than what the experts of the chosen groups have.
"""

import torch
from litgpt.config import Config
from litgpt.model import GroupedTopkRouter

torch.manual_seed(0)
groups = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
config = Config(n_embd=8, n_head=2, n_expert=8, n_expert_per_token=2, norm_topk_prob=True, **groups)
router = GroupedTopkRouter(config)
torch.nn.init.normal_(router.weight)
router.e_score_correction_bias.fill_(-1.5)  # the same for all: it must not change any choice
x = torch.randn(64, 8)
with_bias = router(x)[1].sort().values
router.e_score_correction_bias.zero_()
without = router(x)[1].sort().values
differ = int((with_bias != without).any(dim=1).sum())
print(f"{differ} of 64 tokens visit other experts when all biases are lowered by the same number")
assert differ == 0, "experts of groups that are not kept were chosen"
