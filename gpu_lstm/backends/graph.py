"""A layer as one operator, gpu_lstm::layer: what graphs of torch.compile, exported programs and dispatch modes see.

Traced by itself, torch's LSTM would be decomposed into its steps, and lose dropout and autocast's dtype.

What oneDNN and cuDNN save for backward has a size that only they know, so it cannot be part of a graph of tensors. On
the backends without kernels of their own, forward therefore runs with its own autograd graph, and returns instead of
the gates an empty tensor that has this graph as an attribute, and is saved for backward. Where only the elements were
saved (by hooks that copy, in CUDA graphs, in an exported program), backward recomputes the layer.
"""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import _broadcast_to_and_flatten, tree_flatten, tree_unflatten

from ..call.choices import KERNEL_BACKENDS, Backend
from ..call.modes import Recording, alive, constant_when_traced, gradients_are_differentiated, recurrent_precision
from ..call.noise import Noise
from ..call.prepare import Call
from ..call.sequences import Traversal
from ..call.weights import State, Weights
from ..kernels.problem import Inputs, problem_of
from . import fused, kernels, reference, torch_lstm
from .fused import Saved, traversal_of, weights_of
from .layers import cast, one_after_another, without_autocast

_log_once = functools.cache(logging.getLogger("gpu_lstm").warning)
_LIBRARY = torch.library.Library("gpu_lstm", "FRAGMENT")
SECOND = len(Inputs._fields)  # among the tensors that are given, where the Weights of torch's second direction begin
NAMES = *Inputs._fields, *(f"{name}_reverse" for name in Weights._fields)
_GIVEN = ", ".join(f"Tensor? {name}=None" for name in NAMES)
try:
    for _schema in (
        f"layer(bool reverse, str backend, bool save, bool recompute, {_GIVEN}) "
        "-> (Tensor h, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)",
        "layer_backward(bool reverse, str backend, Tensor?[] gradients, Tensor[] saved, bool[] needed, "
        "Tensor?[] given) -> Tensor[]",
    ):
        _LIBRARY.define(_schema, tags=(torch.Tag.needs_exact_strides,))
except RuntimeError as error:
    raise ImportError(
        "gpu_lstm was imported twice, say from two folders, and its operators can be registered once: restart Python"
    ) from error
OPERATOR = torch.ops.gpu_lstm.layer.default
BACKWARD = torch.ops.gpu_lstm.layer_backward.default


def run(call: Call, dtype: torch.dtype, backend: Backend) -> tuple[Tensor, list[State]]:
    """All layers of a call, in `dtype`, by operators: output [T, B, D*P] and the final states as Call.states."""
    learns = any(one.weight_hh.requires_grad for layer in call.weights for one in layer)
    if call.modes.recording == Recording.WATCHED and torch.jit.is_tracing() and call.modes.grad and learns:
        raise RuntimeError(
            f"torch.jit.trace cannot record the gradients of backend {backend.value!r}: trace within torch.no_grad(), "
            "or with backend 'torch'"
        )

    if torch.compiler.is_exporting():
        _tell_what_a_program_needs()

    def direction(
        row: int, x: Tensor, state: State, weights: Weights, traversal: Traversal, noise: Noise
    ) -> tuple[Tensor, State]:
        x, state, weights = cast(x, state, weights, dtype)
        given = fused.inputs_of(x, state, weights, traversal, noise)
        return _run_operator(call, given, traversal.reverse, backend)

    def both_directions(x: Tensor, state: State, layer: list[Weights]) -> tuple[Tensor, State]:
        x, state, first = cast(x, state, layer[0], dtype)
        second = [t for weights in layer[1:] for t in weights.to(dtype)]
        return _run_operator(call, [*Inputs(x, *state, *first), *second], False, backend)  # type: ignore[arg-type]

    if backend is Backend.TORCH and call.traversal.is_plain() and call.options.kind != "lstm_layer":
        return torch_lstm.layer_by_layer(call._replace(x=call.x.to(dtype)), dtype, both_directions)
    rows = call.kernel_rows() if backend in KERNEL_BACKENDS else call.state_rows()
    y, rows = one_after_another(call, direction, backend.value, dtype, rows)
    return y, call.pack_rows(rows)


@constant_when_traced
def _tell_what_a_program_needs() -> None:
    """Once a process, and no warning, since nothing is wrong."""
    _log_once(
        "the exported program calls operators of gpu_lstm: it loads only where that was imported before; export "
        "gpu_lstm.to_torch(model) for one that needs torch alone"
    )


def _run_operator(call: Call, inputs: Sequence[Tensor | None], reverse: bool, backend: Backend) -> tuple[Tensor, State]:
    save = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
    with without_autocast(call):
        h, h_n, c_n, *_ = OPERATOR(reverse, backend.value, save, call.options.recompute, *inputs)
    return h, (h_n, c_n)


def gradients_of(
    reverse: bool, backend: str, gradients: Sequence[Tensor | None], saved: Sequence[Tensor], needed: Sequence[bool],
    given: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the given tensors where `needed`, from those of h, h_n and c_n; `saved`: h, gates and c.

    By the operator; by the reference where they may be differentiated, to any order, or several of each come at once.
    """
    if are_batched(gradients) or gradients_are_differentiated(saved[0], [*saved, *given, *gradients]):
        run = partial(_without_kernels, reverse=reverse, backend=Backend.REFERENCE)
        return reference.gradients(run, [*map(alive, given)], gradients, needed)
    with torch.no_grad():
        found = iter(BACKWARD(reverse, backend, list(gradients), list(saved), list(needed), list(given)))
    return [next(found) if need else None for need in needed]


def are_batched(gradients: Sequence[Tensor | None]) -> bool:
    """Whether autograd propagates several at once (`is_grads_batched`): by a vmap of its own, not torch.func's."""
    return any([d is not None and _functorch.is_legacy_batchedtensor(d) for d in gradients])


def _kernels_for(given: Inputs, reverse: bool, backend: Backend) -> Any:
    problem = problem_of(given, reverse, recurrent_precision(given.x.dtype))
    return kernels.layer_of(backend, problem, given.x.device)


def _without_kernels(given: Sequence[Any], reverse: bool, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
    """h, h_n and c_n, by torch's operators, which autograd records."""
    inputs, second = Inputs(*given[:SECOND]), given[SECOND:]
    directions = [weights_of(inputs), *([Weights(*second)] if second and second[0] is not None else [])]
    x, h0, c0, *_ = inputs
    if backend is Backend.TORCH:
        if h0.dim() == 3:
            h, (h_n, c_n) = torch_lstm.stack(x, (h0, c0), [directions])
        else:
            h, (h_n, c_n) = torch_lstm.layer(x, (h0, c0), weights_of(inputs), traversal_of(inputs, reverse))
        return h, h_n, c_n
    if len(directions) == 1:
        return reference.run_inputs(inputs, reverse)
    parts = [reference.run_inputs(Inputs(x, h0[d], c0[d], *each), d == 1) for d, each in enumerate(directions)]
    hs, h_ns, c_ns = zip(*parts)
    return torch.cat(hs, 2), torch.stack(h_ns), torch.stack(c_ns)


def _with_autograd(
    given: Sequence[Any], reverse: bool, backend: Backend, record: bool = True
) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
    """Forward, with its own autograd graph if `record`: the leaves (the given tensors, detached), and h, h_n, c_n."""
    with _apart(given[0], record):
        leaves = [t if t is None else t.detach().requires_grad_(record and t.is_floating_point()) for t in given]
        return leaves, _without_kernels(leaves, reverse, backend)


@contextlib.contextmanager
def _apart(x: Tensor, record: bool) -> Iterator[None]:
    """A block inside an operator, where autograd is off: turned on if `record`; no autocast; on x's device."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with (
        torch._C._ForceDispatchKeyGuard(include, exclude & torch._C._after_autograd_keyset),
        torch.set_grad_enabled(record), torch.autocast(x.device.type, enabled=False),
        torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext(),
    ):  # fmt: skip
        yield


def _forward(reverse, backend, save, recompute, *given):
    inputs, way = Inputs(*given[:SECOND]), Backend(backend)
    x, _, c0, *_ = inputs
    nothing, no_c = x.new_empty(0), c0.new_empty(0, dtype=torch.float32)
    if way in KERNEL_BACKENDS:
        h, h_n, c_n, gates, c = fused.forward(_kernels_for(inputs, reverse, way), inputs, save)
        return h, h_n, c_n.to(c0.dtype), nothing if recompute or not save else gates, no_c if c is None else c
    leaves, results = _with_autograd(given, reverse, way, save)
    if save:
        nothing.graph = leaves, results
    h, h_n, c_n = (t.detach() for t in results)
    return h.contiguous(), h_n.clone(), c_n.clone(), nothing, no_c


def _forward_fake(reverse, backend, save, recompute, x, h0, c0, *_):
    directions = h0.shape[0] if h0.dim() == 3 else 1
    h = x.new_empty(*x.shape[:-1], directions * h0.shape[-1])
    by_kernels = Backend(backend) in KERNEL_BACKENDS and save
    gates = x.new_empty((*x.shape[:2], 4 * c0.shape[-1]) if by_kernels and not recompute else (0,))
    c = c0.new_empty((*x.shape[:2], c0.shape[-1]) if by_kernels else (0,), dtype=torch.float32)
    return h, torch.empty_like(h0), torch.empty_like(c0), gates, c


def _backward(reverse, backend, gradients, saved, needed, given):
    (h, gates, c), way = saved, Backend(backend)
    if way in KERNEL_BACKENDS:
        inputs = Inputs(*given[:SECOND])
        layer = _kernels_for(inputs, reverse, way)
        names = [name for name, need in zip(NAMES, needed) if need]
        every = fused.gradients(layer, Saved(inputs, h, gates, c), gradients, set(names))
        found = [every[name] for name in names]
    else:
        leaves, results = gates.graph if hasattr(gates, "graph") else _with_autograd(given, reverse, way)
        pairs = [(result, d) for result, d in zip(results, gradients) if d is not None]
        wanted = [t for t, need in zip(leaves, needed) if need]
        with _apart(given[0], record=False):
            found = torch.autograd.grad(
                [result for result, _ in pairs], wanted, [d for _, d in pairs], retain_graph=True,
                materialize_grads=True,
            )  # fmt: skip
    # The gradients of both biases may be the same tensor.
    return [d.clone() if d.dim() == 1 else d.contiguous() for d in found]


def _backward_fake(reverse, backend, gradients, saved, needed, given):
    wanted = (t for t, need in zip(given, needed) if need)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.reverse, ctx.backend, _, _, *given = inputs
    h, _, _, gates, c = output
    ctx.mark_non_differentiable(gates, c)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, gates, c, *given)


def _gradients(ctx: Any, *output_gradients: Tensor | None) -> tuple:
    saved, given, needed = ctx.saved_tensors[:3], ctx.saved_tensors[3:], ctx.needs_input_grad[4:]
    found = gradients_of(ctx.reverse, ctx.backend, output_gradients[:3], saved, needed, given)
    return None, None, None, None, *found


class InTransforms(torch.autograd.Function):
    """The operator for transforms of torch.func, which refuse what is registered below."""

    forward = staticmethod(OPERATOR)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)


def _one_after_another(operator: Any, info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    """How an operator is vmapped: one call after another, say for Jacobians row by row."""
    flat, spec = tree_flatten(arguments)
    given = list(zip(flat, _broadcast_to_and_flatten(in_dims, spec)))  # type: ignore[arg-type]
    each = []
    for k in range(info.batch_size):
        own = [t if dim is None else t.select(dim, k) for t, dim in given]
        each.append(operator(*tree_unflatten(own, spec)))
    kind = type(each[0])  # a tuple or a list
    results = kind(torch.stack(tensors) for tensors in zip(*each))
    return results, kind([0]) * len(results)


for _operator, _run, _fake in (OPERATOR, _forward, _forward_fake), (BACKWARD, _backward, _backward_fake):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_operator, _run, _key)
    torch.library.register_fake(_operator, _fake, lib=_LIBRARY)
    torch.library.register_vmap(_operator, partial(_one_after_another, _operator), lib=_LIBRARY)
torch.library.register_autograd(OPERATOR, _gradients, setup_context=_setup_context, lib=_LIBRARY)


_MATRICES = {
    first + Weights._fields.index(name): name
    for name in ("weight_ih", "weight_hh", "weight_hr") for first in (Inputs._fields.index("weight_ih"), SECOND)
}  # fmt: skip


def _products(given: Sequence[Any]) -> dict[int, int]:
    """Operations of each matrix's product over all steps, by its place; a multiply-add counts as two, as in torch."""
    rows = given[0].shape[0] * given[0].shape[1]  # T B
    return {k: 2 * rows * t.numel() for k, t in enumerate(given) if k in _MATRICES and t is not None}


def _forward_flops(reverse: bool, backend: str, save: bool, recompute: bool, *given: Any, **_: Any) -> int:
    return sum(_products(given).values())


def _backward_flops(
    reverse: bool, backend: str, gradients: list, saved: list, needed: list[bool], given: list, **_: Any
) -> int:
    """One product for each weight's gradient, one for that of its operand, and those that are recomputed."""
    (_, gates, c), total = saved, 0
    recomputed = ("weight_ih", "weight_hh") if gates.dim() < c.dim() else ()
    for k, operations in _products(given).items():
        name = _MATRICES[k]
        total += operations * (needed[k] + (name != "weight_ih" or needed[0]) + (name in recomputed))
    return total


def count_flops() -> None:
    """Register the operators with every open FlopCounterMode, whose registry is a copy made when it was created."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.setdefault(OPERATOR.overloadpacket, _forward_flops)
            registry.setdefault(BACKWARD.overloadpacket, _backward_flops)
