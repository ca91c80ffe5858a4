"""``python -m benchmarks model``: transformers models whose experts are computed by ours, end to end.

Two layers of a released model, with random weights, generate, read a prompt and make a training step. Each
backend of transformers and ``auto`` take turns in the same rounds, and so does one whose experts return
zeros: no experts can be faster.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.options import RESULTS
from benchmarks.sweep import journal, record
from benchmarks.timing import measure, memory, ratio
from benchmarks.timing.measure import Call
from correctness.judging.budget import allowed_error
from correctness.judging.finding import CheckFailed
from moe_impls.interface import check_choice
from moe_impls.models import MODELS
from reporting import provenance
from reporting.pages import check_writable, markdown_table, write_atomically

OURS, NULL = "moe_impls:auto", "moe_impls:null"
BACKENDS = ("eager", "batched_mm", "grouped_mm")  # of transformers
LAYERS, SMOKE = (
    2,
    {"D": 64, "H": 32, "E": 8, "K": 2, "heads": 4, "kv_heads": 2, "head": 16, "vocabulary": 512},
)
PROMPT, NEW, LENGTH = 8, 16, 256  # tokens of a prompt, generated, and of a prefill or a training step
SECONDS, ROUNDS = 10.0, ratio.LEAST_ROUNDS  # of each candidate of a cell
HOPELESS = 3.0  # times the fastest in a first try: what takes longer is not timed
MEMORY_BYTES = 8 * 2**30  # of one call: batched_mm gathers the weights of every slot
PART = "model.part.csv"


@dataclass(frozen=True)
class Shape:
    """What a released model has beside its experts, of its published configuration.

    E: experts here, where not all fit. layers, vocabulary: of the whole model; the vocabulary is cut as the
    layers are, so that the last product has the share of the time that it has there.
    """

    family: str
    heads: int
    kv_heads: int
    head: int
    layers: int
    vocabulary: int
    E: int | None = None
    others: tuple[tuple[str, Any], ...] = ()


SHAPES = {
    "olmoe-1b-7b": Shape("Olmoe", 16, 16, 128, 16, 50304),
    "qwen3-30b-a3b": Shape("Qwen3Moe", 32, 4, 128, 48, 151936, 32, (("norm_topk_prob", True),)),
    "gpt-oss-20b": Shape("GptOss", 64, 8, 64, 24, 201088, 8),
}


@dataclass(frozen=True)
class Cell:
    """One use of a model, by ours and by transformers.

    ratio, low, high: the fastest backend of transformers over ours, with the interval of `ratio.compare`.
    experts_share: of the time of ours, what the null backend does not take.
    at_most: the same backend over the null backend: what experts that take no time would reach.
    took: what `auto` chose.
    """

    model: str
    use: str
    E: int
    ours_ms: float
    backend: str
    backend_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    verdict: str
    experts_share: float
    at_most: float
    took: str
    times_ms: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Needs the packages of `pip install 'moe-impls[suite,peers]'`. Writes model.csv and model.md; what "
        f"an interrupted run has measured is in {PART}, and the same command goes on from there."
    )
    parser.add_argument("models", nargs="+", metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=(
        f"{RESULTS.name}/ unless given, over what it has of an earlier run"
    ))  # fmt: skip


def run(options: argparse.Namespace) -> int:
    for name in options.models:
        check_choice("NAME", name, tuple(SHAPES))
    check_writable("--out", options.out / "model.csv")
    print(*write(options.out, measure_all(options.out, options.models, options.smoke), options), sep="\n")
    return 0


def build(name: str, smoke: bool) -> Any:
    """Make the first layers of a model with random weights, in float32."""
    import transformers  # pyright: ignore[reportMissingImports]

    shape, layer = SHAPES[name], MODELS[name]
    sizes = {"D": layer.D, "H": layer.H, "E": shape.E or layer.E, "K": layer.K, "heads": shape.heads}
    sizes |= {"kv_heads": shape.kv_heads, "head": shape.head}
    sizes |= {"vocabulary": shape.vocabulary * LAYERS // shape.layers} | (SMOKE if smoke else {})
    torch.manual_seed(0)
    config = getattr(transformers, f"{shape.family}Config")(
        hidden_size=sizes["D"], intermediate_size=sizes["H"], moe_intermediate_size=sizes["H"],
        num_experts=sizes["E"], num_local_experts=sizes["E"], num_experts_per_tok=sizes["K"],
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"], head_dim=sizes["head"],
        vocab_size=sizes["vocabulary"], num_hidden_layers=LAYERS, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, decoder_sparse_step=1, **dict(shape.others),
    )  # fmt: skip
    return getattr(transformers, f"{shape.family}ForCausalLM")(config).eval()


def _no_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return torch.zeros_like(hidden_states)


def uses(model: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; each returns what it computed."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (8, LENGTH), generator=drawn)

    def generate(batch: int) -> Tensor:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        prompt = ids[:batch, :PROMPT]
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    @torch.no_grad()
    def prefill() -> Tensor:
        return model(ids[:1], use_cache=True).logits

    def training() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(ids[:1], labels=ids[:1], use_cache=False).loss
        loss.backward()
        return loss.detach()

    return {
        "generate, batch 1": functools.partial(generate, 1),
        "generate, batch 8": functools.partial(generate, 8),
        f"prefill {LENGTH}": prefill,
        f"training step, {LENGTH}": training,
    }


def by(model: Any, backend: str, call: Call) -> Call:
    """Make a call whose experts are computed by a backend."""

    def set_and_call() -> Any:
        model.config._experts_implementation = backend  # what set_experts_implementation sets, in no time
        return call()

    return set_and_call


def check(model: Any, calls: Mapping[str, Call]) -> None:
    """Raise CheckFailed unless logits and loss by ours are those of transformers.

    They may be further from its loop than its other backend is, by the factor of the error budget.
    """
    for name in (use for use in calls if not use.startswith("generate")):
        logits: list[torch.Tensor] = [by(model, b, calls[name])() for b in ("eager", "grouped_mm", OURS)]  # pyright: ignore[reportAssignmentType]
        loop, other, ours = logits
        size = loop.abs().max()
        allowed = allowed_error((other - loop).abs() / size, loop.dtype, loop.dtype)
        off = float((ours - loop).abs().max() / size)
        if not off <= allowed:
            raise CheckFailed(f"{name}: ours is {off:.3g} of the largest off; allowed is {allowed:.3g}")


def measure_all(folder: Path, names: list[str], smoke: bool) -> pd.DataFrame:
    """Measure every use of every model. Each is in ``folder`` at once, and a run is continued there."""
    from transformers.integrations.moe import ExpertsInterface  # pyright: ignore[reportMissingImports]

    from moe_impls import transformers as ours

    ours.register()
    ExpertsInterface.register(NULL, _no_experts)
    made = {**provenance.columns(), **record.threads(), "models": " ".join(names), "smoke": smoke}
    with journal.opened(folder / PART, Cell, made) as begun:
        done = {(cell.model, cell.use) for cell in begun.rows}
        for name in names:
            model = build(name, smoke)
            calls = uses(model)
            if any((name, use) not in done for use in calls):
                check(model, calls)
            for use, call in calls.items():
                if (name, use) not in done:
                    begun.append(measure_cell(name, use, model, call, 0.2 if smoke else SECONDS))
                    model.zero_grad(set_to_none=True)
        return pd.DataFrame([made | asdict(cell) for cell in begun.rows])


def measure_cell(name: str, use: str, model: Any, call: Call, seconds: float) -> Cell:
    """Time one use by each backend that is not hopeless, in the same rounds."""
    from moe_impls import transformers as ours

    model.train(use.startswith("training"))
    candidates = {backend: by(model, backend, call) for backend in (OURS, *BACKENDS)}
    ours.unuse(model)  # counts from here on
    with memory.memory_limit("cpu", min(MEMORY_BYTES, memory.available_memory_bytes("cpu"))):
        near = measure.near_the_fastest(candidates, OURS, hopeless=HOPELESS)
    near |= {backend: candidates[backend] for backend in (OURS, "grouped_mm")} | {NULL: by(model, NULL, call)}
    timings = measure.all_timed(measure.interleave(near, seconds=seconds, min_rounds=ROUNDS))
    took = ours.calls(model).most_common()
    found = {backend: timing.samples_s for backend, timing in timings.items()}
    median_ms = {backend: statistics.median(s) * 1e3 for backend, s in found.items()}
    best = min((b for b in BACKENDS if b in found), key=median_ms.__getitem__)
    between = ratio.compare(found[OURS], found[best])
    return Cell(
        model=name,
        use=use,
        E=next(
            len(m.down_proj) for m in model.modules() if hasattr(m, "down_proj") and m.down_proj.dim() == 3
        ),
        ours_ms=_rounded(median_ms[OURS]),
        backend=best,
        backend_ms=_rounded(median_ms[best]),
        **{n: v if isinstance(v, str | int) else _rounded(v) for n, v in asdict(between).items()},
        experts_share=_rounded(1 - 1 / ratio.compare(found[NULL], found[OURS]).ratio),
        at_most=_rounded(ratio.compare(found[NULL], found[best]).ratio),
        took=" ".join(implementation for implementation, _ in took),
        times_ms="; ".join(f"{b} {ms:.4g}" for b, ms in sorted(median_ms.items(), key=lambda i: i[1])),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def write(folder: Path, cells: pd.DataFrame, options: argparse.Namespace) -> list[Path]:
    """Write model.csv and its page; remove what was kept of the run so far."""
    first = cells.iloc[0]
    shown = ["model", "E", "use", "ours_ms", "backend", "backend_ms", "ratio", "low", "high", "experts_share",
             "at_most", "took"]  # fmt: skip
    page = f"""# Models of transformers, end to end

Written by `python -m benchmarks model {" ".join(options.models)}{" --smoke" * options.smoke}` at commit
{str(first["git_commit"])[:12]} with torch {first["torch_version"]} on {first["device_name"]},
{first["threads"]} threads. {LAYERS} layers of each model at its widths with random weights in float32, its
vocabulary cut as its layers are. Generation is of {NEW} tokens after a prompt of {PROMPT}; a training step is
a forward and a backward. *backend* is the fastest of transformers' ({", ".join(BACKENDS)}), *ratio* its time
over that of `auto`, from the same rounds, with its interval. *experts_share*: of the time of ours.
*at_most*: the ratio that experts that take no time would have.

{markdown_table(cells[shown])}
"""
    contents = {
        "model.csv": cells.to_csv(index=False, lineterminator="\n").encode(),
        "model.md": page.encode(),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    journal.discard(folder / PART)
    return [folder / name for name in contents]
