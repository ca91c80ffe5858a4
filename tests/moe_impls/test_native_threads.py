"""The threads of native: callers at once, a forked process, and more threads than processors."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from correctness.judging.compare import require_right
from correctness.problems.catalogue import SMALL
from correctness.problems.inputs import make_inputs
from moe_impls import native

ROOT = Path(__file__).parents[2]


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


LARGE_ENOUGH = replace(SMALL, T=200, D=200, H=120, O=200)  # for several threads in each step


def test_several_callers_at_once_share_the_threads_of_native(four_threads: None) -> None:
    inputs = make_inputs(LARGE_ENOUGH)
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: native.forward(*inputs[:3]), range(200)))
    require_right({"y": found[0]}, LARGE_ENOUGH, inputs)
    assert all(torch.equal(y, found[0]) for y in found)


IN_A_FORK = """
import os, torch
from correctness.problems.inputs import make_inputs
from moe_impls import native
from tests.moe_impls.test_native_threads import LARGE_ENOUGH
inputs = make_inputs(LARGE_ENOUGH)
torch.set_num_threads(max(torch.get_num_threads(), 2))
before = native.forward(*inputs[:3])
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0 if torch.equal(native.forward(*inputs[:3]), before) else 3)
"""


def test_native_computes_in_a_process_that_was_forked_from_one_that_used_it() -> None:
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # those of torch, once started, do not outlive a fork
    subprocess.run([sys.executable, "-c", IN_A_FORK], check=True, timeout=120, cwd=ROOT, env=alone)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system chooses the processors")
def test_native_is_right_with_more_threads_than_processors(four_threads: None) -> None:
    inputs, processors = make_inputs(LARGE_ENOUGH), os.sched_getaffinity(0)
    alone = native.forward(*inputs[:3])
    try:
        os.sched_setaffinity(0, {min(processors)})
        shared = native.forward(*inputs[:3])
    finally:
        os.sched_setaffinity(0, processors)
    assert torch.equal(alone, shared)


AFTER_AN_OPERATION = """
import os, time, torch
from correctness.problems.inputs import make_inputs
from moe_impls import native
from tests.moe_impls.test_native_threads import LARGE_ENOUGH

def names():
    return [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]

inputs, matrix = make_inputs(LARGE_ENOUGH), torch.ones(700, 700)
torch.set_num_threads(2)
before = native.forward(*inputs[:3])
begin = time.monotonic()
while "moe_impls" not in names():  # a thread has its name once it runs
    assert time.monotonic() < begin + 60, names()
for threads in (2, 3, 2):
    torch.set_num_threads(threads)
    begin = time.monotonic()
    while time.monotonic() < begin + 1:  # by the threads of the operation, once seen running
        matrix @ matrix
        assert torch.equal(native.forward(*inputs[:3]), before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list threads")
def test_native_computes_after_operations_of_torch_and_with_other_numbers_of_threads() -> None:
    subprocess.run([sys.executable, "-c", AFTER_AN_OPERATION], check=True, timeout=120, cwd=ROOT)
