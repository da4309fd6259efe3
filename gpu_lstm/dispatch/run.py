"""The one path of every call: its route, decided once per kind of call and state of the process, then looked up."""

import builtins
from typing import Any

import torch
from torch import Tensor

from ..backends import graph
from ..call.choices import KERNEL_BACKENDS, Backend, chosen_backends
from ..call.modes import Recording, Transforms, constant_when_traced
from ..call.options import RESET_STATES
from ..call.prepare import Call
from ..call.weights import State, variant_of
from ..kernels import layer
from . import available, race
from .kind import dtype_of, kind_of, size_class
from .race import GraphQuestion
from .route import Route, build, run_by

MOST_ROUTES = 4096  # that are kept; a program with more kinds of calls decides again

_routes: dict[tuple, Route] = {}
_BY_NAME = {backend.value: backend for backend in Backend}  # torch.compile of torch 2.9 does not trace Backend(name)


def run(call: Call) -> tuple[Tensor, list[State]]:
    """As route.run_by, by the route of the call."""
    return run_by(route_of(call), call)


def route_of(call: Call) -> Route:
    """How a call runs: looked up, or decided now."""
    if call.modes.recording != Recording.NOBODY:
        return _route_while_watched(call) if call.modes.recording == Recording.WATCHED else _route_in_a_graph(call)
    x, traversal = call.x, call.traversal
    key = (
        call.options, x.dtype, call.states[0][1].dtype, x.device, size_class(call.steps), call.batch,
        call.form.packed is None, None if traversal.lengths is None else traversal.lengths.dtype,
        traversal.resets is None, traversal.reset_states is None, call.learns, call.modes,
        call.weights[0][0].bias_c is None,  # the only tensor of lstm_layer that options say nothing about
    )  # fmt: skip
    route = _routes.get(key)
    if route is None:
        able, kind = able_to_run(call), kind_of(call)
        route = build(call, kind, race.decide(call, kind, able).backend)
        if not call.modes.capturing:  # when nothing is verified or raced
            if len(_routes) >= MOST_ROUTES:
                _routes.clear()
            _routes[key] = route
    return route


def forget() -> None:
    """Drop all decisions, so that later calls decide again: more is known."""
    _routes.clear()
    race.decided.clear()
    layer.forget()


def able_to_run(call: Call) -> Backend:
    """The backend that runs a call unless another wins a race.

    Raises:
        ValueError, ImportError, RuntimeError, TypeError: an explicitly chosen backend cannot, and why.
    """
    transformed = call.modes.transforms == Transforms.REFERENCE
    return available.select(call.options.backend, call.x.device, dtype_of(call), feature_of(call), transformed)


def feature_of(call: Call) -> str | None:
    """The feature of a call that the fewest backends support; None: all support it."""
    return call.options.feature or (RESET_STATES if call.traversal.reset_states is not None else None)


def _route_while_watched(call: Call) -> Route:
    """Nothing is raced; kernels run as operators. Sizes may be symbols, or tensors of torch.jit.trace."""
    backend = able_to_run(call)
    if backend in KERNEL_BACKENDS:
        graph.count_flops()
    return Route(backend, dtype_of(call), backend in KERNEL_BACKENDS)


def _route_in_a_graph(call: Call) -> Route:
    """In a graph of torch.compile, for all sizes: nothing is raced, and every backend is one operator per layer.

    torch's ONNX exporter, which knows no operator of ours, gets torch's own LSTM or GRU.
    """
    options, traversal, dtype = call.options, call.traversal, dtype_of(call)
    if call.modes.recording == Recording.ONNX and isinstance(call.steps, torch.SymInt):
        # The file would say that T is free, and fail for any T but the example's.
        raise RuntimeError("ONNX: the number of steps is free only in a model that gpu_lstm.to_torch has converted")
    rows = options.cell.rows
    question = GraphQuestion(
        options.backend, chosen_backends[0].value, call.x.device, dtype, feature_of(call),
        transformed=call.modes.transforms == Transforms.REFERENCE,
        # From the weights, whose sizes are constants; a module's attributes are symbols with dynamic=True.
        sizes=tuple([
            (w.weight_ih.shape[1], len(w.weight_hh) // rows, 0 if w.weight_hr is None else w.weight_hh.shape[1])
            for w, *_ in call.weights
        ]),
        directions=len(call.weights[0]), lengths=traversal.lengths is not None or call.form.packed is not None,
        resets=traversal.resets is not None, reset_states=traversal.reset_states is not None,
        noise=options.feature in ("zoneout", "recurrent_dropout"),  # a comparison of rates would be a symbol
        cell=options.cell.name, variant=variant_of(call.weights[0][0]),
    )  # fmt: skip
    name, problem = _answer(*question)
    if problem:
        raise getattr(builtins, name)(problem)
    backend, compiled = _BY_NAME[name], call.modes.recording == Recording.COMPILED
    as_operators = not question.transformed and (compiled or backend in KERNEL_BACKENDS)
    return Route(backend, dtype, as_operators)


@constant_when_traced
def _answer(*question: Any) -> tuple[str, str]:
    """The backend's name and "", or the error's and its text: torch.compile carries strings, but no exception."""
    try:
        return GraphQuestion(*question).answer().value, ""
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        return type(error).__name__, str(error)
