"""A small module of every kind, and states for it; and a package's LSTM, by its formulas."""

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


class HasteLSTM(nn.Module):
    """haste_pytorch.LSTM, with `norm` its LayerNormLSTM, as documented: kernels from the right; gates i, g, f, o."""

    def __init__(self, input_size, hidden_size, dropout=0.0, zoneout=0.0, norm=False):
        super().__init__()
        self.hidden_size, self.batch_first, self.forget_bias = hidden_size, False, 1.0
        self.dropout, self.zoneout, gates = dropout, zoneout, 4 * hidden_size
        sizes = dict(kernel=(input_size, gates), recurrent_kernel=(hidden_size, gates), bias=(gates,))
        sizes |= dict(gamma=(2, gates), gamma_h=(hidden_size,), beta_h=(hidden_size,)) if norm else {}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size)))

    def from_native_weights(self, weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0):
        of_torch = [gate * self.hidden_size + unit for gate in (0, 2, 1, 3) for unit in range(self.hidden_size)]
        self.kernel = nn.Parameter(weight_ih_l0.T[:, of_torch])
        self.recurrent_kernel = nn.Parameter(weight_hh_l0.T[:, of_torch])
        self.bias = nn.Parameter((bias_ih_l0 + bias_hh_l0)[of_torch])

    def forward(self, x, state):  # [T, B, I], each [1, B, H]
        assert self.training
        ((h,), (c,)), outputs = state, []

        def norm(v, gain, shift=None):
            return v if gain is None else nn.functional.layer_norm(v, v.shape[1:], gain, shift)

        of_x, of_h = getattr(self, "gamma", (None, None))
        of_c = getattr(self, "gamma_h", None), getattr(self, "beta_h", None)
        for x_t in x:
            z = norm(x_t @ self.kernel, of_x) + norm(h @ self.recurrent_kernel, of_h) + self.bias
            i, g, f, o = z.split(self.hidden_size, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(norm(c, *of_c))
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])
