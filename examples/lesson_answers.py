"""The answers to the exercises of lstm_explained.ipynb, each checked by itself: python examples/lesson_answers.py.

A gate whose pre-activation is 20 or -20 is as good as open or shut.
"""

import math

import numpy as np
import torch
import weather
from torch import Tensor, nn

import gpu_lstm


def by_hand(module: nn.Module, weight_ih: list[list[float]], bias: list[float]) -> None:
    """Set these weights, [rows, inputs] and [rows], and all other weights to 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_ih_l0[:] = torch.tensor(weight_ih)
        module.bias_ih_l0[:] = torch.tensor(bias)


def latch(steps: int) -> tuple[Tensor, Tensor]:
    """Return the task of section 4: value, store and ask, [steps, 3], and the value to remember, [steps]."""
    torch.manual_seed(0)
    value = 2 * torch.rand(steps) - 1
    store, ask = torch.rand(steps) < 0.1, torch.rand(steps) < 0.25
    store[0] = True
    last = torch.where(store, torch.arange(steps), 0).cummax(dim=0).values  # the last step that stored a value
    return torch.stack([value, store, ask], dim=1), value[last]


def exercise_1() -> None:
    """With 0.9 nothing is left. With 1.2 the sign is left, but not the size: tanh(1.2 h) = h for 0 and +-0.66."""

    def left(x: float, weight: float) -> float:
        h = math.tanh(0.5 * x)
        for _ in range(50):
            h = math.tanh(weight * h)
        return h

    assert abs(left(2, 0.9)) < 0.01
    for x, expected in ((1, 0.6586), (2, 0.6586), (-1, -0.6586)):
        assert abs(left(x, 1.2) - expected) < 1e-4


def exercise_2() -> None:
    """The cell keeps its state at a zero, (f, i) = (1, 0), and adds 1 at a one, (1, 1). f and g are 1, and i is x."""
    counter = gpu_lstm.LSTM(1, 1)
    by_hand(counter, [[40], [0], [0], [0]], [-20, 20, 20, 20])  # i, f, g, o
    _, (_, count) = counter(torch.tensor([[1.0], [0], [1], [1], [0], [1]]))
    assert abs(count.item() - 4) < 1e-4


def exercise_3() -> None:
    """4 (10 H + H H + 2 H) = 2560 has the solution H = 20."""
    (units,) = (h for h in range(1, 100) if 4 * (10 * h + h * h + 2 * h) == 2560)
    assert units == 20
    assert sum(parameter.numel() for parameter in gpu_lstm.LSTM(10, units).parameters()) == 2560


def exercise_4() -> None:
    """i is store, f is 1 - store, and o is ask. g is a twentieth of the value, where tanh is nearly a straight line."""
    x, remembered = latch(steps=200)
    lstm = gpu_lstm.LSTM(3, 1)
    by_hand(lstm, [[0, 40, 0], [0, -40, 0], [0.05, 0, 0], [0, 0, 40]], [-20, 20, 0, -20])
    off = 20 * lstm(x)[0].squeeze(1) - remembered * x[:, 2]
    assert off.abs().max() < 0.01


def exercise_5() -> None:
    """f^1000 = 1/2 needs f = 2^(-1/1000), which is sigmoid(7.27)."""
    f = 0.5 ** (1 / 1000)
    bias = math.log(f / (1 - f))
    assert round(bias, 2) == 7.27
    lstm = gpu_lstm.LSTM(1, 1)
    by_hand(lstm, [[0], [0], [0], [0]], [0, bias, 0, 0])
    h, c = torch.zeros(1, 1), torch.zeros(1, 1, requires_grad=True)
    _, (_, c_n) = lstm(torch.zeros(1000, 1), (h, c))
    c_n.sum().backward()
    assert abs(c.grad.item() - 0.5) < 1e-3


def exercise_6() -> None:
    """Reset the state at each line end. Or add a second input, which is 1 at a line end and shuts f."""
    text = "one line\nanother\n\nthe last"
    end = torch.tensor([character == "\n" for character in text])
    inputs = torch.stack([~end, end], dim=1).float()  # [steps, 2]
    reset, forgets = gpu_lstm.LSTM(2, 1), gpu_lstm.LSTM(2, 1)
    by_hand(reset, [[40, 0], [0, 0], [0, 0], [0, 0]], [-20, 20, 20, 20])
    by_hand(forgets, [[40, 0], [0, -40], [0, 0], [0, 0]], [-20, 20, 20, 20])
    places = torch.tensor([len(text[: k + 1].rpartition("\n")[2]) for k in range(len(text))])
    for traced in (gpu_lstm.trace(reset, inputs, resets=end), gpu_lstm.trace(forgets, inputs)):
        assert (traced.layers[0][0].cell[:, 0, 0] - places).abs().max() < 1e-4


def exercise_7() -> None:
    """Little: two days are as good. The error is about 2.1 °C, and "same as today" has 2.24 °C."""
    torch.manual_seed(0)
    data = weather.load(torch.device("cpu"))
    past, days = data.split - weather.WINDOW, data.windows[:, -2:]
    model = weather.Forecaster(gpu_lstm.StackedLSTM(6, [32, 16], batch_first=True, dropout=0.5))
    optimiser = torch.optim.Adam(model.parameters())
    for _ in range(12):
        for batch in torch.randperm(past).split(64):
            weather.training_step(model, optimiser, days[batch], data.changes[batch])
    with torch.no_grad():
        off = model.eval()(days[past:]) - data.changes[past:]
    assert abs(off.abs().mean().item() * data.temp_max[: data.split].std() - 2.1) < 0.05


def exercise_8() -> None:
    """z is 1 - store, and n is a twentieth of the value. There is no output gate, so the value shows at all times."""
    x, remembered = latch(steps=200)
    gru = gpu_lstm.GRU(3, 1)
    by_hand(gru, [[0, 0, 0], [0, -40, 0], [0.05, 0, 0]], [0, 20, 0])  # r, z, n
    shown = 20 * gru(x)[0].squeeze(1)
    assert (shown - remembered).abs().max() < 0.01
    assert shown[x[:, 2] == 0].abs().mean() > 0.3


def exercise_9() -> None:
    """Change the sign of the rows of z in all four tensors, since 1 - sigmoid(a) = sigmoid(-a)."""
    torch.manual_seed(0)
    gru, x, h = gpu_lstm.GRU(3, 2), torch.randn(5, 3), np.zeros(2)
    W_x, W_h, b_x, b_h = (parameter.detach().numpy().copy() for parameter in gru.parameters())
    for x_t in x.numpy():
        (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(W_x @ x_t + b_x, 3), np.split(W_h @ h + b_h, 3)
        r, z = (1 / (1 + np.exp(-a)) for a in (x_r + h_r, x_z + h_z))
        h = (1 - z) * h + z * np.tanh(x_n + r * h_n)  # the other library's
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter[2:4] *= -1
    assert np.allclose(h, gru(x)[1].detach().numpy(), atol=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads do not help such small models, and wait for each other if cores are busy
    for answer in [value for name, value in globals().items() if name.startswith("exercise_")]:
        answer()
        print(f"{answer.__name__}: {answer.__doc__}")
