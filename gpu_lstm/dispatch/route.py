"""How a call is run: what was decided for its kind."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import graph, reference, schedule, torch_rnn, verify
from ..backends.schedule import Schedule, schedule_of
from ..call.choices import KERNEL_BACKENDS, Backend
from ..call.noise import with_weight_drop
from ..call.prepare import Call
from ..call.weights import State
from ..kernels.layer import Layer
from .kind import Kind


class Route(NamedTuple):
    """Everything that was decided for a kind of call."""

    backend: Backend
    dtype: torch.dtype  # that layers compute in
    as_operators: bool = False  # for graphs and dispatch modes
    layers: Sequence[Layer] = ()  # [L*D], where kernels run in eager mode
    schedule: Schedule | None = None  # likewise


class Decision(NamedTuple):
    """Which backend runs a kind of call, and why."""

    backend: Backend
    why: str
    seconds: dict[str, float] | None = None  # the median of each rival's calls; None: there was no race

    def __str__(self) -> str:
        times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in (self.seconds or {}).items())
        return f"{self.backend.value}: {self.why}" + (f" ({times})" if times else "")


def build(call: Call, kind: Kind, backend: Backend) -> Route:
    """The route of a call by a backend."""
    if backend not in KERNEL_BACKENDS:
        return Route(backend, kind.dtype)
    schedule = schedule_of(call, kind.steps, kind.dtype.itemsize)
    problems = [kind.problem(row, schedule.side_by_side) for row in range(call.options.rows)]
    layers = [verify.layer_of(backend, problem, call.x.device) for problem in problems]
    return Route(backend, kind.dtype, False, layers, schedule)


def run_by(route: Route, call: Call, record: list[reference.Steps] | None = None) -> tuple[Tensor, list[State]]:
    """The output [T, B, D*P] (for a PackedSequence it may be [N, D*P]), and the final states as Call.states.

    The reference appends the Steps of every layer and direction to `record`, if there is one.
    """
    if call.options.drops_weights:
        call = call._replace(weights=with_weight_drop(call.weights, call.options))
    if route.as_operators:
        return graph.run_call(call.padded(), route.dtype, route.backend)
    match route.backend:
        case Backend.TORCH:
            return torch_rnn.run_call(call, route.dtype)
        case Backend.REFERENCE:
            return reference.run_call(call.padded(), route.dtype, record)
    assert route.schedule is not None
    return schedule.run_call(call, route.dtype, route.backend, route.layers, route.schedule)
