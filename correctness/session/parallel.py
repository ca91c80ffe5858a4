"""The whole of ``pytest correctness`` runs in several processes, by pytest-xdist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

MOST_WORKERS = 8  # each holds a copy of torch in memory
SUITE = Path(__file__).parents[1]


def use_workers(config: pytest.Config) -> None:
    """Make pytest-xdist run the tests, one thread for each process, if all of them are to be run."""
    if is_whole(config) and config.pluginmanager.hasplugin("xdist"):
        config.option.numprocesses = min(torch.get_num_threads(), MOST_WORKERS)
        if config.option.dist == "no":
            config.option.dist = "worksteal"  # neighbours in one process, which makes their oracle once
        os.environ["OMP_NUM_THREADS"] = "1"  # of each worker


def is_whole(config: pytest.Config) -> bool:
    """Tell whether all of ``pytest correctness`` is to be run, on whatever subjects, and nothing says how."""
    options = (
        *("keyword", "markexpr", "deselect", "lf", "failedfirst"),  # which tests
        *("collectonly", "usepdb", "trace", "maxfail"),  # and how
    )
    return (
        {Path(argument).resolve() for argument in config.args} == {SUITE}
        and not any(config.getoption(name, None) for name in options)
        and config.getoption("numprocesses", None) is None  # -n 0 is an answer, too
        and config.getoption("capture") != "no"
    )


def exit_status(session: pytest.Session) -> None:
    """Let a run that --exitfirst or --maxfail ended say that tests failed: pytest-xdist says interrupted."""
    workers = session.config.pluginmanager.getplugin("dsession")
    if workers and session.exitstatus == pytest.ExitCode.INTERRUPTED:
        most = session.config.option.maxfail or 0
        if 0 < most <= getattr(workers, "countfailures", 0):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
