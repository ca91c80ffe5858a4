"""Checks of torch's modes on a whole layer: autocast, torch.compile, torch.export."""

from __future__ import annotations

from correctness.checks.case import Check

MODE_CHECKS: tuple[Check, ...] = ()
