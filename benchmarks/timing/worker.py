"""One of two versions of this project, measured by the other: a process that times what it is told to.

    python worker.py ROOT NAME INPUTS

ROOT is a folder that holds the package ``moe_impls``, NAME an implementation of it, INPUTS a file of tensors.
Only what every version has in common is used. Commands come line by line on standard input, and answers go
to standard output: ``results FILE`` writes y and the gradients to a file; ``sample N`` answers the seconds a
call of N calls; ``anew`` reads the tensors into other memory; ``overwrite FILE`` reads others into the same.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import time

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main(root: str, name: str, path: str) -> None:
    if sys.platform == "linux":  # the process ends with its parent, even where it stands still just then
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.path.insert(0, root)
    import torch

    import moe_impls

    forward = moe_impls.resolve(name).forward

    def read():
        given = torch.load(path)
        gradients = given["gradients"]
        leaves = {n: t.requires_grad_(gradients) for n, t in given["tensors"].items()}
        weights = {n: leaves.get(n) for n in ("w_in", "b_in", "w_out", "b_out")}
        experts = moe_impls.Experts(**weights, **given["options"])
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

    answers = sys.stdout
    sys.stdout = sys.stderr  # what else is printed is no answer
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "results":
            torch.save(dict(zip(["y", *leaves], (t.detach() for t in call()), strict=False)), argument)
            print("done", file=answers, flush=True)
        elif command == "anew":
            leaves, call, overwrite = read()
            print("done", file=answers, flush=True)
        elif command == "overwrite":
            overwrite(torch.load(argument))
            print("done", file=answers, flush=True)
        elif command == "sample":
            synchronise()
            begin = time.perf_counter()
            for _ in range(int(argument)):
                call()
            synchronise()
            print((time.perf_counter() - begin) / int(argument), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
