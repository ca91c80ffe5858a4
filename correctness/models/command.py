"""``moe-impls model``: is a checkpoint, or a model, another one; where not, which layer differs and why."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from correctness.models import adapters, running, subjects
from correctness.models.comparison import Finding, compare_weights
from correctness.models.subjects import FAMILY, Checkpoint, Made
from correctness.models.weights import Weights, stacked, uneven

EXAMPLE = "moe-impls model converted/ --against original/"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 for equal, 1 for different, 2 for bad input, with one line on standard error."""
    parser = _Parser(
        prog="moe-impls model", description="Is this model that one?", epilog=f"example: {EXAMPLE}"
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # 1 would say that the models differ
        words = " ".join(str(error).split()) or "no message"
        print(f"error: the comparison failed: {type(error).__name__}: {words}", file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=(
        "what is judged: a file or folder of safetensors, transformers:<family> (tiny, with random weights; "
        "transformers:all for each), path/file.py:function or package.module:Class"
    ))  # fmt: skip
    add("--against", metavar="MODEL", help=(
        "the reference (default: what the checkpoint's own files hold, and transformers' eager experts)"
    ))  # fmt: skip
    add("--adapter", type=Path, metavar="FOLDER", help="a LoRA of PEFT: the reference with it merged")
    add("--weights", action="store_true", help="compare tensors only: no model is built")
    add("--no-gradients", action="store_true", help="run the models forward only")
    add("--experts", metavar="NAME", help=(
        "experts_implementation of the judged model, such as grouped_mm or moe_impls:auto (default: eager)"
    ))  # fmt: skip
    add("--dtype", choices=[*DTYPES], default="float32", help="of transformers:<family> (default: float32)")
    add("--seed", type=int, default=0, help="of the token ids (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the verdict there, too")


@dataclass
class Verdict:
    """What became of a comparison."""

    subject: str
    reference: str
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    tensors: int = 0
    rows: list[tuple[str, float]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.findings

    def show(self) -> str:
        """Write the verdict for people."""
        lines = [f"{self.subject}, against {self.reference}"]
        if self.tensors:
            lines.append(f"  {self.tensors} tensors compared")
        if self.rows:
            width = max(len(what) for what, _ in self.rows)
            lines.append(f"  {'output':<{width}}  error / allowed")
            lines += [f"  {what:<{width}}  {fraction:.3g}" for what, fraction in self.rows]
        lines += [f"  note: {remark}" for remark in self.remarks]
        lines += [f"  {finding}" for finding in self.findings]
        return "\n".join([*lines, "equal" if self.equal else "different"])


def run(options: argparse.Namespace) -> int:
    names = [options.model]
    if options.model == FAMILY + "all":
        subjects.formats()
        from correctness.models import families

        names = [FAMILY + family for family in families.names()]
    verdicts, refused = [], []
    for name in names:
        try:
            verdicts.append(judge(options, name))
        except ValueError as error:
            if len(names) == 1:
                raise
            refused.append(f"{name}: {str(error).partition(chr(10))[0]}")
            continue
        print(
            verdicts[-1].show()
            if len(names) == 1
            else f"{name}: {'equal' if verdicts[-1].equal else verdicts[-1].show()}",
            flush=True,
        )
    if refused:
        print(f"{len(verdicts)} of {len(names)} families compared; not:", *refused, sep="\n  ")
    if options.json is not None:
        written = [asdict(v) | {"equal": v.equal} for v in verdicts]
        options.json.write_text(
            json.dumps(written[0] if len(names) == 1 else written, indent=1), encoding="utf-8"
        )
    return 0 if all(v.equal for v in verdicts) else 1


def judge(options: argparse.Namespace, name: str) -> Verdict:
    """Compare a subject with its reference.

    Raises:
        ValueError: what a name leads to cannot be read or run; the message says what is valid.
    """
    with contextlib.ExitStack() as stack:

        def find(wanted: str, beside: Path | None = None) -> Checkpoint | Made:
            if wanted.startswith(FAMILY):
                made = subjects.saved(wanted.removeprefix(FAMILY), DTYPES[options.dtype])
                return stack.enter_context(made)
            return subjects.find(wanted, beside)

        reference = find(options.against) if options.against else None
        subject = find(name, reference.path if isinstance(reference, Checkpoint) else None)
        if isinstance(reference, Made) and isinstance(subject, Checkpoint):
            reference.beside = subject.path
        if options.adapter is not None and reference is None:
            raise ValueError("--adapter needs --against: the checkpoint that it was trained on")
        if reference is None and not (isinstance(subject, Checkpoint) and subject.runs):
            raise ValueError(f"{name} needs --against: alone only a folder with a config.json can be judged")
        verdict = Verdict(name, options.against or "its own files")
        _compare_weights(options, subject, reference, verdict)
        told = verdict.findings
        if options.adapter is not None:
            verdict.remarks.append("tensors only: the reference is not run with the adapter")
        elif not options.weights:
            verdict.findings = _compare_runs(options, subject, reference, verdict)
            if isinstance(subject, Made) or isinstance(reference, Made):
                told = _of_a_made_model(told, verdict)
            verdict.findings = told + verdict.findings
        return verdict


def _of_a_made_model(told: list[Finding], verdict: Verdict) -> list[Finding]:
    """Leave out what tells of names and layouts alone, where what is computed agrees."""
    of_names = [finding for finding in told if finding.of_names]
    if not verdict.rows or not of_names:
        return told
    if not verdict.findings:
        verdict.remarks.append("names or layouts of tensors are not the reference's; what is computed agrees")
    moved = [f for f in of_names if f.words.startswith("named ")]
    return [f for f in told if f not in (moved if verdict.findings else of_names)]


def _compare_weights(
    options: argparse.Namespace,
    subject: Checkpoint | Made,
    reference: Checkpoint | Made | None,
    verdict: Verdict,
) -> None:
    """Compare the tensors of both, under the names of transformers' modules where there is a config."""
    if reference is None:
        reference, loaded = subject, Made(subject.name, None, made=subject.model(_stored(subject.tensors())))
        loaded.config = subject.config
        subject = loaded
    mine, theirs = subject.tensors(), reference.tensors()
    configs = [one.config for one in (reference, subject) if one.config is not None]
    skeleton = None
    other_names = {*mine} != {*theirs} or isinstance(subject, Made) or isinstance(reference, Made)
    if configs and (other_names or getattr(configs[0], "tie_word_embeddings", False)):
        skeleton = subjects.formats().skeleton(configs[0])
    said = [one.said for one in (reference, subject)]
    verdict.findings += [Finding("config", line) for line in subjects.differences(*said)]
    tied = {} if skeleton is None else subjects.formats().tied(skeleton)
    odd = uneven(theirs, mine)

    def named(weights: Weights, one: Checkpoint | Made) -> Weights:
        apart = {n: w for n, w in weights.items() if n in odd}  # compared by their names on disk
        weights = {n: w for n, w in weights.items() if n not in odd}
        if skeleton is not None and isinstance(one, Checkpoint):
            weights = subjects.formats().as_modules(weights, skeleton)
        return stacked(weights) | apart

    right, judged = named(theirs, reference), named(mine, subject)
    if options.adapter is not None:
        adapter = adapters.read(options.adapter)
        # A linear layer is adapted by its own name, experts as they are stacked.
        found, adapted = adapters.compare_merged(adapter, theirs | right, mine | judged)
        verdict.findings += found
        kept = [{n: w for n, w in one.items() if n not in adapted} for one in (theirs, mine)]
        right, judged = (
            {n: w for n, w in named(one, of).items() if n not in adapted}
            for one, of in zip(kept, (reference, subject), strict=True)
        )
    result = compare_weights(right, judged, tied)
    verdict.tensors, verdict.remarks = result.tensors, verdict.remarks + result.remarks
    verdict.findings += result.findings


def _stored(weights: Weights) -> torch.dtype:
    """Return the dtype of most tensors."""
    kinds = [weight.dtype for weight in weights.values() if weight.dtype.is_floating_point]
    return max(set(kinds), key=kinds.count)


def _compare_runs(
    options: argparse.Namespace,
    subject: Checkpoint | Made,
    reference: Checkpoint | Made | None,
    verdict: Verdict,
) -> list[Finding]:
    """Run both, one after the other, and compare what they compute."""
    alone = reference is None
    against = subject if reference is None else reference
    lacking = [one.name for one in (against, subject) if not one.runs]
    if lacking:
        verdict.remarks.append(
            f"tensors only: {', '.join(lacking)} has no config.json, so that nothing can be run"
        )
        return []
    dtype = torch.float32
    if isinstance(subject, Checkpoint) and isinstance(against, Checkpoint):
        dtype = min(_stored(subject.tensors()), _stored(against.tensors()), key=lambda d: torch.finfo(d).bits)
    try:
        model = against.model(dtype)
    except ValueError as error:
        return _cannot(verdict, error)
    config = against.config or subject.config
    vocabulary = _vocabulary(config, model)
    exact = running.exact(model, vocabulary, options.seed, not options.no_gradients)
    if exact.plain is None:
        verdict.remarks.append("the reference does not run in float64: equal bits are asked for in float32")
    del model
    try:
        by_default = alone and exact.plain is not None
        judged = subject.model(dtype, options.experts or (None if by_default else "eager"))
    except ValueError as error:
        return _cannot(verdict, error)
    record = _run(judged, exact, not options.no_gradients, verdict)
    agreement = running.agree(exact, record)
    verdict.rows = agreement.rows
    verdict.remarks += agreement.remarks
    return agreement.findings


def _run(model: torch.nn.Module, exact: running.Exact, gradients: bool, verdict: Verdict) -> running.Record:
    """Run a subject in float64; in float32 if it cannot, or if the reference cannot."""
    if exact.plain is not None:
        try:
            return running.run(model, exact.ids, torch.float64, gradients)
        except ValueError as error:
            said = str(error).partition("\n")[0]
            how = getattr(getattr(model, "config", None), "_experts_implementation", None)
            if how not in (None, "eager"):  # eager experts of the reference did run in float64
                said = f"experts by {how} do not run in float64 ({said.rpartition(': ')[2]})"
            verdict.remarks.append(f"in float32: {said}")
    return running.run(model, exact.ids, torch.float32, gradients)


def _cannot(verdict: Verdict, error: ValueError) -> list[Finding]:
    if verdict.equal:
        raise error
    said, *faults = (line.strip() for line in str(error).splitlines())
    verdict.remarks.append(f"tensors only: {' '.join([said, '; '.join(faults)]).strip()}")
    return []


def _vocabulary(config: Any, model: Any) -> int:
    if config is not None:
        return int(config.get_text_config().vocab_size)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    if not sizes:
        raise ValueError(f"{type(model).__name__} has no embedding, so that it takes no token ids")
    return sizes[0]
