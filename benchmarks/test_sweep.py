"""The main job: one test for each implementation, workload and mode; ``conftest.py`` measures and records."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.sweep.record import Row


@pytest.mark.timeout(0)  # the sweep limits each call by itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own making
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # by a cell that failed
def test_cell(row: Row, benchmark: BenchmarkFixture) -> None:
    if row.status == "unsupported":
        pytest.skip(row.reason)  # declared by the implementation
    if row.status != "ok":
        pytest.fail(f"{row.status}: {row.reason}", pytrace=False)
    assert row.rounds is not None
    benchmark.extra_info.update(run_id=row.run_id, calls_per_sample=row.calls_per_sample)
    benchmark.pedantic(lambda: None, rounds=row.rounds)  # the samples are replayed, nothing is measured here
