"""Sequences of different lengths and with resets inside: checks, index arithmetic, PackedSequence.

A *step* counts in the order of processing. For a sequence of length L in a batch padded to T, the forward direction
visits time s at step s, and the reverse direction time L - 1 - s. Steps s >= L are padding; both directions visit
time s there.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .backends import RESET_STATES
from .precision import autocasts, is_exact
from .transforms import need_the_reference
from .weights import State


def check_tensor(value: object, name: str) -> None:
    """Raise TypeError unless it is one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor, got: {type(value).__name__}")


def check_dense(input: Tensor, name: str) -> None:
    """Raise RuntimeError unless the input of `name` has its elements in memory as they are: not sparse, not nested."""
    if input.layout is not torch.strided or input.is_nested:
        what = "a nested tensor" if input.is_nested else f"a tensor of layout {input.layout}"
        raise RuntimeError(f"{name}: Expected input to be a dense tensor, got {what}")


def check_lengths(lengths: Tensor, steps: int, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `lengths` is an int tensor of `shape` on `device` with values from 0 to `steps`.

    On CUDA the values are asserted on the device, without a synchronisation; elsewhere at once.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong dtype, shape, device or values.
    """
    check_tensor(lengths, "lengths")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths should be of dtype torch.int32 or torch.int64, got {lengths.dtype}")
    if lengths.shape != shape:
        raise ValueError(f"Expected lengths of shape {list(shape)}, got {list(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"Expected lengths on {device}, where the input is, got {lengths.device}")
    if need_the_reference():  # inside vmap there is no value to look at
        return
    fits = ((lengths >= 0) & (lengths <= steps)).all()
    if torch.compiler.is_compiling():  # a text with the number in it would be a graph for each number
        torch._assert_async(fits, "Expected lengths from 0 to the number of steps")
    elif lengths.is_cuda:
        torch._assert_async(fits, f"Expected lengths from 0 to {steps}, the number of steps")
    elif not lengths.is_meta and not fits:
        raise ValueError(
            f"Expected lengths from 0 to {steps}, the number of steps, "
            f"got lengths from {int(lengths.min())} to {int(lengths.max())}"
        )


def check_resets(resets: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `resets` is a bool tensor of `shape` on `device`.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong dtype, shape or device.
    """
    check_tensor(resets, "resets")
    if resets.dtype != torch.bool:
        raise ValueError(f"resets should be of dtype torch.bool, got {resets.dtype}")
    if resets.shape != shape:
        raise ValueError(f"Expected resets of shape {list(shape)}, got {list(resets.shape)}")
    if resets.device != device:
        raise ValueError(f"Expected resets on {device}, where the input is, got {resets.device}")


def check_reset_state(state: Tensor, name: str, sizes: tuple[list[int], list[int]], x: Tensor, is_cell: bool) -> None:
    """Raise unless `state` is of one of two sizes, a state a sequence or one a step, and of the dtype and device of x.

    As of any state, dtypes may differ under autocast, and a cell state may be float32 beside half precision.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong size, dtype or device.
    """
    check_tensor(state, name)
    if list(state.shape) not in sizes:
        raise ValueError(
            f"Expected {name} of size {sizes[0]}, one a sequence, or {sizes[1]}, one a step, got {list(state.shape)}"
        )
    if state.dtype != x.dtype and not autocasts(x) and not (is_cell and is_exact(state, x)):
        raise ValueError(f"Expected {name} of dtype {x.dtype}, got {state.dtype}")
    if state.device != x.device:
        raise ValueError(f"Expected {name} on {x.device}, where the input is, got {state.device}")


def resets_from_dones(dones: Tensor, first: Tensor | None = None) -> Tensor:
    """The `resets` of a rollout: where an episode starts, from where the episodes end.

    An environment says at a step that it was the last of its episode. The state is zeroed before the step that follows,
    so `resets` are `dones` one step later.

    Args:
        dones: bool [T, B]; at t whether step t was the last of its episode.
        first: bool [B], whether step 0 starts an episode: `dones` at the last step of the rollout before. Default:
            nowhere; the states that are handed over go on.

    Returns:
        bool [T, B].

    Raises:
        TypeError: not tensors.
        ValueError: wrong dtype, shape or device; T = 0.
    """
    check_tensor(dones, "dones")
    if dones.dtype is not torch.bool or dones.dim() != 2 or len(dones) == 0:
        raise ValueError(f"Expected bool dones [T, B] with T > 0, got {dones.dtype} {list(dones.shape)}")
    if first is None:
        first = torch.zeros_like(dones[0])
    check_tensor(first, "first")
    if first.dtype is not torch.bool or first.shape != dones[0].shape or first.device != dones.device:
        raise ValueError(
            f"Expected bool first {list(dones[0].shape)} on {dones.device}, got {first.dtype} {list(first.shape)} on "
            f"{first.device}"
        )
    return torch.cat([first[None], dones[:-1]])


def valid_steps(steps: int, lengths: Tensor | None) -> Tensor | None:
    """Bool [T, B], True before the end of each sequence: in time and in steps alike. None: everywhere."""
    if lengths is None:
        return None
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def times_of_steps(steps: int, batch: int, lengths: Tensor | None, reverse: bool, device: torch.device) -> Tensor:
    """int64 [T, B]: the time that each sequence visits at each step. Its own inverse."""
    step = torch.arange(steps, device=device)[:, None].expand(steps, batch)
    if not reverse:
        return step
    if lengths is None:
        return steps - 1 - step
    return torch.where(step < lengths, lengths - 1 - step, step)


class Traversal(NamedTuple):
    """How layers go through a batch: how many steps, where the state is reset and to what, from which end.

    A reset at t separates time t from time t - 1, for both directions: the forward one begins anew at t, the reverse
    one at t - 1.
    """

    lengths: Tensor | None = None  # [B]; None: all have T steps
    resets: Tensor | None = None  # bool [T, B]
    reverse: bool = False
    # (h [T, B, P], c [T, B, H]) of each layer and direction, [L*D]: the states that steps begin anew from, by the time
    # of the reset, in the reverse direction by that of the step. None: zeros.
    reset_states: list[State] | None = None

    def is_plain(self) -> bool:  # no property: torch 2.8 does not trace one
        """Whether all sequences have T steps and no reset."""
        return self.lengths is None and self.resets is None

    def backwards(self) -> "Traversal":
        """The same batch in the reverse direction."""
        states = self.reset_states
        if states is not None:
            states = [(torch.cat([h[1:], h[:1]]), torch.cat([c[1:], c[:1]])) for h, c in states]
        return Traversal(self.lengths, self.resets, True, states)

    def of(self, number: int) -> "Traversal":
        """That of one layer in one direction, which has that number among [L*D]."""
        if self.reset_states is None:
            return self
        return Traversal(self.lengths, self.resets, self.reverse, [self.reset_states[number]])

    def reset_to(self) -> tuple[Tensor | None, Tensor | None]:
        """(h [T, B, P], c [T, B, H]) that the steps of one layer and direction begin anew from; None: zeros."""
        return (None, None) if self.reset_states is None else self.reset_states[0]

    def reset_tensors(self) -> list[Tensor]:
        """Those of all reset states that are there."""
        return [] if self.reset_states is None else [t for pair in self.reset_states for t in pair]

    def within(self, span: slice | None) -> "Traversal":
        """That of the times of a span alone; None: of all."""
        if span is None:
            return self
        lengths = None if self.lengths is None else (self.lengths - span.start).clamp(0, span.stop - span.start)
        resets = None if self.resets is None else self.resets[span]
        states = None if self.reset_states is None else [(h[span], c[span]) for h, c in self.reset_states]
        return Traversal(lengths, resets, self.reverse, states)

    def reset_at_end_of(self, span: slice | None, *states: Tensor) -> list[Tensor]:
        """States (h, c) of one layer in the reverse direction, which comes to a span from the times after it.

        Reset where a reset separates the two.
        """
        if self.resets is None or span is None or span.stop == len(self.resets):
            return list(states)
        separated = self.resets[span.stop]  # [B]
        if self.lengths is not None:
            separated = separated & (self.lengths > span.stop)
        to = (0 if t is None else t[span.stop].to(state.dtype) for t, state in zip(self.reset_to(), states))
        return [torch.where(separated[:, None], start, state) for start, state in zip(to, states)]

    def steps(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of each step of x [T, B, *], in the order of processing, each [T, B].

        Returns:
            The time that it visits, int64; whether it is inside the sequence (None: all are); whether the state is
            reset before it (None: nowhere).
        """
        steps, batch, _ = x.shape
        time = times_of_steps(steps, batch, self.lengths, self.reverse, x.device)
        valid = valid_steps(steps, self.lengths)
        return time, valid, self._resets_before(time, valid)

    def _resets_before(self, time: Tensor, valid: Tensor | None) -> Tensor | None:
        if self.resets is None:
            return None
        reset = self.resets
        if self.reverse:
            # The step at a time came from time + 1, and the first step from no time at all.
            reset = reset.gather(0, (time + 1).clamp(max=len(time) - 1))
            reset = torch.cat([torch.zeros_like(reset[:1]), reset[1:]])
        return reset if valid is None else reset & valid

    def begins_anew(self) -> Tensor | None:
        """Bool [T, B]: whether the step at each time is reset; None: nowhere."""
        reset, lengths = self.resets, self.lengths
        if reset is None:
            return None
        if self.reverse:  # it came to time t from t + 1, and to the last valid time from the initial state
            reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
            lengths = None if lengths is None else lengths - 1
        valid = valid_steps(len(reset), lengths)
        return reset if valid is None else reset & valid

    def states_before(
        self,
        states: Tensor,  # [T, B, F] h or c of every time; zero in padding
        initial: Tensor,  # [B, F]
        reset_to: Tensor | None,  # [T, B, F], see `reset_to`
    ) -> Tensor:
        """[T, B, F]: the state that the step at each time started from; anything finite in padding."""
        time = torch.arange(states.shape[0], device=states.device)[:, None]  # [T, 1]
        if not self.reverse:
            before = torch.cat([initial[None], states[:-1]])
        elif self.lengths is None:
            before = torch.cat([states[1:], initial[None]])
        else:
            before = torch.cat([states[1:], states.new_zeros(1, *states.shape[1:])])
            before = torch.where((time == self.lengths - 1)[:, :, None], initial, before)
        anew = self.begins_anew()
        if anew is None:
            return before
        return torch.where(anew[:, :, None], 0 if reset_to is None else reset_to.to(before.dtype), before)


class Batch(NamedTuple):
    """A user's input in time-major form, and what is needed to hand results back in the form that came."""

    x: Tensor  # [T, B, I]
    traversal: Traversal
    batched: bool
    batch_first: bool
    packed: PackedSequence | None
    rows: Tensor | None  # [N] of a PackedSequence: row time * B + batch of each of its rows

    @classmethod
    def of(
        cls, input: Tensor | PackedSequence, lengths: Tensor | None, resets: Tensor | None, batch_first: bool
    ) -> "Batch":
        """The batch of a padded, unbatched (2-D) or packed input.

        Raises:
            ValueError, TypeError: wrong lengths or resets, see `check_lengths` and `check_resets`.
        """
        if isinstance(input, PackedSequence):
            return cls._of_packed(input, lengths, resets, batch_first)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and batch_first:
            x = x.transpose(0, 1)
        steps, batch, _ = x.shape
        if lengths is not None:
            check_lengths(lengths, steps, (batch,) if batched else (), x.device)
            lengths = lengths.reshape(batch)
        if resets is not None:
            check_resets(resets, tuple(input.shape[:-1]), x.device)
            if not batched:
                resets = resets.unsqueeze(1)
            elif batch_first:
                resets = resets.T
        return cls(x, Traversal(lengths, resets), batched, batch_first, None, None)

    @classmethod
    def _of_packed(
        cls, input: PackedSequence, lengths: Tensor | None, resets: Tensor | None, batch_first: bool
    ) -> "Batch":
        if lengths is not None:
            raise ValueError("lengths should not be given together with a PackedSequence, which has its own")
        data, batch_sizes, sorted_indices, _ = input
        steps, batch = len(batch_sizes), int(batch_sizes[0])
        inside = torch.arange(batch) < batch_sizes[:, None]  # [T, B], on the CPU as batch_sizes
        rows = inside.flatten().nonzero().squeeze(1).to(data.device)  # [N]
        x = data.new_zeros(steps * batch, data.shape[1]).index_copy(0, rows, data)
        if resets is not None:
            check_resets(resets, (batch, steps) if batch_first else (steps, batch), data.device)
            resets = resets.T if batch_first else resets
            resets = resets if sorted_indices is None else resets.index_select(1, sorted_indices)
        lengths = inside.sum(0).to(data.device)
        return cls(x.view(steps, batch, -1), Traversal(lengths, resets), True, batch_first, input, rows)

    def output(self, y: Tensor) -> Tensor | PackedSequence:
        """Output [T, B, F] in the form of the input."""
        if self.packed is not None and self.rows is not None:
            _, batch_sizes, sorted_indices, unsorted_indices = self.packed
            packed = y.flatten(0, 1).index_select(0, self.rows)
            return PackedSequence(packed, batch_sizes, sorted_indices, unsorted_indices)
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def state_in(self, state: Tensor) -> Tensor:
        """A user's state, [*, B, H] or unbatched [*, H], as [*, B, H] in the batch's order."""
        if not self.batched:
            return state.unsqueeze(-2)
        if self.packed is not None and self.packed.sorted_indices is not None:
            return state.index_select(-2, self.packed.sorted_indices)
        return state

    def resetting_to(self, states: list[State]) -> "Batch":
        """The same batch, with states to reset to: (h [T, B, P], c [T, B, H]) of each layer and direction, [L*D]."""
        lengths, resets, reverse, _ = self.traversal
        traversal = Traversal(lengths, resets, reverse, states)
        return Batch(self.x, traversal, self.batched, self.batch_first, self.packed, self.rows)

    def reset_pair_in(self, pair: State, lead: list[int], width: int, hidden: int, name: str = RESET_STATES) -> State:
        """A user's states to reset to, checked, in the batch's order: [*lead, T, B, P] and [*lead, T, B, H].

        Raises:
            TypeError, ValueError: no pair, no resets, or see `check_reset_state`.
        """
        if self.traversal.resets is None:
            raise ValueError(f"Expected resets together with {RESET_STATES}, which say what they leave, got None")
        if not isinstance(pair, (tuple, list)):  # torch 2.8 does not trace `tuple | list`
            raise TypeError(f"{name} should be a pair of tensors (h, c), got: {type(pair).__name__}")
        if len(pair) != 2:
            raise ValueError(f"Expected {name} of two states (h, c), got {len(pair)}")
        h, c = pair
        return (
            self._reset_state_in(h, f"h of {name}", lead, width, False),
            self._reset_state_in(c, f"c of {name}", lead, hidden, True),
        )

    def _reset_state_in(self, state: Tensor, name: str, lead: list[int], features: int, is_cell: bool) -> Tensor:
        steps, batch, _ = self.x.shape
        time_last = self.batched and self.batch_first
        of_batch = [batch] if self.batched else []
        a_sequence = [*lead, *of_batch, features]
        a_step = [*lead, *([batch, steps] if time_last else [steps, *of_batch]), features]
        check_reset_state(state, name, (a_sequence, a_step), self.x, is_cell)
        if state.dim() == len(a_sequence):
            state = self.state_in(state).unsqueeze(-3)
            return state.expand(*lead, steps, batch, features)
        return self.state_in(state.transpose(-3, -2) if time_last else state)

    def state_out(self, state: Tensor) -> Tensor:
        """The reverse of `state_in`."""
        if not self.batched:
            return state.squeeze(-2)
        if self.packed is not None and self.packed.unsorted_indices is not None:
            return state.index_select(-2, self.packed.unsorted_indices)
        return state
