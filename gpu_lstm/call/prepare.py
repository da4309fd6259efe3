"""A user's call is checked here, and nowhere else."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..kernels.cells import Cell
from . import checks, roles
from .choices import parse_backend_name
from .modes import PLAIN, Recording, Transforms, modes, only_torch_runs
from .options import NORMS, Arguments, Options, options_of
from .request import Request
from .roles import RESET_STATES, Form
from .sequences import EVERY_STEP, Traversal
from .weights import AllWeights, State, Weights, size_of

MANY = 256  # with more sequences index_fill is faster than masked_fill, which is not vectorised


def request_of(
    options: Options, weights: AllWeights, input: Tensor | PackedSequence, hx: Any = None,
    lengths: Tensor | None = None, resets: Tensor | None = None, reset_states: Any = None,
) -> Request:  # fmt: skip
    """Return the request of a call, checked. `weights` are [L][D].

    The modules and `lstm_layer` document the other arguments and the errors.
    """
    role = options.role
    form, x, sizes = role.input(input)
    steps, batch = sizes
    states = role.zeros(x, batch) if hx is None else role.states_in(form, x, batch, hx)
    others: list[Tensor] = []
    if lengths is not None:
        others.append(lengths)
        if form.packed is not None:
            raise ValueError("lengths should not be given together with a PackedSequence, which has its own")
        checks.check_lengths(lengths, steps, (batch,) if form.batched else (), x)
        lengths = lengths.reshape(batch)
    if resets is not None:
        others.append(resets)
        shape = sizes if form.batched else (steps,)
        checks.check_resets(resets, shape[::-1] if form.batch_first else shape, x)
        resets = form.time_major(resets)
    traversal = Traversal(lengths, resets) if others else EVERY_STEP
    now = modes(x)
    learns, plain = _check_tensors(options, form, x, states, weights, now.grad)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if reset_states is not None:
        if role.kept > 1:
            raise ValueError(f"{RESET_STATES} are not supported by {role.name}: its resets leave an empty state")
        if resets is None:
            raise ValueError(f"Expected resets together with {RESET_STATES}, got None")
        pairs = role.reset_states_in(form, x, sizes, reset_states)
        traversal = traversal._replace(reset_states=pairs)
        others += [t for pair in pairs for t in pair]
        learns = learns or (now.grad and any(t.requires_grad for t in others))
    if others:
        plain = plain and all([type(t) in PLAIN for t in others])
    if not plain and now.recording == Recording.NOBODY:
        now = now._replace(recording=Recording.WATCHED)
    if options.reverse:
        traversal = traversal.backwards()
    elif resets is not None and reset_states is None and now.recording == Recording.NOBODY:
        # If no reset comes after the first step, the initial states are zeroed instead, and torch's own operator can
        # run the call. Values are read only on the CPU, where that needs no synchronisation. A trace is not simplified,
        # since it may run with other resets.
        readable = x.is_cpu and now.transforms == Transforms.NONE
        if role.kept == 1 and options.directions == 1 and (steps == 1 or (readable and not resets[1:].any())):
            states = _reset_before_the_first_step(states, lengths, resets, readable)
            traversal = Traversal(lengths)
    return Request(x, steps, batch, states, weights, traversal, options, form, now, learns)


def request_of_layer(
    cell: Cell, x: Tensor, weights: Weights, hx: Any = None, *, reverse: bool = False, heads: int = 1,
    backend: Any = None, **rest: Any,
) -> Request:  # fmt: skip
    """Return the request of one layer in one direction, checked.

    x is [T, B, I]. If `weights` have no weight_ih, x is the product W_ih x, [T, B, 4H]. See `request_of` for `rest`.
    """
    checks.check_bool("reverse", reverse)
    checks.check_tensor(x, "input")
    checks.check_dimensions("input", x, 3)
    if not x.is_floating_point():
        raise TypeError(f"input should be of a floating point dtype, got: {x.dtype}")
    hidden = size_of(weights, cell.rows).hidden
    projected = None if weights.weight_hr is None else len(weights.weight_hr)
    for name, size in (("hidden_size", hidden), ("proj_size", projected)):
        if size == 0:
            raise ValueError(f"{name} must be greater than zero")
    norms = tuple([norm for norm in NORMS if getattr(weights, f"gain_{norm}") is not None])
    checks.check_heads(heads, int(hidden), projected or 0, norms)
    for name, tensor in (("z", x), ("bias", weights.bias_ih)) if weights.weight_ih is None else ():
        if tensor is not None:
            checks.check_size(name, tensor, (*tensor.shape[:-1], cell.rows * hidden))
    arguments = Arguments(
        cell.name, roles.Function, (hidden,), weights.weight_peephole is not None, norms, heads,
        None if weights.weight_ih is None else x.shape[-1], weights.bias_ih is not None,
        None if backend is None else parse_backend_name(backend), proj_size=projected or 0, reverse=reverse,
    )  # fmt: skip
    return request_of(options_of(*arguments), [[weights]], x, hx, **rest)


def _check_tensors(
    options: Options, form: Form, x: Tensor, states: list[State], weights: AllWeights, grad: bool
) -> tuple[bool, bool]:
    """Raise unless all tensors fit together. Return (learns, plain).

    `learns` says whether autograd records, which is `grad`, and a tensor requires a gradient. `plain` says that no
    tensor is of a subclass of Tensor. This function runs at every call, so it visits each weight only once.
    """
    dtype, device = x.dtype, x.device
    learns, alike, plain = x.requires_grad or not grad, True, True  # without autograd nothing has to be asked
    for layer, sizes in zip(weights, options.weight_sizes):
        for one in layer:
            fits, present = True, 0
            for tensor, size in zip(one, sizes):
                if tensor is not None:
                    present += 1
                    if type(tensor) not in PLAIN:
                        plain = False
                    if tensor.shape != size:
                        fits = False
                    if tensor.dtype is not dtype or tensor.device != device:
                        alike = False
                    if not learns and tensor.requires_grad:
                        learns = True
            if not fits or present != options.present:
                checks.check_weights(one, sizes, weights)
    for h, c in states:
        if h.dtype is not dtype or c.dtype is not dtype or h.device != device or c.device != device:
            alike = False
        if type(h) not in PLAIN or type(c) not in PLAIN:
            plain = False
        if not learns and (h.requires_grad or c.requires_grad):
            learns = True
    if not alike or x.shape[-1] != options.role.inputs:
        options.role.check_tensors(form, x, states, weights)
    return grad and learns, plain


def _reset_before_the_first_step(
    states: list[State], lengths: Tensor | None, resets: Tensor, readable: bool
) -> list[State]:
    """Return the initial states of the forward direction, zeroed where `resets` [T, B] are True, which are at time 0.

    `readable` says that the values of `resets` may be read.
    """
    if readable and not resets.any():  # as in most steps of an agent that acts
        return states
    reset = resets[0] if lengths is None else resets[0] & (lengths > 0)
    zero = partial(torch.masked_fill, mask=reset[:, None], value=0)
    if readable and len(reset) > MANY:
        zero = partial(torch.index_fill, dim=-2, index=reset.nonzero().squeeze(1), value=0)
    zeroed = [(zero(h), c) for h, c in states]
    return [(h, h if before is c else zero(c)) for (h, c), (before, _) in zip(zeroed, states)]


def takes_torchs_cell(options: Options, x: Tensor, state: Sequence[Any], weights: Weights) -> bool:
    """Whether torch's operator for a cell runs this call on the CPU with the tensors as they are.

    Otherwise `request_of` converts the tensors or raises an error.
    """
    is_plain = type(x) is Tensor and x.is_cpu and x.dim() == 2 and x.layout is torch.strided and not x.is_nested
    if not is_plain or options.feature is not None:
        return False
    dtype, (batch, features), role = x.dtype, x.shape, options.role
    found = [t.shape for t in (*state, *weights) if type(t) in PLAIN and t.dtype is dtype and t.is_cpu]
    sizes = [(batch, role.hidden)] * len(options.cell.states)
    fits = features == role.inputs and found == [*sizes, *options.weight_sizes[0]]  # no name is None
    return fits and only_torch_runs(options.backend)
