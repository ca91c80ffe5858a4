"""A pool of ranks returns what they return, tells who hangs, raises or dies, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from correctness.judging.finding import Timeout
from correctness.ranks import rank
from correctness.ranks.pool import STILL_S, RanksFailed, shared
from correctness.ranks.problems import SMALL, Spread
from correctness.session.limits import limited
from reporting.provenance import ROOT

REPORTED_S = 10.0  # after its limit

EVERY = {number: (number,) for number in range(4)}


def summed(number: int) -> torch.Tensor:
    t = torch.full((2,), float(number))
    dist.all_reduce(t)
    return t


def one_does_not_come(number: int) -> None:
    summed(number)
    if number != 2:
        summed(number)


def one_raises(number: int) -> None:
    summed(number)
    if number == 1:
        raise ValueError("not today")
    summed(number)


def everyone_raises(number: int) -> None:
    raise ValueError("not today")


def one_dies(number: int) -> None:
    summed(number)
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    summed(number)


def one_computes_for_ever(number: int) -> None:
    while number == 1:
        pass


def test_ranks_return_what_they_find_and_keep_their_processes() -> None:
    pool = shared()
    first = pool.call(os.getpid, dict.fromkeys(range(4), ()))
    assert sorted(pool.call(summed, EVERY)) == [0, 1, 2, 3]
    assert {tuple(t.tolist()) for t in pool.call(summed, EVERY).values()} == {(6.0, 6.0)}
    assert pool.call(os.getpid, dict.fromkeys(range(4), ())) == first


def test_a_world_can_be_smaller_than_the_pool() -> None:
    found = shared().call(summed, {0: (1,), 1: (2,)}, world=2)
    assert [t.tolist() for t in found.values()] == [[3.0, 3.0]] * 2


def test_a_mesh_of_two_is_a_part_of_the_world_whose_ranks_have_other_numbers_there() -> None:
    found = shared().call(_place, dict.fromkeys(rank.MEMBERS[2], ()))
    assert found == {1: (1, 0, 2), 3: (3, 1, 2)}


def _place() -> tuple[int, int, int]:
    mesh = rank.mesh_of(2)
    return dist.get_rank(), mesh.get_local_rank(), mesh.size()


def test_a_hang_is_told_with_who_is_behind_and_where_the_others_stand() -> None:
    shared().call(summed, EVERY)
    begin = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        shared().call(one_does_not_come, EVERY)
    assert time.monotonic() - begin < STILL_S + REPORTED_S
    told = str(failure.value)
    assert "ranks 0, 1, 3 did not return in" in told
    assert "rank 2 is behind: it has begun 1 of 2 collectives and has returned" in told
    assert told.count("in one_does_not_come") == told.count("in all_reduce") == 3


def test_a_rank_that_raises_while_others_wait_is_named_with_its_line() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 raises ValueError: not today") as failure:
        shared().call(one_raises, EVERY)
    assert "ranks 0, 2, 3 did not return in" in str(failure.value)
    assert "in one_raises: raise ValueError" in str(failure.value)


def test_what_all_ranks_raise_is_told_once_and_their_processes_are_kept() -> None:
    first = shared().call(os.getpid, dict.fromkeys(range(4), ()))
    with pytest.raises(RanksFailed, match="^ranks 0, 1, 2, 3 raise ValueError: not today") as failure:
        shared().call(everyone_raises, EVERY)
    assert {raised.kind for raised in failure.value.raised.values()} == {"ValueError"}
    assert shared().call(os.getpid, dict.fromkeys(range(4), ())) == first
    assert shared().call(summed, EVERY)[0].tolist() == [6.0, 6.0]


def test_a_killed_rank_is_named_and_the_next_call_has_new_ones() -> None:
    first = shared().call(os.getpid, dict.fromkeys(range(4), ()))
    with pytest.raises(RanksFailed, match="rank 3 ended its process by SIGKILL"):
        shared().call(one_dies, EVERY)
    assert not any(psutil.pid_exists(pid) for pid in first.values())
    assert shared().call(summed, EVERY)[3].tolist() == [6.0, 6.0]


def test_what_computes_for_ever_ends_at_its_limit() -> None:
    shared().call(summed, EVERY)
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1 did not return in 8 s(.|\n)*in one_computes_for_ever"):
        shared().call(one_computes_for_ever, EVERY, limit_s=8)
    assert time.monotonic() - begin < 8 + REPORTED_S


def test_a_call_that_is_interrupted_leaves_no_answer_for_the_next_one() -> None:
    shared().call(summed, EVERY)
    with pytest.raises(Timeout), limited(30.0, None, wall_s=1.0):
        shared().call(one_computes_for_ever, EVERY)
    assert shared().call(summed, EVERY)[1].tolist() == [6.0, 6.0]


def test_ranks_are_forked_anew_where_what_they_were_forked_from_is_killed() -> None:
    shared().call(summed, EVERY)
    leader = shared().leader
    assert leader
    leader.process.kill()
    leader.process.wait()
    with pytest.raises(RanksFailed, match="rank 0 closed its connection"):
        shared().call(summed, EVERY)
    assert shared().call(summed, EVERY)[1].tolist() == [6.0, 6.0]


def test_ranks_end_with_the_process_that_has_started_them() -> None:
    code = (
        "import os\nfrom correctness.ranks.pool import shared\n"
        "pids = shared().call(os.getpid, {number: () for number in range(4)})\n"
        "print(*pids.values(), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    pids = [int(word) for word in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) == 4, done.stderr
    end = time.monotonic() + 20
    while time.monotonic() < end and any(psutil.pid_exists(pid) for pid in pids):
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_tokens_are_spread_as_their_name_says() -> None:
    p = SMALL
    assert [Spread(p, 4, tokens).sizes for tokens in ("unequal", "equal", "all_on_last")] == [
        [11, 3, 15, 8],
        [10, 9, 9, 9],
        [0, 0, 0, 37],
    ]
    assert Spread(p, 2, "none_on_first").sizes == [0, 37]
    assert Spread(p, 4, "none_on_last").sizes == [13, 5, 19, 0]
