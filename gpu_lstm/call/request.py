"""What a user asks for, in the form of its input, and what layers are asked to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .modes import Modes
from .sequences import Traversal
from .weights import State, Weights

if TYPE_CHECKING:
    from .options import Options


class Form(NamedTuple):
    """A tensor (T, N, I), with batch_first (N, T, I), or unbatched (T, I); or a PackedSequence.

    Inside, the sequences of a PackedSequence are sorted by length, as in its data.
    """

    batched: bool
    batch_first: bool  # False where the input is not batched; of a PackedSequence, of the tensors given with it
    packed: PackedSequence | None = None

    def time_major(self, t: Tensor) -> Tensor:
        """A user's values for each step, (T, N, ...), (N, T, ...) or (T, ...) -> [T, B, ...]."""
        if not self.batched:
            return t.unsqueeze(1)
        t = t.transpose(0, 1) if self.batch_first else t
        indices = None if self.packed is None else self.packed.sorted_indices
        return t if indices is None else t.index_select(1, indices)

    def output(self, y: Tensor) -> Tensor | PackedSequence:
        """[T, B, F] in the form of the input; of a PackedSequence also [N, F], as its data are."""
        if self.packed is not None:
            y = y if y.dim() == 2 else y.flatten(0, 1).index_select(0, self.rows())
            return PackedSequence(y, *self.packed[1:])
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def state_in(self, state: Tensor) -> Tensor:
        """A user's state, [*, B, H] or unbatched [*, H] -> [*, B, H]."""
        if not self.batched:
            return state.unsqueeze(-2)
        indices = None if self.packed is None else self.packed.sorted_indices
        return state if indices is None else state.index_select(-2, indices)

    def state_out(self, state: Tensor) -> Tensor:
        """The reverse of `state_in`."""
        if not self.batched:
            return state.squeeze(-2)
        indices = None if self.packed is None else self.packed.unsorted_indices
        return state if indices is None else state.index_select(-2, indices)

    def inside(self) -> Tensor:
        """Bool [T, B], on the CPU: whether a sequence, of a PackedSequence, has that step."""
        sizes = self.packed.batch_sizes  # type: ignore[union-attr]
        return torch.arange(int(sizes[0]), device=sizes.device) < sizes[:, None]

    def rows(self) -> Tensor:
        """[N]: time * B + batch for each row of a PackedSequence's data."""
        return self.inside().flatten().nonzero().squeeze(1).to(self.packed.data.device)  # type: ignore[union-attr]


UNBATCHED, TIME_FIRST, BATCH_FIRST = Form(False, False), Form(True, False), Form(True, True)


class Call(NamedTuple):
    """What layers are asked to do. T steps, B sequences, L layers, D directions."""

    x: Tensor  # [T, B, I]
    steps: int
    batch: int
    states: list[State]  # [L*D] of ([1, B, P], [K, B, H]); for a GRU c = h
    weights: list[list[Weights]]  # [L][D]
    traversal: Traversal  # of the forward direction; that of lstm_layer(reverse=True) itself
    options: Options
    modes: Modes
    learns: bool  # whether autograd records


class Request(NamedTuple):
    """What a user asks for, checked."""

    x: Tensor  # [T, B, I]; as torch's own operators take it: of a PackedSequence the data [N, I], of a cell [B, I]
    steps: int
    batch: int
    states: list[State]  # the role's blocks
    weights: list[list[Weights]]
    traversal: Traversal
    options: Options
    form: Form
    modes: Modes
    learns: bool

    def padded(self) -> tuple[Tensor, Traversal]:
        """x and the traversal, of a PackedSequence as a batch [T, B, I] with lengths and zeros in the padding."""
        if self.form.packed is None:
            return self.x, self.traversal
        x = self.x.new_zeros(self.steps * self.batch, self.x.shape[1]).index_copy(0, self.form.rows(), self.x)
        lengths = self.form.inside().sum(0).to(x.device)
        return x.view(self.steps, self.batch, -1), self.traversal._replace(lengths=lengths)
