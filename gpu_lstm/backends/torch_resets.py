"""Batches with resets on torch's own LSTM and GRU, which have none.

All is computed by calls of `run`, one layer in one direction without resets, whose steps may hold or clear the state:

    run(x [S, B, I], (h0 [B, P], c0 [B, H]), holds, clears) -> h [S, B, P], c_n [B, H]

where `holds` and `clears` are bool [S, B], or None: nowhere. `valid`, bool [T, B], is False past the end of a sequence;
`reset`, bool [T, B], is True where the state is zeroed before the step.
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


def with_resets(run: Run, x: Tensor, state: State, weights: Weights, valid: Tensor | None, reset: Tensor) -> Result:
    """h [T, B, P] and c_n [B, H] from x [T, B, I].

    On CUDA, and with fake tensors, see `_without_values`. On the CPU, if there are resets after the first step:

    1. One call, in which every reset is a step of its own, which clears.
    2. A step that clears multiplies c by zero, and NaN times zero is NaN, in all episodes that follow. The sequences
       in which this makes a NaN are computed again, by a call from reset to reset.
    """
    if not x.is_cpu or modes(x).recording != Recording.NOBODY:
        return _without_values(run, x, state, weights, valid, reset)
    state = where(reset[0, :, None], (0, 0), state)
    reset = torch.cat([torch.zeros_like(reset[:1]), reset[1:]])
    if not reset.any():
        return run(x, state, None if valid is None else ~valid, None)
    h, c_n = _in_a_grid(run, x, state, valid, reset)
    if (h.detach().sum() + c_n.detach().sum()).isfinite():
        return h, c_n
    spoilt = ~(h.isfinite().all(2).all(0) & c_n.isfinite().all(1))  # [B]
    sequences, (h0, c0) = spoilt.nonzero()[:, 0], state
    # Without them, so that no gradient of the others meets their NaN.
    others = torch.where(spoilt[:, None], 0, h0), torch.where(spoilt[:, None], 0, c0)
    h, c_n = _in_a_grid(run, torch.where(spoilt[:, None], 0, x), others, valid, reset)
    x, state, reset = x[:, sequences], (h0[sequences], c0[sequences]), reset[:, sequences]
    right_h, right_c_n = _from_reset_to_reset(run, x, state, None if valid is None else valid[:, sequences], reset)
    return h.index_copy(1, sequences, right_h), c_n.index_copy(0, sequences, right_c_n)


def _without_values(run: Run, x: Tensor, state: State, weights: Weights, valid: Tensor | None, reset: Tensor) -> Result:
    """with_resets where no shape and no branch may depend on a value: it would synchronise, which no graph allows.

    Inputs and states that make NaN are replaced by zeros, and results after them, up to the end of the episode, by NaN.
    """
    # An infinity opens or shuts gates. It makes a NaN where its weight is zero and, nearly always, where there are two.
    infinite, zero = x.isinf(), (weights.weight_ih == 0).any(0)
    broken = x.isnan().any(2) | (infinite.sum(2) > 1) | (infinite & zero).any(2)  # [T, B]
    before = ~torch.cat(state, 1).isfinite().all(1)  # [B]
    count = before + broken.cumsum(0, dtype=torch.long)  # up to each step
    before_episode = torch.where(reset, count - broken.long(), 0)
    if torch.onnx.is_in_onnx_export():  # ONNX has a running maximum only as a pooling over all T steps
        padded = F.pad(before_episode.T[None].float(), (len(x) - 1, 0))  # [1, B, T - 1 + T]
        lost = count > F.max_pool1d(padded, len(x), 1)[0].T.long()
    else:
        lost = count > before_episode.cummax(0).values
    x = torch.where(lost[:, :, None], 0, x)
    state = torch.where(state[0].isfinite(), state[0], 0), torch.where(state[1].isfinite(), state[1], 0)
    h, c_n = _in_a_grid(run, x, state, valid, reset, on_host=False)
    # Differentiable, so that W_hh's gradient is NaN too, and checks of gradients detect it.
    nan = torch.where(lost.any(), torch.nan, 0.0) * weights.weight_hh.sum()
    return torch.where(lost[:, :, None], nan.to(h.dtype), h), torch.where(lost[-1, :, None], nan.to(c_n.dtype), c_n)


def _from_reset_to_reset(run: Run, x: Tensor, state: State, valid: Tensor | None, reset: Tensor) -> Result:
    """with_resets by a call for each span of steps in which no state is reset and no sequence ends."""
    changes = reset if valid is None else reset | (valid != valid.roll(1, 0))
    zeroed = reset if valid is None else reset | ~valid  # what comes after the end of a sequence starts from zeros, too
    starts = sorted({0, *changes.any(1).nonzero().flatten().tolist(), len(x)})
    (h, c), outputs = state, []
    for start, end in itertools.pairwise(starts):
        y, c_after = run(x[start:end], where(zeroed[start, :, None], (0, 0), (h, c)), None, None)
        h, c = y[-1], c_after if valid is None else torch.where(valid[start, :, None], c_after, c.to(c_after.dtype))
        outputs.append(y)
    return torch.cat(outputs), c


def _in_a_grid(run: Run, x: Tensor, state: State, valid: Tensor | None, reset: Tensor, on_host: bool = True) -> Result:
    """with_resets by one call, in a grid of steps [S, K*B]; those into which no step of x is put, clear.

    On the host every reset gets a step of its own, K = 1. Where the number of resets is not known, episodes alternate
    between two copies of the batch, K = 2, S = T: steps run one after another, sequences in parallel.
    """
    steps, batch, inputs = x.shape
    episode, step = reset.cumsum(0, dtype=torch.long), torch.arange(steps, device=x.device)[:, None]  # [T, B], [T, 1]
    if on_host:
        step, copy, copies, height = step + episode, 0 * episode, 1, steps + int(episode[-1].max())
    else:
        copy, copies, height = episode % 2, 2, steps
    grid, column = (height, copies * batch), copy * batch + torch.arange(batch, device=x.device)
    place = (step * copies * batch + column).flatten()  # [T*B]
    nowhere = torch.zeros(height * copies * batch, dtype=torch.bool, device=x.device)
    opens = nowhere.index_fill(0, place, 1).view(grid)  # [S, K*B]
    clears = ~opens
    if on_host:
        clears = clears & (torch.arange(height, device=x.device)[:, None] < step[-1])  # after the last step hold
    if valid is not None:
        opens = nowhere.index_copy(0, place, valid.flatten()).view(grid)
    x = x.new_zeros(len(nowhere), inputs).index_copy(0, place, x.flatten(0, 1)).view(*grid, inputs)
    h0, c0 = (F.pad(t, (0, 0, 0, (copies - 1) * batch)) for t in state)
    y, c_n = run(x, (h0, c0), ~(opens | clears), clears)
    h = y.flatten(0, 1).index_select(0, place).unflatten(0, (steps, batch))
    return h, c_n.index_select(0, column[-1])
