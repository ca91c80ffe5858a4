"""Problems as data, and the inputs made from them.

``from correctness.problems import *`` is all that the line after ``reproduce:`` in a finding needs:

    x, routing, experts, dy = make_inputs(Problem(...))
    logits, selection_bias, dgates = make_router_inputs(RouterProblem(...))
"""

import torch

from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from correctness.problems.routers import RouterProblem, make_router_inputs
from moe_impls.interface import Clamp
from moe_impls.router_interface import RouterSpec

__all__ = ["Clamp", "Problem", "RouterProblem", "RouterSpec", "make_inputs", "make_router_inputs", "torch"]
