"""transformers: router_jitter_noise > 0 multiplies the caller's tensor in place, in Mixtral and MiniMax.

`hidden_states *= noise` at the head of the block's forward changes x for everyone who holds it, and the
experts, not the router alone, work on the noisy tokens.
"""

import torch
from transformers import MiniMaxConfig, MixtralConfig
from transformers.models.minimax.modeling_minimax import MiniMaxSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

sizes = {"hidden_size": 8, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
changed = []
for config, block in ((MixtralConfig, MixtralSparseMoeBlock), (MiniMaxConfig, MiniMaxSparseMoeBlock)):
    layer = block(config(**sizes, router_jitter_noise=0.1)).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 4, 8)
    before = x.clone()
    layer(x)
    changed.append(not torch.equal(x, before))
    print(f"{block.__name__} changed x: {changed[-1]}")
assert not any(changed), "x was written to"
