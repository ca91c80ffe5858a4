"""transformers: A.X-K2's router chooses experts of forbidden groups where selection biases are negative.

As litgpt's: `masked_fill(..., 0.0)` in place of minus infinity for the experts of groups that are not kept.
"""

import torch
from transformers import AXK2Config
from transformers.models.axk2.modeling_axk2 import AXK2TopkRouter

torch.manual_seed(0)
config = AXK2Config(hidden_size=8, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2)
router = AXK2TopkRouter(config)
torch.nn.init.normal_(router.weight)
x = torch.randn(64, 8)
without = router(x)[2].sort().values
router.e_score_correction_bias.fill_(-1.5)  # the same for all: it must not change any choice
with_bias = router(x)[2].sort().values
differ = int((with_bias != without).any(dim=1).sum())
print(f"{differ} of 64 tokens visit other experts when all biases are lowered by the same number")
assert differ == 0, "experts of groups that are not kept were chosen"
