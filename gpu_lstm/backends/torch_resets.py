"""Batches with resets on torch's own LSTM and GRU, which support none.

Everything is computed by calls of `run`, which runs one layer in one direction without resets. Its steps may hold or
clear the state:

    run(x [S, B, I], (h0 [B, P], c0 [B, H]), holds, clears) -> h [S, B, P], c_n [B, H]

`holds` and `clears` are bool [S, B], or None if no step does so. The functions below take two more masks, by step:

    ended   bool [T, B]   True past the end of a sequence; None if all sequences have T steps
    reset   bool [T, B]   True where the state is zeroed before the step
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call.modes import Recording, modes
from ..call.sequences import where
from ..call.weights import State, Weights

Result = tuple[Tensor, Tensor]
Run = Callable[[Tensor, State, Tensor | None, Tensor | None], Result]


def with_resets(run: Run, x: Tensor, state: State, weights: Weights, ended: Tensor | None, reset: Tensor) -> Result:
    """Compute h [T, B, P] and c_n [B, H] from x [T, B, I].

    On CUDA, and while a call is recorded, `_without_values` computes it. Otherwise sequences that are reset before the
    first step start from zeros. If there are later resets:

    1. One call computes the whole batch. Every reset becomes an additional step, which clears the state.
    2. A step that clears multiplies c by zero. NaN times zero is NaN, which then remains in all episodes that follow.
       The sequences in which this happens are computed again, with a call for each span between resets.
    """
    if not x.is_cpu or modes(x).recording != Recording.NOBODY:
        return _without_values(run, x, state, weights, ended, reset)
    state = where(reset[0, :, None], (0, 0), state)
    reset = torch.cat([torch.zeros_like(reset[:1]), reset[1:]])
    if not reset.any():
        return run(x, state, ended, None)
    h, c_n = _in_a_grid(run, x, state, ended, reset, 1)
    if (h.detach().sum() + c_n.detach().sum()).isfinite():
        return h, c_n
    spoilt = ~(h.isfinite().all(2).all(0) & c_n.isfinite().all(1))  # [B]
    # The other sequences are computed without the spoilt ones, so that no gradient of theirs meets a NaN.
    others = where(spoilt[:, None], (0, 0), state)
    h, c_n = _in_a_grid(run, torch.where(spoilt[:, None], 0, x), others, ended, reset, 1)
    sequences, (h0, c0) = spoilt.nonzero()[:, 0], state
    x, state, reset = x[:, sequences], (h0[sequences], c0[sequences]), reset[:, sequences]
    right_h, right_c_n = _from_reset_to_reset(run, x, state, None if ended is None else ended[:, sequences], reset)
    return h.index_copy(1, sequences, right_h), c_n.index_copy(0, sequences, right_c_n)


def _without_values(run: Run, x: Tensor, state: State, weights: Weights, ended: Tensor | None, reset: Tensor) -> Result:
    """Compute `with_resets` where no shape and no branch may depend on a value.

    Reading a value would synchronise the host with the device, which no graph allows. Inputs and states that make a NaN
    are replaced by zeros. The results from there to the end of the episode are replaced by NaN.
    """
    # One infinity in x only saturates gates, unless a weight of it is zero: 0 * inf is NaN. Two infinities at a step
    # nearly always make a NaN.
    infinite, zero = x.isinf(), (weights.weight_ih == 0).any(0)
    broken = x.isnan().any(2) | (infinite.sum(2) > 1) | (infinite & zero).any(2)  # [T, B]
    before = ~torch.cat(state, 1).isfinite().all(1)  # [B]
    count = before + broken.cumsum(0, dtype=torch.long)  # how many inputs and states were broken up to each step
    before_episode = torch.where(reset, count - broken.long(), 0)
    if torch.onnx.is_in_onnx_export():  # ONNX has a running maximum only as a pooling over all T steps
        padded = F.pad(before_episode.T[None].float(), (len(x) - 1, 0))  # [1, B, T - 1 + T]
        lost = count > F.max_pool1d(padded, len(x), 1)[0].T.long()
    else:
        lost = count > before_episode.cummax(0).values
    x = torch.where(lost[:, :, None], 0, x)
    h0, c0 = [torch.where(t.isfinite(), t, 0) for t in state]
    h, c_n = _in_a_grid(run, x, (h0, c0), ended, reset, 2)
    # The NaN depends on W_hh, so that its gradient is NaN, too, and checks of gradients detect it.
    nan = torch.where(lost.any(), torch.nan, 0.0) * weights.weight_hh.sum()
    return torch.where(lost[:, :, None], nan.to(h.dtype), h), torch.where(lost[-1, :, None], nan.to(c_n.dtype), c_n)


def _from_reset_to_reset(run: Run, x: Tensor, state: State, ended: Tensor | None, reset: Tensor) -> Result:
    """Compute `with_resets` by a call for each span of steps in which no state is reset and no sequence ends."""
    changes = reset if ended is None else reset | (ended != ended.roll(1, 0))
    zeroed = reset if ended is None else reset | ended  # past the end of a sequence a span starts from zeros, too
    starts = sorted({0, *changes.any(1).nonzero().flatten().tolist(), len(x)})
    (h, c), outputs = state, []
    for start, end in itertools.pairwise(starts):
        y, c_after = run(x[start:end], where(zeroed[start, :, None], (0, 0), (h, c)), None, None)
        h, c = y[-1], c_after if ended is None else torch.where(ended[start, :, None], c.to(c_after.dtype), c_after)
        outputs.append(y)
    return torch.cat(outputs), c


def _in_a_grid(run: Run, x: Tensor, state: State, ended: Tensor | None, reset: Tensor, copies: int) -> Result:
    """Compute `with_resets` by one call, over a grid of S steps and N*B sequences, [S, N*B], where N = `copies`.

    The steps of x are spread over the grid. A step of the grid that received no step of x clears the state.

    - With one copy every reset is a step of its own. S is T plus the most resets of a sequence, which the host reads.
    - With two copies of the batch, the episodes of a sequence alternate between them, and S = T. Twice the batch costs
      less than twice the steps, since steps run one after another and sequences in parallel.
    """
    steps, batch, inputs = x.shape
    episode, step = reset.cumsum(0, dtype=torch.long), torch.arange(steps, device=x.device)[:, None]  # [T, B], [T, 1]
    copy, height = episode % copies, steps
    if copies == 1:
        step, height = step + episode, steps + int(episode[-1].max())
    grid, column = (height, copies * batch), copy * batch + torch.arange(batch, device=x.device)
    place = (step * copies * batch + column).flatten()  # [T*B], the index of each step of x in the flattened grid
    nowhere = torch.zeros(height * copies * batch, dtype=torch.bool, device=x.device)
    opens = nowhere.index_fill(0, place, 1).view(grid)  # [S, N*B], True where a step of x is
    clears = ~opens
    if copies == 1:
        clears = clears & (torch.arange(height, device=x.device)[:, None] < step[-1])  # later steps hold
    if ended is not None:
        opens = nowhere.index_copy(0, place, ~ended.flatten()).view(grid)
    x = x.new_zeros(len(nowhere), inputs).index_copy(0, place, x.flatten(0, 1)).view(*grid, inputs)
    h0, c0 = [F.pad(t, (0, 0, 0, (copies - 1) * batch)) for t in state]
    y, c_n = run(x, (h0, c0), ~(opens | clears), clears)
    h = y.flatten(0, 1).index_select(0, place).unflatten(0, (steps, batch))
    return h, c_n.index_select(0, column[-1])
