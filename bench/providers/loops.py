"""Loops over the steps, as people write them where torch.nn.LSTM does not do what they need."""

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

    def forward(self, x, state, resets, stored=None):  # type: ignore[override]
        """x [T, B, I] and state to output [T, B, H] and the last state. Resets leave zeros or `stored` [L, T, B, H]."""
        outputs, keeps = [], (~resets).to(x.dtype)[:, None, :, None]  # [T, 1, B, 1]
        for t, (x_t, keep) in enumerate(zip(x.split(1), keeps)):  # [1, B, I]
            state = keep * state[0], keep * state[1]
            if stored is not None:
                state = tuple(each + (1 - keep) * left[:, t] for each, left in zip(state, stored))
            y, state = super().forward(x_t, state)
            outputs.append(y)
        return torch.cat(outputs), state


def cleanrl_loop(inputs: Inputs) -> Engine:
    """StepLoop, as CleanRL has it."""
    expect(inputs.case, "layers", "resets", "reset_states")
    if inputs.resets is None:
        raise Unable("only for batches with resets")
    return Engine.of(module_like_torchs(StepLoop, inputs), resets=inputs.resets, stored=inputs.reset_states)


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
    "cleanrl-loop": Provider(cleanrl_loop, everywhere=True),
}
