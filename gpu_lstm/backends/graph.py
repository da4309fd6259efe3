"""A layer as one operator, gpu_lstm::layer: what graphs of torch.compile, exported programs and dispatch modes see.

Traced by itself, torch's LSTM would be decomposed into its steps, and lose dropout and autocast's dtype.

What oneDNN and cuDNN save for backward has a size that only they know, so a graph of tensors cannot hold it. On the
backends without kernels of ours, forward therefore records an autograd graph of its own. Instead of the gates it
returns an empty tensor with this graph as an attribute, which is saved for backward. Where only elements were saved (by
hooks that copy, in CUDA graphs, in an exported program), backward recomputes the layer.
"""

from __future__ import annotations  # torch.compile tries to evaluate those of nested functions, and fails

import contextlib
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..call.choices import KERNEL_BACKENDS, Backend
from ..call.modes import Recording, are_batched, constant_when_traced, gradients_are_differentiated, recurrent_precision
from ..call.noise import NO_NOISE
from ..call.request import Call
from ..call.roles import Function
from ..call.sequences import EVERY_STEP
from ..call.weights import State, Weights
from ..kernels import private
from ..kernels.cells import CELLS
from ..kernels.layer import Layer
from ..kernels.problem import Inputs, Pass, problem_of
from . import fused, reference, torch_rnn, verify
from .fused import Saved, part_of
from .layer_loop import Part, run_layers, without_autocast

_log_once = functools.cache(logging.getLogger("gpu_lstm").warning)

# As the package is named, so that a copy within another package, or one that is imported again, has its own operators.
_names = (__name__.split(".backends")[0].replace(".", "_") + f"_{n}" * (n > 1) for n in itertools.count(1))
NAMESPACE = next(name for name in _names if not hasattr(getattr(torch.ops, name), "layer"))
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# An operator takes the Inputs of a layer and, for torch's second direction, the Weights of that.
NAMES = *Inputs._fields, *(f"{name}_reverse" for name in Weights._fields)
SECOND = len(Inputs._fields)
_TENSORS = ", ".join(f"Tensor? {name}=None" for name in NAMES)
for _schema in (
    f"layer(str cell, bool reverse, str backend, bool save, bool recompute, {_TENSORS}) "
    "-> (Tensor h, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)",
    "layer_backward(str cell, bool reverse, str backend, Tensor?[] gradients, Tensor[] saved, bool[] needed, "
    "Tensor?[] tensors) -> Tensor[]",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.needs_exact_strides,))
OPERATOR = getattr(torch.ops, NAMESPACE).layer.default
BACKWARD = getattr(torch.ops, NAMESPACE).layer_backward.default


AUTO = "auto "
"""Before the name of a backend of kernels that nobody asked for: another one runs where these have no right one."""


def named(backend: Backend, asked: bool) -> str:
    """A backend, as operators are told of it."""
    return backend.value if asked or backend not in KERNEL_BACKENDS else AUTO + backend.value


def _parsed(name: str) -> tuple[Backend, bool]:
    """The reverse: the backend, and whether another may run in its place."""
    return Backend(name.removeprefix(AUTO)), name.startswith(AUTO)


def run_call(call: Call, dtype: torch.dtype, backend: Backend, name: str) -> tuple[Tensor, list[State]]:
    """All layers of a call, in `dtype`, by operators: output [T, B, D*P] and states as Call.states.

    `name`: the backend, as `named` says it.
    """
    if call.learns and call.modes.recording == Recording.WATCHED and torch.jit.is_tracing():
        raise RuntimeError(
            f"torch.jit.trace cannot record the gradients of backend {backend.value!r}: trace within torch.no_grad(), "
            "or with backend 'torch'"
        )
    if private.is_exporting():
        _tell_what_a_program_needs()

    if backend is Backend.TORCH and call.traversal.is_plain() and not isinstance(call.options.role, Function):
        call = call._replace(x=call.x.to(dtype))
        return torch_rnn.layer_by_layer(call, dtype, partial(_both_directions, call, dtype))
    return run_layers(call, dtype, backend, partial(_run_part, call, dtype, name))


def _run_part(call: Call, dtype: torch.dtype, name: str, part: Part) -> tuple[Tensor, State]:
    return _ask(call, name, fused.inputs_of(part.to(dtype)), part.traversal.reverse)


def _both_directions(
    call: Call, dtype: torch.dtype, x: Tensor, state: State, weights: list[Weights]
) -> tuple[Tensor, State]:
    first = fused.inputs_of(Part(0, x, state, weights[0], EVERY_STEP, NO_NOISE).to(dtype))
    return _ask(call, Backend.TORCH.value, [*first, *(t for second in weights[1:] for t in second.to(dtype))], False)


def _ask(call: Call, backend: str, tensors: Sequence[Tensor | None], reverse: bool) -> tuple[Tensor, State]:
    save = call.modes.grad and any([t is not None and t.requires_grad for t in tensors])
    with without_autocast(call):
        how = call.options.cell.name, reverse, backend, save, call.options.recompute
        h, h_n, c_n, *_ = OPERATOR(*how, *tensors)
    return h, (h_n, c_n)


@constant_when_traced
def _tell_what_a_program_needs() -> None:
    """Log it once a process; not as a warning, since nothing is wrong."""
    _log_once(
        "the exported program calls operators of gpu_lstm: it loads only where that was imported before; export "
        "gpu_lstm.to_torch(model) for one that needs torch alone"
    )


def gradients_of(
    cell: str, reverse: bool, backend: str, gradients: Sequence[Tensor | None], saved: Sequence[Tensor],
    needed: Sequence[bool], tensors: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the operator's `tensors` where `needed`, from those of h, h_n and c_n; `saved`: h, gates and c.

    By the operator; by the reference where they may be differentiated, to any order, or several of each come at once.
    """
    if are_batched(gradients) or gradients_are_differentiated(saved[0], [*saved, *tensors, *gradients]):
        run = partial(_without_kernels, cell=cell, reverse=reverse, backend=Backend.REFERENCE)
        # Other transforms do not accept the wrappers of those that have ended.
        tensors = [None if t is None else private.unwrapped_if_ended(t) for t in tensors]
        return reference.gradients(run, tensors, gradients, needed)
    with torch.no_grad():
        lists = (list(each) for each in (gradients, saved, needed, tensors))
        those_needed = iter(BACKWARD(cell, reverse, backend, *lists))
    return [next(those_needed) if need else None for need in needed]


def _kernels_for(inputs: Inputs, cell: str, reverse: bool, backend: Backend) -> Layer:
    problem = problem_of(inputs, cell, reverse, recurrent_precision(inputs.x.dtype))
    return verify.layer_of(backend, problem, inputs.x.device)


def _in_place_of_kernels(cell: str, inputs: Inputs) -> Backend:
    """What runs where none is right."""
    return Backend.TORCH if torch_rnn.has(CELLS[cell], inputs) else Backend.REFERENCE


def _as_by_kernels(inputs: Inputs, cell: str, reverse: bool, save: bool) -> tuple[Any, ...]:
    """What fused.forward returns, by other means: what is saved, only the reference computes."""
    with _apart(inputs.x, record=False):
        if not save:
            h, h_n, c_n = _without_kernels(inputs, cell, reverse, _in_place_of_kernels(cell, inputs))
            return h.contiguous(), h_n.clone(), c_n.clone(), None, None
        wide = (t.float() if t is not None and t.is_floating_point() else t for t in inputs)  # as c is saved
        record: list[reference.Steps] = []
        h, (h_n, c_n) = reference.run_layer(cell, *part_of(Inputs(*wide), reverse)[1:], record=record)
        h, h_n, gates = (t.to(inputs.x.dtype, copy=True) for t in (h, h_n, record[0].gates))
        return h, h_n, c_n.clone(), gates, record[0].cell


def _without_kernels(
    tensors: Sequence[Any], cell: str, reverse: bool, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """h, h_n and c_n, by torch's operators, which autograd records."""
    second = tensors[SECOND:]
    _, x, state, weights, traversal, noise = part_of(Inputs(*tensors[:SECOND]), reverse)
    directions = [weights, *([Weights(*second)] if second and second[0] is not None else [])]
    if backend is Backend.TORCH:
        if traversal.is_plain() and not reverse:
            h, (h_n, c_n) = torch_rnn.stack(CELLS[cell], x, state, [directions])
        else:
            h, (h_n, c_n) = torch_rnn.run_layer(CELLS[cell], x, state, weights, traversal)
        return h, h_n, c_n
    results = [
        reference.run_layer(cell, x, (h0, c0), weights, traversal.backwards() if d else traversal, noise)
        for d, (weights, h0, c0) in enumerate(zip(directions, state[0].split(1), state[1].split(CELLS[cell].kept)))
    ]
    hs, finals = zip(*results)
    h_n, c_n = map(torch.cat, zip(*finals))
    return torch.cat(hs, 2), h_n, c_n


def _with_autograd(
    tensors: Sequence[Any], cell: str, reverse: bool, backend: Backend, record: bool = True
) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
    """Forward, with its own autograd graph if `record`: the leaves (the tensors, detached), and h, h_n, c_n."""
    with _apart(tensors[0], record):
        leaves = [t if t is None else t.detach().requires_grad_(record and t.is_floating_point()) for t in tensors]
        return leaves, _without_kernels(leaves, cell, reverse, backend)


@contextlib.contextmanager
def _apart(x: Tensor, record: bool) -> Iterator[None]:
    """A block inside an operator, where autograd is off: turned on if `record`; no autocast; on x's device."""
    with (
        private.autograd_inside_an_operator(), torch.set_grad_enabled(record),
        torch.autocast(x.device.type, enabled=False),
        torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext(),
    ):  # fmt: skip
        yield


def _forward(cell, reverse, backend, save, recompute, *tensors):
    inputs, (backend, may_differ) = Inputs(*tensors[:SECOND]), _parsed(backend)
    x, _, c0, *_ = inputs
    nothing, no_c = x.new_empty(0), c0.new_empty(0, dtype=torch.float32)
    if backend in KERNEL_BACKENDS:
        layer = _kernels_for(inputs, cell, reverse, backend)
        if may_differ and not layer.has_kernel(Pass(save=save), inputs):
            h, h_n, c_n, gates, c = _as_by_kernels(inputs, cell, reverse, save)
        else:
            h, h_n, c_n, gates, c = fused.forward(layer, inputs, save)
        return h, h_n, c_n.to(c0.dtype), nothing if recompute or not save else gates, no_c if c is None else c
    leaves, results = _with_autograd(tensors, cell, reverse, backend, save)
    if save:
        nothing.graph = leaves, results
    h, h_n, c_n = (t.detach() for t in results)
    return h.contiguous(), h_n.clone(), c_n.clone(), nothing, no_c


def _forward_fake(cell, reverse, backend, save, recompute, x, h0, c0, *_):
    h = x.new_empty(*x.shape[:-1], h0.shape[0] * h0.shape[-1])
    by_kernels = _parsed(backend)[0] in KERNEL_BACKENDS and save
    gates = x.new_empty((*x.shape[:2], 4 * c0.shape[-1]) if by_kernels and not recompute else (0,))
    c = c0.new_empty((*x.shape[:2], c0.shape[-1]) if by_kernels else (0,), dtype=torch.float32)
    return h, torch.empty_like(h0), torch.empty_like(c0), gates, c


def _backward(cell, reverse, backend, gradients, saved, needed, tensors):
    (h, gates, c), (dh, dh_n, _), (backend, may_differ) = saved, gradients, _parsed(backend)
    inputs = Inputs(*tensors[:SECOND])
    if backend in KERNEL_BACKENDS:
        layer, pass_ = _kernels_for(inputs, cell, reverse, backend), Pass(True, True, dh is not None, dh_n is not None)
        if may_differ and not layer.has_kernel(pass_, inputs):
            backend = _in_place_of_kernels(cell, inputs)
    if backend in KERNEL_BACKENDS:
        wanted = [name for name, need in zip(NAMES, needed) if need]
        by_name = fused.gradients(layer, Saved(inputs, h, gates, c), gradients, set(wanted))
        results = [by_name[name] for name in wanted]
    else:
        leaves, outputs = gates.graph if hasattr(gates, "graph") else _with_autograd(tensors, cell, reverse, backend)
        outputs = [y for y, d in zip(outputs, gradients) if d is not None]
        gradients = [d for d in gradients if d is not None]
        wanted = [t for t, need in zip(leaves, needed) if need]
        with _apart(tensors[0], record=False):
            results = torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, materialize_grads=True)
    # The gradients of both biases may be the same tensor.
    return [d.clone() if d.dim() == 1 else d.contiguous() for d in results]


def _backward_fake(cell, reverse, backend, gradients, saved, needed, tensors):
    wanted = (t for t, need in zip(tensors, needed) if need)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    (ctx.cell, ctx.reverse, ctx.backend), tensors = inputs[:3], inputs[5:]
    h, _, _, gates, c = output
    ctx.mark_non_differentiable(gates, c)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, gates, c, *tensors)


def _gradients(ctx: Any, *output_gradients: Tensor | None) -> tuple:
    saved, tensors, needed = ctx.saved_tensors[:3], ctx.saved_tensors[3:], ctx.needs_input_grad[5:]
    return *[None] * 5, *gradients_of(ctx.cell, ctx.reverse, ctx.backend, output_gradients[:3], saved, needed, tensors)


class InTransforms(torch.autograd.Function):
    """The operator for transforms of torch.func, which refuse what is registered below."""

    forward = staticmethod(OPERATOR)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)


def _one_after_another(operator: Any, info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    """How an operator is vmapped: one call after another, say for Jacobians row by row."""

    def example(k: int, t: Any, dims: Any) -> Any:
        if isinstance(t, list):
            return [example(k, *each) for each in zip(t, dims or [None] * len(t))]
        return t if dims is None else t.select(dims, k)

    every = [operator(*example(k, [*arguments], in_dims)) for k in range(info.batch_size)]
    collected = type(every[0])  # a tuple or a list
    results = collected(torch.stack(tensors) for tensors in zip(*every))
    return results, collected([0]) * len(results)


for _operator, _run, _fake in (OPERATOR, _forward, _forward_fake), (BACKWARD, _backward, _backward_fake):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_operator, _run, _key)
    torch.library.register_fake(_operator, _fake, lib=_LIBRARY)
    torch.library.register_vmap(_operator, partial(_one_after_another, _operator), lib=_LIBRARY)
torch.library.register_autograd(OPERATOR, _gradients, setup_context=_setup_context, lib=_LIBRARY)


def _products(tensors: Sequence[Any]) -> dict[str, int]:
    """Operations of each matrix's product over all steps, by its name; a multiply-add counts as two, as in torch."""
    steps, batch, _ = tensors[0].shape
    matrices = "weight_ih", "weight_hh", "weight_hr"
    present = ((name, t) for name, t in zip(NAMES, tensors) if name.startswith(matrices) and t is not None)
    return {name: 2 * steps * batch * t.numel() for name, t in present}


def _forward_flops(cell: str, reverse: bool, backend: str, save: bool, recompute: bool, *tensors: Any, **_: Any) -> int:
    return sum(_products(tensors).values())


def _backward_flops(
    cell: str, reverse: bool, backend: str, gradients: list, saved: list, needed: list[bool], tensors: list, **_: Any
) -> int:
    """One product for each weight's gradient, one for that of its operand, and those that are recomputed."""
    (_, gates, c), total, needs = saved, 0, dict(zip(NAMES, needed))
    for name, operations in _products(tensors).items():
        of_operand = needs["x"] if name.startswith("weight_ih") else True
        recomputed = gates.dim() < c.dim() and name in ("weight_ih", "weight_hh")
        total += operations * (needs[name] + of_operand + recomputed)
    return total


def count_flops() -> None:
    """Register the operators with every open FlopCounterMode, whose registry is a copy made when it was created."""
    for mode in private.dispatch_modes():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.setdefault(OPERATOR.overloadpacket, _forward_flops)
            registry.setdefault(BACKWARD.overloadpacket, _backward_flops)
