"""transformers: NllbMoeSparseMLP sends every token through experts 0 and 1, whatever the router chose.

`NllbMoeTop2Router.route_tokens` returns the mask of each token's best expert, [T, E] of zeros and ones.
`NllbMoeExperts.forward` takes it for expert ids and one-hots it, so that only the ids 0 and 1 occur.
"""

import torch
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

torch.manual_seed(0)
config = NllbMoeConfig(d_model=8, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=4, expert_capacity=64)
layer = NllbMoeSparseMLP(config, ffn_dim=16).eval()
called = set()
for name, expert in layer.experts.items():
    expert.register_forward_hook(lambda *_, name=name: called.add(name))
x = torch.randn(1, 32, 8)
layer(x)
chosen = layer.router.classifier(x).argmax(dim=-1).unique().tolist()
print("best experts of 32 tokens:", chosen)
print("experts that were called: ", sorted(called))
assert called == {f"expert_{e}" for e in chosen} or len(called) > 2, "only experts 0 and 1 are used"
