"""Loops over the steps, as people write them where torch.nn.LSTM does not do what they need."""

import itertools
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs import Inputs
from .engine import Engine, Provider, Unable, expect, module_like_torchs

CHUNK = 16  # steps that are compiled at once: compiling unrolls the loop, so that its time grows with them


def cell_loop(inputs: Inputs) -> Engine:
    """One torch.nn.LSTMCell, called T times."""
    expect(inputs.case)
    case = inputs.case
    cell = nn.LSTMCell(case.input_size, case.hidden_size, device=inputs.h0.device, dtype=case.torch_dtype)
    cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in inputs.weights.items()})
    cell.requires_grad_(case.training)

    def call(x, state):
        ((h,), (c,)), outputs = state, []
        for x_t in x:
            h, c = cell(x_t, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])

    return Engine(call, {f"{name}_l0": tensor for name, tensor in cell.named_parameters()})


class StepLoop(nn.LSTM):
    """torch.nn.LSTM called for every step, with its state masked by `resets` [T, B], as in recurrent PPO."""

    def forward(self, x, state, resets, stored=None, in_pieces=False):  # type: ignore[override]
        """x [T, B, I] and state to output [T, B, H] and the last state. Resets leave zeros or `stored` [L, T, B, H].

        `in_pieces`: called only for the steps from one time at which any sequence is reset to the next.
        """
        outputs, keeps = [], (~resets).to(x.dtype)[..., None]  # [T, B, 1]
        begins = [0, *(1 + resets[1:].any(dim=1).nonzero()[:, 0]).tolist()] if in_pieces else range(len(x))
        for begin, end in itertools.pairwise((*begins, len(x))):
            state = keeps[begin] * state[0], keeps[begin] * state[1]
            if stored is not None:
                state = tuple(each + (1 - keeps[begin]) * left[:, begin] for each, left in zip(state, stored))
            y, state = super().forward(x[begin:end], state)
            outputs.append(y)
        return torch.cat(outputs), state


def masked_loop(inputs: Inputs, in_pieces: bool) -> Engine:
    """StepLoop: a step at a time, as CleanRL has it; or in pieces, whose ends every call reads, as in rl_games."""
    options = dict(resets=resets_of(inputs, "reset_states"), stored=inputs.reset_states, in_pieces=in_pieces)
    return Engine.of(module_like_torchs(StepLoop, inputs), **options)


def resets_of(inputs: Inputs, *features: str) -> Tensor:
    expect(inputs.case, "layers", "resets", *features)
    if inputs.resets is None:
        raise Unable("only for batches with resets")
    return inputs.resets


def padded_trajectories(inputs: Inputs) -> Engine:
    """Each of N trajectories, from a reset to the next, is a padded sequence of its own, as in rsl_rl.

    Which steps they have is found once, as rsl_rl does before its epochs. The last states are those after the padding.
    """
    begins = resets_of(inputs).T.clone()  # [B, T]
    begins[:, 0], lstm = True, module_like_torchs(nn.LSTM, inputs)
    lengths = begins.flatten().nonzero()[:, 0].diff(append=torch.tensor([begins.numel()], device=begins.device))  # [N]
    valid = torch.arange(inputs.case.steps, device=begins.device) < lengths[:, None]  # [N, T]
    firsts, keep = begins.flatten().cumsum(0)[:: begins.shape[1]] - 1, ~resets_of(inputs)[0, :, None]  # [B], [B, 1]

    def call(x, state):
        padded = x.new_zeros(*valid.shape, x.shape[2])
        padded[valid] = x.transpose(0, 1).flatten(0, 1)
        start = [each.new_zeros(len(each), *lengths.shape, each.shape[2]) for each in state]
        start = [zeros.index_copy(1, firsts, keep * each) for zeros, each in zip(start, state)]
        y, _ = lstm(padded.transpose(0, 1), start)
        return y.transpose(0, 1)[valid].view(*begins.shape, -1).transpose(0, 1), (None, None)

    return Engine(call, dict(lstm.named_parameters()), kernels=lambda: "without the last states")


def compiled_loop(inputs: Inputs) -> Engine:
    """The input product for all steps at once, then CHUNK steps by torch.compile, T / CHUNK times."""
    expect(inputs.case)
    if inputs.case.steps % CHUNK:
        raise Unable(f"T is no multiple of {CHUNK}")
    parameters = {name: t.detach().clone().requires_grad_(inputs.case.training) for name, t in inputs.weights.items()}
    weight_ih, weight_hh, bias_ih, bias_hh = parameters.values()
    steps = torch.compile(_steps, fullgraph=True, dynamic=False)

    def call(x, state):
        ((h,), (c,)), outputs = state, []
        for gates_x in F.linear(x, weight_ih, bias_ih + bias_hh).split(CHUNK):
            y, h, c = steps(gates_x, h, c, weight_hh)
            outputs.append(y)
        return torch.cat(outputs), (h[None], c[None])

    return Engine(call, parameters)


def _steps(gates_x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CHUNK steps from pre-activations [CHUNK, B, 4H]."""
    outputs = []
    for z in gates_x.unbind():
        i, f, g, o = (z + h @ weight_hh.T).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


PROVIDERS = {
    "cell-loop": Provider(cell_loop),
    "compiled-loop": Provider(compiled_loop),
    "cleanrl-loop": Provider(partial(masked_loop, in_pieces=False), everywhere=True),
    "rl_games-pieces": Provider(partial(masked_loop, in_pieces=True), everywhere=True),
    "rsl_rl-padded": Provider(padded_trajectories, everywhere=True),
}
