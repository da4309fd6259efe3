"""Index arithmetic for sequences that have different lengths and resets.

For a sequence of length L the reverse direction visits time L - 1 - s at step s. From step L on both directions visit
time s at step s.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.cells import Cell
from .checks import check_tensor, cure_of_flags
from .weights import State


def resets_from_dones(dones: Tensor, first: Tensor | None = None) -> Tensor:
    """Return the `resets` of a rollout, bool [T, B], from its `dones`.

    An episode starts one step after the last one ends, so that `dones` are shifted by one step.

    Do not use it for buffers that already contain the starts of episodes: `dones` of CleanRL and rl_games,
    `episode_starts` of Stable-Baselines3, `is_init` of TorchRL. Pass these as `resets`. Here they would be shifted once
    more, and each episode would silently begin with the state of the episode before.

    Args:
        dones: Whether a step was the last one of its episode, bool [T, B].
        first: Whether step 0 starts an episode, bool [B]. This is the last row of `dones` in the previous rollout.
            Default: False everywhere, which is right if the caller zeroed the initial states at the ends of episodes.

    Raises:
        TypeError: `dones` or `first` is not a tensor.
        ValueError: `dones` or `first` has a wrong dtype, shape or device, or T is 0.
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
    """Return bool [T, B], which is True before the end of each sequence. Return None if no sequence ends before T.

    The mask is the same for times and for steps.
    """
    if lengths is None:
        return None
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def without_padding(t: Tensor, lengths: Tensor | None) -> Tensor:
    """Return t [T, B, F] with zeros past the end of each sequence."""
    valid = valid_steps(t.shape[0], lengths)
    return t if valid is None else torch.where(valid[:, :, None], t, 0)


def where(mask: Tensor | None, these: tuple[Any, Any], others: tuple[Any, Any]) -> State:
    """Return the states (h, c), [B, *] each: `these` where the mask [B, 1] is True, and `others` elsewhere.

    A mask of None stands for a mask that is False everywhere.
    """
    if mask is None:
        return others
    h, c = [torch.where(mask, a, b) for a, b in zip(these, others)]
    return h, c


class Traversal(NamedTuple):
    """The way in which a layer goes through a batch: the steps of each sequence, the resets, and the direction.

    A reset at t separates time t from time t - 1. The forward direction starts anew at time t, and the reverse
    direction starts anew at time t - 1.
    """

    lengths: Tensor | None = None  # [B]; None: all have T steps
    resets: Tensor | None = None  # bool [T, B]
    reverse: bool = False
    # The states that resets set, [L*D] pairs (h [T, B, P], c [T, B, H]). None: zeros. The forward direction uses the
    # states at t for a reset at t. The reverse direction uses them for a reset before the step that visits t.
    reset_states: list[State] | None = None

    def is_plain(self) -> bool:
        """Whether all sequences have T steps, and there are no resets."""
        return self.lengths is None and self.resets is None

    def backwards(self) -> "Traversal":
        """Return the traversal of the same batch in the reverse direction."""
        states = self.reset_states and [(h.roll(-1, 0), c.roll(-1, 0)) for h, c in self.reset_states]
        return Traversal(self.lengths, self.resets, True, states)

    def first(self, steps: int) -> "Traversal":
        """Return the traversal of the first `steps` times."""
        lengths = None if self.lengths is None else self.lengths.clamp(max=steps)
        resets = None if self.resets is None else self.resets[:steps]
        states = None if self.reset_states is None else [(h[:steps], c[:steps]) for h, c in self.reset_states]
        return Traversal(lengths, resets, self.reverse, states)

    def entering(self, end: int, h: Tensor, c: Tensor, cell: Cell) -> State:
        """Return the state with which the reverse direction enters the times before `end`.

        It is (h, c), the state after the times from `end` on, or the state that a reset at `end` sets.
        """
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
        """Return (time, valid, reset), [T, B] each, for the steps of x [T, B, *].

        `time` is the time that a step visits. It is a permutation that is its own inverse. `valid` says whether a step
        is inside its sequence, and is None if every step is. `reset` says whether the state is reset before a step, and
        is None if there are no resets.
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
        """Return bool [T, B], which says for each time whether the state is reset before the step that visits it.

        Return None without resets.
        """
        reset, lengths = self.resets, self.lengths
        if reset is None:
            return None
        if self.reverse:
            # A reset at t + 1 comes before the step that visits t. At the last valid time there is no step before.
            reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
            lengths = None if lengths is None else lengths - 1
        valid = valid_steps(len(reset), lengths)
        return reset if valid is None else reset & valid

    def states_before(self, states: Tensor, initial: Tensor, reset_to: Tensor | None) -> Tensor:
        """Return the state before the step that visits each time, [T, B, F]. In padding it is finite, but arbitrary.

        Args:
            states: h or c of every time, [T, B, F], zero in padding.
            initial: The initial state, [1, B, F].
            reset_to: The states that resets set, [T, B, F]. None: zeros.
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
