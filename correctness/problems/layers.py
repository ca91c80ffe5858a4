"""Problems of whole layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_impls.interface import dtype_name


@dataclass(frozen=True)
class LayerProblem:
    """A layer in one dtype, with parameters drawn anew; the tokens follow from these."""

    dtype: torch.dtype = torch.float32

    @property
    def id(self) -> str:
        """A short name for test ids and messages."""
        return dtype_name(self.dtype)
