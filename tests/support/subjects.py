"""A small module of every kind, and lstm_layer as a module."""

from functools import partial

import torch
from torch import nn

import gpu_lstm
from gpu_lstm.functional import lstm_layer


class Function(nn.Module):
    """lstm_layer as a module."""

    def __init__(self, normed):
        super().__init__()
        self.own = nn.ParameterList(torch.randn(size) for size in ((8, 2), (8, 2), (8,), (8,)))
        self.of_c = nn.ParameterList(torch.rand(2) for _ in range(2 * normed))
        self.backend, self.bias_c, self.reverse = None, True, False

    def forward(self, x, hx=None, **given):
        of_c = [None, None, None, None, self.of_c[0], self.of_c[1] if self.bias_c else None] if len(self.of_c) else []
        return lstm_layer(x, [*self.own, *of_c], hx, reverse=self.reverse, backend=self.backend, **given)


SUBJECTS = {
    "plain": partial(gpu_lstm.LSTM, 2, 2), "deep": partial(gpu_lstm.LSTM, 2, 2, 2, bidirectional=True),
    "projected": partial(gpu_lstm.LSTM, 2, 3, proj_size=2), "cell": partial(gpu_lstm.LSTMCell, 2, 2),
    "variant": partial(gpu_lstm.LSTM, 2, 2, peepholes=True, layer_norm=True),
    "stack": partial(gpu_lstm.StackedLSTM, 2, [2, 3], residual=True), "function": partial(Function, False),
    "function, normed": partial(Function, True), "GRU": partial(gpu_lstm.GRU, 2, 2, 2, bidirectional=True),
    "GRUCell": partial(gpu_lstm.GRUCell, 2, 2), "StackedGRU": partial(gpu_lstm.StackedGRU, 2, [2, 3], residual=True),
}  # fmt: skip
