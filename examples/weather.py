"""Forecast tomorrow's maximum temperature in Seattle with a stack of two LSTM layers.

Run it from the root of the repository. The data comes with the package vega_datasets, and nothing is downloaded::

    pip install -e ".[examples]"
    python examples/weather.py

The example trains gpu_lstm.StackedLSTM on 2012 to 2014, on the GPU if there is one, and forecasts each day of 2015 from
the 30 days before it. It prints the errors beside the errors of three simple forecasts, and the time of a training
step, and draws the forecasts in out/weather.png.

One of the three simple forecasts, a ridge regression on the last two days, is as good as the stack. Tomorrow's weather
in one town depends little on the days before yesterday. highlight.py has a task that cannot be solved without memory.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from vega_datasets import data

import gpu_lstm

# The settings were chosen by training on 2012 and 2013 and evaluating on 2014.
TEST_YEAR = 2015
WINDOW = 30  # T, the days that a forecast sees
HIDDEN_SIZES = [32, 16]
DROPOUT = 0.5  # between the layers
RIDGE_DAYS, RIDGE_PENALTY = 2, 10.0  # settings of the linear forecast
BATCH = 64  # N, the windows in a training step


class Errors(NamedTuple):
    """The errors of a forecast of the test year, in °C."""

    mae: float
    rmse: float


class Weather(NamedTuple):
    """The weather, one row a day. The first `split` days are for training."""

    dates: np.ndarray  # [days]
    day: np.ndarray  # [days], of the year
    temp_max: np.ndarray  # [days], °C
    series: Tensor  # [days, 6]: maximum, minimum, rain, wind, all normalised; the time of year as a point on a circle
    windows: Tensor  # [days - T, T, 6]; window k holds the days k to k + T - 1
    # The day after a window minus the last day of the window, normalised. 0 forecasts the last day's value again.
    changes: Tensor  # [days - T]
    split: int


def main(epochs: int = 40, seed: int = 0, out: Path = Path("out")) -> dict[str, Errors]:
    """Load, train, evaluate, plot and time. Return the errors by the name of the forecast."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more do not help so small a model, and slow it down if other work shares the cores
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    weather = load(device)
    windows, temp_max, day, split = weather.windows, weather.temp_max, weather.day, weather.split
    x, y = windows[: split - WINDOW], weather.changes[: split - WINDOW]  # [training windows, T, 6], [training windows]

    # Train. Every epoch reads each training window once, in batches.
    model = Forecaster(gpu_lstm.StackedLSTM(6, HIDDEN_SIZES, batch_first=True, dropout=DROPOUT)).to(device)
    optimiser = torch.optim.Adam(model.parameters())
    for _ in track(range(epochs), description="Training"):
        for batch in torch.randperm(len(x)).to(device).split(BATCH):
            training_step(model, optimiser, x[batch], y[batch])

    # Evaluate. All results are [test days] in °C. The stack has three rivals: a linear forecast from the last days,
    # today's value again, and the mean of the training days that are at most 15 days of the year away.
    model.eval()
    with torch.no_grad():
        change = model(windows[split - WINDOW :]).cpu().numpy() * temp_max[:split].std()
    linear = ridge(windows.cpu().numpy(), weather.changes.cpu().numpy(), split - WINDOW) * temp_max[:split].std()
    truth, today = temp_max[split:], temp_max[split - 1 : -1]
    apart = np.abs(day[split:, None] - day[:split])  # [test days, training days]
    near = np.minimum(apart, 366 - apart) <= 15
    mean = near @ temp_max[:split] / near.sum(axis=1)
    forecasts = {
        "StackedLSTM": today + change, f"ridge, last {RIDGE_DAYS} days": today + linear,
        "same as today": today, "day-of-year mean": mean,
    }  # fmt: skip
    errors = {name: errors_of(forecast - truth) for name, forecast in forecasts.items()}
    table = Table("forecast", "MAE (°C)", "RMSE (°C)", title=f"Daily maximum temperature, Seattle, {TEST_YEAR}")
    for name, error in errors.items():
        table.add_row(name, f"{error.mae:.2f}", f"{error.rmse:.2f}")
    Console().print(table)
    print("The linear forecast sees two days only: what is left to remember is little. highlight.py needs memory.")
    plot(weather.dates[split:], forecasts, truth, errors, out / "weather.png")

    # Time StackedLSTM, and the same layers made of torch.nn.LSTM.
    torch_stack = TorchStack(nn.LSTM(i, h, batch_first=True) for i, h in pairwise([6, *HIDDEN_SIZES]))
    ours, theirs = step_times([model.train(), Forecaster(torch_stack).to(device)], x[:BATCH], y[:BATCH])
    backend = gpu_lstm.explain(model.stack, x[:BATCH]).backend
    times = f"StackedLSTM {ours:.2f} ms, torch.nn.LSTM {theirs:.2f} ms"
    print(f"Backend {backend} on {device}; median training step: {times}")
    if backend == "torch":
        print("Both run torch's own LSTM, since fused kernels need a GPU: the times differ by the host's work only.")
    return errors


def load(device: torch.device) -> Weather:
    """Return Seattle's weather from 2012 to 2015, normalised by the training years, and cut into windows."""
    table = data.seattle_weather()
    split = int((table["date"].dt.year < TEST_YEAR).sum())
    measured = table[["temp_max", "temp_min", "precipitation", "wind"]].to_numpy()  # [days, 4]; °C, °C, mm, m/s
    measured = (measured - measured[:split].mean(axis=0)) / measured[:split].std(axis=0)
    day = table["date"].dt.day_of_year.to_numpy()
    angle = 2 * np.pi * day / 365.25
    features = np.column_stack([measured, np.sin(angle), np.cos(angle)])
    series = torch.tensor(features, dtype=torch.float32, device=device)
    windows = series.unfold(0, WINDOW, 1)[:-1].transpose(1, 2).contiguous()
    changes = series[WINDOW:, 0] - series[WINDOW - 1 : -1, 0]
    return Weather(table["date"].to_numpy(), day, table["temp_max"].to_numpy(), series, windows, changes, split)


def ridge(windows: np.ndarray, changes: np.ndarray, training: int) -> np.ndarray:
    """Return a linear forecast of the changes after the windows [windows, T, 6]. The first `training` windows are for
    training, and the result [others] is for the other windows."""
    inputs = windows[:, -RIDGE_DAYS:].reshape(len(windows), -1).astype(np.float64)
    x, y = inputs[:training], changes[:training].astype(np.float64)
    centre = x.mean(axis=0)
    x = x - centre
    slopes = np.linalg.solve(x.T @ x + RIDGE_PENALTY * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    return (inputs[training:] - centre) @ slopes + y.mean()


class Forecaster(nn.Module):
    """Map windows of days to the change of temp_max after them, normalised."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack
        self.head = nn.Linear(HIDDEN_SIZES[-1], 1)

    def forward(self, windows: Tensor) -> Tensor:
        output, _ = self.stack(windows)  # [N, T, 6] -> [N, T, 16]
        return self.head(output[:, -1]).squeeze(-1)  # [N], from the output of the last day


class TorchStack(nn.ModuleList):
    """Layers of torch.nn.LSTM on top of each other, with dropout between them."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for k, layer in enumerate(self):
            x, _ = layer(nn.functional.dropout(x, DROPOUT, self.training) if k > 0 else x)
        return x, None


def errors_of(off: np.ndarray) -> Errors:
    """Return the errors of a forecast, given its difference from the truth, [test days]."""
    return Errors(mae=np.abs(off).mean(), rmse=np.sqrt((off**2).mean()))


def training_step(model: nn.Module, optimiser: torch.optim.Optimizer, windows: Tensor, changes: Tensor) -> None:
    """Run forward, backward and the optimiser on windows [N, T, 6] and changes [N]."""
    loss = nn.functional.mse_loss(model(windows), changes)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def plot(
    dates: np.ndarray, forecasts: dict[str, np.ndarray], truth: np.ndarray, errors: dict[str, Errors], path: Path
) -> None:
    """Draw the test year, below it June and July with all forecasts, and their errors. All series are [test days]."""
    colours = dict(zip(forecasts, ("black", "tab:green", "tab:orange", "tab:blue"), strict=True))
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[2, 1])
    year, summer, bars = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    for axes, days, names in ((year, slice(None), ["StackedLSTM"]), (summer, slice(151, 212), list(forecasts))):
        axes.plot(dates[days], truth[days], "o", color="0.6", markersize=3.5, label="measured")
        for name in reversed(names):
            style = "--" if name.startswith("ridge") else "-"
            axes.plot(dates[days], forecasts[name][days], style, color=colours[name], linewidth=1.2, label=name)
        axes.set_ylabel("maximum temperature (°C)")
        axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator(), show_offset=False))
        axes.grid(color="0.9")
        axes.margins(x=0.01)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.15 * (high - low))  # room for the legend
        axes.legend(loc="upper left", fontsize=8, ncols=3)
    for place, (name, error) in enumerate(errors.items()):
        bars.barh(place, error.mae, 0.6, color=colours[name])
        bars.text(error.mae, place, f" {error.mae:.2f}", va="center")
    bars.set(title="mean absolute error (°C)", xlim=(0, 1.2 * max(error.mae for error in errors.values())))
    bars.set_yticks(range(len(errors)), errors)
    bars.invert_yaxis()
    figure.suptitle(f"Tomorrow's maximum temperature in Seattle, {TEST_YEAR}: each forecast is made the day before")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


def step_times(models: list[nn.Module], windows: Tensor, changes: Tensor) -> np.ndarray:
    """Return the median time of a training step of each model in ms. The models take turns."""
    pairs = [(model, torch.optim.Adam(model.parameters())) for model in models]
    times = []
    for _ in range(55):
        for model, optimiser in pairs:
            start = time.perf_counter()
            training_step(model, optimiser, windows, changes)
            if windows.is_cuda:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
    return np.median(np.reshape(times, (-1, len(models)))[5:], axis=0)  # without the first 5, which warm up


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    main(**vars(parser.parse_args()))
