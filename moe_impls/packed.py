"""Sorted slices on weights that oneDNN has laid out in blocks for its matrix products, once, in ``prepare``.

A plain product of few rows spends most of its time on weights in rows; in oneDNN's blocks they are read in
the order of use. The blocks are a copy of the weights, so inference holds them twice unless the originals are
dropped, and a result is valid only as long as the weights stay as they were: their version counters are
compared in every call. Writes that no counter sees are not noticed: through ``.data``, and to tensors of
inference mode.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_impls.checking import watch_writes
from moe_impls.dispatcher import sort_by_expert
from moe_impls.functional import activate, combine_slots
from moe_impls.interface import Experts, Prepared, Routing, Support
from moe_impls.operators import as_one_node, operator

HAS_ONEDNN = torch.backends.mkldnn.is_available()  # not every build of torch does
# oneDNN has products in low precision for processors with the instructions for them only.
SUPPORT = Support(
    devices=("cpu",) if HAS_ONEDNN else (),
    dtypes=(
        torch.float32,
        *([torch.bfloat16] if HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else []),
        *([torch.float16] if HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported() else []),
    ),
    gradients=False,
    fullgraph=True,
    exports=True,
)
ROWS = 64  # of a typical product; what oneDNN chooses for 16 to 1024 rows runs equally fast at any number


def prepare(experts: Experts) -> Prepared:
    """Lay the weights out for ``f(x, routing, *, combine="sum") -> y``, without gradients.

    Raises:
        RuntimeError: by ``f``, if a weight was written to since.
    """
    check_unwritten = watch_writes(experts)
    E, O, _ = experts.w_out.shape

    def blocks(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    with torch.no_grad():
        dense = experts.map(torch.Tensor.contiguous)  # oneDNN reads a strided bias as if it were dense
        layers = [(blocks(w_in), b_in, blocks(w_out), b_out) for w_in, b_in, w_out, b_out in dense.unbind()]

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")

    @torch.no_grad()
    def f(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
        check_unwritten()
        T, K = routing.expert_ids.shape
        order, counts = sort_by_expert(routing.expert_ids, E)  # [T * K], [E]
        rows = x[order // K]  # [T * K, D]
        outputs = x.new_empty(T * K, O)  # by slot
        parts = zip(rows.split(counts.tolist()), order.split(counts.tolist()), layers, strict=True)
        for part, slots, (w_in, b_in, w_out, b_out) in parts:
            if len(part):
                a = activate(product(part, w_in, b_in), experts.activation, experts.clamp)
                outputs[slots] = product(a, w_out, b_out)
        if experts.output_activation == "relu":
            outputs = F.relu(outputs)
        return combine_slots(outputs.view(T, K, O), routing.gates, combine).to(x.dtype)

    return as_one_node(f, O)


@operator(SUPPORT)
def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O] on weights that are laid out anew; see ``moe_impls.interface``."""
    return prepare(experts)(x, routing, combine=combine)
