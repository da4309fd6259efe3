"""A user's call as one value: checked here and nowhere else, time-major; it returns results in the user's form."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from ..equations import EQUATIONS
from . import checks
from .forms import Form, Packed, Padded
from .modes import PLAIN, Modes, Recording, modes
from .options import RESET_STATES, Options
from .sequences import EVERY_STEP, Traversal
from .weights import State, Weights


class Call(NamedTuple):
    """What a stack of layers is asked to do. T steps, B sequences, L layers, D directions."""

    x: Tensor  # [T, B, I]; as torch's own accept it: for a PackedSequence its data [N, I], for a cell [B, I]
    steps: int
    batch: int
    # A pair ([*, B, P], [*, B, H]) for each of the user's, with options.lead rows, in c K to each; for a GRU c = h.
    states: list[State]
    weights: list[list[Weights]]  # [L][D]
    traversal: Traversal  # of the forward direction; that of lstm_layer(reverse=True) itself
    options: Options
    form: Form
    modes: Modes
    learns: bool  # whether autograd records

    def padded(self) -> tuple[Tensor, Traversal]:
        """x [T, B, I], of a cell [B, I], and the traversal; a PackedSequence as a batch with lengths."""
        if self.form.packed is None:
            return self.x, self.traversal
        return self.form.padded(), self.traversal._replace(lengths=self.form.lengths())

    def laid_out(self) -> "Call":
        """The same with x [T, B, I], and states ([1, B, P], [1, B, H]) of each layer and direction, [L*D]."""
        x, steps, batch, states, weights, traversal, options, form, its_modes, learns = self
        if form.packed is not None:
            x, traversal = self.padded()
        if options.one_step:
            x = x[None]
        if options.lead:
            rows = [row for h, c in states for row in zip(h.split(1), c.split(options.kept))]
        else:
            rows = [(h[None], c if options.kept > 1 else c[None]) for h, c in states]
        return Call(x, steps, batch, rows, weights, traversal, options, form, its_modes, learns)  # sooner than _replace

    def joined(self, rows: list[State]) -> list[State]:
        """Final states that are laid out, as `self.states`."""
        if not self.options.lead:
            return [(h.squeeze(0), c if self.options.kept > 1 else c.squeeze(0)) for h, c in rows]
        left, out = iter(rows), []
        for _ in self.options.blocks:
            h, c = zip(*itertools.islice(left, *self.options.lead))
            out.append((torch.cat(h), torch.cat(c)))
        return out

    def results(self, y: Tensor, states: list[State]) -> tuple[Any, Any]:
        """The output and the final states in the user's form, from y [T, B, D*P] and states as `self.states`."""
        out: list[Any]
        form, out = self.form, states
        if self.options.one_state:
            h, c = self.states[0]
            kept = int(h.dtype is not c.dtype)  # in float32 it is c alone
            out = [form.state_out(state[kept]) for state in states]
        elif self.options.kept > 1:
            h, c = states[0]
            numbers = [c[k :: self.options.kept].view_as(h) for k in range(self.options.kept)]
            out = [tuple(map(form.state_out, (h, *EQUATIONS[self.options.cell.name].states_of(*numbers))))]
        elif form.packed is not None or not form.batched:
            out = [(form.state_out(h), form.state_out(c)) for h, c in states]
        return form.output(y), out if self.options.by_layer else out[0]


def prepare(
    options: Options,
    weights: list[list[Weights]],  # [L][D]
    input: Tensor | PackedSequence,
    hx: Any = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_states: Any = None,
) -> Call:
    """The call, checked. The modules and `lstm_layer` document what a user may give, and what is raised."""
    form, x = _form_and_input(options, input, hx)
    if form.packed is not None:
        steps, batch = len(form.packed.batch_sizes), int(form.packed.batch_sizes[0])
    elif options.one_step:
        steps, batch = 1, x.shape[0]
    else:
        steps, batch, _ = x.shape
    traversal = EVERY_STEP
    if lengths is not None or resets is not None:
        traversal = _traversal(form, x, (steps, batch), lengths, resets)
    if options.kept > 1:
        states = [_kept_states(options, form, x, batch, hx)]
    else:
        states = _zeros(options, x, batch) if hx is None else _states(options, form, x, batch, hx)
    now = modes(x)
    learns, plain = _check_tensors(options, form, x, states, weights, now.grad)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if reset_states is not None:
        if options.kept > 1:
            raise ValueError(f"{RESET_STATES} are not supported by {options.name}: its resets leave an empty state")
        pairs = _reset_states(options, form, x, (steps, batch), traversal, reset_states)
        traversal = traversal._replace(reset_states=pairs)
        learns = learns or (now.grad and any(t.requires_grad for pair in pairs for t in pair))
        plain = plain and all(type(t) in PLAIN for pair in pairs for t in pair)
    if lengths is not None or resets is not None:
        plain = plain and type(lengths) in _OPTIONAL and type(resets) in _OPTIONAL
    if not plain and now.recording == Recording.NOBODY:
        now = now._replace(recording=Recording.WATCHED)
    zeroed = resets is not None and options.kept == 1 and reset_states is None
    if options.reverse:
        traversal = traversal.backwards()
    elif zeroed and steps == 1 and now.recording < Recording.COMPILED:
        states, traversal = _reset_before_the_only_step(options, states, traversal)
    return Call(x, steps, batch, states, weights, traversal, options, form, now, learns)


_OPTIONAL = (*PLAIN, type(None))
_UNBATCHED, _TIME_FIRST, _BATCH_FIRST = Padded(False, False), Padded(True, False), Padded(True, True)


def _form_and_input(options: Options, input: Tensor | PackedSequence, hx: Any) -> tuple[Form, Tensor]:
    """The form of an input, and the input as Call.x; hx is checked but for its sizes. Only here the role counts."""
    role, alone = options.role, options.one_state
    form: Form = _TIME_FIRST
    x: Any = input
    if isinstance(input, PackedSequence):
        checks.check_packed(input)
        form, x = Packed(input, options.batch_first), input.data
    elif role == "layer":
        checks.check_dense(input, options.name)
        if input.dim() != 3:
            raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
        if not input.is_floating_point():
            raise TypeError(f"input should be of a floating point dtype, got: {input.dtype}")
    else:
        if role == "stack":
            checks.check_tensor(input, "input")
        rank = checks.check_rank_and_layout(input, options.name, options.ranks)
        if rank == options.ranks[0]:
            form, x = _UNBATCHED, input.unsqueeze(0 if role == "cell" else 1)
        elif options.batch_first:
            form, x = _BATCH_FIRST, input.transpose(0, 1)
    if hx is None or options.kept > 1:
        pass
    elif role == "cell":
        if alone:
            checks.check_rank_of_hidden(hx, options.name)
        elif type(hx) is not tuple or len(hx) != 2:
            checks.check_states_of_a_cell(hx, form.batched)
    elif role == "stack":
        checks.check_states(hx, options, "hx", RuntimeError)
    elif role == "module" and form.packed is None:
        (checks.check_rank_of_state if alone else checks.check_rank_of_states)(rank, hx)
    elif alone:
        checks.check_tensor(hx, "hx")
    else:
        checks.check_pair(hx)
        for i, state in enumerate(hx):
            checks.check_tensor(state, f"hidden[{i}]")
    return form, x


def _traversal(
    form: Form, x: Tensor, sizes: tuple[int, int], lengths: Tensor | None, resets: Tensor | None
) -> Traversal:
    """The traversal of a batch of `sizes` (T, B), checked; in the forward direction."""
    steps, batch = sizes
    if form.packed is not None and lengths is not None:
        raise ValueError("lengths should not be given together with a PackedSequence, which has its own")
    if lengths is not None:
        checks.check_lengths(lengths, steps, (batch,) if form.batched else (), x.device)
        lengths = lengths.reshape(batch)
    if resets is not None:
        shape = (batch, steps) if form.batch_first else (steps, batch) if form.batched else (steps,)
        checks.check_resets(resets, shape, x.device)
        resets = form.time_major(resets)
    return Traversal(lengths, resets)


def _zeros(options: Options, x: Tensor, batch: int) -> list[State]:
    """Initial states of zeros. Where both of a pair have the same size they may be one tensor."""
    states = []
    for _, hidden, projected, _ in options.blocks:
        c = x.new_zeros(*options.lead, batch, hidden)
        # But torch.compile does not let an operator have the same tensor twice.
        one = not projected and not torch.compiler.is_compiling()
        states.append((c if one else x.new_zeros(*options.lead, batch, projected or hidden), c))
    return states


def _states(options: Options, form: Form, x: Tensor, batch: int, hx: Any) -> list[State]:
    """A user's states as Call.states, their sizes checked, but a cell's."""
    states: list[State] = []
    alone, inside = options.one_state, form.batched and form.packed is None
    for state, (_, hidden, projected, _) in zip(hx if options.by_layer else (hx,), options.blocks):
        h, c = (state, state) if alone else (state[0], state[1])  # of an unbatched hx torch ignores the rest
        if not inside:
            h = h[None] if options.one_step else form.state_in(h)
            c = h if alone else c[None] if options.one_step else form.state_in(c)
        if not options.one_step:  # of which torch's operator says what is wrong
            size = *options.lead, batch, hidden
            if c.shape != size or h.shape != ((*options.lead, batch, projected) if projected else size):
                checks.check_input(options, form, x, None)
                checks.check_sizes_of_states(options, x, batch, len(states), (h, c))
            if alone and checks.is_exact(h, x):
                h = h.to(x.dtype)
        if c is h and torch.compiler.is_compiling():  # which does not let an operator have the same tensor twice
            c = h.clone()
        states.append((h, c))
    return states


def _kept_states(options: Options, form: Form, x: Tensor, batch: int, hx: Any) -> State:
    """A user's states, of a cell that keeps several numbers of a unit, as Call.states; all but h in float32 or more."""
    cell, size = options.cell, (*options.lead, batch, options.hidden)
    exact = torch.promote_types(x.dtype, torch.float32)
    if hx is None:
        empty: Any = cell.empty_like(x.new_empty(0, dtype=exact))  # [K, 1, 1]
        return x.new_zeros(size), empty.repeat(options.rows, 1, 1).expand(-1, *size[-2:])
    checks.check_every_state(hx, cell.states, x)
    checks.check_size_of_states(cell.states, hx, size if form.batched else (*options.lead, options.hidden))
    h, *others = map(form.state_in, hx)
    numbers = EQUATIONS[cell.name].states_from(*[t.to(exact) for t in others])  # K of [*lead, B, H]
    return h, torch.stack(numbers, -3).flatten(0, -3)


def _check_tensors(
    options: Options, form: Form, x: Tensor, states: list[State], weights: list[list[Weights]], grad: bool
) -> tuple[bool, bool]:
    """Raise unless all tensors fit together.

    Returns:
        Whether autograd has to record, which it does if `grad`; whether no weight or state is of a subclass of Tensor.
    """
    dtype, device, learns, alike, plain = x.dtype, x.device, grad and x.requires_grad, True, True
    asks = grad and not learns
    for layer, sizes in zip(weights, options.weight_sizes):
        for one in layer:
            fits, present = True, 0
            for tensor, size in zip(one, sizes):
                if tensor is not None:
                    present += 1
                    if type(tensor) is not Parameter and type(tensor) is not Tensor:
                        plain = False
                    if tensor.shape != size:
                        fits = False
                    if tensor.dtype is not dtype or tensor.device != device:
                        alike = False
                    if asks and tensor.requires_grad:
                        learns, asks = True, False
            if not fits or present != options.present:
                checks.check_input(options, form, x, weights)
                checks.check_sizes(one, sizes)
                checks.check_same_tensors(weights)
    for h, c in states:
        if h.dtype is not dtype or c.dtype is not dtype or h.device != device or c.device != device:
            alike = False
        if type(h) not in PLAIN or type(c) not in PLAIN:
            plain = False
        if asks and (h.requires_grad or c.requires_grad):
            learns = True
    if options.one_step:
        checks.check_cell(options, form, x, states[0], weights[0][0], alike)
    elif not alike or x.shape[-1] != options.input_size:
        checks.check_input(options, form, x, weights)
        checks.check_alike(x, states, weights)
    return learns, plain


def _reset_states(
    options: Options, form: Form, x: Tensor, sizes: tuple[int, int], traversal: Traversal, reset_states: Any
) -> list[State]:
    """A user's states to reset to, checked: (h [T, B, P], c [T, B, H]) of each layer and direction, [L*D]."""
    if options.by_layer:
        checks.check_states(reset_states, options, RESET_STATES, ValueError)
        named = [(state, f"{RESET_STATES} of layer {k}") for k, state in enumerate(reset_states)]
    else:
        check_one = checks.check_tensor if options.one_state else checks.check_reset_pair
        check_one(reset_states, RESET_STATES)
        named = [(reset_states, RESET_STATES)]
    if traversal.resets is None:
        raise ValueError(f"Expected resets together with {RESET_STATES}, which say what they leave, got None")
    steps, batch = sizes
    of_batch = [batch] * form.batched
    of_steps = [batch, steps] if form.batch_first else [steps, *of_batch]
    rows: list[State] = []
    lead = options.lead
    for (pair, name), size in zip(named, options.blocks):
        states = []
        pair = (pair, pair) if options.one_state else pair
        for letter, state, features in zip("hc", pair, (size.width, size.hidden)):
            a_sequence, a_step = [*lead, *of_batch, features], [*lead, *of_steps, features]
            checks.check_reset_state(state, f"{letter} of {name}", (a_sequence, a_step), x, letter == "c")
            if state.dim() == len(a_sequence):
                state = form.state_in(state).unsqueeze(-3).expand(*lead, steps, batch, features)
            else:
                state = form.state_in(state.transpose(-3, -2) if form.batch_first else state)
            states.append(state)  # [*lead, T, B, features]
        h, c = states
        rows += zip(h.unbind(0), c.unbind(0)) if lead else [(h, c)]
    return rows


def _reset_before_the_only_step(
    options: Options, states: Sequence[State], traversal: Traversal
) -> tuple[list[State], Traversal]:
    """With one step, a reset zeroes the initial state; in the reverse direction no reset comes before the step."""
    lengths, resets, *_ = traversal
    assert resets is not None
    reset = resets[0, :, None]  # [B, 1]
    if lengths is not None:
        reset = reset & (lengths > 0)[:, None]
    if options.directions == 2:
        forward = torch.arange(states[0][0].shape[0], device=reset.device) % 2 == 0  # rows of a block
        reset = reset & forward[:, None, None]
    return [(h.masked_fill(reset, 0), c.masked_fill(reset, 0)) for h, c in states], Traversal(lengths)
