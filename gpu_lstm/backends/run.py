"""A call by its route: what was decided for its kind."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..call.choices import Backend
from ..call.noise import with_weight_drop
from ..call.prepare import Call
from ..kernels.layer import Layer
from . import graph, reference, schedule, torch_rnn
from .schedule import Schedule


class Route(NamedTuple):
    """Everything that was decided for a kind of call."""

    backend: Backend
    dtype: torch.dtype  # that layers compute in
    operators: str | None = None  # for graphs and dispatch modes: the backend, as operators are told of it
    layers: Sequence[Layer] = ()  # [L*D], where kernels run in eager mode
    schedule: Schedule | None = None  # likewise


def execute(route: Route, call: Call, record: reference.Record | None = None) -> tuple[Any, Any]:
    """The output and the final states, in the user's form.

    The reference tells `record`, if there is one, the Steps of every layer and direction.
    """
    backend, dtype, operators, layers, scheduled = route
    if call.options.drops_weights:
        call = call._replace(weights=with_weight_drop(call.weights, call.options))
    if backend is Backend.TORCH and operators is None and (given := torch_rnn.as_given(call)) is not None:
        return call.results(*given)
    laid_out = call if call.options.one_row and call.form.packed is None else call.laid_out()
    if scheduled is not None:
        y, states = schedule.by_kernels(laid_out, dtype, backend, layers, scheduled)
    elif operators is not None:
        y, states = graph.by_operators(laid_out, dtype, backend, operators)
    elif backend is Backend.TORCH:
        y, states = torch_rnn.by_torch(laid_out, dtype)
    else:
        y, states = reference.by_reference(laid_out, dtype, record)
    return call.results(y, states if call.options.one_row else call.joined(states))
