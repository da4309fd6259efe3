"""The forms of an input: padded, unbatched, packed. Conversion to the time-major form used inside, and back."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


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

    # Of a PackedSequence alone:

    def inside(self) -> Tensor:
        """Bool [T, B], on the CPU: whether a sequence has that step."""
        sizes = self.packed.batch_sizes  # type: ignore[union-attr]
        return torch.arange(int(sizes[0]), device=sizes.device) < sizes[:, None]

    def rows(self) -> Tensor:
        """[N]: time * B + batch for each row of data."""
        return self.inside().flatten().nonzero().squeeze(1).to(self.packed.data.device)  # type: ignore[union-attr]


UNBATCHED, TIME_FIRST, BATCH_FIRST = Form(False, False), Form(True, False), Form(True, True)
