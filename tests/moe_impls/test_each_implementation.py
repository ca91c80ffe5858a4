"""What each implementation does where no problem can tell: beyond what is defined, and elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from correctness.problems.catalogue import SMALL
from correctness.problems.inputs import make_inputs
from moe_impls import IMPLEMENTATIONS, Experts, Implementation, Routing, resolve

# Those that compute anything themselves; `compiled` takes the code of `dense_mask`.
OWN = [resolve(name) for name in IMPLEMENTATIONS if name not in ("auto", "compiled")]
HERE = [taken for taken in OWN if taken.is_available() and "cpu" in taken.support.devices]
TRAINED = [taken for taken in HERE if taken.support.gradients and "logsumexp" in taken.support.combines]


def of_biases(*outputs: float) -> Experts:
    """Experts whose outputs are their biases, with D = H = O = 1."""
    E = len(outputs)
    weights = torch.zeros(E, 1, 1), torch.zeros(E, 1), torch.zeros(E, 1, 1), torch.tensor(outputs).view(E, 1)
    return Experts(*weights, activation="relu", output_activation="none")


@pytest.mark.parametrize(("above", "counted"), [(79.5, 79.5), (80.5, 80.0), (1000.0, 80.0)])
@pytest.mark.parametrize("taken", TRAINED, ids=lambda taken: taken.name)
def test_a_gate_of_zero_has_the_gradient_of_an_output_at_most_80_above_the_others(
    taken: Implementation, above: float, counted: float
) -> None:
    gates = torch.tensor([[0.0, 1.0]], requires_grad=True)
    routing = Routing(torch.tensor([[0, 1]]), gates)
    y = taken.forward(torch.zeros(1, 1), routing, of_biases(above, 0.0), combine="logsumexp")
    (grad,) = torch.autograd.grad(y.sum(), gates)
    assert y.tolist() == [[0.0]]
    torch.testing.assert_close(grad, torch.tensor([[math.exp(counted), 1.0]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("taken", TRAINED, ids=lambda taken: taken.name)
def test_an_output_with_almost_no_gate_has_almost_no_gradient_though_it_is_the_largest(
    taken: Implementation,
) -> None:
    routing, experts = Routing(torch.tensor([[0, 1]]), torch.tensor([[1e-12, 1.0]])), of_biases(1.0, 0.0)
    assert experts.b_out is not None
    experts.b_out.requires_grad_()
    y = taken.forward(torch.zeros(1, 1), routing, experts, combine="logsumexp")
    (grad,) = torch.autograd.grad(y.sum(), experts.b_out)
    torch.testing.assert_close(grad, torch.tensor([[1e-12 * math.e], [1.0]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "taken", [taken for taken in HERE if taken.support.gradients], ids=lambda taken: taken.name
)
def test_an_expert_that_no_token_visits_may_overflow(taken: Implementation) -> None:
    experts = replace(of_biases(1.0, 2.0), activation="relu2")
    experts.w_in[1] = 1e30
    leaves = [leaf.requires_grad_() for leaf in (torch.ones(1, 1), *experts.tensors.values())]
    y = taken.forward(leaves[0], Routing(torch.tensor([[0]]), torch.ones(1, 1)), experts)
    grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    assert all(bool(grad.isfinite().all()) for grad in grads if grad is not None)


@pytest.mark.parametrize(
    ("taken", "combine"),
    [pytest.param(taken, c, id=f"{taken.name}-{c}") for taken in HERE for c in taken.support.combines],
)
def test_nothing_is_made_on_the_default_device(taken: Implementation, combine: str) -> None:
    x, routing, experts, _ = make_inputs(replace(SMALL, combine=combine))
    x.requires_grad_(taken.support.gradients)

    def results() -> list[Tensor]:
        y = taken.forward(x, routing, experts, combine=combine)
        return [y.detach(), *(torch.autograd.grad(y.sum(), x) if y.requires_grad else ())]

    wanted = results()
    assert len(wanted) == 1 + taken.support.gradients
    with torch.device("meta"):  # no result can be computed from what is there
        found = results()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
