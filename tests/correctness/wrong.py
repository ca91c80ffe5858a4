"""Wrong implementations, and which check is there to reject each of them."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from moe_impls import index_add, sorted_dispatch
from moe_impls.interface import Experts, Routing

Forward = Callable[..., Tensor]


def zeros(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    return 0 * sorted_dispatch.forward(x, routing, experts, combine=combine)


def no_gate(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    ones = torch.ones_like(routing.gates) + 0 * routing.gates
    return sorted_dispatch.forward(x, routing._replace(gates=ones), experts, combine=combine)


def dead_expert(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    """The least visited of the visited experts returns nothing: w_out and b_out of zero."""
    counts = routing.expert_ids.flatten().bincount(minlength=len(experts.w_out))
    rarest = counts.masked_fill(counts == 0, counts.max() + 1).argmin()
    alive = (torch.arange(len(counts)) != rarest).to(x.dtype)
    dead = replace(experts, w_out=experts.w_out * alive[:, None, None])
    if dead.b_out is not None:
        dead = replace(dead, b_out=dead.b_out * alive[:, None])
    return sorted_dispatch.forward(x, routing, dead, combine=combine)


def dropped_token(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return y * (torch.arange(len(x)) != len(x) - 1).to(y.dtype).unsqueeze(1)


NULL_IMPLEMENTATIONS = (zeros, no_gate, dead_expert, dropped_token)


def with_inputs(change: Callable[[Tensor, Routing, Experts], tuple]) -> Forward:
    """Works on ``change(x, routing, experts)``."""

    def changed_inputs(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        return sorted_dispatch.forward(*change(x, routing, experts), combine=combine)

    return changed_inputs


def with_gates(change: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    """Changes the gates [T, K], by the expert ids [T, K], before it uses them."""
    return with_inputs(lambda x, routing, e: (x, routing._replace(gates=change(*routing)), e))


def with_result(change: Callable[[Tensor, Tensor], Tensor | None]) -> Forward:
    """Returns ``change(y, x)``, or y where that is None."""

    def changed_result(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        y = sorted_dispatch.forward(x, routing, experts, combine=combine)
        changed = change(y, x)
        return y if changed is None else changed

    return changed_result


def with_prepare(prepare: Callable[[Experts], Forward]) -> Forward:
    """Right, with a ``prepare`` beside it."""

    def prepared_wrongly(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        return sorted_dispatch.forward(x, routing, experts, combine=combine)

    vars(prepared_wrongly)["prepare"] = prepare
    return prepared_wrongly


def stale(experts: Experts) -> Forward:
    """Works on a copy of the biases of long ago."""
    copies = {name: t.clone() for name, t in experts.tensors.items() if name.startswith("b_")}
    return lambda x, routing, *, combine: sorted_dispatch.forward(
        x, routing, replace(experts, **copies), combine=combine
    )


def first_routing_only(experts: Experts) -> Forward:
    seen: list[Routing] = []

    def f(x: Tensor, routing: Routing, *, combine: str) -> Tensor:
        seen.append(routing)
        use = seen[0] if len(seen[0].gates) == len(x) else routing
        return sorted_dispatch.forward(x, use, experts, combine=combine)

    return f


class _Backward(torch.autograd.Function):
    """A copy, which ``see(ctx, copy)`` may look at, with the derivative ``change(ctx, grad)``."""

    @staticmethod
    def forward(ctx, t: Tensor, change: Callable, see: Callable = lambda ctx, copy: None) -> Tensor:
        ctx.change = change
        copy = t.clone()
        see(ctx, copy)
        return copy

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return ctx.change(ctx, grad), None, None


def with_backward(change: Callable, see: Callable = lambda ctx, y: None) -> Forward:
    """Changes the gradient that flows into the result."""
    return with_result(lambda y, x: _Backward.apply(y, change, see))


def in_inference(wrong: Forward) -> Forward:
    """Is wrong where no gradient is recorded, and right elsewhere."""

    def wrong_in_inference(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        forward = sorted_dispatch.forward if torch.is_grad_enabled() else wrong
        return forward(x, routing, experts, combine=combine)

    return wrong_in_inference


def in_inference_mode(wrong: Forward) -> Forward:
    """Is wrong under inference_mode, and right elsewhere."""

    def wrong_there(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        forward = wrong if torch.is_inference_mode_enabled() else sorted_dispatch.forward
        return forward(x, routing, experts, combine=combine)

    return wrong_there


def one_buffer_of_a_module() -> Callable[[Experts], Forward]:
    """Everything that was prepared answers in the same memory."""
    buffers: dict[torch.Size, Tensor] = {}

    def prepare(experts: Experts) -> Forward:
        def prepared(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
            y = sorted_dispatch.forward(x, routing, experts, combine=combine)
            return buffers.setdefault(y.shape, torch.empty_like(y)).copy_(y)

        return prepared

    return prepare


def doing(action: Callable[[], object]) -> Forward:
    """Is right, and does something else besides."""
    return with_result(lambda y, x: (action(), y)[1])


def writes_to_x(y: Tensor, x: Tensor) -> None:
    x.data.mul_(1.5)


def writes_to_x_and_back(y: Tensor, x: Tensor) -> None:
    x.mul_(2).div_(2)


def answers_in_x(y: Tensor, x: Tensor) -> Tensor | None:
    return x.copy_(y) if x.shape == y.shape else None


def noisy(y: Tensor, x: Tensor) -> Tensor:
    """Rounding that differs between calls, far inside any budget."""
    return y * (1 + torch.randint(2, (), dtype=y.dtype) * 2 * torch.finfo(y.dtype).eps)


def position_matters(y: Tensor, x: Tensor) -> Tensor:
    return y * (1 + (torch.arange(len(x)) == 3).to(y.dtype).unsqueeze(1))


def requires_a_gradient(y: Tensor, x: Tensor) -> Tensor:
    """A result in a graph though no input is: a training step would keep it alive."""
    return y + torch.zeros((), dtype=y.dtype, requires_grad=True)


def every_expert_matters(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    return sorted_dispatch.forward(x, routing, experts, combine=combine) + experts.w_out.abs().sum()


def in_the_dtype_of_the_gates(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    dtype = routing.gates.dtype
    cast = experts.map(lambda w: w.to(dtype))
    return sorted_dispatch.forward(x.to(dtype), routing, cast, combine=combine).to(x.dtype)


def around_the_largest_output(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    """logsumexp that is stable where every gate counts: one of zero may have the largest output."""
    ids, gates = routing
    one = torch.ones_like(gates[:, :1])
    outputs = torch.stack(
        [
            sorted_dispatch.forward(x, Routing(ids[:, k : k + 1], one), experts, combine="sum")
            for k in range(ids.shape[1])
        ],
        dim=1,
    )
    largest = outputs.amax(dim=1, keepdim=True)
    total = (gates.unsqueeze(-1) * (outputs - largest).exp()).sum(dim=1)
    return (largest.squeeze(1) + total.log()).to(x.dtype)


def lost_in_parameters(x: Tensor, routing: Routing, experts: Experts) -> tuple:
    """Another path for what a layer passes in."""
    inside = isinstance(experts.w_in, torch.nn.Parameter)
    return x, routing, replace(experts, b_in=None) if inside else experts


def dense_experts(x: Tensor, routing: Routing, experts: Experts) -> tuple:
    """Rows that are dense are taken for experts that are."""
    w = experts.w_in
    E, F, D = w.shape
    if w.stride()[1:] == (D, 1):
        w = w.as_strided(w.shape, (F * D, D, 1))
    return x, routing, replace(experts, w_in=w)


def shared_is_unbiased(x: Tensor, routing: Routing, experts: Experts) -> tuple:
    shared = experts.w_in.data_ptr() == experts.w_out.data_ptr()
    return x, routing, replace(experts, b_in=None) if shared else experts


def remembered_activation() -> Callable[[Tensor, Routing, Experts], tuple]:
    """What is to be computed is decided once for each address of the weights."""
    seen: dict[int, str] = {}

    def remember(x: Tensor, routing: Routing, experts: Experts) -> tuple:
        activation = seen.setdefault(experts.w_in.data_ptr(), experts.activation)
        return x, routing, replace(experts, activation=activation)

    return remember


def remembered_result() -> Forward:
    """The result of a call whose x has the same first and last entries as this one."""
    seen: dict[tuple, Tensor] = {}

    def remember(y: Tensor, x: Tensor) -> Tensor:
        return seen.setdefault((*x[0].tolist(), *x[-1].tolist(), x.shape), y) if len(x) else y

    return in_inference(with_result(remember))


def pooled_gradients() -> Callable[[Tensor, Routing, Experts], tuple]:
    """The gradient of an expert without tokens is what an earlier call of the same sizes left there."""
    pool: dict[torch.Size, Tensor] = {}

    def write(ctx, grad: Tensor) -> Tensor:
        visited = (grad != 0).flatten(1).any(dim=1)[:, None, None]
        pool[grad.shape] = torch.where(visited, grad, pool.get(grad.shape, grad))
        return pool[grad.shape].clone()

    return lambda x, routing, e: (x, routing, replace(e, w_in=_Backward.apply(e.w_in, write)))


def packed_for_an_object() -> Callable[[Tensor, Routing, Experts], tuple]:
    """The weights of a tensor object, in another layout that is made once."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def pack(x: Tensor, routing: Routing, experts: Experts) -> tuple:
        w = experts.w_in
        if id(w) not in kept or kept[id(w)][0] is not w:
            kept[id(w)] = w, w.detach().clone()
        return x, routing, replace(experts, w_in=kept[id(w)][1])

    return pack


def packed_for_a_version() -> Callable[[Tensor, Routing, Experts], tuple]:
    """Make it anew where address or version say that the contents are others."""
    kept: dict[tuple[int, int], Tensor] = {}

    def pack(x: Tensor, routing: Routing, experts: Experts) -> tuple:
        w = experts.w_in
        copy = kept.setdefault((w.data_ptr(), w._version), w.detach().clone())
        return x, routing, replace(experts, w_in=copy)

    return pack


def ring_of_results(size: int) -> Callable[[Tensor, Tensor], Tensor | None]:
    """The result of a call lies where that of ``size`` calls before lay."""
    ring: list[Tensor] = []

    def in_ring(y: Tensor, x: Tensor) -> Tensor | None:
        if y.requires_grad:
            return None
        ring.append(ring[-size].copy_(y) if len(ring) >= size else y)
        return ring[-1]

    return in_ring


def latest_activation_only() -> Forward:
    """A backward that asks the implementation, not its graph, what was computed."""
    latest: list[str] = [""]

    def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        mine = latest[0] = experts.activation
        y = sorted_dispatch.forward(x, routing, experts, combine=combine)
        return _Backward.apply(y, lambda ctx, grad: grad if latest[0] == mine else 0 * grad)

    return forward


def kept_for_the_thread() -> Forward:
    """What a backward needs is kept where only the thread of the forward finds it."""
    place = threading.local()

    def see(ctx, y: Tensor) -> None:
        place.is_here = True

    return with_backward(lambda ctx, grad: grad if hasattr(place, "is_here") else 0 * grad, see)


def one_buffer_for_gradients() -> Callable[[Tensor, Routing, Experts], tuple]:
    """Each graph has a piece of memory, to which each of its backwards writes."""

    def write(ctx, grad: Tensor) -> Tensor:
        ctx.buffer = getattr(ctx, "buffer", torch.empty_like(grad)).copy_(grad)
        return ctx.buffer

    return lambda x, routing, e: (x, routing, replace(e, w_in=_Backward.apply(e.w_in, write)))


def as_dense_as_w_in(x: Tensor, routing: Routing, experts: Experts) -> tuple:
    """Where w_in is contiguous, w_out is read as if it were."""
    E, O, H = experts.w_out.shape
    if experts.w_in.is_contiguous() and experts.w_out.stride(2) > 1:
        return x, routing, replace(experts, w_out=experts.w_out.as_strided((E, O, H), (O * H, H, 1)))
    return x, routing, experts


def by_size(x: Tensor, routing: Routing, experts: Experts) -> tuple:
    """Each token scaled to a largest feature of 1 and back, which one of zeros does not survive."""
    size = x.abs().amax(dim=1, keepdim=True)
    return x / size * size, routing, experts


def rows_repeat(x: Tensor, routing: Routing, experts: Experts) -> tuple:
    """Rows that overlap in memory are taken for one."""
    return x[:1].expand(x.shape) if x.stride(0) < x.shape[1] else x, routing, experts


def untrained_for_gates_alone(x: Tensor, routing: Routing, experts: Experts) -> tuple:
    """Gradients of a frozen model's gates, if its experts have no biases, are those of something else."""
    wanted = [t.requires_grad for t in (x, *experts.tensors.values())]
    alone = not any(wanted) and experts.b_in is None and routing.gates.requires_grad
    gates = _Backward.apply(routing.gates, lambda ctx, grad: grad / 2) if alone else routing.gates
    return x, routing._replace(gates=gates), experts


def kept_index() -> Callable[[Tensor, Routing, Experts], tuple]:
    """An index of tokens, made by the first call of a size."""
    kept: dict[int, Tensor] = {}

    def gather(x: Tensor, routing: Routing, experts: Experts) -> tuple:
        return x.index_select(0, kept.setdefault(len(x), torch.arange(len(x)))), routing, experts

    return gather


def by_default(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "logsumexp") -> Tensor:
    return sorted_dispatch.forward(x, routing, experts, combine=combine)


def workspace(rows: int) -> Callable[[Tensor, Tensor], Tensor | None]:
    """Results without a graph are handed out in one piece of memory."""
    memory: dict[int, Tensor] = {}

    def in_workspace(y: Tensor, x: Tensor) -> Tensor | None:
        if y.requires_grad or len(y) > rows:
            return None
        return memory.setdefault(y.shape[1], y.new_empty(rows, y.shape[1]))[: len(y)].copy_(y)

    return in_workspace


def through_one_buffer() -> Callable[[Tensor, Tensor], Tensor]:
    """Results of one shape pass through the same memory, which another thread may write to meanwhile."""
    memory: dict[torch.Size, Tensor] = {}

    def copied_twice(y: Tensor, x: Tensor) -> Tensor:
        buffer = memory.setdefault(y.shape, torch.empty_like(y.detach())).copy_(y.detach())
        time.sleep(0.001)
        return y + (buffer - y.detach())

    return copied_twice


def latest_forward_only() -> Forward:
    """What a backward needs lies where the next forward writes, be it for inference."""
    place: list[object] = [None]

    def see(ctx, y: Tensor) -> None:
        ctx.mark = place[0] = object()

    return with_backward(lambda ctx, grad: grad if ctx.mark is place[0] else 0 * grad, see)


def in_order_only() -> Forward:
    """What backwards need stands in a queue."""
    queue: list[object] = []

    def see(ctx, y: Tensor) -> None:
        if ctx.needs_input_grad[0]:
            ctx.mark = object()
            queue.append(ctx.mark)

    return with_backward(lambda ctx, grad: grad if queue.pop(0) is ctx.mark else 0 * grad, see)


def once_only(ctx, grad: Tensor) -> Tensor:
    """A backward that consumes what was saved for it."""
    ctx.consumed = hasattr(ctx, "consumed")
    return 0 * grad if ctx.consumed else grad


def remembers_its_gradient(ctx, grad: Tensor) -> Tensor:
    """A backward that was done before is not done again."""
    ctx.first = getattr(ctx, "first", grad)
    return ctx.first


def sees_writes_to_y() -> Forward:
    """The backward reads y again, where the caller may have written to it."""

    def see(ctx, y: Tensor) -> None:
        ctx.alias, ctx.copy = y.detach(), y.clone()

    return with_backward(lambda ctx, grad: grad * (ctx.alias == ctx.copy), see)


def filled_later(y: Tensor, x: Tensor) -> Tensor:
    """Another thread, of a pool that was there before, writes the result after it was returned."""
    result = torch.zeros_like(y)
    _POOL.submit(lambda: (time.sleep(0.02), result.copy_(y.detach())))
    return result + 0 * y if y.requires_grad else result


_POOL = ThreadPoolExecutor(1)


def left_running(y: Tensor, x: Tensor) -> Tensor:
    threading.Timer(0.1, lambda: None).start()
    return y


def falls_back(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    try:
        raise NotImplementedError("no kernel")
    except NotImplementedError:
        return sorted_dispatch.forward(x, routing, experts, combine=combine)


def beyond_a_new_tensor(offset: Callable[[Tensor], int]) -> Forward:
    """Copies its result into new memory, and writes four bytes at an offset from that."""

    def copied(y: Tensor, x: Tensor) -> Tensor:
        memory = torch.empty_like(y.detach())
        ctypes.memset(memory.data_ptr() + offset(memory), 0, 4)
        return y + memory.zero_()

    return with_result(copied)


def reads_beyond_x(y: Tensor, x: Tensor) -> Tensor:
    """Adds 0 times the number after x."""
    after = (ctypes.c_byte * 8).from_address(x.data_ptr() + x.nbytes)
    return y + 0 * torch.frombuffer(bytearray(after), dtype=x.dtype)[0]


BUGS = {
    "after_inference": (*NULL_IMPLEMENTATIONS, with_inputs(kept_index())),
    "inputs_unchanged": (
        with_result(writes_to_x),
        in_inference(with_result(writes_to_x)),
        in_inference(with_result(writes_to_x_and_back)),
        in_inference(with_result(answers_in_x)),
    ),
    "within_bounds": (
        *NULL_IMPLEMENTATIONS,
        beyond_a_new_tensor(lambda memory: memory.nbytes),
        beyond_a_new_tensor(lambda memory: -4),
        in_inference(beyond_a_new_tensor(lambda memory: memory.nbytes + 64)),
        with_result(reads_beyond_x),
    ),
    "values": (*NULL_IMPLEMENTATIONS, in_inference(zeros)),
    "exact": (*NULL_IMPLEMENTATIONS, in_inference(zeros)),
    "output": (
        with_result(lambda y, x: y.masked_fill(y.isinf(), 0)),
        in_the_dtype_of_the_gates,
        around_the_largest_output,
    ),
    "without_gradients": (*NULL_IMPLEMENTATIONS, with_result(requires_a_gradient)),
    "global_state": (
        doing(lambda: torch.rand(1)),
        doing(lambda: torch.manual_seed(0)),
        doing(lambda: random.seed(0)),
        doing(lambda: torch.set_grad_enabled(True)),
        doing(lambda: torch.set_num_threads(1)),
        doing(lambda: torch.set_flush_denormal(True)),
        doing(lambda: torch.set_float32_matmul_precision("high")),
        doing(lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")),
        doing(lambda: torch._C._set_mkldnn_enabled(False)),
        with_backward(lambda ctx, grad: (torch.manual_seed(0), grad)[1]),
        with_result(lambda y, x: y.to(torch.get_default_dtype()).to(y.dtype)),
    ),
    "deterministic": (with_result(noisy), in_inference(with_result(noisy))),
    "new_contents": (*NULL_IMPLEMENTATIONS, with_inputs(pooled_gradients())),
    "one_input_changes": (*NULL_IMPLEMENTATIONS, remembered_result()),
    "same_objects": (
        *NULL_IMPLEMENTATIONS,
        in_inference(with_inputs(packed_for_an_object())),
        in_inference(with_inputs(packed_for_a_version())),
        in_inference_mode(with_inputs(packed_for_an_object())),
        in_inference_mode(with_result(ring_of_results(1))),
    ),
    "prepared": (
        with_prepare(stale),
        with_prepare(first_routing_only),
        with_prepare(one_buffer_of_a_module()),
    ),
    "options_change": (
        *NULL_IMPLEMENTATIONS,
        by_default,
        with_inputs(remembered_activation()),
        with_inputs(lambda x, routing, e: (x, routing, replace(e, b_out=None) if e.b_in is None else e)),
    ),
    "every_size": (
        *NULL_IMPLEMENTATIONS,
        with_result(lambda y, x: y.flip(0) if len(y) == 53 else None),
        with_gates(lambda ids, gates: gates.flip(0) if ids.shape[1] == 7 else gates),
        with_result(lambda y, x: y.flip(1) if x.shape[1] == 11 else None),
    ),
    "changing_sizes": (*NULL_IMPLEMENTATIONS, with_result(workspace(48))),
    "every_call": (*NULL_IMPLEMENTATIONS, with_result(ring_of_results(16))),
    "strides": (*NULL_IMPLEMENTATIONS, in_inference(with_inputs(dense_experts))),
    "one_strided": (*NULL_IMPLEMENTATIONS, with_inputs(as_dense_as_w_in)),
    "expanded": (*NULL_IMPLEMENTATIONS, with_inputs(by_size), with_inputs(rows_repeat)),
    "gradient_subsets": (*NULL_IMPLEMENTATIONS, with_inputs(untrained_for_gates_alone)),
    "shared_memory": (*NULL_IMPLEMENTATIONS, with_inputs(shared_is_unbiased)),
    "results_are_the_callers": (
        sees_writes_to_y(),
        remembered_result(),
        with_result(lambda y, x: y[:1].expand(y.shape) if len(y) and bool((y == y[:1]).all()) else None),
    ),
    "inside_a_graph": (
        with_gates(lambda ids, gates: gates if gates.is_leaf else gates.detach()),
        with_inputs(lost_in_parameters),
        in_inference(with_inputs(lost_in_parameters)),
    ),
    "several_graphs": (latest_forward_only(), in_order_only(), latest_activation_only()),
    "backward_twice": (
        with_backward(once_only),
        with_backward(remembers_its_gradient),
        with_backward(lambda ctx, grad: torch.where(grad.abs() > 1e-6, grad, 0)),
        with_backward(lambda ctx, grad: grad / grad.abs().max() * grad.abs().max()),
        with_inputs(one_buffer_for_gradients()),
    ),
    "non_finite_contained": (
        *NULL_IMPLEMENTATIONS,
        with_backward(lambda ctx, grad: grad + 0 * grad.sum()),
        in_inference(with_result(lambda y, x: y + 0 * y.sum())),
        with_gates(lambda ids, gates: gates + 0 * gates.sum() if ids.shape[1] == 1 else gates),
    ),
    "another_thread": (
        with_result(lambda y, x: None if threading.current_thread() is threading.main_thread() else 0 * y),
        with_result(through_one_buffer()),
        kept_for_the_thread(),
    ),
    "autocast": (
        *NULL_IMPLEMENTATIONS,
        with_result(lambda y, x: 2 * y if torch.get_autocast_dtype("cpu") == torch.float16 else None),
        with_backward(  # wrong after the block in which it was called
            lambda ctx, grad: 2 * grad if ctx.within and not torch.is_autocast_enabled("cpu") else grad,
            lambda ctx, y: setattr(ctx, "within", torch.is_autocast_enabled("cpu")),
        ),
    ),
    "done_when_it_returns": (with_result(filled_later), with_result(left_running)),
    "instruments_untouched": (
        doing(lambda: setattr(time, "monotonic", lambda: 0.0)),
        doing(lambda: setattr(time, "thread_time", lambda: 0.0)),
        doing(lambda: setattr(Tensor, "__le__", lambda a, b: torch.ones_like(a, dtype=torch.bool))),
    ),
    "no_fallback": (falls_back,),
    "gradcheck": (with_gates(lambda ids, gates: _Backward.apply(gates, lambda ctx, grad: 2 * grad)),),
    # The right derivative, whose own derivative is lost.
    "second_order": (with_backward(lambda ctx, grad: grad.detach() + 0 * grad),),
    "exports": (index_add.forward,),  # reads on the host which tokens an expert has
    "fullgraph": (index_add.forward,),
    "no_host_sync": (
        sorted_dispatch.forward,
        in_inference(with_result(lambda y, x: y if bool(y.isfinite().all()) else None)),
        with_backward(lambda ctx, grad: grad if bool(grad.isfinite().all()) else 0 * grad),
    ),
    "tokens_permuted": (with_result(position_matters),),
    "experts_relabelled": (with_gates(lambda ids, gates: torch.where(ids < 8, 0, gates)),),
    "choices_reordered": (with_gates(lambda ids, gates: torch.cat([2 * gates[:, :1], gates[:, 1:]], dim=1)),),
    "batch_split": (with_result(lambda y, x: 2 * y if len(x) > 100 else None),),
    "gates_doubled": (with_gates(lambda ids, gates: gates.clamp(max=1)),),
    "identical_experts": (with_gates(lambda ids, gates: gates.abs()),),
    "one_expert_doubled": (every_expert_matters,),
    "slot_split": (with_gates(lambda ids, gates: gates.square()),),
}
