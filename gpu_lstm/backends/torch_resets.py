"""Batches with resets on torch's own LSTM and GRU, which have none.

All is computed by calls of `run`, one layer in one direction without resets, whose steps may hold or clear the state:

    run(x [S, B, I], (h0 [B, P], c0 [B, H]), holds, clears) -> h [S, B, P], c_n [B, H]

where `holds` and `clears` are bool [S, B], or None: nowhere. `valid`, bool [T, B], is False past the end of a sequence;
`reset`, bool [T, B], is True where the state is zeroed before the step.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call.modes import Recording, modes
from ..call.weights import State, Weights

Result = tuple[Tensor, Tensor]
Run = Callable[[Tensor, State, Tensor | None, Tensor | None], Result]


def with_resets(run: Run, x: Tensor, state: State, weights: Weights, valid: Tensor | None, reset: Tensor) -> Result:
    """h [T, B, P] and c_n [B, H] from x [T, B, I], by one call in a grid of steps.

    A step that clears multiplies c by zero, and NaN times zero is NaN, in all episodes that follow. Therefore inputs
    and states that make a NaN are replaced by zeros, and results after them, up to the end of the episode, by NaN.
    Where values are at hand, on the CPU, this is done only if a NaN came out. Elsewhere no shape and no branch may
    depend on a value: that would synchronise, which no graph allows.
    """
    on_host = x.is_cpu and modes(x).recording == Recording.NOBODY
    if on_host:
        state = torch.where(reset[0, :, None], 0, state[0]), torch.where(reset[0, :, None], 0, state[1])
        reset = torch.cat([torch.zeros_like(reset[:1]), reset[1:]])
        if not reset.any():
            return run(x, state, None if valid is None else ~valid, None)
        h, c_n = _in_a_grid(run, x, state, valid, reset, on_host)
        if (h.detach().sum() + c_n.detach().sum()).isfinite():
            return h, c_n
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
    h, c_n = _in_a_grid(run, x, state, valid, reset, on_host)
    # Differentiable, so that W_hh's gradient is NaN too, and checks of gradients detect it.
    nan = torch.where(lost.any(), torch.nan, 0.0) * weights.weight_hh.sum()
    return torch.where(lost[:, :, None], nan.to(h.dtype), h), torch.where(lost[-1, :, None], nan.to(c_n.dtype), c_n)


def _in_a_grid(run: Run, x: Tensor, state: State, valid: Tensor | None, reset: Tensor, on_host: bool) -> Result:
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
