"""What the suite says of a whole layer, as the columns of a table."""

from __future__ import annotations

from dataclasses import fields
from time import process_time

import torch

import correctness.session.profiles  # noqa: F401  # of Hypothesis
from correctness.checks.case import Subject, cases
from correctness.checks.layers import layer
from correctness.judging.budget import relative_errors
from correctness.judging.finding import CheckFailed, Timeout
from correctness.judging.layer_bench import Bench, Layer
from correctness.session.limits import limited
from moe_impls.interface import dtype_name
from moe_impls.layer_interface import LayerSupport
from moe_impls.router_interface import RouterSpec

PASSED, FAILED, REFUSED = "passed", "failed", "refused"
SECONDS = 60.0  # of processor time for each check


def verdict(name: str, tested: Layer) -> dict[str, str]:
    """Run every check of a layer; SECONDS is the limit of each."""
    subject, begun = layer(name, tested), process_time()
    passed = 0
    skipped: list[str] = []
    findings: dict[str, str] = {}  # by check
    for case in cases([subject]):
        if case.skip:
            skipped.append(case.check.name)
            continue
        try:
            with limited(SECONDS, None):
                case.run()
            passed += 1
        except (CheckFailed, Timeout) as failure:
            findings[case.check.name] = told(str(failure), subject)
    weights = tested.read(tested.make())
    return {
        "router": spec(weights.router),
        "activation": activation(weights.experts.activation, weights.experts.clamp),
        "declared": declared(tested.support),
        "verdict": FAILED if findings else PASSED,
        "passed": str(passed),
        "failed": str(len(findings)),
        "not_declared": " ".join(dict.fromkeys(skipped)),
        "worst_fraction": worst_fraction(tested),
        "failing": " ".join(findings),
        "findings": "; ".join(findings.values()),
        "seconds": f"{process_time() - begun:.1f}",
    }


def refused(reason: str) -> dict[str, str]:
    """Return the columns of a layer that the contract cannot say, with the reason."""
    return {"verdict": REFUSED, "findings": reason}


def told(finding: str, subject: Subject) -> str:
    """Shorten a finding to its first line without the name of the subject."""
    return " ".join(finding.split("\n")[0].removeprefix(f"{subject.name} fails ").split())[:300]


def spec(router: RouterSpec) -> str:
    """Write what differs from the defaults of a spec."""
    shown = [f"K = {router.top_k}", router.score]
    for field in fields(router)[2:]:
        value = getattr(router, field.name)
        if value != field.default:
            shown.append(field.name if value is True else f"{field.name} {value}")
    return ", ".join(shown)


def activation(name: str, clamp: tuple[float, ...]) -> str:
    """Write an activation with its numbers, where it has any."""
    return f"{name} ({', '.join(f'{number:g}' for number in clamp)})" if name == "swiglu_clamped" else name


def declared(support: LayerSupport) -> str:
    """Write what differs from the defaults of a declaration."""
    shown = []
    for field in fields(support):
        value = getattr(support, field.name)
        if value == field.default:
            continue
        if isinstance(value, tuple):
            value = " ".join(dtype_name(dtype) for dtype in value)
        shown.append(field.name if value is True else f"{field.name} {value}")
    return ", ".join(shown)


def worst_fraction(tested: Layer) -> str:
    """Measure the largest error of y in float32 and bfloat16, as a fraction of its budget."""
    worst = []
    for dtype in (torch.float32, torch.bfloat16):
        if dtype in tested.support.dtypes:
            try:
                bench = Bench.of(tested, dtype)
                y = bench.call(bench.x.unsqueeze(0)).squeeze(0)
            except CheckFailed:
                continue
            errors = relative_errors(y.detach(), bench.expected.want["y"], bench.expected.allowed["y"])
            worst.append(float(errors.max()))
    return f"{max(worst):.3g}" if worst else ""
