"""A small module of every kind, and states for it."""

import torch
from torch import nn

import gpu_lstm
from gpu_lstm.functional import lstm_layer


class Function(nn.Module):
    """lstm_layer as a module."""

    def __init__(self, normed):
        super().__init__()
        self.own = nn.ParameterList([torch.randn(size) for size in ((8, 2), (8, 2), (8,), (8,))])
        self.of_c = nn.ParameterList([torch.rand(2) for _ in range(2 * normed)])
        self.backend, self.bias_c, self.reverse = None, True, False

    def forward(self, x, hx=None, **given):
        of_c = [None, None, None, None, self.of_c[0], self.of_c[1] if self.bias_c else None] if len(self.of_c) else []
        return lstm_layer(x, [*self.own, *of_c], hx, reverse=self.reverse, backend=self.backend, **given)


SUBJECTS = {
    "plain": lambda: gpu_lstm.LSTM(2, 2),
    "deep": lambda: gpu_lstm.LSTM(2, 2, 2, bidirectional=True),
    "projected": lambda: gpu_lstm.LSTM(2, 3, proj_size=2),
    "variant": lambda: gpu_lstm.LSTM(2, 2, peepholes=True, layer_norm=True),
    "stack": lambda: gpu_lstm.StackedLSTM(2, [2, 3], residual=True),
    "cell": lambda: gpu_lstm.LSTMCell(2, 2),
    "function": lambda: Function(False),
    "function, normed": lambda: Function(True),
}


def states_for(module, batch, random):
    """Initial states, or states to reset to, one a sequence; `batch` is [] of an unbatched call."""
    if isinstance(module, gpu_lstm.LSTM):
        rows = module.num_layers * (1 + module.bidirectional)
        return random(rows, *batch, module.proj_size or module.hidden_size), random(rows, *batch, module.hidden_size)
    if isinstance(module, gpu_lstm.StackedLSTM):
        return [(random(*batch, size), random(*batch, size)) for size in module.hidden_sizes]
    return random(*batch, 2), random(*batch, 2)
