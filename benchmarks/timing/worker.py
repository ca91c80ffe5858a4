"""One of two versions of this project, measured by the other: a process that times what it is told to.

    python worker.py ROOT NAME INPUTS DESCRIPTOR

ROOT is a folder that holds the package ``moe_impls``, NAME an implementation of it, INPUTS a file of tensors,
DESCRIPTOR the number of a connection, see ``correctness/session/child.py``. Only what every version has in
common is used. A message is a command and its argument: ``results FILE`` writes y and the gradients to a
file; ``sample N`` answers the seconds a call of N calls; ``anew`` reads the tensors into other memory;
``overwrite FILE`` reads others into the same.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection


def ready(root: str, name: str, path: str):
    """A function of a command and its argument that does what it says."""
    sys.path.insert(0, root)
    import torch

    import moe_impls

    forward = moe_impls.resolve(name).forward

    def read():
        given = torch.load(path)
        gradients = given["gradients"]
        leaves = {n: t.requires_grad_(gradients) for n, t in given["tensors"].items()}
        weights = {n: leaves.get(n) for n in ("w_in", "b_in", "w_out", "b_out")}
        options = given["options"]
        if "clamp" in options:
            options["clamp"] = moe_impls.Clamp(*options["clamp"])
        experts = moe_impls.Experts(**weights, **options)
        routing = moe_impls.Routing(given["expert_ids"], leaves["gates"])

        def call():
            with torch.set_grad_enabled(gradients):
                y = forward(leaves["x"], routing, experts, combine=given["combine"])
            return (y, *torch.autograd.grad(y, list(leaves.values()), given["dy"])) if gradients else (y,)

        def overwrite(other):
            for n, t in leaves.items():
                t.data.copy_(other["tensors"][n])
            for n in ("expert_ids", "dy"):
                given[n].copy_(other[n])

        torch.set_num_threads(given["threads"])
        return leaves, call, overwrite

    leaves, call, overwrite = read()

    def synchronise():
        if leaves["x"].is_cuda:
            torch.cuda.synchronize(leaves["x"].device)

    def answer(command, argument):
        nonlocal leaves, call, overwrite
        if command == "results":
            torch.save(dict(zip(["y", *leaves], (t.detach() for t in call()), strict=False)), argument)
        elif command == "anew":
            leaves, call, overwrite = read()
        elif command == "overwrite":
            overwrite(torch.load(argument))
        elif command == "sample":
            synchronise()
            begin = time.perf_counter()
            for _ in range(argument):
                call()
            synchronise()
            return (time.perf_counter() - begin) / argument

    return answer


def serve(connection, *arguments):
    """Answer what comes over the connection until it is closed or something fails."""
    try:
        answer = ready(*arguments)
        while True:
            connection.send((True, answer(*connection.recv())))
    except EOFError:
        pass
    except Exception as error:  # in a class that the other side knows
        connection.send((False, RuntimeError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[-1])), *sys.argv[1:-1])
