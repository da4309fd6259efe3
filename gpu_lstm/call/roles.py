"""The roles of callers: a module, a stack, a cell or a function. Each has its own form of input and states.

    role        input                                              hx and the returned states, here (h, c) of an LSTM
    Module      [T, B, I], [B, T, I], [T, I] or a PackedSequence   ([L*D, B, P], [L*D, B, H])
    Stack       as Module                                          a list with ([B, H_k], [B, H_k]) for layer k
    Stack       as Module, with two directions                     a list with ([2, B, H_k], [2, B, H_k]) for layer k
    Cell        [B, I] or [I]                                      ([B, H], [B, H])
    Function    [T, B, I]                                          ([B, P], [B, H])

A GRU has h instead of the pair, and an sLSTM has (h, c, n, m).

Such a pair of states is a *block*. It has the states of all layers and directions or, in a stack, of one layer. If the
input has no B, neither has a user's block. Inside the library a block always has B. There the c of a GRU is its h, and
the c of an sLSTM has K numbers for each unit, [L*D*K, B, H].

For layers a block is cut into *rows*, ([1, B, P], [K, B, H]), with one row for each layer and direction.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import rnn
from torch.nn.utils.rnn import PackedSequence

from ..equations import EQUATIONS
from ..kernels import cells
from . import checks
from .modes import autocasts
from .weights import AllWeights, Size, State, Weights

TORCHS = vars(rnn).copy()  # torch's classes by name, even if somebody replaces them in torch later
RESET_STATES = "reset_states"  # the argument of a call, for errors


class Form(NamedTuple):
    """The form of an input: a tensor [T, B, I], with batch_first [B, T, I], unbatched [T, I], or a PackedSequence.

    Inside the library the sequences of a PackedSequence are sorted by length, as they are in its data.
    """

    batched: bool
    batch_first: bool  # False for unbatched input; for a PackedSequence it says whether `resets` are [B, T]
    packed: PackedSequence | None = None

    def time_major(self, t: Tensor) -> Tensor:
        """Return a user's tensor that has a value for each step as [T, B, ...].

        It is [T, B, ...], with batch_first [B, T, ...], and unbatched [T, ...].
        """
        if not self.batched:
            return t.unsqueeze(1)
        t = t.transpose(0, 1) if self.batch_first else t
        return t if self.packed is None else _permuted(t, 1, self.packed.sorted_indices)

    def output(self, y: Tensor) -> Tensor | PackedSequence:
        """Return y [T, B, F] in the form of the input.

        For a PackedSequence y may also be [sum of lengths, F], in the order of its data.
        """
        if self.packed is not None:
            y = y if y.dim() == 2 else y.flatten(0, 1).index_select(0, self.rows())
            return PackedSequence(y, *self.packed[1:])
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def state_in(self, state: Tensor) -> Tensor:
        """Return a user's state, [*, B, H] or unbatched [*, H], as [*, B, H]."""
        if not self.batched:
            return state.unsqueeze(-2)
        return state if self.packed is None else _permuted(state, -2, self.packed.sorted_indices)

    def state_out(self, state: Tensor) -> Tensor:
        """Return a state [*, B, H] as a user has it. This is the reverse of `state_in`."""
        if not self.batched:
            return state.squeeze(-2)
        return state if self.packed is None else _permuted(state, -2, self.packed.unsorted_indices)

    def inside(self) -> Tensor:
        """Return bool [T, B] on the CPU, which is True before the end of each sequence of a PackedSequence."""
        sizes = self.packed.batch_sizes  # type: ignore[union-attr]
        return torch.arange(int(sizes[0]), device=sizes.device) < sizes[:, None]

    def rows(self) -> Tensor:
        """Return the index of each row of a PackedSequence's data in a padded batch [T * B, I]: time * B + batch."""
        return self.inside().flatten().nonzero().squeeze(1).to(self.packed.data.device)  # type: ignore[union-attr]


def _permuted(t: Tensor, dim: int, order: Tensor | None) -> Tensor:
    """Return t with the sequences, which are in dimension `dim`, in another order, or t if `order` is None."""
    return t if order is None else t.index_select(dim, order)


UNBATCHED, TIME_FIRST, BATCH_FIRST = Form(False, False), Form(True, False), Form(True, True)


class Role:
    """The base class of the roles."""

    title = "{0}"  # its name in errors, made of the name of its cell
    suffix = "_l{}"  # the ending of the names of a layer's parameters
    ranks = 2, 3  # the ranks of an input without B and with B
    packs = True  # whether an input may be a PackedSequence
    by_layer = False  # whether a user's states are a list with a block for each layer
    has_rows = False  # whether a block has a dimension for its rows even if it has only one

    def __init__(self, cell: cells.Cell, sizes: tuple[Size, ...], directions: int, batch_first: bool) -> None:
        self.cell, self.sizes, self.batch_first = cell, sizes, batch_first
        self.inputs, self.hidden = sizes[0].inputs, sizes[0].hidden  # sizes of the first layer
        self.name = self.title.format(cell.name.upper(), cell.name)
        self.one_state, self.kept = cell.one_state, cell.kept
        self.blocks = sizes if self.by_layer else sizes[:1]  # the size of each block's layers
        rows = directions * len(sizes) // len(self.blocks)
        self.lead = (rows,) if rows > 1 or self.has_rows else ()  # the dimensions of a block before B

    def input(self, input: Any) -> tuple[Form, Tensor, tuple[int, int]]:
        """Return (form, x, (T, B)) of an input, checked.

        x is [T, B, I]. For a PackedSequence it is the data [sum of lengths, I], and for a cell it is [B, I].
        """
        if self.packs and isinstance(input, PackedSequence):
            checks.check_packed(input)
            counts = input.batch_sizes
            return Form(True, self.batch_first, input), input.data, (len(counts), int(counts[0]))
        form, x = TIME_FIRST, input
        if self.rank_of(input) == self.ranks[0]:
            form, x = UNBATCHED, input.unsqueeze(-2)
        elif self.batch_first:
            form, x = BATCH_FIRST, input.transpose(0, 1)
        steps, batch, _ = x.shape if self.packs else (1, *x.shape)
        return form, x, (steps, batch)

    def rank_of(self, input: Any) -> int:
        """Return the rank of an input. Raise unless it is one of `ranks`, and the input is a dense tensor."""
        if self.by_layer:  # torch has no stacks
            checks.check_tensor(input, "input")
        try:
            rank: int = input.dim()
        except AttributeError as error:  # the error of torch.nn.LSTM
            raise AttributeError(f"{error}; expected a tensor{checks.cure_of(input)}") from None
        if rank not in self.ranks:
            expected = "{}D or {}D".format(*self.ranks)
            raise ValueError(f"{self.name}: Expected input to be {expected}, got {rank}D instead")
        if input.layout is not torch.strided or input.is_nested:
            what = "a nested tensor" if input.is_nested else f"a tensor of layout {input.layout}"
            raise RuntimeError(f"{self.name}: Expected input to be a dense tensor, got {what}")
        return rank

    def zeros(self, x: Tensor, batch: int) -> list[State]:
        """Return the blocks of a call without hx: zeros, and for an sLSTM the empty state.

        If h and c of an LSTM or a GRU have the same size, they are the same tensor.
        """
        blocks = []
        for size in self.blocks:
            c = x.new_zeros(*self.lead, batch, size.hidden)
            h = x.new_zeros(*self.lead, batch, size.projected) if size.projected else c
            if self.kept > 1:
                empty: Any = self.cell.empty_like(x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32)))
                c = empty.repeat(*self.lead or (1,), 1, 1).expand(-1, batch, size.hidden)
            blocks.append((h, c))
        return blocks

    def states_in(self, form: Form, x: Tensor, batch: int, hx: Any) -> list[State]:
        """Return the blocks of hx, checked."""
        if self.kept > 1:
            return [self._numbers_in(form, x, batch, hx)]
        states = []
        for k, block in enumerate(self.blocks_of(form, x, hx)):
            h, c = (block, block) if self.one_state else (block[0], block[1])
            if form.packed is not None or not form.batched:
                h = form.state_in(h)
                c = h if self.one_state else form.state_in(c)
            _, hidden, projected, _ = self.blocks[k]
            size_c = *self.lead, batch, hidden
            size_h = (*self.lead, batch, projected) if projected else size_c
            if c.shape != size_c or h.shape != size_h:
                checks.check_as_torch(x, self.inputs, x)
                names = ("hidden",) if self.one_state else ("hidden[0]", "hidden[1]")
                names = (f"h of layer {k}", f"c of layer {k}") if self.by_layer else names
                for name, state, size in zip(names, (h, c), (size_h, size_c)):
                    checks.check_size(name, state, size, (*self.lead, x.shape[0], size[-1]))
            if self.one_state and checks.is_exact(h, x):
                h = h.to(x.dtype)
            states.append((h, c))
        return states

    def blocks_of(self, form: Form, x: Tensor, hx: Any) -> Sequence[Any]:
        """Return a user's blocks. Raise, as torch's operators do, unless hx is (h, c), or h for a GRU."""
        if self.one_state:
            checks.check_tensor(hx, "hx")
        else:
            checks.check_states(hx, ("hidden[0]", "hidden[1]"))
        return (hx,)

    def _numbers_in(self, form: Form, x: Tensor, batch: int, hx: Any) -> State:
        """Return the block of an sLSTM, checked: h [*lead, B, H], and the K numbers of each unit.

        The numbers are in float32, or in float64 for an input in float64.
        """
        names, size = self.cell.states, (*self.lead, *((batch,) if form.batched else ()), self.hidden)
        expected = f"hx should be a tuple of {len(names)} tensors ({', '.join(names)}), got"
        checks.check_states(hx, names, (f"{expected}: {{}}", f"{expected} {{}}"))
        for name, state in zip(names, hx):
            checks.check_device("hidden", state, x)
            checks.check_size(name, state, size)
        (h, *others), exact = map(form.state_in, hx), torch.promote_types(x.dtype, torch.float32)
        numbers = EQUATIONS[self.cell.name].states_from(*[t.to(exact) for t in others])  # K of [*lead, B, H]
        return h, torch.stack(numbers, -3).flatten(0, -3)

    def check_tensors(self, form: Form, x: Tensor, states: list[State], weights: AllWeights) -> None:
        """Raise, in torch's words, unless all tensors have one dtype and one device.

        Module and Cell also raise unless x has the right number of features.
        """
        tensors = [("parameter", tensor, False) for layer in weights for one in layer for tensor in one.present()]
        tensors += [("hidden", tensor, is_c) for state in states for tensor, is_c in zip(state, (False, True))]
        for what, tensor, is_c in tensors:
            checks.check_device(what, tensor, x)
            if not checks.fits(tensor, x, is_c):
                found = f"found input tensor with {x.dtype} and {what} tensor with {tensor.dtype}"
                raise RuntimeError(f"Input and {what} tensors are not the same dtype, {found}")

    def states_out(self, form: Form, states: list[State]) -> Any:
        """Return the states as a user has them.

        `states` are the rows of all layers and directions, or the blocks that torch's own operator returned.
        """
        if (count := len(states) // len(self.blocks)) > 1:
            of_blocks = [zip(*states[k : k + count]) for k in range(0, len(states), count)]
            states = [(torch.cat(h), torch.cat(c)) for h, c in of_blocks]
        out: list[Any] = []
        plain = form.packed is None and form.batched
        for h, c in states:
            if not self.lead and h.dim() == 3:  # a row
                # With K > 1 there is nothing to squeeze, and ONNX would fail.
                h, c = h.squeeze(0), c if self.kept > 1 else c.squeeze(0)
            if self.one_state:
                h = h if h.dtype is c.dtype else c  # c is h in float32
                out.append(h if plain else form.state_out(h))
            elif self.kept > 1:
                numbers = [c[k :: self.kept].view_as(h) for k in range(self.kept)]
                out.append((*map(form.state_out, (h, *EQUATIONS[self.cell.name].states_of(*numbers))),))
            else:
                out.append((h, c) if plain else (form.state_out(h), form.state_out(c)))
        return out if self.by_layer else out[0]

    def reset_states_in(self, form: Form, x: Tensor, sizes: tuple[int, int], given: Any) -> list[State]:
        """Return a user's reset_states, checked and cut into rows, (h [T, B, P], c [T, B, H]) each."""
        if self.by_layer:
            checks.check_list(given, self.cell.states, len(self.blocks), RESET_STATES, ValueError)
        steps, batch = sizes
        of_batch = [batch] if form.batched else []
        of_steps = [batch, steps] if form.batch_first else [steps, *of_batch]
        rows: list[State] = []
        for k, (block, size) in enumerate(zip(given if self.by_layer else (given,), self.blocks)):
            name, states = f"{RESET_STATES} of layer {k}" if self.by_layer else RESET_STATES, []
            if self.one_state:
                checks.check_tensor(block, name)
                block = block, block
            texts = (
                f"{name} should be a pair of tensors (h, c), got: {{}}",
                f"Expected {name} of two states (h, c), got {{}}",
            )
            checks.check_count(block, (2,), texts, ValueError)
            for letter, state, features in zip("hc", block, (size.width, size.hidden)):
                a_sequence, a_step = [*self.lead, *of_batch, features], [*self.lead, *of_steps, features]
                checks.check_reset_state(state, f"{letter} of {name}", (a_sequence, a_step), x, letter == "c")
                if state.dim() == len(a_sequence):
                    state = form.state_in(state).unsqueeze(-3).expand(*self.lead, steps, batch, features)
                else:
                    state = form.state_in(state.transpose(-3, -2) if form.batch_first else state)
                states.append(state.unbind(0) if self.lead else [state])  # [T, B, features] each
            rows += zip(*states)
        return rows


class Module(Role):
    """An LSTM, GRU or SLSTM. It has one block for all layers and directions, as torch's modules have."""

    has_rows = True

    def blocks_of(self, form: Form, x: Tensor, hx: Any) -> Sequence[Any]:
        if form.packed is not None:
            return super().blocks_of(form, x, hx)
        rank, kind = (3, "batched") if form.batched else (2, "unbatched")
        if self.one_state:
            try:
                found = hx.dim()
            except AttributeError as error:  # the error of torch.nn.GRU
                raise AttributeError(f"{error}; hx is one tensor") from None
            if found != rank:
                raise RuntimeError(f"For {kind} {rank}-D input, hx should also be {rank}-D but got {found}-D tensor")
        elif isinstance(hx, Tensor) and len(hx) == 1:
            raise IndexError(f"index 1 is out of bounds for dimension 0 with size 1{checks.cure_of_one(hx)}")
        elif hx[0].dim() != rank or hx[1].dim() != rank:
            ranks = f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors{checks.cure_of_one(hx)}"
            raise RuntimeError(f"For {kind} {rank}-D input, hx and cx should also be {rank}-D but got {ranks}")
        elif rank == 3 and not (isinstance(hx, (tuple, list)) and len(hx) == 2):  # torch takes two of an unbatched hx
            checks.check_count(hx, (2,), checks.PAIR, RuntimeError)
        return (hx,)

    def check_tensors(self, form: Form, x: Tensor, states: list[State], weights: AllWeights) -> None:
        weight = x if form.packed is not None else weights[0][0].weight_ih
        if x.shape[-1] != self.inputs or not (x.dtype is weight.dtype or autocasts(x)):
            checks.check_as_torch(x, self.inputs, weight)
        super().check_tensors(form, x, states, weights)


class Stack(Module):
    """A StackedLSTM or StackedGRU. It has a block for each layer."""

    title, suffix, by_layer, has_rows = "Stacked{0}", "_l0", True, False

    def blocks_of(self, form: Form, x: Tensor, hx: Any) -> Sequence[Any]:
        return checks.check_list(hx, self.cell.states, len(self.blocks), "hx", RuntimeError)


class Cell(Role):
    """An LSTMCell or GRUCell, which runs one step. torch's own cell is called to raise its errors."""

    title, suffix, ranks, packs = "{0}Cell", "", (1, 2), False

    def blocks_of(self, form: Form, x: Tensor, hx: Any) -> Sequence[Any]:
        states, size = (hx,) if self.one_state else hx, (len(x), self.hidden) if form.batched else (self.hidden,)
        fits = type(states) is tuple and len(states) == len(self.cell.states)
        if not fits or not all([isinstance(t, Tensor) and t.shape == size for t in states]):
            self._ask_torch(x if form.batched else x[0], hx)
        return (hx,)

    def check_tensors(self, form: Form, x: Tensor, states: list[State], weights: AllWeights) -> None:
        try:
            checks.check_as_torch(x, self.inputs, x)
            super().check_tensors(form, x, states, weights)
        except RuntimeError:
            self._ask_torch(x, states[0][0] if self.one_state else states[0], weights[0][0])
            raise

    def _ask_torch(self, x: Tensor, hx: Any, weights: Weights | None = None) -> None:
        """Raise the error that torch's own cell raises for this call, if it does.

        Without `weights` it gets weights of the right sizes.
        """
        if weights is None:
            rows = self.cell.rows * self.hidden
            weights = Weights(x.new_empty(rows, self.inputs), x.new_empty(rows, self.hidden))
        as_torchs: Any = SimpleNamespace(hidden_size=self.hidden, **weights._asdict())
        try:
            TORCHS[self.name].forward(as_torchs, x, hx)
        except (AttributeError, TypeError) as error:
            cure = "; hx is one tensor" if self.one_state else checks.cure_of_one(hx, "a cell expects (h, c)")
            raise type(error)(f"{error}{cure}") from None


class Function(Role):
    """A function such as `lstm_layer`. It runs one layer in one direction."""

    title = "{1}_layer"
