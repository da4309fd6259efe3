"""Sequences of different lengths and with resets inside: index arithmetic.

At step s the reverse direction visits time L - 1 - s of a sequence of length L; from L on both directions visit time s.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.cells import Cell
from .checks import check_tensor, cure_of_flags
from .weights import State


def resets_from_dones(dones: Tensor, first: Tensor | None = None) -> Tensor:
    """The `resets` of a rollout, bool [T, B], from its `dones`: an episode starts one step after the last one ends.

    Not for buffers that hold starts already: CleanRL's and rl_games' `dones`, Stable-Baselines3's `episode_starts`,
    TorchRL's `is_init`. These are `resets` as they are: shifting them again would silently let each episode begin with
    the state of the one before.

    Args:
        dones: bool [T, B]; at t whether step t was the last of its episode.
        first: bool [B], whether step 0 starts an episode: `dones` at the last step of the rollout before. Default:
            nowhere, which is right if the initial states were zeroed at ends of episodes.

    Raises:
        TypeError: they are not tensors.
        ValueError: wrong dtype, shape or device; T = 0.
    """
    check_tensor(dones, "dones")
    if dones.dtype is not torch.bool or dones.dim() != 2 or len(dones) == 0:
        cure = cure_of_flags("dones", dones, dones.shape[:2]) if dones.dim() > 1 and len(dones) > 0 else ""
        raise ValueError(f"Expected bool dones [T, N] of a step or more, got {dones.dtype} {list(dones.shape)}{cure}")
    if first is None:
        first = torch.zeros_like(dones[0])
    check_tensor(first, "first")
    if first.dtype is not torch.bool or first.shape != dones[0].shape or first.device != dones.device:
        expected = f"Expected bool first {list(dones[0].shape)} on {dones.device}"
        cure = cure_of_flags("first", first, dones[0].shape) if first.device == dones.device else ""
        raise ValueError(f"{expected}, got {first.dtype} {list(first.shape)} on {first.device}{cure}")
    return torch.cat([first[None], dones[:-1]])


def valid_steps(steps: int, lengths: Tensor | None) -> Tensor | None:
    """Bool [T, B], True before the end of each sequence: in time and in steps alike. None: everywhere."""
    if lengths is None:
        return None
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def without_padding(t: Tensor, lengths: Tensor | None) -> Tensor:
    """t [T, B, F] with zeros past the end of each sequence."""
    valid = valid_steps(t.shape[0], lengths)
    return t if valid is None else torch.where(valid[:, :, None], t, 0)


def where(mask: Tensor | None, these: tuple[Any, Any], others: tuple[Any, Any]) -> State:
    """States [B, *]: these where the mask [B, 1] is true, else the others. None: it is true nowhere."""
    if mask is None:
        return others
    h, c = [torch.where(mask, a, b) for a, b in zip(these, others)]
    return h, c


class Traversal(NamedTuple):
    """How a layer goes through a batch: how many steps, where its state is reset and to what, from which end.

    A reset at t separates t from t - 1: the forward direction starts again at t, the reverse one at t - 1.
    """

    lengths: Tensor | None = None  # [B]; None: all have T steps
    resets: Tensor | None = None  # bool [T, B]
    reverse: bool = False
    # States to reset to: [L*D] of (h [T, B, P], c [T, B, H]). Forward, those at t are for a reset at t; in reverse, for
    # one before the step that visits t. None: zeros.
    reset_states: list[State] | None = None

    def is_plain(self) -> bool:
        """Whether all sequences have T steps and no reset."""
        return self.lengths is None and self.resets is None

    def backwards(self) -> "Traversal":
        """The same batch in the reverse direction."""
        states = self.reset_states and [(h.roll(-1, 0), c.roll(-1, 0)) for h, c in self.reset_states]
        return Traversal(self.lengths, self.resets, True, states)

    def first(self, steps: int) -> "Traversal":
        """The traversal of the first times, `steps` of them."""
        lengths = None if self.lengths is None else self.lengths.clamp(max=steps)
        resets = None if self.resets is None else self.resets[:steps]
        states = None if self.reset_states is None else [(h[:steps], c[:steps]) for h, c in self.reset_states]
        return Traversal(lengths, resets, self.reverse, states)

    def entering(self, end: int, h: Tensor, c: Tensor, cell: Cell) -> State:
        """The state with which a layer enters the times before `end` in reverse, reset where `end` has a reset."""
        if self.resets is None or end == len(self.resets):
            return h, c
        separated = self.resets[end]  # [B]
        if self.lengths is not None:
            separated = separated & (self.lengths > end)
        to: Any = 0, cell.empty_like(c)
        if self.reset_states is not None:
            to = [t[end - 1].to(s.dtype) for t, s in zip(self.reset_states[0], (h, c))]
        return where(separated[:, None], to, (h, c))

    def steps(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(time, valid, reset) [T, B] of the steps of x [T, B, *]. The permutation `time` is its own inverse.

        Each step's time; whether it is inside its sequence (None: all are), and comes after a reset (None: none does).
        """
        steps, batch, _ = x.shape
        time = torch.arange(steps, device=x.device)[:, None].expand(steps, batch)
        if self.reverse:
            ends = steps if self.lengths is None else self.lengths
            time = torch.where(time < ends, ends - 1 - time, time)
        valid = valid_steps(steps, self.lengths)
        reset = self.resets_in_time()
        return time, valid, reset.gather(0, time) if self.reverse and reset is not None else reset

    def resets_in_time(self) -> Tensor | None:
        """Bool [T, B]: whether the state is reset before the step that visits each time; None: nowhere."""
        reset, lengths = self.resets, self.lengths
        if reset is None:
            return None
        if self.reverse:  # it came to time t from t + 1, and to the last valid time from the initial state
            reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
            lengths = None if lengths is None else lengths - 1
        valid = valid_steps(len(reset), lengths)
        return reset if valid is None else reset & valid

    def states_before(self, states: Tensor, initial: Tensor, reset_to: Tensor | None) -> Tensor:
        """[T, B, F]: the state that the step at each time started from; anything finite in padding.

        `states` [T, B, F]: h or c of every time, zero in padding; `initial` [1, B, F]; `reset_to` [T, B, F].
        """
        if len(states) == 1:
            before = initial
        elif not self.reverse:
            before = torch.cat([initial, states[:-1]])
        elif self.lengths is None:
            before = torch.cat([states[1:], initial])
        else:
            time = torch.arange(states.shape[0], device=states.device)[:, None]  # [T, 1]
            before = torch.cat([states[1:], states.new_zeros(1, *states.shape[1:])])
            before = torch.where((time == self.lengths - 1)[:, :, None], initial, before)
        reset = self.resets_in_time()
        if reset is None:
            return before
        return torch.where(reset[:, :, None], 0 if reset_to is None else reset_to.to(before.dtype), before)


EVERY_STEP = Traversal()
