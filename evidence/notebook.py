"""The notebook's behaviour, kept so that tests can show what they reject (``docs/notebook.md``).

Its experts, dispatcher and layer in short, with every defect in it, numbered as in that table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_impls.interface import Routing
from moe_impls.router import smooth_load
from moe_impls.router_interface import RouterSpec

# Defect 15, in the form of source text.
DEAD_CODE = """
import torch
from torch import nn
from tqdm import tqdm

class Layer(nn.Module):
    def __init__(self):
        self.soft = nn.Softmax()
        self.scale = torch.ones(1)
"""


def uniform_noise_gating(
    clean: Tensor, raw_scale: Tensor, spec: RouterSpec, *, generator: torch.Generator | None = None
) -> tuple[Routing, Tensor]:
    """Defect 2: noise uniform on [0, 1), and a load that takes it for a standard Normal."""
    scale = F.softplus(raw_scale) + 1e-2
    noisy = clean + torch.rand(clean.shape, generator=generator, dtype=clean.dtype) * scale
    top = noisy.topk(spec.top_k, dim=1)
    return Routing(top.indices, top.values.softmax(dim=1)), smooth_load(clean, noisy, scale, spec.top_k)


class NotebookDispatcher:
    """Defects 3 to 8 and 14."""

    def __init__(self, num_experts: int, gates: Tensor) -> None:
        self.num_tokens = len(gates)
        self.expert, self.token = gates.t().nonzero(as_tuple=True)  # counts what is not zero, NaN too
        self.part_sizes = (gates > 0).sum(0).tolist()  # counts what is positive
        self.gates = gates[self.token, self.expert].unsqueeze(1)

    def dispatch(self, inp: Tensor) -> list[Tensor]:
        return list(inp[self.token].squeeze(1).split(self.part_sizes))

    def combine(self, expert_out: list[Tensor], multiply_by_gates: bool = True) -> Tensor:
        rows = torch.cat(expert_out).exp()
        if multiply_by_gates:
            rows = rows * self.gates
        total = torch.zeros(self.num_tokens, rows.shape[1]).index_add(0, self.token, rows.float())
        total[total == 0] = torch.finfo(torch.float64).eps
        return total.log()


class NotebookExpert(nn.Module):
    def __init__(self, input_size: int, output_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu()).relu()


class NotebookMoE(nn.Module):
    """Defects 1 and 9 to 13, and those of its dispatcher."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_experts: int,
        hidden_size: int,
        noisy_gating: bool = True,
        k: int = 4,
    ) -> None:
        super().__init__()
        self.num_experts, self.noisy_gating, self.k = num_experts, noisy_gating, k
        self.experts = nn.ModuleList(
            NotebookExpert(input_size, output_size, hidden_size) for _ in range(num_experts)
        )
        self.w_gate = nn.Parameter(torch.zeros(input_size, num_experts))
        self.w_noise = nn.Parameter(torch.zeros(input_size, num_experts))
        self.register_buffer("mean", torch.tensor([0.0]))
        self.register_buffer("std", torch.tensor([1.0]))

    def prob_in_top_k(self, clean: Tensor, noisy: Tensor, scale: Tensor, top_values: Tensor) -> Tensor:
        raise NotImplementedError("never reached, since the last argument is never given")

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates [T, E] and load [E]."""
        logits = clean = x @ self.w_gate
        scale = F.softplus(x @ self.w_noise) + 1e-2
        noisy = self.noisy_gating and self.training
        if noisy:
            logits = clean + torch.rand_like(clean) * scale
        top = logits.topk(self.k, dim=1)
        gates = torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(dim=1))
        if noisy and self.k < self.num_experts:
            return gates, self.prob_in_top_k(clean, logits, scale).sum(0)  # type: ignore[call-arg] # defect 1
        return gates, (gates > 0).sum(0)

    def forward(self, x: Tensor, loss_coef: float = 1e-2) -> tuple[Tensor, Tensor]:
        gates, load = self.gating(x)
        imbalance = [v.float().var() / (v.float().mean() ** 2 + 1e-10) for v in (gates.sum(0), load)]
        dispatcher = NotebookDispatcher(self.num_experts, gates)
        parts = dispatcher.dispatch(x)
        return dispatcher.combine([e(p) for e, p in zip(self.experts, parts, strict=True)]), loss_coef * sum(
            imbalance, torch.zeros(())
        )
