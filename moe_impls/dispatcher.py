"""Bringing tokens to their experts and back: the sort that implementations share, and SparseDispatcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_impls.functional import accumulation_dtype
from moe_impls.interface import COMBINES, Routing, check_choice, check_positive


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the order in which slots of one expert lie side by side, and how many slots each expert has.

    A slot is a (token, choice) pair; slot t * K + k belongs to token t. Nothing is read back to the host.

    Args:
        expert_ids: [T, K] int64 in [0, num_experts).

    Returns:
        order: [T * K] int64, the slots by expert and, within one expert, by token (a stable sort).
        counts: [E] int64, slots of each expert; they sum to T * K.
    """
    sorted_ids, order = expert_ids.flatten().sort(stable=True)  # [T * K]
    bounds = torch.arange(num_experts + 1, device=expert_ids.device)
    counts = torch.searchsorted(sorted_ids, bounds).diff()  # [E]
    return order, counts


class SparseDispatcher:
    """Splits a batch into one batch for each expert, and combines what the experts return.

    The interface of tensor2tensor's ``expert_utils.SparseDispatcher``. A token visits the experts where its
    gate is not zero; NaN is not zero. Where a gate may be exactly zero for a visited expert, for example
    after underflow, build the dispatcher with `from_routing`, which keeps every slot.

    The sizes of the parts are read by the host, once, when the dispatcher is built.
    """

    def __init__(self, num_experts: int, gates: Tensor) -> None:
        """
        Args:
            num_experts: E.
            gates: [T, E], any floating dtype; zero where the token does not visit the expert.

        Raises:
            TypeError, ValueError: num_experts is no positive int, or gates is not floating of shape [T, E].
        """
        check_positive("num_experts", num_experts)
        if gates.ndim != 2 or gates.shape[1] != num_experts:
            raise ValueError(f"gates has shape {list(gates.shape)}; it must be [T, {num_experts}]")
        if not gates.is_floating_point():
            raise TypeError(f"gates has dtype {gates.dtype}; it must be a floating dtype")
        expert, token = (gates != 0).T.nonzero(as_tuple=True)  # [N] each, by expert and then by token
        self._build(len(gates), num_experts, expert, token, gates[token, expert])

    @classmethod
    def from_routing(cls, routing: Routing, num_experts: int) -> SparseDispatcher:
        """Make a dispatcher of all T * K slots of a routing, whatever the values of its gates."""
        order, _ = sort_by_expert(routing.expert_ids, num_experts)
        ids, gates = routing.expert_ids, routing.gates
        dispatcher = cls.__new__(cls)
        dispatcher._build(
            len(ids), num_experts, ids.flatten()[order], order // ids.shape[1], gates.flatten()[order]
        )
        return dispatcher

    def _build(self, num_tokens: int, num_experts: int, expert: Tensor, token: Tensor, gates: Tensor) -> None:
        self._num_tokens = num_tokens
        self._token = token  # [N], N visits by expert and then by token
        self._gates = gates  # [N]
        self._part_sizes: list[int] = expert.bincount(minlength=num_experts).tolist()

    @property
    def part_sizes(self) -> list[int]:
        """Count the tokens that visit each expert: E numbers."""
        return list(self._part_sizes)

    def expert_to_gates(self) -> list[Tensor]:
        """Return the gates of each expert's tokens: E tensors of shape [T_e], in the order of `dispatch`."""
        return list(self._gates.split(self._part_sizes))

    def dispatch(self, inp: Tensor) -> list[Tensor]:
        """Return the rows of ``inp`` [T, ...] that each expert receives: E tensors [T_e, ...] in token order.

        Raises:
            ValueError: inp does not have T rows.
        """
        if inp.ndim == 0 or len(inp) != self._num_tokens:
            raise ValueError(
                f"inp has shape {list(inp.shape)}; its first dimension must be T = {self._num_tokens}"
            )
        return list(inp[self._token].split(self._part_sizes))

    def combine(
        self, expert_out: Sequence[Tensor], multiply_by_gates: bool = True, combine: str = "sum"
    ) -> Tensor:
        """Bring the experts' outputs back to their tokens.

        Args:
            expert_out: E tensors [T_e, O] in the order of `dispatch`.
            multiply_by_gates: weight each row by its gate; otherwise every weight is 1.
            combine: sum: y[t] = Σ_e gates[t,e] * out_e (Shazeer et al. 2017, arXiv:1701.06538, equation 1),
                zero for a token without experts; or logsumexp: y[t] = log Σ_e gates[t,e] * exp(out_e),
                stable for outputs of any size, and -inf, the log of an empty sum, for a token without
                experts.

        Returns:
            [T, O] in the dtype of expert_out; sums are kept in at least float32.

        Raises:
            ValueError: expert_out does not fit `part_sizes`, combine is unknown, or logsumexp is asked for
                with a negative gate.
        """
        check_choice("combine", combine, COMBINES)
        sizes = [len(part) for part in expert_out]
        if sizes != self._part_sizes:
            raise ValueError(f"expert_out has parts of {sizes} rows; they must be of {self._part_sizes} rows")
        stitched = torch.cat(list(expert_out))  # [N, O]
        dtype = accumulation_dtype(stitched.dtype)
        values = stitched.to(dtype)
        weights = self._gates.to(dtype) if multiply_by_gates else torch.ones_like(self._gates, dtype=dtype)
        weights = weights.unsqueeze(1)  # [N, 1]
        y = values.new_zeros(self._num_tokens, values.shape[1])
        if combine == "sum":
            return y.index_add(0, self._token, weights * values).to(stitched.dtype)

        if bool((weights < 0).any()):
            raise ValueError(f"gates holds {float(weights.min())}; combine 'logsumexp' needs gates >= 0")
        # log Σ g exp(f) = m + log Σ g exp(f - m), with m the token's largest output whose gate is not zero
        token = self._token.unsqueeze(1).expand_as(values)
        counted = values.detach().masked_fill(weights == 0, -torch.inf)
        largest = torch.full_like(y, -torch.inf).scatter_reduce(0, token, counted, "amax")
        largest = largest.masked_fill(largest == -torch.inf, 0)
        # Only an output with gate zero can exceed `largest`; the clamp keeps its exp finite.
        shifted = (values - largest[self._token]).clamp(max=80.0)
        y = y.index_add(0, self._token, weights * shifted.exp())
        return (largest + y.log()).to(stitched.dtype)
