"""What the tests of this repository share: threads that sleep, Hypothesis' profile, settings put back."""

from __future__ import annotations

import os
from collections.abc import Iterator

# As in correctness/conftest.py: threads that wait for work must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

# What pytest-xdist tells its workers is not for the runs of pytest that tests start, where pytest-benchmark
# would then be off.
for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
    os.environ.pop(name, None)

import correctness.session.profiles  # noqa: E402, F401  # of Hypothesis
from correctness.judging.process_state import restored, settings  # noqa: E402


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[object]:
    """Put back what a subject changes in the process, so that the next test does not find it."""
    with restored(settings(torch.float32)):
        return (yield)
