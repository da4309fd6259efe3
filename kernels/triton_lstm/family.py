"""What the launcher asks of a family of kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..memory import Buffer, buffers_of
from ..problem import Pass, Problem
from .planning import Plan

Result = Callable[[Problem, dict[str, Tensor]], Tensor]


class Family(NamedTuple):
    """Kernels and what goes with them, in pairs forward and backward. `memory` is what was allocated for a launch."""

    kernels: tuple[Any, Any]
    waits: Callable[[Problem, Plan], bool] = lambda p, plan: False  # whether its programs wait for each other
    buffers: Callable[[Problem, Plan, Pass], dict[str, Buffer]] = lambda p, plan, pass_: buffers_of(p, pass_)  # written
    operands: tuple[Any, Any] = None, None  # operands(p, plan, r, memory): what is read besides the call's tensors
    loops: tuple[Any, Any] = None, None  # loop(launch, arguments, p): all steps, where each is a launch
    results: tuple[Result, Result] = (lambda p, memory: memory["h_ptr"]), (lambda p, memory: memory["dgates_ptr"])
    projects: bool = False  # whether a projection is in the kernels' loop
