"""The path of every call: its route is decided once for each kind of call and state of the process, then looked up."""

import builtins
from typing import Any

import torch

from ..backends.layer_loop import computes_in_float32
from ..backends.torch_rnn import MOST_STEPS
from ..call.choices import KERNEL_BACKENDS, Backend, chosen_backends, requested_backend
from ..call.modes import Recording, Transforms, constant_when_traced, recurrent_precision
from ..call.request import Request
from ..execution.operators import AUTO, BACKEND_OF, count_flops, operator_name
from ..kernels import cache, layer
from ..kernels.problem import Problem
from . import available, race
from .execute import Route, execute
from .kind import Kind, describe, kind_of

MOST_ROUTES = 4096  # the number of routes that are kept; a program with more kinds of calls decides again
BATCH_OF_A_GRAPH = 16  # the assumed batch size, since a graph serves all batch sizes

_routes: dict[tuple, Route] = {}
_compiled: set[bool] = set()  # `backward` of the passes that this process runs by the compiled loops of a CPU


def run_call(request: Request) -> tuple[Any, Any]:
    """Run a call by its route, and return the output and the final states in the user's form."""
    return execute(route_of(request), request)


def route_of(request: Request) -> Route:
    """Return the route of a call, looked up or decided now."""
    if request.modes.recording != Recording.NOBODY:
        watched = request.modes.recording == Recording.WATCHED
        return _route_while_watched(request) if watched else _route_in_a_graph(request)
    x, steps, (lengths, resets, _, reset_states) = request.x, request.steps, request.traversal
    # All facts from which the Kind follows, as a call has them at hand. Steps are rounded as in `kind_of`. bias_c is
    # the only tensor of lstm_layer whose presence does not follow from the options.
    key = (
        request.options, x.dtype, request.states[0][1].dtype, x.device, (steps - 1).bit_length(),
        steps > MOST_STEPS, request.batch, request.form.packed is None, None if lengths is None else lengths.dtype,
        resets is None, reset_states is None, request.learns, request.modes, request.weights[0][0].bias_c is None,
    )  # fmt: skip
    route = _routes.get(key)
    if route is None:
        kind = kind_of(request)
        able = able_to_run(request, kind)
        try:
            route = race.build(request, kind, race.decide(request, kind, able).backend)
        except torch.OutOfMemoryError:
            if requested_backend(request.options.backend) is not Backend.AUTO:
                raise
            backend = kind.fallback
            what = f"backend 'auto' uses {backend.value!r} for {describe(kind, x.device)}"
            cache.warn_once(f"{what}: memory is full, where the kernels have to be verified")
            return race.build(request, kind, backend)  # not kept, so the next call tries again
        if not request.modes.capturing:  # a route from a capture is not kept, since nothing was verified or raced
            if len(_routes) >= MOST_ROUTES or _compiles(able, kind):
                _routes.clear()
            _routes[key] = route
    return route


def forget() -> None:
    """Drop all decisions and plans, so that later calls decide again.

    For tests and tools, after a change that no key of a route contains.
    """
    _routes.clear()
    _compiled.clear()
    race.decided.clear()
    layer.forget_layers()


def _compiles(able: Backend, kind: Kind) -> bool:
    """Whether a kind of call is the first of this process whose passes the compiled loops of a CPU run.

    Earlier calls that started no compilation are decided again after it.
    """
    if able not in KERNEL_BACKENDS or not available.is_compiled_once(able):
        return False
    new = {pass_.backward for pass_ in kind.passes} - _compiled
    _compiled.update(new)
    return bool(new)


def able_to_run(request: Request, kind: Kind) -> Backend:
    """Return the backend that runs a kind of call unless another one wins a race. See available.select for errors."""
    transformed = request.modes.transforms == Transforms.REFERENCE
    return available.select(request.options.backend, request.x.device, kind, transformed)


def _route_while_watched(request: Request) -> Route:
    """Return the route of a call under a dispatch mode or torch.jit.trace, where kernels run as operators.

    Nothing is raced. Sizes may be symbols, or tensors of torch.jit.trace.
    """
    kind = kind_of(request._replace(steps=1, batch=1))
    backend = able_to_run(request, kind)
    if backend not in KERNEL_BACKENDS:
        return Route(backend, kind.dtype)
    name = operator_name(backend, request.options.backend)
    if name.startswith(AUTO) and available.is_compiled_once(backend):
        # A program that is recorded here should also run where the package of this backend is missing.
        return Route(kind.fallback, kind.dtype)
    count_flops()
    return Route(backend, kind.dtype, name, wide=computes_in_float32(backend, kind.dtype))


def _route_in_a_graph(request: Request) -> Route:
    """Return the route of a call in a graph of torch.compile, torch.export or torch's ONNX exporter, for all sizes.

    Nothing is raced. In a graph of torch.compile or torch.export a layer is one operator, whatever its backend is. The
    ONNX exporter knows no operator of ours. It gets torch's own LSTM or GRU, or the reference for a layer that torch
    does not have. If the user chose a kernel backend, it gets the operator.
    """
    if request.modes.recording == Recording.ONNX and isinstance(request.steps, torch.SymInt):
        # The file would declare T free, and fail for every T except the example's.
        raise RuntimeError("ONNX: the number of steps is free only in a model that gpu_lstm.to_torch has converted")
    kind = kind_of(request._replace(steps=race.LONGEST, batch=BATCH_OF_A_GRAPH, learns=True))
    transformed = request.modes.transforms == Transforms.REFERENCE
    # chosen_backends is read here, since this function is traced, and `_answer` is not. The tracer knows the `with
    # backend(...)` blocks that the traced function opens, and `_answer` would not see them. A block around the traced
    # function becomes part of the graph.
    chosen = request.options.backend or chosen_backends[0].value
    name, problem, wide = _answer(chosen, request.x.device, transformed, tuple(map(tuple, kind.problems)), *kind[1:])
    if problem:
        raise getattr(builtins, name, RuntimeError)(problem)  # errors of torch, as for full memory, are RuntimeErrors
    if request.modes.recording == Recording.ONNX and name.startswith(AUTO):
        name, wide = kind.fallback.value, False
    backend, compiled = BACKEND_OF[name], request.modes.recording == Recording.COMPILED
    operators = name if not transformed and (compiled or backend in KERNEL_BACKENDS) else None
    return Route(backend, kind.dtype, operators, wide=wide)


@constant_when_traced
def _answer(
    chosen: str | Backend | None, device: torch.device, transformed: bool, problems: tuple[tuple, ...], *others: Any
) -> tuple[str, str, bool]:
    """Return the operator_name of the backend, "", and whether the backend computes in float32.

    If no backend can run the call, return the name of the error's class, its text, and False. torch.compile can carry
    strings out of this function, but no exception. `problems` and `others` are the fields of the Kind, as plain tuples.
    """
    precision = recurrent_precision(Problem(*problems[0]).dtype)
    kind = Kind(tuple([Problem(*each)._replace(precision=precision) for each in problems]), *others)
    try:
        able = available.select(chosen, device, kind, transformed)
        if operator_name(able, chosen).startswith(AUTO):
            able = race.expected_winner(kind, able, device).backend
        return operator_name(able, chosen), "", computes_in_float32(able, kind.dtype)
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        return type(error).__name__, str(error), False
