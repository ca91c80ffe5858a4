"""transformers: with router_bias=True LongCat-Flash has a bias of the router that it never reads.

`LongcatFlashTopkRouter.forward` multiplies by `classifier.weight` itself and leaves `classifier.bias` out.
"""

import torch
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

config = LongcatFlashConfig(hidden_size=8, n_routed_experts=4, zero_expert_num=0, moe_topk=2)
config.router_bias = True
router = LongcatFlashTopkRouter(config)
x = torch.randn(16, 8)
before = router(x)[0]
with torch.no_grad():
    router.classifier.bias += torch.tensor([100.0] + [0.0] * (len(before[0]) - 1))
after = router(x)[0]
print(
    "logits of expert 0 before and after 100 is added to its bias:", before[0, 0].item(), after[0, 0].item()
)
assert not torch.equal(before, after), "the bias has no effect"
