"""A layer as one operator, gpu_lstm::whole_layer: torch's own LSTM in a graph of torch.compile, any in an exported one.

Traced by itself torch's LSTM would fall into its steps, a graph for each T, in which torch's decomposition loses
dropout and autocast's dtype. An exported program keeps operators and their derivatives, not an autograd.Function.

What oneDNN and cuDNN keep for backward has a size that only they know, and no place in a graph of tensors. So forward
runs with autograd of its own, and hands out a tensor without elements that has what came of it as an attribute: it
lives as long as that tensor, which is saved for backward. Where only the elements were saved (by hooks that copy, in
CUDA graphs, in an exported program), backward takes the layer again.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import fused, native
from .backends import Backend
from .library import library_of
from .ops import on_the_device_of, one_after_another
from .sequences import Traversal
from .weights import State, Weights

_LIBRARY = library_of(__name__)
_LIBRARY.define(
    "whole_layer(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, bool[] given, Tensor? lengths, Tensor? resets, "
    "bool reverse, str backend, bool save, Tensor? reset_h=None, Tensor? reset_c=None) "
    "-> (Tensor h, Tensor h_n, Tensor c_n, Tensor kept)",
    tags=(torch.Tag.needs_exact_strides,),
)
_LIBRARY.define(
    "whole_layer_backward(Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor kept, Tensor x, Tensor h0, Tensor c0, "
    "Tensor[] weights, bool[] given, Tensor? lengths, Tensor? resets, bool reverse, str backend, bool[] needed, "
    "Tensor? reset_h=None, Tensor? reset_c=None) -> Tensor[]",
    tags=(torch.Tag.needs_exact_strides,),
)

whole_layer = torch.ops.gpu_lstm.whole_layer.default
whole_layer_backward = torch.ops.gpu_lstm.whole_layer_backward.default


def layer(
    x: Tensor,  # [T, B, I]
    state: State,  # ([D, B, P], [D, B, H])
    weights: list[Weights],  # [D]
    traversal: Traversal,
    backend: Backend,
) -> tuple[Tensor, State]:
    """h [T, B, D*P] and the final state. Two directions are for torch, where the traversal is plain."""
    tensors = [t for one in weights for t in one.present()]
    reset_to = traversal.reset_tensors()
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state, *tensors, *reset_to))
    way = traversal.lengths, traversal.resets, traversal.reverse
    h, h_n, c_n, _ = whole_layer(x, *state, tensors, weights[0].given(), *way, backend.value, save, *reset_to)
    return h, (h_n, c_n)


def _in_eager_mode(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],  # of every direction as Weights.present() has them
    given: list[bool],  # as Weights.given() says
    reset_to: list[Tensor],  # [T, B, P] and [T, B, H], or none
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    count = sum(given)
    layer = [Weights.of_present(weights[first : first + count], given) for first in range(0, len(weights), count)]
    traversal = Traversal(lengths, resets, reverse, [(reset_to[0], reset_to[1])] if reset_to else None)
    if backend == Backend.TORCH.value and traversal.is_plain() and not reverse:
        h, (h_n, c_n) = native.stack(x, (h0, c0), [layer])
        return h, h_n, c_n
    state = h0[0], c0[0]
    if backend == Backend.TORCH.value:
        h, (h_n, c_n) = native.layer(x, state, layer[0], traversal)
    else:
        h, (h_n, c_n) = fused.layer(x, state, layer[0], traversal, Backend(backend))
    return h, h_n[None], c_n[None]


@contextlib.contextmanager
def _apart(x: Tensor, record: bool) -> Iterator[None]:
    """Inside an operator: autograd as `record` says, which is off there in any case, no autocast, and x's device."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with (
        torch._C._ForceDispatchKeyGuard(include, exclude & torch._C._after_autograd_keyset),
        torch.set_grad_enabled(record), torch.autocast(x.device.type, enabled=False), on_the_device_of(x),
    ):  # fmt: skip
        yield


def _forward(x, h0, c0, weights, given, lengths, resets, reverse, backend, save, *reset_to):
    kept, end = x.new_empty(0), 3 + len(weights)
    with _apart(x, record=save):
        leaves = [t.detach().requires_grad_(save) for t in (x, h0, c0, *weights, *reset_to) if t is not None]
        h, h_n, c_n = _in_eager_mode(*leaves[:3], leaves[3:end], given, leaves[end:], lengths, resets, reverse, backend)
        if save:
            kept.graph = leaves, (h, h_n, c_n)
    return h.detach().contiguous(), h_n.detach().clone(), c_n.detach().clone(), kept


def _forward_fake(x, h0, c0, weights, *others):
    h = x.new_empty(*x.shape[:-1], h0.shape[0] * h0.shape[2])
    return h, torch.empty_like(h0), torch.empty_like(c0), x.new_empty(0)


def _backward(dh, dh_n, dc_n, kept, x, h0, c0, weights, given, lengths, resets, reverse, backend, needed, *reset_to):
    if not hasattr(kept, "graph"):
        *_, kept = _forward(x, h0, c0, weights, given, lengths, resets, reverse, backend, True, *reset_to)
    with _apart(x, record=False):
        leaves, results = kept.graph
        pairs = [(result, d) for result, d in zip(results, (dh, dh_n, dc_n)) if d is not None]
        found = iter(torch.autograd.grad(
            [result for result, _ in pairs], [t for t, need in zip(leaves, needed) if need], [d for _, d in pairs],
            retain_graph=True, materialize_grads=True,
        ))  # fmt: skip
    gradients = (next(found) if need else x.new_empty(0) for need in needed)
    return [d.clone() if d.dim() == 1 else d.contiguous() for d in gradients]  # both biases' may be the same tensor


def _backward_fake(
    dh, dh_n, dc_n, kept, x, h0, c0, weights, given, lengths, resets, reverse, backend, needed, *reset_to
):
    asked = zip((x, h0, c0, *weights, *reset_to), needed)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(0) for t, need in asked]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, h0, c0, weights, ctx.given, lengths, resets, ctx.reverse, ctx.backend, _, *reset_to = inputs
    *_, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.weights = len(weights)
    ctx.save_for_backward(kept, x, h0, c0, lengths, resets, *weights, *reset_to)


def _gradients(ctx: Any, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: None) -> tuple:
    kept, x, h0, c0, lengths, resets, *others = ctx.saved_tensors
    weights, reset_to = others[: ctx.weights], others[ctx.weights :]
    needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3], *ctx.needs_input_grad[10:]]
    found = whole_layer_backward(
        dh,
        dh_n,
        dc_n,
        kept,
        x,
        h0,
        c0,
        weights,
        ctx.given,
        lengths,
        resets,
        ctx.reverse,
        ctx.backend,
        needed,
        *reset_to,
    )
    dx, dh0, dc0, *others = (d if need else None for d, need in zip(found, needed))
    return dx, dh0, dc0, others[: ctx.weights], *(None,) * 6, *others[ctx.weights :]


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("whole_layer", _forward, _key)
    _LIBRARY.impl("whole_layer_backward", _backward, _key)
torch.library.register_fake("gpu_lstm::whole_layer", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("gpu_lstm::whole_layer_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("gpu_lstm::whole_layer", _gradients, setup_context=_setup_context, lib=_LIBRARY)
for _name, _operator in (("whole_layer", whole_layer), ("whole_layer_backward", whole_layer_backward)):
    torch.library.register_vmap(f"gpu_lstm::{_name}", one_after_another(_operator), lib=_LIBRARY)
