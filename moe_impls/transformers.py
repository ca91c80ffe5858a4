"""The experts of Hugging Face transformers models by the implementations of this project."""

from __future__ import annotations

from moe_impls.experts_module import Form, Refused, experts_of, form_of

__all__ = ["Form", "Refused", "experts_of", "form_of"]
