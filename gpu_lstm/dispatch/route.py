"""The one path of every call: its route, decided once per kind of call and state of the process, then looked up."""

import builtins
from typing import Any

import torch

from ..backends.layer_loop import computes_in_float32
from ..backends.torch_rnn import MOST_STEPS
from ..call.choices import KERNEL_BACKENDS, Backend, chosen_backends, requested_backend
from ..call.modes import Recording, Transforms, constant_when_traced, recurrent_precision
from ..call.request import Request
from ..execution.operators import AUTO, count_flops, operator_name
from ..kernels import cache, layer
from ..kernels.problem import Problem
from . import available, race
from .kind import Kind, describe, dtype_of, kind_of
from .run import Route, execute

MOST_ROUTES = 4096  # that are kept; a program with more kinds of calls decides again
BATCH_OF_A_GRAPH = 16  # assumed, whatever the batch is
TOO_MANY = MOST_STEPS + 1  # steps, which are a power of two and count as the next one, as in `kind_of`

_routes: dict[tuple, Route] = {}
# By what operators are told of it; torch.compile of torch 2.9 does not trace Backend(name).
_BY_NAME = {operator_name(backend, asked): backend for backend in Backend for asked in (True, False)}


def run(call: Request) -> tuple[Any, Any]:
    """The output and the final states, in the user's form, by the route of the call."""
    return execute(route_of(call), call)


def route_of(call: Request) -> Route:
    """How a call runs: looked up, or decided now."""
    if call.modes.recording != Recording.NOBODY:
        return _route_while_watched(call) if call.modes.recording == Recording.WATCHED else _route_in_a_graph(call)
    x, steps, (lengths, resets, _, reset_states) = call.x, call.steps, call.traversal
    # What a route depends on, as a call has it at hand: all of `kind_of` follows from it. Steps are those of a power of
    # two; bias_c is the only tensor of lstm_layer that options say nothing about.
    key = (
        call.options, x.dtype, call.states[0][1].dtype, x.device, (steps - (steps != TOO_MANY)).bit_length(),
        call.batch, call.form.packed is None, None if lengths is None else lengths.dtype, resets is None,
        reset_states is None, call.learns, call.modes, call.weights[0][0].bias_c is None,
    )  # fmt: skip
    route = _routes.get(key)
    if route is None:
        kind = kind_of(call)
        try:
            route = race.build(call, kind, race.decide(call, kind, able_to_run(call, kind)).backend)
        except torch.OutOfMemoryError:
            if requested_backend(call.options.backend) is not Backend.AUTO:
                raise
            backend = race.other_than_kernels(kind)
            what = f"backend 'auto' uses {backend.value!r} for {describe(kind, x.device)}"
            cache.warn_once(f"{what}: memory is full, where the kernels have to be verified")
            return race.build(call, kind, backend)  # the next call tries again
        if not call.modes.capturing:  # when nothing is verified or raced
            if len(_routes) >= MOST_ROUTES:
                _routes.clear()
            _routes[key] = route
    return route


def forget() -> None:
    """Drop all decisions and plans, so that later calls decide again: more is known."""
    _routes.clear()
    race.decided.clear()
    layer.forget_layers()


def able_to_run(call: Request, kind: Kind) -> Backend:
    """The backend that runs a kind of call unless another wins a race; errors are those of available.select."""
    return available.select(call.options.backend, call.x.device, kind, call.modes.transforms == Transforms.REFERENCE)


def _route_while_watched(call: Request) -> Route:
    """Nothing is raced; kernels run as operators. Sizes may be symbols, or tensors of torch.jit.trace."""
    kind = kind_of(call._replace(steps=1, batch=1))
    backend = able_to_run(call, kind)
    asked = requested_backend(call.options.backend) is not Backend.AUTO
    if backend in KERNEL_BACKENDS and not asked and available.is_compiled_once(backend):
        backend = race.other_than_kernels(kind)  # so that what is recorded runs without the package as well
    if backend not in KERNEL_BACKENDS:
        return Route(backend, dtype_of(call))
    count_flops()
    wide = computes_in_float32(backend, dtype_of(call))
    return operators_route(backend, dtype_of(call), operator_name(backend, asked), wide)


def operators_route(backend: Backend, dtype: torch.dtype, operators: str | None, wide: bool) -> Route:
    """Return the route of a call whose layers are operators, with results in `dtype`, computed in float32 if `wide`."""
    return Route(backend, torch.float32 if wide else dtype, operators, results=dtype if wide else None)


def _route_in_a_graph(call: Request) -> Route:
    """In a graph of torch.compile, for all sizes: nothing is raced, and every backend is one operator per layer.

    torch's ONNX exporter, which knows no operator of ours, gets torch's own LSTM or GRU.
    """
    if call.modes.recording == Recording.ONNX and isinstance(call.steps, torch.SymInt):
        # The file would say that T is free, and fail for any T but the example's.
        raise RuntimeError("ONNX: the number of steps is free only in a model that gpu_lstm.to_torch has converted")
    kind = kind_of(call._replace(steps=race.LONGEST, batch=BATCH_OF_A_GRAPH, learns=True))
    transformed = call.modes.transforms == Transforms.REFERENCE
    # A block that the traced function opens is known to the tracer alone; one around it binds the graph.
    chosen = call.options.backend or chosen_backends[0].value
    name, problem, wide = _answer(chosen, call.x.device, transformed, tuple(map(tuple, kind.problems)), *kind[1:])
    if problem:
        raise getattr(builtins, name, RuntimeError)(problem)  # torch's own, as where memory is full, are such
    if call.modes.recording == Recording.ONNX and name.startswith(AUTO):
        name, wide = race.other_than_kernels(kind).value, False
    backend, compiled = _BY_NAME[name], call.modes.recording == Recording.COMPILED
    operators = name if not transformed and (compiled or backend in KERNEL_BACKENDS) else None
    return operators_route(backend, kind.dtype, operators, wide)


@constant_when_traced
def _answer(
    chosen: str | Backend | None, device: torch.device, transformed: bool, problems: tuple[tuple, ...], *others: Any
) -> tuple[str, str, bool]:
    """Return the name of the backend for operators, an empty error, and whether the backend computes in float32.

    The Kind is given as plain tuples. On failure, return the name of the error's class, its text, and False.

    torch.compile carries strings, but no exception.
    """
    precision = recurrent_precision(Problem(*problems[0]).dtype)
    kind = Kind(tuple([Problem(*each)._replace(precision=precision) for each in problems]), *others)
    try:
        able = available.select(chosen, device, kind, transformed)
        if able in KERNEL_BACKENDS and requested_backend(chosen) is Backend.AUTO:
            winner = race.expected_winner(kind, able, device).backend
            return operator_name(winner, asked=False), "", computes_in_float32(winner, kind.dtype)
        return able.value, "", computes_in_float32(able, kind.dtype)
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        return type(error).__name__, str(error), False
