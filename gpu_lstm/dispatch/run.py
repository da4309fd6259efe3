"""A call by its route: what was decided for its kind."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..backends import one_step, reference, torch_rnn
from ..backends.layer_loop import rounded
from ..call.choices import Backend
from ..call.noise import with_weight_drop
from ..call.request import Request
from ..execution import graph, schedule
from ..execution.schedule import Schedule
from ..kernels.layer import Layer


class Route(NamedTuple):
    """Everything that was decided for a kind of call."""

    backend: Backend
    dtype: torch.dtype  # that layers compute in
    operators: str | None = None  # for graphs and dispatch modes: the backend, as operators are told of it
    layers: Sequence[Layer] = ()  # [L*D], where kernels run in eager mode
    schedule: Schedule | None = None  # likewise
    one_step: bool = False  # whether one_step.py may run it
    results: torch.dtype | None = None  # the dtype that results are rounded to; None: the dtype that layers compute in


def execute(route: Route, request: Request, record: reference.Record | None = None) -> tuple[Any, Any]:
    """The output and the final states, in the user's form. The reference tells `record` the Steps of every layer."""
    backend, dtype, operators, layers, scheduled, is_step, results = route
    options, form = request.options, request.form
    if options.drops_weights:
        request = request._replace(weights=with_weight_drop(request.weights, options))
    if backend is Backend.TORCH and operators is None and (given := torch_rnn.as_given(request)) is not None:
        y, states = given
        return form.output(y), options.role.states_out(form, states)
    if is_step and all([layer.step is not None for layer in layers]):
        of_step, states = one_step.by_one_step(request, layers)
        return of_step if of_step is None else form.output(of_step), options.role.states_out(form, states)
    call = request.call()
    if scheduled is not None:
        y, states = schedule.by_kernels(call, dtype, backend, layers, scheduled)
    elif operators is not None:
        y, states = graph.by_operators(call, dtype, backend, operators)
    elif backend is Backend.TORCH:
        y, states = torch_rnn.by_torch(call, dtype)
    else:
        y, states = reference.by_reference(call, dtype, record)
    if results is not None:
        y, states = rounded(call, results, y, states)
    return form.output(y), options.role.states_out(form, states)
