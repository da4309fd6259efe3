"""The forms of an input: padded, unbatched, packed. Conversion to the time-major form used inside, and back."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Padded(NamedTuple):
    """A tensor (T, N, I), with batch_first (N, T, I), or unbatched (T, I)."""

    batched: bool
    batch_first: bool  # False where the input is not batched
    packed: None = None

    def time_major(self, t: Tensor) -> Tensor:
        """A user's (T, N, ...), (N, T, ...) or (T, ...) -> [T, B, ...]."""
        if not self.batched:
            return t.unsqueeze(1)
        return t.transpose(0, 1) if self.batch_first else t

    def output(self, y: Tensor) -> Tensor:
        """[T, B, F] in the form of the input."""
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def state_in(self, state: Tensor) -> Tensor:
        """A user's state, [*, B, H] or unbatched [*, H] -> [*, B, H]."""
        return state if self.batched else state.unsqueeze(-2)

    def state_out(self, state: Tensor) -> Tensor:
        """The reverse of `state_in`."""
        return state if self.batched else state.squeeze(-2)


UNBATCHED, TIME_FIRST, BATCH_FIRST = Padded(False, False), Padded(True, False), Padded(True, True)


class Packed(NamedTuple):
    """A PackedSequence. Inside, sequences are sorted by length, as in its data."""

    packed: PackedSequence
    batch_first: bool  # of the tensors given with it
    batched: bool = True

    def time_major(self, t: Tensor) -> Tensor:
        """A user's values for each step, (T, N, ...) or (N, T, ...) in the user's order -> [T, B, ...]."""
        t = t.transpose(0, 1) if self.batch_first else t
        return t if self.packed.sorted_indices is None else t.index_select(1, self.packed.sorted_indices)

    def output(self, y: Tensor) -> PackedSequence:
        """[T, B, F], or [N, F] as packed data are, in the form of the input."""
        _, batch_sizes, sorted_indices, unsorted_indices = self.packed
        if y.dim() == 3:
            y = y.flatten(0, 1).index_select(0, self.rows())
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)

    def state_in(self, state: Tensor) -> Tensor:
        """A user's state [*, B, H], sorted by length."""
        indices = self.packed.sorted_indices
        return state if indices is None else state.index_select(-2, indices)

    def state_out(self, state: Tensor) -> Tensor:
        """The reverse of `state_in`."""
        indices = self.packed.unsorted_indices
        return state if indices is None else state.index_select(-2, indices)

    def inside(self) -> Tensor:
        """Bool [T, B], on the CPU: whether a sequence has that step."""
        sizes = self.packed.batch_sizes
        return torch.arange(int(sizes[0]), device=sizes.device) < sizes[:, None]

    def lengths(self) -> Tensor:
        """The lengths of the sequences, [B]."""
        return self.inside().sum(0).to(self.packed.data.device)

    def rows(self) -> Tensor:
        """[N]: time * B + batch for each row of data."""
        return self.inside().flatten().nonzero().squeeze(1).to(self.packed.data.device)

    def padded(self) -> Tensor:
        """The data as [T, B, I], zeros in the padding."""
        data, batch_sizes, *_ = self.packed
        steps, batch = len(batch_sizes), int(batch_sizes[0])
        x = data.new_zeros(steps * batch, data.shape[1]).index_copy(0, self.rows(), data)
        return x.view(steps, batch, -1)


Form = Padded | Packed
