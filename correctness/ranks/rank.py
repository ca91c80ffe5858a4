"""What runs in each process of a `Pool`: it joins a world, calls functions, and tells where it stands.

Nothing of what it answers goes through the collectives that are under test.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from correctness.judging import blame
from correctness.judging.finding import CheckFailed
from correctness.session.child import die_with, serve
from moe_impls.registry import one_line

STACKS = signal.SIGUSR1  # asks for the stacks of all threads, which come even while one is blocked in C
FOREVER = timedelta(hours=24)  # the pool, not gloo, ends what hangs
# The ranks of a mesh of so many, in a world of 4, and another mesh of two, with a rank in both.
MEMBERS = {1: (2,), 2: (1, 3), 3: (0, 1, 3), 4: (0, 1, 2, 3)}
OTHER_TWO = (0, 1)
UNNAMED = (OTHER_TWO, MEMBERS[3])  # whose dimension has no name

_meshes: dict[tuple[int, ...], DeviceMesh] = {}
_begun_ns = 0  # when the latest call began


class Raised(NamedTuple):
    """What a function raised in a rank.

    lines: of the subject. finding: whether it is one, a CheckFailed.
    """

    kind: str
    message: str
    lines: str
    finding: bool


def load_torch() -> None:
    """Load what ranks use, once for all that are forked: torch.utils.checkpoint loads the compiler, too."""
    importlib.import_module("torch._dynamo")
    torch.set_num_threads(1)


def fork(folder: str, ranks: int) -> list[int]:
    """Fork processes that serve over connections to folder/answers; return their numbers."""
    parent, pids = os.getpid(), []
    for number in range(ranks):
        pid = os.fork()
        if pid == 0:
            try:
                _be(folder, number, parent)
            finally:
                os._exit(1)
        pids.append(pid)
    return pids


def exit_status(pid: int, seconds: float) -> int | None:
    """Return how a forked process ended, a signal if negative; None if it has not after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _be(folder: str, number: int, parent: int) -> None:
    """Serve as a rank, ready to be asked for stacks and collectives."""
    die_with(parent)
    output = os.open(Path(folder, f"output{number}"), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    file = Path(folder, f"stacks{number}").open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    faulthandler.register(STACKS, file=file, all_threads=True)
    listener = Listener(str(Path(folder, f"asked{number}")), "AF_UNIX")
    threading.Thread(target=_tell, args=(listener, file), daemon=True).start()
    connection = Client(str(Path(folder, "answers")), "AF_UNIX")
    connection.send(number)
    serve(connection)  # pyright: ignore[reportArgumentType]


def _tell(listener: Listener, _: object) -> None:
    """Answer with `collectives`, beside a main thread that is blocked; keeps what it is given open."""
    while True:
        with listener.accept() as connection:
            connection.send(collectives())


def collectives() -> dict[str, tuple[int, str]]:
    """Count the collectives of the latest call that this rank has begun: by group, with the last one's name.

    From the flight recorder of torch.distributed, which records those of gloo, too.
    """
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    entries = json.loads(dump(True, False)).get("entries", []) if dump else []
    found: dict[str, tuple[int, str]] = {}
    for entry in entries:
        if entry["time_created_ns"] >= _begun_ns:
            group = entry["process_group"][0]
            found[group] = found.get(group, (0, ""))[0] + 1, entry["profiling_name"].rpartition(":")[2]
    return found


def join(store: str, rank: int, world: int) -> None:
    """Become a rank of a new world, and leave the one before. In a world of 4 there are MEMBERS."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _meshes.clear()
    dist.init_process_group(
        "gloo", store=c10d.FileStore(store, world), rank=rank, world_size=world, timeout=FOREVER
    )
    for members in (*MEMBERS.values(), OTHER_TWO) if world == 4 else [tuple(range(world))]:
        name = None if members in UNNAMED else ("expert",)
        _meshes[members] = DeviceMesh("cpu", list(members), mesh_dim_names=name)


def mesh_of(ranks: int | tuple[int, ...]) -> DeviceMesh:
    """Return a mesh of this world: of so many ranks, or of these."""
    if isinstance(ranks, tuple):
        return _meshes[ranks]
    return next(mesh for members, mesh in _meshes.items() if len(members) == ranks)


def answer(function: Callable[..., Any], *arguments: Any) -> bytes:
    """Call a function: what it returns or `Raised`, as bytes, since tensors would travel in shared memory."""
    global _begun_ns
    _begun_ns = time.time_ns()
    try:
        found: Any = function(*arguments)
    except BaseException as error:
        lines, finding = blame.lines_of(error), isinstance(error, CheckFailed)
        message = str(error) if finding else one_line(error)[: blame.SHOWN_CHARACTERS]
        found = Raised(type(error).__name__, message, lines, finding)
    return pickle.dumps(found)
