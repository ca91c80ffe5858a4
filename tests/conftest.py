"""What the tests of this repository share: threads that sleep, Hypothesis' profile, settings put back."""

from __future__ import annotations

import os
from collections.abc import Iterator

# As in correctness/conftest.py: threads that wait for work must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

import correctness.session.profiles  # noqa: E402, F401  # of Hypothesis
from correctness.judging.process_state import restored  # noqa: E402
from correctness.judging.process_state import settings as process_settings  # noqa: E402
from evidence.mutants import MUTANTS, table  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("evidence", "what proves the suite")
    group.addoption(
        "--mutants", action="store_true", help="each mutant through every check: results/mutants.csv"
    )
    group.addoption("--seeds", type=int, metavar="N", help="of test_lookalikes.py: every problem on N seeds")
    group.addoption("--error-budget", metavar="CSV", help="how much of the budget each lookalike uses")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mutant" in metafunc.fixturenames:
        metafunc.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kind}-{mutant.name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[object]:
    """Put back what a subject changes in the process, so that the next test does not find it."""
    with restored(process_settings(torch.float32)):
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("mutants"):
        table.report(terminalreporter)
