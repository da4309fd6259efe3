"""A layer as one operator, gpu_lstm::layer: what graphs of torch.compile, exported programs and dispatch modes see.

Traced by itself torch's LSTM would fall into its steps, a graph for each T, in which torch's decomposition loses
dropout and autocast's dtype. An exported program keeps operators and their derivatives, not an autograd.Function.

What oneDNN and cuDNN keep for backward has a size that only they know, and no place in a graph of tensors. So on the
backends without kernels of their own forward runs with autograd of its own, and hands out a tensor without elements,
in the place of the gates, that has what came of it as an attribute: it lives as long as that tensor, which is saved for
backward. Where only the elements were saved (by hooks that copy, in CUDA graphs, in an exported program), backward
recomputes the layer.
"""

from __future__ import annotations  # torch.compile evaluates those of nested functions, and cannot

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..call.choices import KERNEL_BACKENDS, Backend
from ..call.modes import Recording, gradients_are_differentiated, recurrent_precision
from ..call.noise import Noise
from ..call.prepare import Call
from ..call.sequences import Traversal
from ..call.weights import State, Weights
from ..kernels.problem import problem_of  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout
from . import fused, kernels, reference, torch_lstm
from .fused import DIFFERENTIABLE, Inputs, Saved
from .layers import cast, connect, named, one_after_another, without_autocast

_LIBRARY = torch.library.Library("gpu_lstm", "FRAGMENT")
_LIBRARY.define(
    "layer(Tensor x, Tensor h0, Tensor c0, Tensor[] others, int[] places, bool reverse, str backend, bool save, "
    "bool recompute) -> (Tensor h, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)",
    tags=(torch.Tag.needs_exact_strides,),
)
_LIBRARY.define(
    "layer_backward(Tensor?[] gradients, Tensor[] saved, Tensor x, Tensor h0, Tensor c0, Tensor[] others, "
    "int[] places, bool reverse, str backend, bool[] needed) -> Tensor[]",
    tags=(torch.Tag.needs_exact_strides,),
)
OPERATOR = torch.ops.gpu_lstm.layer.default
BACKWARD = torch.ops.gpu_lstm.layer_backward.default

STATES = 3  # x, h0 and c0 travel by themselves, the other Inputs as a list of those that are there and their places
SECOND = len(Inputs._fields)  # from this place on the Weights of torch's second direction


def run(call: Call, dtype: torch.dtype, backend: Backend) -> tuple[Tensor, list[State]]:
    """All layers of a call, in `dtype`, by operators: output [T, B, D*P] and the final states as Call.states."""
    _refuse_tracing(call, backend)
    if backend is Backend.TORCH and call.traversal.is_plain() and call.options.kind != "lstm_layer":
        return _by_torch(call, dtype)

    def direction(
        row: int, x: Tensor, state: State, weights: Weights, traversal: Traversal, noise: Noise
    ) -> tuple[Tensor, State]:
        x, state, weights = cast(x, state, weights, dtype)
        with without_autocast(call):
            given = fused.inputs_of(x, state, weights, traversal, noise)
            h, h_n, c_n, *_ = _call(given, traversal.reverse, backend.value, call.options.recompute)
        return h, (h_n, c_n)

    y, rows = one_after_another(call, direction, backend.value, dtype, call.state_rows())
    return y, call.pack_rows(rows)


def _refuse_tracing(call: Call, backend: Backend) -> None:
    learns = any(one.weight_hh.requires_grad for layer in call.weights for one in layer)
    if call.modes.recording == Recording.WATCHED and torch.jit.is_tracing() and call.modes.grad and learns:
        raise RuntimeError(
            f"torch.jit.trace cannot record the gradients of backend {backend.value!r}: trace within torch.no_grad(), "
            "or with backend 'torch'"
        )


def _by_torch(call: Call, dtype: torch.dtype) -> tuple[Tensor, list[State]]:
    """torch's own LSTM, both directions of a layer at once."""
    options, states = call.options, call.layer_states()
    _, kept = torch_lstm.draw(call.weights, (call.steps, call.batch), dtype, options)
    x = call.x
    finals: list[State] = []
    for k, layer in enumerate(call.weights):
        x, (h0, c0), first = cast(x, states[k], layer[0], dtype)
        second = layer[1].to(dtype) if len(layer) == 2 else ()
        with named(k, None, "torch"), without_autocast(call):
            y, h_n, c_n, *_ = _call([*Inputs(x, h0, c0, *first), *second], False, "torch", False)
        x = connect(x, y, None, kept[k], options)
        finals.append((h_n, c_n))
    return x, call.pack_layers(finals)


def _call(given: Sequence[Tensor | None], reverse: bool, backend: str, recompute: bool) -> tuple[Tensor, ...]:
    save = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in given])
    return OPERATOR(*_flat(given), reverse, backend, save, recompute)


def _flat(given: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[int]]:
    """As the operators have it; torch.jit.trace records no list with None in it."""
    x, h0, c0, *others = given
    assert x is not None
    assert h0 is not None
    assert c0 is not None
    return x, h0, c0, [t for t in others if t is not None], [k for k, t in enumerate(others, STATES) if t is not None]


def _inputs(
    x: Tensor, h0: Tensor, c0: Tensor, others: list[Tensor], places: list[int]
) -> tuple[Inputs, Weights | None]:
    """The reverse of `_flat`: Inputs, and the Weights of torch's second direction."""
    there = dict(zip(places, others))
    first = Inputs(x, h0, c0, *(there.get(k) for k in range(STATES, SECOND)))  # type: ignore[arg-type]
    if SECOND not in there:
        return first, None
    return first, Weights(*(there.get(SECOND + k) for k in range(len(Weights._fields))))  # type: ignore[arg-type]


def forward_of(layer: Any, given: Inputs, save: bool, recompute: bool) -> tuple[Tensor, ...]:
    """What autograd.LSTMLayer does forward, by the operator: h, h_n, c_n, gates and c."""
    return OPERATOR(*_flat(given), layer.problem.reverse, layer.backend, save, recompute)


def gradients_of(
    layer: Any, saved: Sequence[Tensor | None], output_gradients: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """As fused.gradients, by the operator; `saved`: Inputs, h, gates and c."""
    *there, h, gates, c = saved
    given = Inputs(*there)  # type: ignore[arg-type]  # those at the end may be left out
    found = BACKWARD(
        list(output_gradients), [h, gates, c], *_flat(given), layer.problem.reverse, layer.backend, list(needed)
    )
    return [gradient if need else None for gradient, need in zip(found, needed)]


def _kernels_for(given: Inputs, reverse: bool, backend: Backend) -> Any:
    r = fused.recurrence_of(given, reverse, recurrent_precision(given.x.dtype))
    return kernels.layer_of(backend, problem_of(given.x, r), given.x.device)


@contextlib.contextmanager
def _apart(x: Tensor, record: bool) -> Iterator[None]:
    """Inside an operator: autograd as `record` says, which is off there in any case, no autocast, and x's device."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with (
        torch._C._ForceDispatchKeyGuard(include, exclude & torch._C._after_autograd_keyset),
        torch.set_grad_enabled(record), torch.autocast(x.device.type, enabled=False),
        torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext(),
    ):  # fmt: skip
        yield


def _run_without_kernels(given: Inputs, second: Weights | None, reverse: bool, backend: Backend) -> tuple[Tensor, ...]:
    """h, h_n and c_n, by torch's operators, which autograd records."""
    state = given.h0, given.c0
    if backend is Backend.REFERENCE:
        return reference.run_inputs(given, reverse)
    if given.h0.dim() == 3:
        h, (h_n, c_n) = torch_lstm.stack(given.x, state, [[given.weights(), *([second] if second else [])]])
    else:
        h, (h_n, c_n) = torch_lstm.layer(given.x, state, given.weights(), given.traversal(reverse))
    return h, h_n, c_n


def _leaves(
    inputs: tuple[Inputs, Weights | None], reverse: bool, backend: Backend, save: bool
) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
    """Forward with autograd of its own: its leaves, as Inputs and Weights, and h, h_n and c_n."""
    given, second = inputs
    with _apart(given.x, record=save):
        own = [None if t is None else t.detach().requires_grad_(save and t.is_floating_point()) for t in given]
        other = None if second is None else [None if t is None else t.detach().requires_grad_(save) for t in second]
        results = _run_without_kernels(Inputs(*own), other and Weights(*other), reverse, backend)  # type: ignore[arg-type]
    return own + (other or []), results


def _forward(x, h0, c0, others, places, reverse, backend, save, recompute):
    inputs, way = _inputs(x, h0, c0, others, places), Backend(backend)
    if way in KERNEL_BACKENDS:
        given, _ = inputs
        h, h_n, c_n, gates, c = fused.forward(_kernels_for(given, reverse, way), given, save)
        gates = x.new_empty(0) if recompute or not save else gates
        return h, h_n, c_n.to(c0.dtype), gates, c0.new_empty(0, dtype=torch.float32) if c is None else c
    kept = x.new_empty(0)
    leaves, results = _leaves(inputs, reverse, way, save)
    if save:
        kept.graph = leaves, results
    h, h_n, c_n = (t.detach() for t in results)
    return h.contiguous(), h_n.clone(), c_n.clone(), kept, c0.new_empty(0, dtype=torch.float32)


def _forward_fake(x, h0, c0, others, places, reverse, backend, save, recompute):
    directions = h0.shape[0] if h0.dim() == 3 else 1
    h = x.new_empty(*x.shape[:-1], directions * h0.shape[-1])
    by_kernels = Backend(backend) in KERNEL_BACKENDS and save
    gates = x.new_empty((*x.shape[:2], 4 * c0.shape[-1]) if by_kernels and not recompute else (0,))
    c = c0.new_empty((x.shape[0], *c0.shape) if by_kernels else (0,), dtype=torch.float32)
    return h, torch.empty_like(h0), torch.empty_like(c0), gates, c


def _backward(gradients, saved, x, h0, c0, others, places, reverse, backend, needed):
    inputs, way = _inputs(x, h0, c0, others, places), Backend(backend)
    h, gates, c = saved
    if way in KERNEL_BACKENDS:
        given, _ = inputs
        layer = _kernels_for(given, reverse, way)
        found = fused.gradients(layer, Saved(given, h, gates, c), gradients, needed[:DIFFERENTIABLE])
        found = found + [None] * (len(needed) - DIFFERENTIABLE)
    else:
        leaves, results = gates.graph if hasattr(gates, "graph") else _leaves(inputs, reverse, way, True)
        pairs = [(result, d) for result, d in zip(results, gradients) if d is not None]
        wanted = [t for t, need in zip(leaves, needed) if need]
        with _apart(x, record=False):
            by_autograd = iter(torch.autograd.grad(
                [result for result, _ in pairs], wanted, [d for _, d in pairs], retain_graph=True,
                materialize_grads=True,
            ))  # fmt: skip
        found = [next(by_autograd) if need else None for need in needed]
    # Both biases' may be the same tensor.
    return [x.new_empty(0) if d is None else d.clone() if d.dim() == 1 else d.contiguous() for d in found]


def _backward_fake(gradients, saved, x, h0, c0, others, places, reverse, backend, needed):
    there = dict(zip([*range(STATES), *places], [x, h0, c0, *others]))
    return [
        torch.empty_like(there[k], memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for k, need in enumerate(needed)
    ]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, h0, c0, others, ctx.places, ctx.reverse, ctx.backend, _, _ = inputs
    h, _, _, gates, c = output
    ctx.mark_non_differentiable(gates, c)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, gates, c, x, h0, c0, *others)


def _gradients(ctx: Any, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple:
    *saved, x, h0, c0 = ctx.saved_tensors[:6]
    others = list(ctx.saved_tensors[6:])
    count = SECOND + len(Weights._fields) if SECOND in ctx.places else SECOND
    needed = [False] * count
    for k, need in zip([*range(STATES), *ctx.places], [*ctx.needs_input_grad[:STATES], *ctx.needs_input_grad[STATES]]):
        needed[k] = need
    if gradients_are_differentiated(saved[0], [*ctx.saved_tensors, dh, dh_n, dc_n]):
        first, second = _inputs(x, h0, c0, others, ctx.places)
        run = partial(_by_reference, reverse=ctx.reverse)
        found = reference.gradients(run, [*first, *(second or ())], (dh, dh_n, dc_n), needed)
    else:
        inputs = x, h0, c0, others, ctx.places
        found = BACKWARD([dh, dh_n, dc_n], list(saved), *inputs, ctx.reverse, ctx.backend, needed)
        found = [d if need else None for d, need in zip(found, needed)]
    dx, dh0, dc0 = found[:STATES]
    return dx, dh0, dc0, [found[k] for k in ctx.places], *(None,) * 5


def _by_reference(given: Sequence[Any], reverse: bool) -> tuple[Tensor, ...]:
    """h, h_n and c_n of the operator, by the reference."""
    first = Inputs(*given[:SECOND])
    if first.h0.dim() == 2:
        return reference.run_inputs(first, reverse)
    directions = [first.weights()] + ([Weights(*given[SECOND:])] if len(given) > SECOND else [])
    parts = [
        reference.run_inputs(Inputs(first.x, first.h0[d], first.c0[d], *weights), d == 1)
        for d, weights in enumerate(directions)
    ]
    h, h_n, c_n = zip(*parts)
    return torch.cat(h, 2), torch.stack(h_n), torch.stack(c_n)


def one_after_another_vmapped(operator: Any) -> Callable[..., tuple]:
    """How an operator is vmapped: one call after another, say for Jacobians row by row."""

    def at(k: int, argument: Any, dim: Any) -> Any:
        if isinstance(argument, list):
            return [at(k, *each) for each in zip(argument, dim or [None] * len(argument))]
        return argument.select(dim, k) if isinstance(argument, Tensor) and dim is not None else argument

    def call_each(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        each = [operator(*(at(k, *both) for both in zip(arguments, in_dims))) for k in range(info.batch_size)]
        results = [torch.stack(tensors) for tensors in zip(*each)]
        if isinstance(each[0], list):
            return results, [0] * len(results)
        return tuple(results), (0,) * len(results)

    return call_each


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("layer", _forward, _key)
    _LIBRARY.impl("layer_backward", _backward, _key)
torch.library.register_fake("gpu_lstm::layer", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("gpu_lstm::layer_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("gpu_lstm::layer", _gradients, setup_context=_setup_context, lib=_LIBRARY)
for _name, _operator in (("layer", OPERATOR), ("layer_backward", BACKWARD)):
    torch.library.register_vmap(f"gpu_lstm::{_name}", one_after_another_vmapped(_operator), lib=_LIBRARY)


def _products(x: Tensor, others: list[Tensor], places: list[int]) -> list[tuple[str, int, int]]:
    """(name of a weight, its place, operations of its product with all steps): two for a multiply-add, as torch's."""
    names = "weight_ih", "weight_hh", "weight_hr"
    known = {first + Weights._fields.index(name): name for name in names for first in (STATES, SECOND)}
    rows = x.shape[0] * x.shape[1]  # T B
    return [(known[k], k, 2 * rows * t.numel()) for t, k in zip(others, places) if k in known]


def _forward_flops(
    x: Tensor, h0: Tensor, c0: Tensor, others: list[Tensor], places: list[int], *_: Any, **__: Any
) -> int:
    """Of products alone."""
    return sum(count for *_, count in _products(x, others, places))


def _backward_flops(
    gradients: list, saved: list, x: Tensor, h0: Tensor, c0: Tensor, others: list, places: list, *rest: Any, **_: Any
) -> int:
    """A product for the gradient of each weight, and one for that of what it multiplies; those that are recomputed."""
    (_, gates, c), needed = saved, rest[-1]
    recomputed = ("weight_ih", "weight_hh") if gates.dim() < c.dim() else ()
    return sum(
        count * (bool(needed[k]) + (name != "weight_ih" or bool(needed[0])) + (name in recomputed))
        for name, k, count in _products(x, others, places)
    )


def count_flops() -> None:
    """Have the FlopCounterModes that are open know the operators; their registry is a copy, made when they were."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.setdefault(OPERATOR.overloadpacket, _forward_flops)
            registry.setdefault(BACKWARD.overloadpacket, _backward_flops)
