"""The layer around the implementations: arguments, shapes, state, noise, and that it trains."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from correctness.checks.balance import EPS32, EPS64, require_close
from evidence.notebook import NotebookMoE
from moe_impls import (
    IMPLEMENTATIONS,
    Clamp,
    Implementation,
    MoE,
    RouterSpec,
    Support,
    cv_squared,
    from_notebook_state_dict,
    resolve,
    to_notebook_state_dict,
)
from moe_impls.interface import DTYPES


def layer(**options) -> MoE:
    """A small layer with D = 5, O = 3, E = 6, H = 7, K = 2 and a gate that is not zero."""
    torch.manual_seed(0)
    made = MoE(5, 3, 6, 7, k=2, **options)
    torch.nn.init.normal_(made.w_gate)
    torch.nn.init.normal_(made.w_noise)
    return made


def tokens(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*leading, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("leading", ((), (4,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)))
def test_leading_dimensions_are_kept(leading: tuple[int, ...]) -> None:
    model, x = layer().eval(), tokens(*leading)
    y, loss = model(x)
    assert y.shape == (*leading, 3)
    assert loss.shape == ()
    flat, flat_loss = model(x.reshape(-1, 5))
    assert torch.equal(y, flat.reshape(y.shape))
    assert torch.equal(loss, flat_loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", (True, False))
def test_the_dtype_is_kept_and_the_loss_is_at_least_float32(dtype: torch.dtype, training: bool) -> None:
    model = layer(dtype=dtype).train(training)
    y, loss = model(tokens(4, dtype=dtype))
    assert y.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (y.float().sum() + loss).backward()
    assert all(p.grad is None or p.grad.dtype == dtype for p in model.parameters())


def test_router_logits_of_a_bfloat16_layer_are_float32() -> None:
    model, x = layer(dtype=torch.bfloat16).eval(), tokens(64, dtype=torch.bfloat16)
    routing, _ = model.gate(x)
    best = (x.float() @ model.w_gate.float()).double().topk(2)
    assert routing.gates.dtype == torch.float32
    assert torch.equal(routing.expert_ids, best.indices)
    require_close("the gates", routing.gates, best.values.softmax(1), EPS32)


def test_autocast_does_not_reach_the_router() -> None:
    model, x = layer().eval(), tokens(64)
    want, _ = model.gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = model.gate(x)
    assert torch.equal(got.gates, want.gates)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("activation", ("relu", "swiglu"))
def test_every_parameter_is_trained(bias: bool, activation: str) -> None:
    model = layer(bias=bias, activation=activation)
    y, loss = model(tokens(64))
    (y.square().sum() + loss).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == {
        "w_gate", "w_noise", "w_in", "w_out", *(("b_in", "b_out") if bias else ())
    }  # fmt: skip


def test_the_loss_is_its_coefficient_times_the_balance() -> None:
    model = layer().eval()
    unit, default, none = (model(tokens(32), *c)[1].item() for c in ((1.0,), (), (0.0,)))
    assert unit > 0
    assert default == pytest.approx(1e-2 * unit)
    assert none == 0


def test_one_expert_has_no_auxiliary_loss() -> None:
    assert MoE(5, 3, 1, 7, k=1)(tokens(4))[1] == 0


def test_a_nan_stays_in_its_token() -> None:
    # Where every expert sees every token, the sizes of products do not depend on where NaN is sent.
    model, x = layer(implementation="dense_mask").eval(), tokens(8)
    want, _ = model(x)
    x[3, 1] = torch.nan
    y, _ = model(x)
    others = torch.arange(8) != 3
    assert y[3].isnan().all()
    assert torch.equal(y[others], want[others])


def test_experts_start_like_linear_layers() -> None:
    model = MoE(400, 30, 4, 100)
    for parameter, inputs in ((model.w_in, 400), (model.b_in, 400), (model.w_out, 100), (model.b_out, 100)):
        assert parameter is not None
        bound = inputs**-0.5
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_gate_starts_at_zero_where_noise_decides_and_else_like_a_linear_layer() -> None:
    noisy, quiet = MoE(400, 3, 40, 5), MoE(400, 3, 40, 5, noisy_gating=False)
    for parameter in (noisy.w_gate, noisy.w_noise, quiet.w_noise):
        assert not parameter.any()
    w_gate, bound = quiet.w_gate.detach(), 400**-0.5
    assert -bound <= w_gate.min() < -0.95 * bound
    assert 0.95 * bound < w_gate.max() <= bound


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size is 0; it must be at least 1"),
        ({"hidden_size": 2.5}, TypeError, "hidden_size is 2.5; it must be an int"),
        ({"k": 9}, ValueError, "k is 9; it must be at most num_experts, 6"),
        ({"k": True}, TypeError, "k is True"),
        ({"bias": "no"}, TypeError, "bias is 'no'; it must be True or False"),
        ({"implementation": 3}, TypeError, "implementation is 3; it must be of type str or Implementation"),
        ({"router": 3}, TypeError, "router is 3; it must be of type RouterSpec or NoneType"),
        ({"generator": 3}, TypeError, "generator is 3; it must be of type Generator"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; valid are relu, .*swiglu"),
        ({"output_activation": "gelu"}, ValueError, "output_activation is 'gelu'; valid are none, relu"),
        ({"combine": "mean"}, ValueError, "combine is 'mean'; valid are sum, logsumexp"),
        ({"clamp": Clamp(2.0)}, ValueError, "clamp is .*; activation .relu. reads none, only"),
        ({"clamp": 7.0, "activation": "swiglu_clamped"}, TypeError, "clamp is 7.0; it must be a Clamp"),
        ({"implementation": "fastest"}, ValueError, "unknown implementation 'fastest'; valid .*index_add"),
        ({"router": RouterSpec(7)}, ValueError, "top_k is 7; .* at most .* 6"),
        ({"router": RouterSpec(1, groups=4), "noisy_gating": False}, ValueError, "groups is 4; .* divide"),
        ({"router": RouterSpec(1, groups=2)}, ValueError, "groups is 2; noisy gating .* groups = 1 only"),
    ],
)  # fmt: skip
def test_the_constructor_names_what_is_wrong(options: dict, error: type[Exception], message: str) -> None:
    sizes = {"input_size": 5, "output_size": 3, "num_experts": 6, "hidden_size": 7, "k": 2}
    with pytest.raises(error, match=message):
        MoE(**{**sizes, **options})


def test_the_numbers_of_a_clamp_are_those_that_the_layer_was_given() -> None:
    clamp = Clamp(0.1, 1.0, 0.25)
    model = layer(activation="swiglu_clamped", output_activation="none", clamp=clamp, noisy_gating=False)
    x = tokens(9)
    want = resolve("index_add").forward(x, model.gate(x)[0], replace(model.experts, clamp=clamp))
    torch.testing.assert_close(model(x)[0], want)
    other = resolve("index_add").forward(x, model.gate(x)[0], replace(model.experts, clamp=Clamp()))
    assert not torch.allclose(model(x)[0], other)
    assert "clamp=Clamp(limit=0.1, alpha=1.0, offset=0.25)" in repr(model) and "clamp" not in repr(layer())


def test_numbers_of_a_clamp_that_an_implementation_does_not_declare_are_refused() -> None:
    mine = Implementation("mine", resolve("sorted_dispatch").forward, Support(clamps=(Clamp(),)))
    layer(implementation=mine, activation="swiglu_clamped")
    with pytest.raises(
        ValueError, match="clamp of implementation mine is Clamp.limit=2.0, .*; valid are Clamp"
    ):
        layer(implementation=mine, activation="swiglu_clamped", clamp=Clamp(2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation of implementation mine is 'gelu'; valid are relu"),
        ({"combine": "logsumexp"}, "combine of implementation mine is 'logsumexp'; valid are sum"),
        ({"dtype": torch.float64}, "dtype of implementation mine is torch.float64; valid are torch.float32"),
        ({"bias": False}, "bias of implementation mine is False; valid are True"),
    ],
)
def test_what_an_implementation_does_not_declare_is_refused(options: dict, message: str) -> None:
    support = Support(activations=("relu",), combines=("sum",), dtypes=(torch.float32,), biases=(True,))
    mine = Implementation("mine", resolve("sorted_dispatch").forward, support)
    wanted = layer(implementation="sorted_dispatch").eval()(tokens(4))[0]
    assert torch.equal(layer(implementation=mine).eval()(tokens(4))[0], wanted)
    with pytest.raises(ValueError, match=message):
        layer(implementation=mine, **options)
    with pytest.raises(ValueError, match="dtype of implementation mine is torch.bfloat16"):
        layer(implementation=mine).bfloat16()(tokens(4, dtype=torch.bfloat16))


def test_a_device_that_an_implementation_does_not_declare_is_refused() -> None:
    mine = Implementation("mine", resolve("sorted_dispatch").forward, Support(devices=("cuda",)))
    with pytest.raises(ValueError, match="device of implementation mine is 'cpu'; valid are cuda"):
        layer(implementation=mine)(tokens(4))


def test_a_token_visits_four_experts_unless_told_otherwise() -> None:
    made = MoE(5, 3, 6, 7)
    assert made.k == 4
    assert made.gate(tokens(2))[0].expert_ids.shape == (2, 4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 6), ValueError, r"x has shape \[2, 6\]; it must be \[..., 5\]"),
        (torch.tensor(1.0), ValueError, r"x has shape \[\]; it must be \[..., 5\]"),
        (torch.zeros(2, 5, dtype=torch.float64), TypeError, "x has dtype torch.float64; .* torch.float32"),
        (torch.zeros(2, 5, device="meta"), ValueError, "x is on meta; .* cpu"),
        ([[0.0] * 5], TypeError, "x is a list"),
    ],
)
def test_forward_names_what_is_wrong(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer()(x)


def _one_by_one(model: NotebookMoE, x: Tensor, k: int) -> Tensor:
    """The linear layer on a module for each expert, one token at a time."""
    logits = x @ model.w_gate
    rows = []
    for t in range(len(x)):
        values, ids = logits[t].topk(k)
        weights = values.softmax(0)
        rows.append(sum(w * model.experts[e](x[t]) for w, e in zip(weights, ids.tolist(), strict=True)))
    return torch.stack(rows)


def _notebook_layer() -> NotebookMoE:
    torch.manual_seed(0)
    model = NotebookMoE(5, 3, 6, 7, k=2).double().eval()
    torch.nn.init.normal_(model.w_gate)
    torch.nn.init.normal_(model.w_noise)
    return model


def test_a_state_dict_of_the_notebook_gives_the_same_layer() -> None:
    theirs, ours = _notebook_layer(), MoE(5, 3, 6, 7, k=2, dtype=torch.float64).eval()
    ours.load_state_dict(from_notebook_state_dict(theirs.state_dict()))
    x = tokens(32, dtype=torch.float64)
    require_close("the output", ours(x)[0], _one_by_one(theirs, x, 2), EPS64)


def test_a_state_dict_converts_there_and_back() -> None:
    theirs = _notebook_layer().state_dict()
    back = to_notebook_state_dict(from_notebook_state_dict(theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    without = to_notebook_state_dict(layer().state_dict(), buffers=False)
    assert theirs.keys() - without.keys() == {"mean", "std"}
    other = _notebook_layer().float()
    other.load_state_dict(to_notebook_state_dict(layer().state_dict()))
    x = tokens(32)
    require_close("the output", layer().eval()(x)[0], _one_by_one(other, x, 2), EPS32)


def test_each_weight_of_the_notebook_reaches_the_converted_layer() -> None:
    """Two layers that agree may both ignore a weight; here each has an effect."""
    x, theirs = tokens(200, dtype=torch.float64), _notebook_layer().state_dict()
    ours = MoE(5, 3, 6, 7, k=2, dtype=torch.float64).eval()
    ours.load_state_dict(from_notebook_state_dict(theirs))
    y, _ = ours(x)
    for name in theirs.keys() - {"mean", "std", "w_noise"}:  # noise has no effect in eval mode
        changed = {**theirs, name: theirs[name] + torch.randn_like(theirs[name])}
        ours.load_state_dict(from_notebook_state_dict(changed))
        assert not torch.equal(ours(x)[0], y), name


def test_converters_name_unknown_and_missing_keys() -> None:
    theirs = _notebook_layer().state_dict()
    with pytest.raises(ValueError, match="state has unknown keys experts.0.fc3.weight"):
        from_notebook_state_dict({**theirs, "experts.0.fc3.weight": torch.zeros(1)})
    missing = {name: value for name, value in theirs.items() if name != "experts.4.fc1.bias"}
    with pytest.raises(ValueError, match="state lacks the keys experts.4.fc1.bias"):
        from_notebook_state_dict(missing)
    with pytest.raises(ValueError, match="b_in, b_out"):
        to_notebook_state_dict(layer(bias=False).state_dict())


FROM_FILE = """
from moe_impls.index_add import forward as index_add

def mine(x, routing, experts, *, combine="sum"):
    return index_add(x, routing, experts, combine=combine)
"""


@pytest.mark.parametrize("kind", ("name", "implementation", "file"))
def test_a_layer_survives_deepcopy_pickle_and_its_state_dict(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FROM_FILE, encoding="utf-8")
    chosen = {"name": "index_add", "implementation": resolve("index_add"), "file": f"{file}:mine"}[kind]
    model = layer(implementation=chosen, generator=torch.Generator().manual_seed(3))
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    loaded = MoE(5, 3, 6, 7, k=2, implementation=chosen, generator=torch.Generator().manual_seed(3))
    loaded.load_state_dict(torch.load(stored))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded
    want = model(tokens(16))
    for made in copies:
        got = made(tokens(16))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    with torch.no_grad():
        model.w_in.zero_()
    assert all(made.w_in.any() for made in copies)  # nothing is shared


def test_noise_is_reproduced_by_the_generator_and_drawn_in_training_only() -> None:
    x = tokens(16)
    model = layer(generator=torch.Generator().manual_seed(3))
    before = torch.get_rng_state()
    first, second = model(x)[0], model(x)[0]
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    assert not torch.equal(first, second)
    assert torch.equal(layer(generator=torch.Generator().manual_seed(3))(x)[0], first)
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    quiet = layer(noisy_gating=False)
    assert torch.equal(quiet(x)[0], quiet(x)[0])


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_a_router_spec_replaces_the_router(score: str) -> None:
    spec = RouterSpec(3, score=score, scale=2.5)
    model = layer(router=spec, noisy_gating=False)
    x = tokens(32)
    routing, load = model.gate(x)
    logits = x @ model.w_gate
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    assert model.k == 3
    assert load.sum() == 3 * 32
    require_close("the gates", routing.gates, 2.5 * scores.topk(3).values, EPS32)


STEPS, BATCH = 200, 256


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's bundled digits: 1,437 to train on and 360 to test, 8 x 8 pixels scaled to [0, 1]."""
    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data)[order] / 16, torch.tensor(data.target)[order]
    return x[360:], y[360:], x[:360], y[:360]


def train(implementation: str, dtype: torch.dtype, loss_coef: float = 1e-2) -> tuple[MoE, list[float]]:
    """The layer as a classifier after STEPS steps of Adam, and the loss at each step."""
    x, target, _, _ = digits()
    torch.manual_seed(0)
    model = MoE(
        64,
        10,
        8,
        32,
        k=2,
        implementation=implementation,
        output_activation="none",
        generator=torch.Generator().manual_seed(1),
        dtype=dtype,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = torch.Generator().manual_seed(2)
    curve = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,), generator=batches)
        y, balance = model(x[batch].to(dtype), loss_coef)
        loss = F.cross_entropy(y, target[batch]) + balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return model.eval(), curve


@functools.cache
def reference_curve() -> Tensor:
    return torch.tensor(train("sorted_dispatch", torch.float64)[1])


def trained(dtype: torch.dtype) -> list[str]:
    """The implementations that declare all that `train` needs in this dtype."""
    supports = {name: resolve(name).support for name in IMPLEMENTATIONS}
    return [
        name
        for name, support in supports.items()
        if support.gradients and dtype in support.dtypes and "cpu" in support.devices
    ]


@pytest.mark.parametrize("implementation", trained(torch.float64))
def test_implementations_train_alike(implementation: str) -> None:
    curve = torch.tensor(train(implementation, torch.float64)[1])
    assert curve[-10:].mean() < 0.2 * curve[:10].mean()
    assert (curve - reference_curve()).abs().max() < 1e-6


@pytest.mark.parametrize("implementation", trained(torch.float32))
def test_a_float32_layer_learns_the_digits(implementation: str) -> None:
    model, _ = train(implementation, torch.float32)
    _, _, x, target = digits()
    accuracy = (model(x.float())[0].argmax(dim=1) == target).double().mean()
    assert accuracy > 0.95


def test_the_auxiliary_loss_balances_the_load() -> None:
    x, _, _, _ = digits()
    with_loss, without = (
        float(cv_squared(train("sorted_dispatch", torch.float32, coef)[0].gate(x.float())[1]))
        for coef in (1e-1, 0.0)
    )
    assert with_loss < 0.5 * without


def test_an_implementation_without_gradients_is_refused_where_they_would_be_needed() -> None:
    layer = MoE(8, 8, 4, 16, k=2, output_activation="none", implementation="packed+prepared")
    x = torch.randn(3, 8)
    with pytest.raises(
        RuntimeError, match="'packed.prepared' has no gradients: call the layer under torch.no"
    ):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)(x)
