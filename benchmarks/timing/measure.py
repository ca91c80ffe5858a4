"""The only timer.

Times are compared only with times taken in the same minute: all candidates of one problem run in rounds,
one after the other, in changing order, and every raw sample is kept.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from correctness.judging import calling
from correctness.judging.finding import Timeout
from correctness.problems.problem import Inputs, Problem
from correctness.session.limits import WAITING, limited
from moe_impls.interface import Experts, Forward, Routing

Call = Callable[[], object]
Watch = Callable[[str, float], None]  # of a name and seconds: whose code runs next, for how long at most

MIN_ROUNDS = 7  # samples that a median and two quantiles are taken from, at the least
MAX_ROUNDS = 101
WARM_UP_CALLS = 2
SHORT_CALLS = 10  # of which the time of one is estimated where it is less than a sample
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# A sample is at least this long, or several calls are taken together: the clocks resolve well under a
# thousandth of it (perf_counter some 0.1 µs, CUDA events 0.5 µs).
MIN_SAMPLE_S = {"cpu": 1e-4, "cuda": 1e-3}


def is_out_of_memory(error: object) -> bool:
    """Whether an exception says that memory ran out."""
    # The CPU's allocator has no exception class of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@dataclass(frozen=True)
class Timing:
    """The samples of one candidate in seconds a call, one each round, and how many calls a sample spans."""

    samples_s: tuple[float, ...]
    calls_per_sample: int


def time_calls(call: Call, calls: int, device: str, before: Call | None = None) -> float:
    """Seconds a call, over ``calls`` calls; on CUDA between two events, with no synchronisation inside.

    With ``before``, which is done before each call, the calls are timed one by one.
    """
    if before is not None:
        total_s = 0.0
        for _ in range(calls):
            before()
            total_s += time_calls(call, 1, device)
        return total_s / calls
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):  # whose stream the events are recorded on
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                call()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def nobody_watches(name: str, seconds: float) -> None:
    """Take no notice."""


def interleave(
    candidates: dict[str, Call],
    *,
    device: str = "cpu",
    seconds: float = 0.4,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    call_timeout_s: float | None = None,
    before: Mapping[str, Call] | None = None,
    clock: Callable[[str, int], float] | None = None,
    watch: Watch = nobody_watches,
) -> dict[str, Timing | BaseException]:
    """Time all candidates in rounds; the order of every second round is shuffled, and reversed in the next.

    What ran before leaves its mark on the caches and on the memory that is free, so no candidate always
    follows the same one.

    Args:
        candidates: functions without arguments, by name.
        device: where they compute; chooses the clock.
        seconds: time to spend on each candidate on average; the numbers of rounds bound it.
        min_rounds, max_rounds: samples taken of each candidate, at least and at most.
        call_timeout_s: processor time that one call may take, see ``limits.limited``.
        before: by the name of a candidate, what is done before each of its calls and not timed.
        clock: of a name and a number of calls, the seconds a call, where it is not here that they are made.
        watch: called before each sample with its name and the most seconds; the name is "" between samples.

    Returns:
        For each name its timing, or the exception that its call raised; the others go on without it.
    """
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"min_rounds is {min_rounds}, max_rounds {max_rounds}; valid are 1 <= min <= max")
    failures: dict[str, BaseException] = {}
    samples: dict[str, list[float]] = {name: [] for name in candidates}

    def sample(name: str, calls: int) -> float:
        limit_s = None if call_timeout_s is None else call_timeout_s * calls
        try:
            with watched(name, limit_s, watch):
                if clock is not None:
                    return clock(name, calls)
                return time_calls(candidates[name], calls, device, (before or {}).get(name))
        except (Exception, Timeout) as error:
            failures[name] = error
            return 0.0

    call_s = {name: min(sample(name, 1) for _ in range(WARM_UP_CALLS)) for name in candidates}
    min_sample_s = MIN_SAMPLE_S["cuda" if device.startswith("cuda") else "cpu"]
    for name, s in call_s.items():  # of one short call the clock's own time, or a hiccup, may be the most
        if s < min_sample_s and name not in failures:
            call_s[name] = min(s, sample(name, SHORT_CALLS))
    calls = {name: max(1, round(min_sample_s / max(s, 1e-8) + 0.5)) for name, s in call_s.items()}
    calls = {name: 1 if call_s[name] >= min_sample_s else n for name, n in calls.items()}
    round_s = sum(call_s[name] * calls[name] for name in candidates if name not in failures)
    rounds = int(seconds * len(candidates) / max(round_s, 1e-9))
    rounds = min(max(rounds, min_rounds), max_rounds)

    order, shuffled = list(candidates), random.Random(0)
    gc.collect(1)  # what is young; all that was ever imported would take longer than the samples
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            order = list(reversed(order)) if number % 2 else shuffled.sample(order, len(order))
            for name in order:
                if name not in failures:
                    samples[name].append(sample(name, calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: failures.get(name) or Timing(tuple(samples[name]), calls[name]) for name in candidates}


def all_timed(outcomes: Mapping[str, Timing | BaseException]) -> dict[str, Timing]:
    """Return what `interleave` did where none may have failed; raise what the first failure was."""
    timings = {}
    for name, outcome in outcomes.items():
        if not isinstance(outcome, Timing):
            raise outcome
        timings[name] = outcome
    return timings


VISITS, VISIT_ROUNDS = 10, 2  # of a problem, and the least rounds in each


def in_turns(
    problems: Sequence[Callable[[], Mapping[str, Call]]],
    *,
    seconds: float,
    device: str = "cpu",
    clock: Callable[[str, int], float] | None = None,
) -> list[dict[str, Timing | BaseException]]:
    """Time the candidates of several problems, each in VISITS visits that are spread over the whole time.

    What else a machine does changes within minutes, and where tensors lie in memory moves times by several
    percent: who measures a problem in one go sees one state of both. So the problems take turns, and the
    calls are made anew for each visit.

    Args:
        problems: for each a function that makes its candidates, with tensors of their own.
        seconds: time to spend on each candidate of each problem on average; MAX_ROUNDS may end it sooner.
        clock: as for `interleave`.

    Returns:
        For each problem what `interleave` returns, with the samples of all visits in the order taken.
    """
    found: list[dict[str, Timing | BaseException]] = [{} for _ in problems]
    for _ in range(VISITS):
        for make, outcomes in zip(problems, found, strict=True):
            calls = {n: c for n, c in make().items() if not isinstance(outcomes.get(n), BaseException)}
            visit = interleave(
                calls,
                device=device,
                seconds=seconds / VISITS,
                min_rounds=VISIT_ROUNDS,
                max_rounds=MAX_ROUNDS // VISITS,
                clock=clock,
            )
            for name, now in visit.items():
                before = outcomes.get(name)
                if isinstance(before, Timing) and isinstance(now, Timing):
                    now = Timing(before.samples_s + now.samples_s, now.calls_per_sample)
                outcomes[name] = now
    return found


LEAST_LIMIT_S = 0.02  # below, a first try tells little
ONCE_S = 1.0  # that a first call may take longer, at most
TRY_S, TRIES = 0.1, (2, 6)  # a try of so many calls, at least and at most, ends when it has taken this long


def near_the_fastest(
    calls: Mapping[str, Call],
    first: str,
    device: str = "cpu",
    *,
    hopeless: float,
    most: int | None = None,
    at_most_s: float | None = None,
    smaller: Mapping[str, Sequence[Call]] | None = None,
) -> dict[str, Call]:
    """Keep the calls that come near the fastest in a first try, the fastest first.

    A try is two calls, or more of short ones; the shortest counts. It ends when two at the limit would have,
    or when memory runs out.

    Args:
        first: the name of the one that is tried first, from which the limit of the others comes.
        hopeless: times the fastest, what takes longer is left out.
        most: so many of them at most; all unless given.
        at_most_s: what takes longer is left out, too, were it the fastest.
        smaller: calls of the same on fewer tokens, the smallest first. If one takes longer than the limit
            the whole is not tried: a single operation may take minutes, and no limit interrupts that.

    Raises:
        Whatever else a call raises.
    """
    tried_s: dict[str, float] = {}
    limit_s = at_most_s

    def is_slow(call: Call) -> bool:
        """Tell whether a call is over the limit; a second decides where it may have made something once."""
        if limit_s is None or (took_s := time_calls(call, 1, device)) <= limit_s:
            return False
        return took_s > limit_s + ONCE_S or time_calls(call, 1, device) > limit_s

    for name in sorted(calls, key=lambda name: name != first):
        try:
            if any(map(is_slow, (smaller or {}).get(name, ()))):
                continue
            took_s: list[float] = []
            most_s = None if limit_s is None else TRIES[0] * limit_s + TRY_S
            with limited(most_s, None, wall_s=most_s):
                while len(took_s) < TRIES[0] or (sum(took_s) < TRY_S and len(took_s) < TRIES[1]):
                    took_s.append(time_calls(calls[name], 1, device))
            tried_s[name] = min(took_s)
        except Timeout:
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            continue
        limit_s = max(hopeless * min(tried_s.values()), LEAST_LIMIT_S)
        limit_s = limit_s if at_most_s is None else min(limit_s, at_most_s)
    near = [name for name, s in tried_s.items() if limit_s is not None and s <= limit_s]
    return {name: calls[name] for name in sorted(near, key=tried_s.__getitem__)[:most]}


CACHES = ("warm", "cold")
FLUSH_BYTES = {"cpu": (32 * 2**20, 512 * 2**20), "cuda": (256 * 2**20, 256 * 2**20)}  # least and most


def flusher(device: str) -> Call:
    """A call after which the caches hold nothing of what was there: it writes more than they hold.

    A last-level cache that is larger than the most that is written (of a large server, shared by its virtual
    machines) may keep something.
    """
    least, most = FLUSH_BYTES["cuda" if device.startswith("cuda") else "cpu"]
    size = min(max(least, 2 * last_level_cache_bytes()), most)
    buffer = torch.empty(size // 4, device=device)
    return lambda: buffer.fill_(1.0)


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache of the first CPU as Linux tells it, or 0."""
    sizes = [path.read_text().strip() for path in CPU_CACHES.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(text[:-1]) * units[text[-1]] for text in sizes if text[-1:] in units), default=0)


@contextlib.contextmanager
def recording(**options: Any) -> Iterator[profile]:
    """Run torch's profiler on the block; Ctrl-C and time limits act within it or wait for the record's end.

    A record that is broken off while it starts or stops makes the process crash, at its exit at the latest.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    arrived: list[int] = []

    def keep() -> None:
        for number in handlers:
            signal.signal(number, lambda signalled, _: arrived.append(signalled))

    def deliver() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        while arrived:
            signal.raise_signal(arrived.pop())

    keep()
    try:
        with profile(**options) as record:
            try:
                deliver()
                yield record
            finally:
                keep()
    finally:
        deliver()


@contextlib.contextmanager
def watched(name: str, seconds: float | None, watch: Watch) -> Iterator[None]:
    """Limit the code of ``name`` in the block to ``seconds``, and tell ``watch`` when it has to be over.

    Raises:
        Timeout: it takes longer; see ``limits.limited``.
    """
    watch(name, WAITING * seconds if seconds else math.inf)
    try:
        with limited(seconds, None, option="--cell-timeout"):
            yield
    finally:
        watch("", math.inf)


def arguments(inputs: Inputs, *, gradients: bool) -> tuple[list[Tensor], Tensor, Routing, Experts]:
    """New leaves of a call, that require gradients or not, and x, routing and experts made of them."""
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in inputs.tensors.items()}
    return list(leaves.values()), *calling.assemble(inputs, leaves)


def call_of(forward: Forward, problem: Problem, inputs: Inputs, mode: str) -> Call:
    """The call that is timed: y [T, O] alone, or y and the gradients of x, the gates and every weight."""
    gradients = mode == "forward_backward"
    leaves, x, routing, experts = arguments(inputs, gradients=gradients)

    def forward_only() -> Tensor:
        with torch.no_grad():
            return forward(x, routing, experts, combine=problem.combine)

    def forward_backward() -> tuple[Tensor, ...]:
        y = forward(x, routing, experts, combine=problem.combine)
        return torch.autograd.grad(y, leaves, inputs.dy)

    return forward_backward if gradients else forward_only


def graph_of(forward: Forward, problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """The forward alone of a call with gradients: what its graph keeps is what waits for the backward."""
    _, x, routing, experts = arguments(inputs, gradients=True)
    return lambda: forward(x, routing, experts, combine=problem.combine)
