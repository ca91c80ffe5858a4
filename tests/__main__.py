"""``python -m tests``: all that judges implementations, one part after the other, and what each part found.

A part that fails does not keep the next one from running. Options go to the first part, `pytest correctness`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from evidence.mutation.trial import LARGER
from reporting.provenance import ROOT

WORKERS = f"-n{min(os.cpu_count() or 1, 8)}"
OWN_TESTS = ("tests/moe_impls/test_triton.py", "tests/moe_impls/test_each_implementation.py")
INTERPRETED = {"TRITON_INTERPRET": "1"}
# The arguments of pytest, and what is added to the environment.
PARTS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (("correctness",), {}),
    # Without the search for problems and the largest: the interpreter takes minutes for each.
    (("correctness", "--impl=triton_fused", "-k", f"not ({' or '.join(LARGER)})", WORKERS), INTERPRETED),
    ((*OWN_TESTS, "-k=triton", WORKERS), INTERPRETED),
)
CLOSING = re.compile(r"=+ (.* in [\d.]+s.*?) =+")


def run(arguments: tuple[str, ...], added: dict[str, str]) -> tuple[int, str]:
    """Run pytest, its output passed on as it comes: the exit status, and what its closing line says."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=os.environ | added,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
    )  # fmt: skip
    closing = "no closing line"
    assert process.stdout
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := CLOSING.fullmatch(line.strip()):
            closing = found[1]
    return process.wait(), closing


def main(options: list[str]) -> int:
    """Run every part; 1 if any failed."""
    found = []
    for number, (arguments, added) in enumerate(PARTS):
        arguments = (*arguments, *options) if number == 0 else arguments
        named = " ".join([*(f"{name}={value}" for name, value in added.items()), "pytest", *arguments])
        print(f"\n{named}", flush=True)
        begin = time.monotonic()
        status, closing = run(arguments, added)
        found.append((status, f"{named}: {closing}, exit status {status}, {time.monotonic() - begin:.0f} s"))
    print("\nWhat each part found:")
    for status, line in found:
        print(f"  {'failed' if status else 'passed'}  {line}")
    return int(any(status for status, _ in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
