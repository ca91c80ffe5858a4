"""The timer, the memory probe and the limit, against cases whose answer is known."""

from __future__ import annotations

import signal
import time
from dataclasses import replace

import pytest
import torch
from torch.profiler import profile

from benchmarks.timing import measure, memory, roofline
from benchmarks.timing.measure import Timing
from benchmarks.workloads import flops
from correctness.judging.finding import Timeout
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from correctness.session.limits import limited
from moe_impls import kept_memory
from moe_impls.registry import resolve

PROBLEM = Problem("p", T=6, D=8, H=4, O=8, E=3, K=2)


def busy(seconds: float):
    def call() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def timings(outcomes: dict) -> dict[str, Timing]:
    assert all(isinstance(outcome, Timing) for outcome in outcomes.values())
    return outcomes


def test_a_call_of_known_length_is_timed_as_that_long() -> None:
    timing = timings(measure.interleave({"busy": busy(0.005)}, seconds=1.0))["busy"]
    assert timing.calls_per_sample == 1
    assert min(timing.samples_s) == pytest.approx(0.005, rel=0.05)


def test_every_candidate_gets_the_same_number_of_samples_and_no_fewer_than_the_minimum() -> None:
    found = timings(measure.interleave({"slow": busy(0.01), "fast": busy(0.0002)}, seconds=0.001))
    assert [len(t.samples_s) for t in found.values()] == [measure.MIN_ROUNDS] * 2


def test_each_round_takes_all_candidates_and_the_next_in_the_reverse_order() -> None:
    order: list[str] = []

    def named(name: str):
        return lambda: (order.append(name), time.sleep(0.001))

    measure.interleave({n: named(n) for n in "abc"}, seconds=0.001, min_rounds=12, max_rounds=12)
    rounds = ["".join(order[-36:])[i : i + 3] for i in range(0, 36, 3)]
    assert all(sorted(taken) == ["a", "b", "c"] for taken in rounds)
    assert all(later == first[::-1] for first, later in zip(rounds[::2], rounds[1::2], strict=True))
    assert len(set(rounds[::2])) > 2


def test_calls_shorter_than_the_clock_resolves_are_taken_together() -> None:
    timing = timings(measure.interleave({"nothing": lambda: None}, seconds=0.01))["nothing"]
    assert timing.calls_per_sample > 100
    assert 0 < min(timing.samples_s) < 5e-6


def test_a_candidate_that_raises_while_timed_is_reported_and_the_others_go_on() -> None:
    calls = iter(range(100))

    def fails_late() -> None:
        time.sleep(0.001)
        if next(calls) == 4:
            raise KeyError("late")

    outcomes = measure.interleave({"bad": fails_late, "good": busy(0.001)}, seconds=0.01)
    assert isinstance(outcomes["bad"], KeyError)
    good = outcomes["good"]
    assert isinstance(good, Timing) and len(good.samples_s) >= measure.MIN_ROUNDS


def test_a_call_over_the_time_limit_is_stopped() -> None:
    begin = time.monotonic()
    outcomes = measure.interleave(
        {"endless": busy(60), "good": busy(0.001)}, seconds=0.01, call_timeout_s=0.2
    )
    assert isinstance(outcomes["endless"], Timeout) and isinstance(outcomes["good"], Timing)
    assert time.monotonic() - begin < 10


def test_invalid_numbers_of_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="min_rounds is 0"):
        measure.interleave({}, min_rounds=0)


def test_problems_take_turns_and_their_calls_are_made_anew_for_each_visit() -> None:
    order: list[str] = []

    def maker(problem: str):
        def make() -> dict[str, measure.Call]:
            order.append(problem)
            return {"first": busy(0.001), "second": busy(0.002)}

        return make

    found = measure.in_turns([maker("a"), maker("b")], seconds=0.02)
    assert order == ["a", "b"] * measure.VISITS
    for outcomes in map(timings, found):
        first, second = (timing.samples_s for timing in outcomes.values())
        assert len(first) == len(second) >= measure.VISITS * measure.VISIT_ROUNDS
        assert len(first) <= measure.MAX_ROUNDS
        assert min(second) / min(first) == pytest.approx(2, rel=0.1)


def test_who_fails_in_one_visit_is_not_called_in_the_next() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise KeyError("always")

    (outcomes,) = measure.in_turns([lambda: {"bad": fails, "good": busy(0.001)}], seconds=0.01)
    assert isinstance(outcomes["bad"], KeyError) and len(calls) <= measure.WARM_UP_CALLS
    good = outcomes["good"]
    assert isinstance(good, Timing) and len(good.samples_s) >= measure.VISITS * measure.VISIT_ROUNDS


MEBIBYTE = 2**20


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda a: a + a, 1),
        (lambda a: (a + a) * a, 2),  # the product is made while the sum is still held
        (lambda a: [a + a, a * a, a - a], 3),
        (lambda a: [(a + a).sum() for _ in range(5)], 1),  # each is released before the next
        (lambda a: a.view(2, -1), 0),
    ],
)
def test_peak_memory_of_a_call_is_what_its_tensors_add_up_to(call, expected: int) -> None:
    a = torch.ones(MEBIBYTE // 4)
    found = memory.peak_memory_bytes(lambda: call(a), "cpu")
    assert found == pytest.approx(expected * MEBIBYTE, abs=1024)


def test_memory_that_a_call_releases_but_did_not_take_does_not_count() -> None:
    # The profiler keeps the sizes of an earlier record, and reports a release by the size that it knows.
    profiled = [torch.ones(0)]

    def take() -> None:
        profiled[0] = torch.ones(MEBIBYTE)

    def release_and_take_a_quarter() -> torch.Tensor:
        profiled.clear()
        return torch.ones(MEBIBYTE // 4)

    assert memory.peak_memory_bytes(take, "cpu") == pytest.approx(4 * MEBIBYTE, abs=1024)
    found = memory.peak_memory_bytes(release_and_take_a_quarter, "cpu")
    assert found == pytest.approx(MEBIBYTE, abs=1024)


def test_memory_that_is_kept_for_the_next_call_counts_in_every_call() -> None:
    def call() -> torch.Tensor:
        return kept_memory.take((4, MEBIBYTE // 4), torch.float32)

    for _ in range(2):
        assert memory.peak_memory_bytes(call, "cpu") == pytest.approx(4 * MEBIBYTE, abs=1024)


@pytest.mark.parametrize("where", ["_get_distributed_info", "stop"])
def test_ctrl_c_while_a_record_starts_or_stops_waits_until_it_has_ended(where: str, monkeypatch) -> None:
    once = getattr(profile, where)
    done = []

    def interrupted(record: profile) -> object:
        signal.raise_signal(signal.SIGINT)
        result = once(record)
        done.append(where)
        return result

    monkeypatch.setattr(profile, where, interrupted)
    # Python ignores Ctrl-C where its parent did, as under nohup.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            memory.peak_memory_bytes(lambda: torch.zeros(8), "cpu")
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert done
    assert memory.peak_memory_bytes(lambda: torch.zeros(8), "cpu") == 32  # no record is left open


def test_a_time_limit_ends_a_call_while_it_is_recorded() -> None:
    with pytest.raises(Timeout), limited(0.2, wall_s=0.2):
        memory.peak_memory_bytes(lambda: time.sleep(10), "cpu")
    assert memory.peak_memory_bytes(lambda: torch.zeros(8), "cpu") == 32


def test_the_timed_call_is_what_its_mode_says() -> None:
    inputs = make_inputs(PROBLEM)
    forward = resolve("sorted_dispatch").forward
    y = measure.call_of(forward, PROBLEM, inputs, "forward")()
    assert isinstance(y, torch.Tensor) and y.shape == (PROBLEM.T, PROBLEM.O) and not y.requires_grad
    grads = measure.call_of(forward, PROBLEM, inputs, "forward_backward")()
    assert isinstance(grads, tuple)
    assert [g.shape for g in grads] == [t.shape for t in inputs.tensors.values()]


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_the_limit_does_as_many_operations_as_the_row_says(mode: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    problem = Problem("p", T=6, D=8, H=4, O=12, E=3, K=2)
    with FlopCounterMode(display=False) as counter:
        roofline.dense_products(problem, mode)()
    assert counter.get_total_flops() == flops(problem, mode)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_the_limit_is_that_of_float32_where_the_cpu_cannot_multiply_the_dtype(
    monkeypatch: pytest.MonkeyPatch, has_instructions: bool
) -> None:
    monkeypatch.setattr(roofline, "multiplies", lambda dtype: has_instructions or dtype.itemsize > 2)
    multiplied = {roofline.multiplied_in(replace(PROBLEM, dtype=d)) for d in (torch.float32, torch.bfloat16)}
    assert multiplied == ({torch.float32, torch.bfloat16} if has_instructions else {torch.float32})


def test_memory_needed_grows_with_the_weights_and_with_gradients() -> None:
    weights = 4 * PROBLEM.E * (PROBLEM.F * PROBLEM.D + PROBLEM.O * PROBLEM.H)
    forward = memory.needed_memory_bytes(PROBLEM, "forward")
    assert forward > 2 * weights
    assert memory.needed_memory_bytes(PROBLEM, "forward_backward") == forward * 3 // 2


def test_an_allocation_beyond_the_machine_fails_instead_of_being_killed() -> None:
    beyond = memory.available_memory_bytes("cpu") + 2**30
    with memory.memory_limit("cpu", 2**30), pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        torch.empty(beyond, dtype=torch.uint8)


def kept(mode_call) -> int:
    return memory.saved_for_backward_bytes(mode_call, "cpu")


def test_what_a_graph_keeps_is_what_its_backward_reads() -> None:
    a = torch.ones(MEBIBYTE // 4, requires_grad=True)
    assert kept(lambda: a * 2) == pytest.approx(0, abs=1024)  # a was there before, and y is the result
    assert kept(lambda: (a * 2).exp()) == pytest.approx(0, abs=1024)  # exp reads its result
    assert kept(lambda: (a * 2).sin()) == pytest.approx(MEBIBYTE, abs=1024)
    assert kept(lambda: (a * 2).sin().sin()) == pytest.approx(2 * MEBIBYTE, abs=1024)


def test_traffic_counts_touched_experts_alone_and_with_a_backward_the_gradients_of_all() -> None:
    p = Problem("p", T=6, D=8, H=4, O=8, E=3, K=2, activation="relu", bias=False)
    expert = 4 * (4 * 8 + 8 * 4)
    tokens = 4 * 6 * 8
    choices = 6 * 2 * (8 + 4)
    assert roofline.traffic_bytes(p, "forward", 2) == (tokens + choices + 2 * expert, tokens)
    read, written = roofline.traffic_bytes(p, "forward_backward", 2)
    assert read == 2 * tokens + choices + 2 * expert
    assert written == 2 * tokens + 6 * 2 * 4 + 3 * expert


def test_the_limit_is_the_larger_of_the_two_and_follows_from_its_ingredients() -> None:
    inputs = make_inputs(PROBLEM)
    found = roofline.measure_roofline(PROBLEM, "forward", inputs.routing)
    assert found.limit_ms == max(found.compute_limit_ms, found.traffic_limit_ms) > 0
    assert found.touched_experts == len(set(inputs.routing.expert_ids.flatten().tolist()))
    moved_ms = found.read_bytes / found.read_gb_per_s / 1e6 + found.written_bytes / found.copy_gb_per_s / 1e6
    assert found.traffic_limit_ms == pytest.approx(moved_ms)


def test_a_cold_cache_is_flushed_before_each_call_and_the_flush_is_not_timed() -> None:
    order: list[str] = []
    outcomes = measure.interleave(
        {"call": lambda: order.append("call")},
        seconds=0,
        min_rounds=3,
        max_rounds=3,
        before={"call": lambda: (order.append("flush"), time.sleep(0.01))},
    )
    assert order == ["flush", "call"] * (len(order) // 2)
    assert max(timings(outcomes)["call"].samples_s) < 0.01


def test_flushing_writes_more_than_the_last_level_cache_holds(tmp_path, monkeypatch) -> None:
    for index, size in enumerate(["48K", "2048K", "30M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(measure, "CPU_CACHES", tmp_path)
    assert measure.last_level_cache_bytes() == 30 * 2**20
    flushed = measure.flusher("cpu")()
    assert isinstance(flushed, torch.Tensor) and flushed.nbytes == 60 * 2**20


def test_calls_that_take_too_long_or_too_much_memory_are_not_near_the_fastest() -> None:
    def greedy() -> None:
        torch.empty(2**50)

    calls = {"fast": busy(0.001), "slow": busy(0.5), "greedy": greedy, "near": busy(0.0015)}
    assert list(measure.near_the_fastest(calls, "near", hopeless=3)) == ["fast", "near"]
    assert list(measure.near_the_fastest(calls, "near", hopeless=3, most=1)) == ["fast"]


def test_what_is_too_slow_on_fewer_tokens_is_not_tried_on_all() -> None:
    whole = []
    calls = {"fast": busy(0.001), "slow": lambda: whole.append("slow"), "near": busy(0.0015)}
    smaller = {"fast": [busy(0.001)], "slow": [busy(0.001), busy(0.05)], "near": [busy(0.001)]}
    near = measure.near_the_fastest(calls, "fast", hopeless=3, smaller=smaller)
    assert list(near) == ["fast", "near"] and not whole


def test_a_limit_may_leave_no_call() -> None:
    slow = {"slow": busy(0.05), "slower": busy(0.06)}
    assert measure.near_the_fastest(slow, "slow", hopeless=3, at_most_s=0.01) == {}
    assert list(measure.near_the_fastest(slow, "slow", hopeless=3, at_most_s=1)) == ["slow", "slower"]


def test_memory_that_runs_out_on_fewer_tokens_leaves_a_call_out() -> None:
    calls = {"fast": busy(0.001), "greedy": busy(0.001)}
    smaller = {"greedy": [lambda: torch.empty(2**50)]}
    assert list(measure.near_the_fastest(calls, "fast", hopeless=3, smaller=smaller)) == ["fast"]


def test_what_else_a_first_try_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        measure.near_the_fastest({"fast": busy(0.001), "broken": lambda: 1 // 0}, "fast", hopeless=3)
