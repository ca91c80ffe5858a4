"""Every whole layer is right: see ``correctness.layer_checks``. So are the checks."""

from __future__ import annotations

from correctness.layer_checks import LayerCase


def test_layer(layer_case: LayerCase) -> None:
    layer_case.run()
