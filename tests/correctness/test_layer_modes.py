"""Layers are judged in their modes: unusual right ones pass, each wrong one fails its check."""

from __future__ import annotations

import pytest

from correctness.checks.layer_balance import BALANCE
from correctness.checks.layer_compiled import COMPILED
from correctness.checks.layer_loaded import LOADED
from correctness.checks.layer_modes import MODES
from correctness.checks.layer_reuse import REUSE
from correctness.checks.layer_sizes import SIZES
from correctness.checks.layer_training import TRAINING
from tests.correctness import mode_layers, reused_layers, wrong_modes
from tests.correctness.findings import findings

CHECKS = (*TRAINING, *BALANCE, *LOADED, *REUSE, *MODES, *SIZES, *COMPILED)
RIGHT = mode_layers.RIGHT | reused_layers.RIGHT
WRONG = wrong_modes.WRONG | {f"{n}, used again": wrong for n, wrong in reused_layers.WRONG.items()}


@pytest.mark.parametrize("name", RIGHT)
def test_right_layers_pass_in_every_mode(name: str) -> None:
    assert findings(RIGHT[name], CHECKS) == {}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_layers_fail_the_check_of_their_mode(name: str) -> None:
    wrong, check = WRONG[name]
    assert check in findings(wrong, [c for c in wrong.kind.checks if c.name == check])
