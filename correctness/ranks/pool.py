"""A pool of processes that are the ranks of a world, kept from one call to the next.

``Pool().call(function, {rank: arguments})`` calls a function in several ranks at once. What they return
comes back by pipes. A call has a limit, and one in which nothing computes any more ends sooner: the finding
says who waits, who is behind, and where each stands. A rank that is killed is named. After trouble the pool
begins anew, and it ends with this process, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any

import psutil

from correctness.judging.finding import CheckFailed
from correctness.ranks import rank as in_rank
from correctness.ranks.rank import STACKS, Raised
from correctness.session import child
from correctness.session.child import DYING_S, Child, Ended, ending

SIZE = 4
LIMIT_S = 60.0
STARTING_S = 120.0
STILL_S = 5.0  # without any work of those who have not answered, which then wait for one another
WORK_S = 0.05  # of processor time in STILL_S are none: gloo looks for messages a hundred times a second
GRACE_S = 3.0  # for the others, once one has failed
POLL_S = 0.1
SHOWN_FRAMES = 8  # of a stack
SHOWN_OUTPUT = 400  # characters of what a rank that ended has written last
# Of the ranks: one thread each, connections inside this machine, and a recorder of the latest collectives.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "500"}


class RanksFailed(CheckFailed):
    """A call of several ranks that did not return. raised: what they raised, by rank."""

    def __init__(self, finding: str, raised: dict[int, Raised]) -> None:
        super().__init__(finding)
        self.raised = raised


class Pool:
    """SIZE processes, forked when they are first needed from one that has loaded torch."""

    def __init__(self) -> None:
        self.leader: Child | None = None
        self.connections: dict[int, Connection] = {}
        self.pids: list[int] = []
        self.world = self.worlds = 0

    def call(
        self,
        function: Callable[..., Any],
        arguments: dict[int, tuple[Any, ...]],
        *,
        world: int = SIZE,
        limit_s: float = LIMIT_S,
    ) -> dict[int, Any]:
        """Call a function in several ranks at once, and return what each returns.

        Args:
            function, arguments: of each rank that takes part, as pickle has them.
            world: ranks of the default process group.

        Raises:
            RanksFailed: not every rank returned; the finding says which did what.
        """
        calls = {rank: (function, *given) for rank, given in arguments.items()}
        try:
            self._join(world)
            found = self._ask(calls, limit_s, STILL_S)
        except RanksFailed:
            raise
        except BaseException:  # the time of a test is over, or Ctrl-C: answers may be under way
            self._end_ranks()
            raise
        if any(isinstance(value, Raised) for value in found.values()):
            self.renew()
            raise RanksFailed(_all_raised(found), {r: v for r, v in found.items() if isinstance(v, Raised)})
        return found

    def renew(self) -> None:
        """Let the next call begin in a new world: what the last one left under way is not for it."""
        self.world = 0

    def end(self) -> None:
        """End all processes; the next call starts others."""
        self._end_ranks()
        if self.leader:
            self.leader.end()
        self.leader = None

    def _end_ranks(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (*psutil.Process(pid).children(recursive=True), psutil.Process(pid)):
                    process.kill()
            self._exit_status(pid)
        for connection in self.connections.values():
            connection.close()
        if self.pids:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.connections, self.pids, self.world = {}, [], 0

    def _exit_status(self, pid: int) -> int | None:
        """Return how a rank ended, once; None if that cannot be known."""
        with contextlib.suppress(Ended, ChildProcessError):
            return self._lead(in_rank.exit_status, pid, DYING_S) if self.leader else None
        return None

    def _lead(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the process that the ranks are forked from."""
        if self.leader is None:
            environment = os.environ | ENVIRONMENT
            if os.path.exists("/sys/class/net/lo"):
                environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
            self.leader = Child.of_functions(env=environment)
            self.leader.call(in_rank.load_torch)
        try:
            return self.leader.call(function, *arguments)
        except Ended:
            self.leader = None
            raise

    def _join(self, world: int) -> None:
        if not self.pids:
            self._start()
        if self.world != world:
            self.worlds += 1
            store = str(self.folder / f"store{self.worlds}")
            joining = {rank: (in_rank.join, store, rank, world) for rank in range(world)}
            for rank, value in self._ask(joining, STARTING_S, STARTING_S).items():
                if isinstance(value, Raised):
                    self.end()
                    raise RuntimeError(f"rank {rank} cannot join the others: {value.message}")
            self.world = world

    def _start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="moe-ranks-"))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self.folder / "answers"))
            listening.listen(SIZE)
            listening.settimeout(STARTING_S)
            self.pids = self._lead(in_rank.fork, str(self.folder), SIZE)
            for _ in self.pids:
                connection = Connection(listening.accept()[0].detach())
                self.connections[connection.recv()] = connection
        for connection in self.connections.values():
            connection.send(sys.path)

    def _ask(self, calls: dict[int, tuple[Any, ...]], limit_s: float, still_s: float) -> dict[int, Any]:
        """Send each rank its call and gather the answers; what is `Raised` is one, too.

        Raises:
            RanksFailed: a rank ended, or did not answer in time.
        """
        ended: dict[int, str] = {}
        for rank, call in calls.items():
            try:
                self.connections[rank].send((in_rank.answer, call))
            except OSError:
                ended[rank] = self._ending(rank)
        found: dict[int, Any] = {}
        begun = moved = time.monotonic()
        worked, failed = dict.fromkeys(calls, 0.0), False
        while waiting := [rank for rank in calls if rank not in found and rank not in ended]:
            by_connection = {self.connections[rank]: rank for rank in waiting}
            for connection in wait(list(by_connection), POLL_S):
                rank = by_connection[connection]  # pyright: ignore[reportArgumentType]
                try:
                    is_answer, value = self.connections[rank].recv()
                    found[rank] = pickle.loads(value) if is_answer else _not_called(value)
                except (EOFError, ConnectionError):
                    ended[rank] = self._ending(rank)
                failed |= bool(ended) or isinstance(found.get(rank), Raised)
                moved = time.monotonic()
            now, used = time.monotonic(), {rank: self._used(rank) for rank in waiting}
            if any(used[rank] > worked[rank] + WORK_S for rank in waiting):
                worked, moved = worked | used, now
            if now - moved > (GRACE_S if failed else still_s) or now - begun > limit_s:
                break
        if not waiting and not ended:
            return found
        text = self._trouble(found, ended, waiting, time.monotonic() - begun)
        self._end_ranks()
        raise RanksFailed(text, {r: v for r, v in found.items() if isinstance(v, Raised)})

    def _used(self, rank: int) -> float:
        """Return the seconds that a rank and what it has started have computed."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pids[rank])
            times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
            return sum(t.user + t.system for t in times)
        return 0.0

    def _ending(self, rank: int) -> str:
        """Say how a rank ended, and what it wrote last."""
        how = ending(self._exit_status(self.pids[rank]))
        output = (self.folder / f"output{rank}").read_text(errors="replace").strip()[-SHOWN_OUTPUT:]
        return f"{how}: {' '.join(output.split())}" if output else how

    def _trouble(
        self, found: dict[int, Any], ended: dict[int, str], waiting: list[int], seconds: float
    ) -> str:
        """Say why not every rank has answered: who ended, raised, waits or is behind; and all stacks."""
        told = [f"rank {rank} {how}" for rank, how in ended.items()]
        raised = {rank: value for rank, value in found.items() if isinstance(value, Raised)}
        if not ended:  # or what was raised is that the connection to it is closed
            told += [_said([rank], value) for rank, value in raised.items()]
        if not waiting:
            return "; ".join(told)
        told.append(f"{_ranks(waiting)} did not return in {seconds:.0f} s")
        if ended:
            return "; ".join(told)
        begun = {rank: self._collectives(rank) for rank in (*found, *waiting)}
        told += _behind(begun, waiting)
        return "; ".join(told) + "".join(self._stack(rank) for rank in waiting)

    def _collectives(self, rank: int) -> dict[str, tuple[int, str]] | None:
        """Ask a rank, beside what it does, for its collectives; None if it does not answer."""
        try:
            with Client(str(self.folder / f"asked{rank}"), "AF_UNIX") as connection:
                return connection.recv() if connection.poll(GRACE_S) else None
        except (OSError, EOFError):
            return None

    def _stack(self, rank: int) -> str:
        """Let a rank write its stacks, and return its main thread's, innermost first."""
        file = self.folder / f"stacks{rank}"
        os.kill(self.pids[rank], STACKS)
        end, text = time.monotonic() + GRACE_S, ""
        while time.monotonic() < end and "Current thread" not in text:
            time.sleep(POLL_S)
            text = file.read_text(errors="replace")
        main = text.rpartition("\n\n")[2]  # the last one: threads come before it
        frames = re.findall(r'File "(.+)", line (\d+) in (.+)', main)
        frames = [f for f in frames if f[0] not in (in_rank.__file__, child.__file__)][:SHOWN_FRAMES]
        return f"\n  rank {rank}:" + "".join(
            f"\n    at {file}:{line} in {name}" for file, line, name in frames
        )


def _not_called(error: object) -> Raised:
    """Tell that a rank could not call the function, such as one whose module it cannot import."""
    return Raised(type(error).__name__, f"{type(error).__name__}: {error}", "", False)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def _all_raised(found: dict[int, Any]) -> str:
    """Say what was raised or found: once, if it was the same everywhere."""
    by_value: dict[Raised, list[int]] = {}
    for rank, value in found.items():
        if isinstance(value, Raised):
            by_value.setdefault(value, []).append(rank)
    return "; ".join(_said(ranks, value) for value, ranks in by_value.items())


def _said(ranks: list[int], value: Raised) -> str:
    """Say which ranks raised or found something."""
    verb = ("find" if value.finding else "raise") + "s" * (len(ranks) == 1)
    return f"{_ranks(ranks)} {verb}{':' * value.finding} {value.message}{value.lines}"


def _behind(begun: dict[int, dict[str, tuple[int, str]] | None], waiting: list[int]) -> list[str]:
    """Say which ranks have begun fewer collectives of a group than others have."""
    told = [
        f"rank {rank} does not answer: it holds the interpreter" for rank, by in begun.items() if by is None
    ]
    counts = {rank: by for rank, by in begun.items() if by is not None}
    for group in sorted({group for by in counts.values() for group in by}):
        of_group = {rank: by.get(group, (0, ""))[0] for rank, by in counts.items()}
        most = max(of_group.values())
        name = next(by[group][1] for rank, by in counts.items() if group in by and of_group[rank] == most)
        behind = {rank: n for rank, n in of_group.items() if n < most}
        for rank, n in behind.items():
            state = "waits" if rank in waiting else "has returned"
            told.append(f"rank {rank} is behind: it has begun {n} of {most} collectives and {state}")
        if most and not behind:
            told.append(f"all have begun {most} collectives, {name} the last")
    return told


_SHARED = Pool()
atexit.register(_SHARED.end)


def shared() -> Pool:
    """Return the pool of this process."""
    return _SHARED
