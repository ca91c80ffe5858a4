"""Run whole models on the same token ids, and find the first module whose output differs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from correctness.judging.budget import allowed_error, eps, roundings, worst
from correctness.models.causes import digest
from correctness.models.comparison import Finding

SKETCH = 4  # random columns that each row of a gradient is multiplied with
DRAWS = 5  # of token ids, where a reference's own rounding changes which experts are chosen
MOE = re.compile(r"(^|\.)(experts|router|gate)$")


@dataclass
class Record:
    """What a model computed, in its order: the first floating-point tensor of each module's output by name.

    gradients: of the loss, each row multiplied with SKETCH random columns. digests: of the parameters.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    loss: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    dtype: torch.dtype = torch.float64
    narrow: bool = False  # a part of it worked in float32 even so
    ungraded: str = ""  # why there are no gradients

    @property
    def logits(self) -> Tensor:
        return self.outputs["logits"]


def draw_ids(vocabulary: int, seed: int, batch: int = 2, length: int = 16) -> Tensor:
    """Draw token ids [B, S], none of them among the first few, which are often special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (batch, length), generator=generator)


class _Watch(TorchDispatchMode):
    """Notices whether a float64 tensor becomes a float32 one."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.narrow |= any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        return out


def run(model: nn.Module, ids: Tensor, dtype: torch.dtype, gradients: bool = True) -> Record:
    """Run a model on token ids [B, S] in a dtype, to which its weights are turned in place.

    Raises:
        ValueError: it cannot be run so; the message has what it raised.
    """
    model = model.to(dtype).eval()
    record = Record(dtype=dtype)
    given: dict[str, Any] = {"input_ids": ids}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    if config is not None:
        given["use_cache"] = False
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.enter_context(module.register_forward_hook(_recorder(record, name)))
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(gradients)
            if gradients:
                stack.enter_context(parameter.register_post_accumulate_grad_hook(_sketcher(record, name)))
        try:
            with torch.set_grad_enabled(gradients), _Watch() as watch:
                out = model(**given) if config is not None else model(ids)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"{type(model).__name__} cannot run in {dtype}: {error}") from error
        logits = first_tensor(out)
        if logits is None:
            raise ValueError(
                f"{type(model).__name__} returns no floating-point tensor, but {type(out).__name__}"
            )
        loss = _loss(logits, ids)
        if gradients:
            try:
                loss.backward()
            except RuntimeError as error:
                record.ungraded = str(error).partition("\n")[0]
                record.gradients.clear()
    record.narrow = watch.narrow
    record.outputs["logits"], record.loss = logits.detach().clone(), loss.detach()
    record.kinds["logits"] = type(model).__name__
    record.digests = {name: digest(p.detach()) for name, p in model.named_parameters()}
    record.layers = _layers(model)
    return record


def first_tensor(out: Any) -> Tensor | None:
    """Find the first floating-point tensor of what a module returns."""
    if isinstance(out, Tensor):
        return out if out.is_floating_point() else None
    values = out.values() if isinstance(out, dict) else out if isinstance(out, list | tuple) else ()
    return next((t for t in map(first_tensor, values) if t is not None), None)


def _recorder(record: Record, name: str) -> Any:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        tensor = first_tensor(out)
        if tensor is not None:
            called = name
            while called in record.outputs:  # a module that is called again
                base, _, times = called.partition(" call ")
                called = f"{base} call {int(times or 1) + 1}"
            record.outputs[called] = tensor.detach().clone()
            record.kinds[called] = type(module).__name__

    return keep


def _sketcher(record: Record, name: str) -> Any:
    def sketch(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        record.gradients[name] = gradient if gradient.dim() < 2 else gradient @ _columns(gradient)
        parameter.grad = None

    return sketch


def _columns(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(like.shape[-1])
    return torch.randn(like.shape[-1], SKETCH, generator=generator, dtype=torch.float64).to(like)


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute the loss of the next token; of outputs that are no logits, a random weighting's mean."""
    if logits.dim() == 3 and logits.shape[:2] == ids.shape and logits.shape[-1] > int(ids.max()):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    generator = torch.Generator().manual_seed(0)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)).mean()


def _layers(model: nn.Module) -> tuple[str, ...]:
    """Name the decoder's layers: the children of the longest list of modules that stands in no other."""
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and "expert" not in name
    ]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    name, found = max(outer, key=lambda one: len(one[1]), default=("", ()))
    return tuple(f"{name}.{i}" for i in range(len(found)))


@dataclass(frozen=True)
class Exact:
    """The reference in float64, and what it loses in float32."""

    ids: Tensor
    record: Record
    plain: Record | None  # None if it does not run in float64: then equal bits are asked for

    def allowed(self, want: Tensor, plain: Tensor | None, judged: torch.dtype) -> float:
        """Return the relative error that a right model may show, in units of the root mean square."""
        if plain is None or self.plain is None:
            return 0.0
        return allowed_error(
            relative(plain, want), torch.float32, torch.float32 if self.record.narrow else judged
        )


def relative(got: Tensor, want: Tensor) -> Tensor:
    """Return |got - want| over the root mean square of ``want``; infinite where it is no number."""
    scale = want.double().square().mean().sqrt()
    error = (got.double() - want.double()).abs()
    return torch.where(error == 0, 0.0, error / scale).nan_to_num(nan=math.inf, posinf=math.inf)


def exact(model: nn.Module, vocabulary: int, seed: int, gradients: bool = True) -> Exact:
    """Run the reference in float32 and float64, on token ids for which both choose the same experts.

    A subject, or a part of it, may work in float32: on token ids where the rounding alone changes which
    experts are chosen, the budget would let anything pass. They are drawn again.
    """
    best = None
    wide = any(p.dtype == torch.float64 for p in model.parameters())  # which float32 would round
    for draw in range(DRAWS):
        ids = draw_ids(vocabulary, seed + draw)
        plain = run(copy.deepcopy(model) if wide else model, ids, torch.float32, gradients)
        try:
            found = Exact(ids, run(model, ids, torch.float64, gradients), plain)
        except ValueError:
            return Exact(ids, plain, None)
        lost = worst(relative(plain.logits, found.record.logits))
        if best is None or lost < best[0]:
            best = lost, found
        if lost < math.sqrt(eps(torch.float32)):
            break
    assert best is not None
    return best[1]


@dataclass
class Agreement:
    """What two runs have in common: each row is (what, error as a multiple of what is allowed)."""

    rows: list[tuple[str, float]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def agree(reference: Exact, subject: Record) -> Agreement:
    """Compare outputs in the order of the reference, then the loss, then each gradient."""
    right, found = reference.record, Agreement()
    pairs = list(_aligned(right, subject))
    plain = reference.plain
    first = ""
    for mine, theirs, title in pairs:
        want, got = right.outputs[theirs], subject.outputs[mine]
        fraction, allowed = _fraction(
            reference, subject, want, got, None if plain is None else plain.outputs.get(theirs)
        )
        if fraction > 1 and not first:
            first = title
            how = executed(got, want, allowed, title)
            words = f"the first output that differs ({right.kinds[theirs]}), {how}"
            found.findings.append(Finding(title, words))
        if theirs in right.layers or theirs == "logits" or theirs.partition(" ")[0] == first:
            found.rows.append((title, fraction))
    fraction, _ = _fraction(
        reference, subject, right.loss, subject.loss, None if plain is None else plain.loss
    )
    found.rows.append(("loss", fraction))
    if fraction > 1 and not found.findings:
        found.findings.append(
            Finding("loss", f"{float(subject.loss):.9g}, in the reference {float(right.loss):.9g}")
        )
    _gradients(reference, subject, found)
    return found


def _fraction(
    reference: Exact, subject: Record, want: Tensor, got: Tensor, plain: Tensor | None
) -> tuple[float, float]:
    """Return the worst error as a multiple of what is allowed, and what is allowed."""
    allowed = reference.allowed(want, plain, subject.dtype)
    if got.shape != want.shape:
        return math.inf, allowed
    error = worst(relative(got, want))
    return (error / allowed if allowed else math.inf if error else 0.0), allowed


def _aligned(right: Record, subject: Record) -> Iterator[tuple[str, str, str]]:
    """Pair outputs by name, where the names are the reference's; else decoder layers by their order."""
    # What is inside experts is their own affair: how many tokens they are given at a time, in which order.
    common = [name for name in right.outputs if name in subject.outputs and ".experts." not in name]
    if len(common) > 1 and all(name in common for name in right.layers):
        yield from ((name, name, name) for name in common)
        return
    for i, (mine, theirs) in enumerate(zip(subject.layers, right.layers, strict=False)):
        blocks = _block(subject, mine), _block(right, theirs)
        if all(blocks):
            yield *blocks, f"MoE block of layer {i}"
        if mine in subject.outputs and theirs in right.outputs:
            yield mine, theirs, f"layer {i}"
    yield "logits", "logits", "logits"


def _block(record: Record, layer: str) -> str:
    """Name the MoE block of a layer: what has a child that is called experts, router or gate."""
    inside = [name for name in record.outputs if name.startswith(f"{layer}.") and MOE.search(name)]
    return next((p for name in inside if (p := name.rpartition(".")[0]) in record.outputs and p != layer), "")


def _gradients(reference: Exact, subject: Record, found: Agreement) -> None:
    right, plain = reference.record, reference.plain
    if right.ungraded or subject.ungraded:
        found.remarks.append(f"no gradients: {right.ungraded or subject.ungraded}")
        return
    if not right.gradients:
        return
    by_digest = {d: name for name, d in subject.digests.items()}
    fractions, lacking = {}, []
    for name, want in right.gradients.items():
        mine = name if name in subject.digests else by_digest.get(right.digests[name])
        if mine is None:
            continue
        if mine not in subject.gradients:
            lacking.append(name)
            continue
        lost = None if plain is None else plain.gradients.get(name)
        fractions[name], _ = _fraction(reference, subject, want, subject.gradients[mine], lost)
    most = max(fractions, key=lambda name: fractions[name], default="")
    if most:
        found.rows.append((f"{len(fractions)} gradients, worst {most}", fractions[most]))
    if lacking:
        found.findings.append(Finding("gradients", f"none of {', '.join(lacking)}"))
    # A wrong backward shows in all that comes before it: the last that ran is the nearest to it.
    ran = {name: i for i, name in enumerate(right.outputs)}
    wrong = sorted(
        (name for name in fractions if fractions[name] > 1),
        key=lambda name: ran.get(name.rpartition(".")[0], -1),
    )
    if wrong and not found.findings:
        last = f"{len(wrong)} gradients differ, although every output agrees; the nearest to the loss is this"
        found.findings.append(Finding(wrong[-1], last))
    compared = len(fractions)
    if left := len(right.gradients) - compared - len(lacking):
        found.remarks.append(
            f"{left} gradients have no counterpart of the same name or numbers, and are not compared"
        )


def executed(got: Tensor, want: Tensor, allowed: float, module: str) -> str:
    """Say how an output differs from the reference's."""
    if got.shape != want.shape:
        return f"its shape is {list(got.shape)}, in the reference {list(want.shape)}"
    if not bool(got.isfinite().all()):
        return "it holds NaN or infinity"
    if not bool(got.any()):
        return "it is all zeros"
    got, want = got.double(), want.double()
    size = want.square().mean().sqrt()
    tolerance = max(allowed, roundings(eps(torch.float32))) * size
    factor = (got * want).sum() / (want * want).sum()
    if bool(((got - factor * want).abs() <= tolerance * factor.abs()).all()):
        return f"it is {float(factor):.6g} times the reference's: a factor is missing, or counted twice"
    for narrow in (torch.bfloat16, torch.float16):
        if torch.equal(got.to(narrow).double(), got) and not torch.equal(want.to(narrow).double(), want):
            return (
                f"its numbers are those of {str(narrow).removeprefix('torch.')}: it works in a narrower dtype"
            )
    rows, right = got.flatten(0, -2), want.flatten(0, -2)
    factors = (rows * right).sum(dim=1, keepdim=True) / (right * right).sum(dim=1, keepdim=True)
    if got.shape[-1] > 2 and bool(((rows - factors * right).abs() <= tolerance * factors.abs()).all()):
        least, most = float(factors.min()), float(factors.max())
        gates = (
            ": gates are renormalised in one of them only"
            if re.search(r"experts|moe|mlp|MoE", module)
            else ""
        )
        return f"each token is scaled by a factor of its own, {least:.4g} to {most:.4g}{gates}"
    wrong = ((rows - right).abs() > tolerance).any(dim=1)
    return (
        f"in {int(wrong.sum())} of {len(wrong)} tokens, by up to {worst(relative(got, want)):.2g} of its size"
    )
