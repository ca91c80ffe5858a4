"""The experiments on the measurement itself: what they plant is what they time, and their table is whole."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.commands import measurement
from benchmarks.commands.measurement import Outcome
from benchmarks.timing import measure


def test_a_planted_slowdown_is_as_long_as_it_says() -> None:
    slowed = measurement.slowed(lambda: time.sleep(0.001), 0.004)
    fastest = min(measure.time_calls(slowed, 1, "cpu") for _ in range(20))
    assert fastest == pytest.approx(0.005, rel=0.3)


def test_a_call_that_does_nothing_takes_next_to_nothing() -> None:
    found = measurement.overhead()
    assert found.reached == (found.value < 5)
    assert 0 < found.value < 1000


def test_the_page_says_what_was_reached_and_what_was_not(tmp_path: Path) -> None:
    found = [
        Outcome("a", 20, 0.05, "at most 1 %", False, "how"),
        Outcome("b, µs", 3, 1.5, "below 5", True, ""),
    ]
    table, page = measurement.write(tmp_path, found, quick=True)
    assert list(pd.read_csv(table)["reached"]) == [False, True]
    text = page.read_text(encoding="utf-8")
    assert (
        "| a | 20 | 5.0% | at most 1 % | no | how |" in text and "| b, µs | 3 | 1.5 | below 5 | yes |" in text
    )
    assert "`python -m benchmarks measurement --quick`" in text
