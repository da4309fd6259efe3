"""A layer as one operator, gpu_lstm::layer, and its backward, for graphs, exported programs and dispatch modes.

Without it, tracing would decompose torch's LSTM into its steps, and lose dropout and the dtype of autocast.

oneDNN and cuDNN save tensors for backward whose sizes only they know, so a graph of tensors cannot hold them. On the
backends without kernels of ours, forward therefore records an autograd graph of its own. Instead of the gates it
returns an empty tensor with this graph as an attribute. The graph lives as long as the user's graph saves that tensor.
Where only the elements of the tensor were saved (by hooks that copy, in CUDA graphs, in an exported program), backward
recomputes the layer.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import fused, reference, torch_rnn
from ..backends.fused import Saved
from ..backends.layer_loop import weights_of
from ..call.choices import KERNEL_BACKENDS, Backend, requested_backend
from ..call.modes import recurrent_precision
from ..call.weights import Weights
from ..kernels import cache, private
from ..kernels.cells import CELLS
from ..kernels.contract import launcher_of, package_of
from ..kernels.layer import Layer
from ..kernels.problem import Inputs, Pass, problem_of
from ..verification import verify

# The namespace is named after the package, so that a copy inside another package has its own operators. If the package
# is imported a second time, its namespace gets a number.
_package = __name__.split(".execution")[0].replace(".", "_")
_names = itertools.chain([_package], (f"{_package}_{n}" for n in itertools.count(2)))
NAMESPACE = next(name for name in _names if not hasattr(getattr(torch.ops, name), "layer"))
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# An operator takes the Inputs of a layer and, where torch runs both directions, the Weights of the second one.
TENSOR_NAMES = *Inputs._fields, *(f"{name}_reverse" for name in Weights._fields)
SECOND = len(Inputs._fields)
_TENSORS = ", ".join(f"Tensor? {name}=None" for name in TENSOR_NAMES)
for _schema in (
    f"layer(str cell, bool reverse, str backend, bool save, bool recompute, {_TENSORS}) "
    "-> (Tensor h, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)",
    "layer_backward(str cell, bool reverse, str backend, Tensor?[] gradients, Tensor[] saved, bool[] needed, "
    "Tensor?[] tensors) -> Tensor[]",
):
    LIBRARY.define(_schema, tags=(torch.Tag.needs_exact_strides,))
OPERATOR = getattr(torch.ops, NAMESPACE).layer.default
BACKWARD = getattr(torch.ops, NAMESPACE).layer_backward.default


class How(NamedTuple):
    """The arguments of the operator that are no tensors. The operator of backward has the first three."""

    cell: str
    reverse: bool
    backend: str  # from operator_name
    save: bool = False  # whether to return what backward reads
    recompute: bool = False  # whether to return no gates even if `save`

    @property
    def asked(self) -> bool:
        """Whether the backend must run or raise: the user chose it, or it has no kernels."""
        return not self.backend.startswith(AUTO)


AUTO = "auto "
"""The prefix of the name of a kernel backend that the user did not choose. If it cannot run, another one does."""
BACKEND_OF = {prefix + backend.value: backend for backend in Backend for prefix in ("", AUTO)}
"""The Backend of each operator_name. (torch.compile of torch 2.9 does not trace Backend(name).)"""


def operator_name(backend: Backend, argument: str | Backend | None) -> str:
    """Return the name by which operators know a backend. It begins with AUTO if the user did not choose these kernels.

    `argument` is the user's argument `backend`, as in requested_backend.
    """
    chosen = backend not in KERNEL_BACKENDS or requested_backend(argument) is not Backend.AUTO
    return backend.value if chosen else AUTO + backend.value


def _runner(how: How, inputs: Inputs, pass_: Pass) -> Layer | Backend:
    """Return the kernels that run a pass, or else Backend.TORCH or REFERENCE.

    These two also replace kernels that cannot run, unless the user chose the kernels.
    """
    backend = BACKEND_OF[how.backend]
    if backend not in KERNEL_BACKENDS:
        return backend
    problem = problem_of(inputs, how.cell, how.reverse, recurrent_precision(inputs.x.dtype))
    device, obstacle = inputs.x.device, None
    try:
        if device.type not in package_of(backend.value).DEVICES:
            obstacle = launcher_of(backend.value).obstacle(device, problem.dtype)
        if obstacle is None:
            layer = verify.verified_layer(backend, problem, device)
            if how.asked or layer.has_kernel(pass_, inputs):
                return layer
    except ImportError as error:
        obstacle = error
    if obstacle is not None:  # the program was exported on a machine where the backend could run
        if how.asked:
            raise obstacle
        cache.warn_once(f"backend 'auto' does without {backend.value!r}, for which the program was made: {obstacle}")
    return Backend.TORCH if torch_rnn.has(CELLS[how.cell], inputs) else Backend.REFERENCE


def without_kernels(
    tensors: Sequence[Any], how: How, backend: Backend = Backend.REFERENCE
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer by operators of torch that autograd records: torch's own LSTM or GRU, or the reference.

    `tensors` are the tensors of the operator, in the order of TENSOR_NAMES. Returns h, h_n and c_n.
    """
    cell, inputs, second = CELLS[how.cell], Inputs(*tensors[:SECOND]), tensors[SECOND:]
    directions = [weights_of(inputs), *([Weights(*second)] if second and second[0] is not None else [])]
    if backend is Backend.TORCH:
        if how.reverse or inputs.lengths is not None or inputs.resets is not None:
            h, (h_n, c_n) = torch_rnn.layer_by_torch(cell, inputs, how.reverse)
        else:
            h, (h_n, c_n) = torch_rnn.stack(cell, inputs.x, (inputs.h0, inputs.c0), [directions])
        return h, h_n, c_n
    results = []
    states = zip(inputs.h0.split(1), inputs.c0.split(cell.kept))
    for d, (weights, (h0, c0)) in enumerate(zip(directions, states)):
        one = inputs._replace(h0=h0, c0=c0, **weights._asdict())
        results.append(reference.layer_by_reference(cell, one, how.reverse or d == 1))
    hs, finals = zip(*results)
    h_n, c_n = map(torch.cat, zip(*finals))
    return torch.cat(hs, 2), h_n, c_n


def _with_autograd(
    tensors: Sequence[Any], how: How, backend: Backend, record: bool
) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
    """Run `without_kernels` on detached tensors, and record an autograd graph of its own if `record`.

    Returns the detached tensors, which are the leaves of that graph, and h, h_n and c_n.
    """
    with _apart(tensors[0], record):
        leaves = [t if t is None else t.detach().requires_grad_(record and t.is_floating_point()) for t in tensors]
        return leaves, without_kernels(leaves, how, backend)


@contextlib.contextmanager
def _apart(x: Tensor, record: bool) -> Iterator[None]:
    """A block inside an operator, on the device of x and without autocast.

    Autograd, which is off inside operators, is on if `record`.
    """
    with (
        private.autograd_inside_an_operator(), torch.set_grad_enabled(record),
        torch.autocast(x.device.type, enabled=False),
        torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext(),
    ):  # fmt: skip
        yield


def _forward(cell, reverse, backend, save, recompute, *tensors):
    """Run a layer. Return h, h_n, c_n, gates and c. The last two are empty where backward does not read them."""
    how, inputs = How(cell, reverse, backend, save, recompute), Inputs(*tensors[:SECOND])
    no_gates, no_c = inputs.x.new_empty(0), inputs.c0.new_empty(0, dtype=torch.float32)
    runner = _runner(how, inputs, Pass(save=save))
    if isinstance(runner, Layer):
        h, h_n, c_n, gates, c = fused.forward(runner, inputs, save)
    elif (
        save and BACKEND_OF[backend] in KERNEL_BACKENDS
    ):  # backward reads gates and c, and only the reference returns them
        record = []
        with _apart(inputs.x, record=False):
            # c is float32, so the reference computes in float32.
            wide = Inputs(*(t.float() if t is not None and t.is_floating_point() else t for t in inputs))
            h, (h_n, c_n) = reference.layer_by_reference(CELLS[cell], wide, reverse, record.append)
            h, h_n, gates = (t.to(inputs.x.dtype, copy=True) for t in (h, h_n, record[0].gates))
            c_n, c = c_n.to(inputs.c0.dtype, copy=True), record[0].c
    else:
        leaves, outputs = _with_autograd(tensors, how, runner, save)
        if save:
            no_gates.graph = leaves, outputs
        h, h_n, c_n = (t.detach() for t in outputs)
        return h.contiguous(), h_n.clone(), c_n.clone(), no_gates, no_c
    return h, h_n, c_n, gates if save and not recompute else no_gates, no_c if c is None else c


def _forward_fake(cell, reverse, backend, save, recompute, x, h0, c0, *_):
    """Return tensors of the shapes and dtypes that `_forward` returns."""
    h = x.new_empty(*x.shape[:-1], h0.shape[0] * h0.shape[-1])
    by_kernels = save and BACKEND_OF[backend] in KERNEL_BACKENDS
    gates = x.new_empty((*x.shape[:2], 4 * c0.shape[-1]) if by_kernels and not recompute else (0,))
    c = c0.new_empty((*x.shape[:2], c0.shape[-1]) if by_kernels else (0,), dtype=torch.float32)
    return h, torch.empty_like(h0), torch.empty_like(c0), gates, c


def _backward(cell, reverse, backend, gradients, saved, needed, tensors):
    """Return the gradients of those `tensors` that are `needed`, from the `gradients` of h, h_n and c_n."""
    (h, gates, c), (dh, dh_n, _), how = saved, gradients, How(cell, reverse, backend)
    inputs = Inputs(*tensors[:SECOND])
    runner = _runner(how, inputs, Pass(True, True, dh is not None, dh_n is not None))
    if isinstance(runner, Layer):
        wanted = list(itertools.compress(TENSOR_NAMES, needed))
        by_name = fused.gradients(runner, Saved(inputs, h, gates, c), gradients, set(wanted))
        results = [by_name[name] for name in wanted]
    else:
        graph = getattr(gates, "graph", None)
        leaves, outputs = graph or _with_autograd(tensors, how, runner, record=True)
        outputs = [y for y, d in zip(outputs, gradients) if d is not None]
        gradients = [d for d in gradients if d is not None]
        wanted = list(itertools.compress(leaves, needed))
        with _apart(tensors[0], record=False):
            results = torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, materialize_grads=True)
    # An operator must return different tensors, and the gradients of both biases may be one.
    return [d.clone() if d.dim() == 1 else d.contiguous() for d in results]


def _backward_fake(cell, reverse, backend, gradients, saved, needed, tensors):
    """Return tensors of the shapes and dtypes that `_backward` returns."""
    wanted = itertools.compress(tensors, needed)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]


def _one_after_another(operator: Any, info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    """Apply vmap to an operator by one call after another, for example for the rows of a Jacobian."""

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
        LIBRARY.impl(_operator, _run, _key)
    torch.library.register_fake(_operator, _fake, lib=LIBRARY)
    torch.library.register_vmap(_operator, partial(_one_after_another, _operator), lib=LIBRARY)


def _products(tensors: Sequence[Any]) -> dict[str, int]:
    """Return the operations of the product with each weight matrix over all steps, by the name of the weight.

    A multiply-add counts as two operations, as in torch.
    """
    steps, batch, _ = tensors[0].shape
    matrices = "weight_ih", "weight_hh", "weight_hr"
    present = ((name, t) for name, t in zip(TENSOR_NAMES, tensors) if name.startswith(matrices) and t is not None)
    return {name: 2 * steps * batch * t.numel() for name, t in present}


def _backward_flops(
    cell: str, reverse: bool, backend: str, gradients: list, saved: list, needed: list[bool], tensors: list, **_: Any
) -> int:
    """Count the operations of backward.

    For each weight there is a product for its gradient, one for the gradient of its operand, and with recomputed gates
    the product of forward.
    """
    (_, gates, c), total, needs = saved, 0, dict(zip(TENSOR_NAMES, needed))
    for name, operations in _products(tensors).items():
        of_operand = needs["x"] if name.startswith("weight_ih") else True
        recomputed = gates.dim() < c.dim() and name in ("weight_ih", "weight_hh")
        total += operations * (needs[name] + of_operand + recomputed)
    return total


def count_flops() -> None:
    """Register the operators with every open FlopCounterMode.

    A registration with torch would come too late: each mode copied the registry when it was created.
    """
    for mode in private.dispatch_modes():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.setdefault(OPERATOR.overloadpacket, lambda *a, **_: sum(_products(a[len(How._fields) :]).values()))
            registry.setdefault(BACKWARD.overloadpacket, _backward_flops)
