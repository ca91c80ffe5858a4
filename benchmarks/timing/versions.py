"""Two versions of the project in one job: the checkout here and another, each in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing.measure import Call, Timing, all_timed, in_turns
from correctness.judging import compare
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from correctness.session.child import Child, Ended
from moe_impls.interface import Clamp
from reporting.provenance import IS_CHECKOUT, ROOT

WHICH = ("base", "here")
WORKER = Path(__file__).with_name("worker.py")


class VersionError(ValueError):
    """A version that cannot be measured; the message says which and why in one line."""


@contextlib.contextmanager
def checked_out(base: str) -> Iterator[Path]:
    """A folder with the package of a commit, or of a path where it is installed or checked out.

    Raises:
        VersionError: no such commit or path, or uncommitted changes here, which no commit would stand for; or
            what is here is no checkout.
    """
    if not IS_CHECKOUT:
        raise VersionError("--base needs a checkout of the repository: there, python -m benchmarks compare")
    if Path(base).is_dir():
        if not (Path(base) / "moe_impls").is_dir():
            raise VersionError(f"--base: {base} holds no package moe_impls")
        yield Path(base).resolve()
        return
    commit = _git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if commit is None:
        raise VersionError(f"--base: {base!r} is neither a commit of {ROOT.name} nor a folder with moe_impls")
    if changed := _git("status", "--porcelain", "--untracked-files=no"):
        files = ", ".join(line[2:].strip() for line in changed.splitlines()[:5])
        raise VersionError(f"--base needs a clean checkout; not committed: {files}")
    with tempfile.TemporaryDirectory(prefix="moe-base-") as folder:
        tree = Path(folder) / "tree"
        if _git("worktree", "add", "--detach", str(tree), commit) is None:
            raise VersionError(f"--base: git cannot check out {base}")
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def names_in(root: Path) -> list[str]:
    """The implementations of the version that lies there."""
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import moe_impls; print(*moe_impls.IMPLEMENTATIONS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise VersionError(f"importing moe_impls of {root} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.split()


class Version:
    """An implementation of one version on one problem, in its process."""

    def __init__(self, root: Path, name: str, inputs: Path) -> None:
        self.label = f"{name} of {root}"
        self.child = Child([sys.executable, WORKER, root, name, inputs], asked=True)

    def ask(self, command: str, argument: object = None) -> Any:
        """The answer to a command of ``worker.py``; between answers the process stands still.

        For some milliseconds after a call the threads of OpenMP turn in a loop to be ready for the next one,
        on the cores that the other version is timed on. Only Linux ends a process that stands still with the
        one that asked for it, so elsewhere it goes on.

        Raises:
            VersionError: it raises something, or its process ends.
        """
        try:
            self.child.process.send_signal(signal.SIGCONT)
            answer = self.child.ask((command, argument))
        except (Ended, RuntimeError) as error:
            raise VersionError(f"{self.label} failed: {error}") from error
        if sys.platform == "linux":
            self.child.process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process."""
        self.child.end()


def write_inputs(path: Path, problem: Problem, inputs: Inputs, gradients: bool) -> None:
    """The file that a version reads its call from."""
    experts = inputs.experts
    options: dict[str, Any] = {
        "activation": experts.activation,
        "output_activation": experts.output_activation,
    }
    if experts.clamp != Clamp():  # which earlier versions do not know
        options["clamp"] = tuple(experts.clamp)
    torch.save(
        {
            "tensors": inputs.tensors, "expert_ids": inputs.routing.expert_ids, "dy": inputs.dy,
            "options": options, "combine": problem.combine, "gradients": gradients,
            "threads": torch.get_num_threads(),
        },
        path,
    )  # fmt: skip


def measure_versions(
    roots: tuple[Path, Path], name: str, problem: Problem, mode: str, *, seconds: float
) -> tuple[Timing, Timing]:
    """Time one implementation of two versions in the same rounds, between checks of both.

    Raises:
        VersionError: a process fails.
        CheckFailed: a result is wrong.
    """
    gradients = mode == "forward_backward"
    inputs = make_inputs(problem)
    reference = compare.make_reference(problem, inputs, gradients)
    with tempfile.TemporaryDirectory(prefix="moe-versions-") as folder, contextlib.ExitStack() as stack:
        path, results = Path(folder) / "inputs.pt", Path(folder) / "results.pt"
        write_inputs(path, problem, inputs, gradients)
        versions = {which: Version(root, name, path) for which, root in zip(WHICH, roots, strict=True)}
        for version in versions.values():
            stack.callback(version.close)
            version.ask("results", results)
            compare.require_within(torch.load(results), reference)

        def anew() -> dict[str, Call]:
            for version in versions.values():
                version.ask("anew")
            return dict.fromkeys(WHICH, lambda: None)

        (outcomes,) = in_turns(
            [anew],
            seconds=seconds,
            clock=lambda which, calls: versions[which].ask("sample", calls),
        )
        again = replace(problem, seed=problem.seed + 1)  # of which whatever was remembered is wrong
        other = make_inputs(again)
        write_inputs(path, again, other, gradients)
        reference = compare.make_reference(again, other, gradients)
        for version in versions.values():
            version.ask("overwrite", path)
            version.ask("results", results)
            compare.require_within(torch.load(results), reference)
    first, second = all_timed(outcomes).values()
    return first, second
