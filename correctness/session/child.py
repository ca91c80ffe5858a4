"""The one way to run something in another process: start it, ask it, know how it ended, end it.

``Child(command)`` runs any command, ``Child.of_functions()`` a Python process that calls functions::

    child = Child.of_functions()
    try:
        answer = child.call(function, argument)  # raises what the function raises, or Ended
    finally:
        child.end()

A child ends with this process, however that ends, and ``end`` ends all that it has started, too. On POSIX.

A command that is asked needs nothing of this project. Its last argument is the number of a file descriptor,
of which ``multiprocessing.connection.Connection`` makes a connection; it receives a message at a time and
sends ``(True, answer)`` or ``(False, exception)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import psutil

POLL_S = 0.1
DYING_S = 5.0  # how long a process that has closed its connection may take to end
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Ended(Exception):
    """A child ended before it answered; the message says how. status: of its exit, a signal if negative."""

    def __init__(self, how: str, status: int | None) -> None:
        super().__init__(how)
        self.status = status


def ending(status: int | None) -> str:
    """How a process with this exit status ended; a negative one is a signal."""
    if status is None:
        return "closed its connection"
    if status >= 0:
        return f"ended its process with exit status {status}"
    name = signal.Signals(-status).name
    why = ", as when memory runs out" if name == "SIGKILL" else ""
    return f"ended its process by {name}{why}"


def _never() -> bool:
    return False


class Child:
    """A process that ends with this one, with its own process group.

    Args:
        command: the program and its arguments.
        asked: whether it answers, see the module; adds the number of its end of the connection.
        options: of ``subprocess.Popen``, such as cwd, env, stdout.
    """

    def __init__(self, command: Sequence[object], *, asked: bool = False, **options: Any) -> None:
        arguments, ends = [str(part) for part in command], ()
        if asked:
            self.connection, theirs = multiprocessing.Pipe()
            arguments, ends = [*arguments, str(theirs.fileno())], (theirs.fileno(),)
        self.process = subprocess.Popen(
            [sys.executable, "-I", __file__, "run", str(os.getpid()), *arguments],
            pass_fds=ends, start_new_session=True, **options,
        )  # fmt: skip
        if asked:
            theirs.close()

    @classmethod
    def of_functions(cls, **options: Any) -> Child:
        """A Python process that finds the modules that this one finds, for ``call``."""
        child = cls([sys.executable, "-P", __file__, "serve"], asked=True, **options)
        child.connection.send(sys.path)
        return child

    def call(
        self, function: Callable[..., Any], *arguments: object, is_over: Callable[[], bool] = _never
    ) -> Any:
        """Call a function there and return what it returns; both travel as pickle has them. See ``ask``."""
        return self.ask((function, arguments), is_over)

    def ask(self, message: object, is_over: Callable[[], bool] = _never) -> Any:
        """Send a message and return the answer.

        Args:
            is_over: asked every POLL_S seconds whether the child has had its time; then it is ended.

        Raises:
            Ended: the child ended, by itself or because its time was over.
            Exception: the one that the child answers with.
        """
        try:
            self.connection.send(message)
            while not self.connection.poll(POLL_S):
                if self.process.poll() is not None and not self.connection.poll():
                    raise EOFError  # though a process that it has forked may hold its end of the connection
                if is_over():
                    self.end()
                    raise Ended("ran on after its time limit; its process was killed", None)
            is_answer, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            status = self.wait(DYING_S)
            self.end()
            raise Ended(ending(status), status) from None
        if not is_answer:
            raise answer
        return answer

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, a signal if negative; None if the process has not ended after ``seconds``."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Kill the process and all that it has started, of its group or not."""
        started = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def die_with(parent: int) -> None:
    """End this process when its parent ends, by Linux's kernel, even where it stands still just then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended by now
        sys.exit(1)


def serve(connection: Connection) -> None:
    """Call what comes over the connection, after a path for modules, until it is closed."""
    sys.path[:] = connection.recv()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        except Exception as error:  # of an import that finding the function takes
            connection.send((False, error))
            continue
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, error
        connection.send(answer)


if __name__ == "__main__":
    if sys.argv[1] == "run":  # in the place of this process, which keeps its number and ends with its parent
        die_with(int(sys.argv[2]))
        os.execvp(sys.argv[3], sys.argv[3:])
    serve(Connection(int(sys.argv[2])))
