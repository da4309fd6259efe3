"""What swapping torch.nn.LSTM for gpu_lstm.LSTM costs or gains, and what resets cost, in one process."""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gpu_lstm

T, B = 128, 32
HIDDEN = (128, 512)
RESET_RATE = 0.02
REPEATS = 15


def main() -> None:
    """Time torch.nn.LSTM, gpu_lstm.LSTM, and gpu_lstm.LSTM with resets, run by run in turn; print a table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table(title=f"T={T}, B={B}, float32 on {device}; medians of {REPEATS}, ratios to torch.nn.LSTM")
    for column in ("H = I", "pass", "torch.nn.LSTM", "gpu_lstm.LSTM", f"with resets on {RESET_RATE:.0%} of steps"):
        table.add_column(column, justify="right")
    for hidden in track(HIDDEN, description="hidden sizes"):
        for name, run in (("forward", _forward), ("forward + backward", _forward_backward)):
            seconds = _medians([_bind(run, *call) for call in _calls(hidden, device)], device)
            cells = [f"{s * 1e3:.2f} ms ({s / seconds[0]:.2f}x)" for s in seconds]
            table.add_row(str(hidden), name, *cells)
    Console().print(table)


def _calls(hidden: int, device: str) -> list[tuple[torch.nn.Module, torch.Tensor, dict]]:
    """(module, input, keyword arguments) of the three that are compared."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(hidden, hidden, device=device)
    ours = gpu_lstm.LSTM(hidden, hidden, device=device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, hidden, device=device)  # [T, B, I]
    resets = torch.rand(T, B, device=device) < RESET_RATE  # [T, B]
    return [(theirs, x, {}), (ours, x, {}), (ours, x, {"resets": resets})]


def _bind(run: Callable, module: torch.nn.Module, x: torch.Tensor, options: dict) -> Callable[[], None]:
    return lambda: run(module, x, options)


def _forward(module: torch.nn.Module, x: torch.Tensor, options: dict) -> None:
    with torch.no_grad():
        module(x, **options)


def _forward_backward(module: torch.nn.Module, x: torch.Tensor, options: dict) -> None:
    module.zero_grad()
    output, _ = module(x, **options)
    output.sum().backward()


def _medians(runs: list[Callable[[], None]], device: str) -> list[float]:
    """Median seconds of each, taken in turn so that a drift of the machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(REPEATS + 2):
        for run, taken in zip(runs, seconds):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:  # the first two warm up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]
