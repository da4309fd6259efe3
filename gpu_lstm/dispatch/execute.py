"""The execution of a call by its route, which was decided for its kind."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import plain_inference, reference, torch_rnn
from ..backends.layer_loop import rounded
from ..call.choices import Backend
from ..call.noise import with_weight_drop
from ..call.request import Request
from ..execution import graph, schedule
from ..execution.schedule import Schedule
from ..kernels.layer import Layer


class Route(NamedTuple):
    """The decisions for a kind of call."""

    backend: Backend
    dtype: torch.dtype  # the dtype of results, in which layers compute unless `wide`
    operators: str | None = None  # the backend's operator_name, if layers run as operators, as in graphs
    layers: Sequence[Layer] = ()  # [L*D], if kernels run in eager mode
    schedule: Schedule | None = None  # if kernels run in eager mode
    plain: bool = False  # whether backends/plain_inference.py may run the call
    wide: bool = False  # whether layers compute in float32, and results are rounded to `dtype`


def execute(route: Route, request: Request, record: reference.Record | None = None) -> tuple[Any, Any]:
    """Run a request, and return the output and the final states in the user's form.

    The reference calls `record` with the Steps of each layer and direction.
    """
    backend, results, operators, layers, scheduled, plain, wide = route
    options, form, dtype = request.options, request.form, torch.float32 if wide else results
    if options.drops_weights:
        request = request._replace(weights=with_weight_drop(request.weights, options))
    y: Tensor | None
    if backend is Backend.TORCH and operators is None and (given := torch_rnn.as_given(request)) is not None:
        y, states = given
    elif plain and all([layer.inference is not None for layer in layers]):
        y, states = plain_inference.infer(request, backend, layers)
    elif scheduled is not None:
        y, states = schedule.by_kernels(request.laid_out(), dtype, backend, layers, scheduled)
    elif operators is not None:
        y, states = graph.by_operators(request.laid_out(), dtype, backend, operators)
    elif backend is Backend.TORCH:
        y, states = torch_rnn.by_torch(request.laid_out(), dtype)
    else:
        y, states = reference.by_reference(request.laid_out(), dtype, record)
    if wide and y is not None:
        y, states = rounded(request.laid_out(), results, y, states)
    return y if y is None else form.output(y), options.role.states_out(form, states)
