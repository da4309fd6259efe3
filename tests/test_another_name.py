"""The package within another one, imported again, and reloaded: several copies in a process, each with operators."""

import importlib
import multiprocessing
import shutil
import sys
from pathlib import Path

import pytest
import torch

import gpu_lstm
from gpu_lstm.backends import graph

ROOT = Path(__file__).parents[1]


def compared(other) -> list[float]:
    """How far results and gradients of another copy are from torch's own: eager and compiled, torch and kernels."""
    torch.manual_seed(0)
    theirs, x = torch.nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = [theirs(x)[0], *torch.autograd.grad(theirs(x)[0].sum(), list(theirs.parameters()))]
    far = []
    for backend in ("torch", "reference"):
        ours = other.LSTM(3, 4, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        for call in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
            y = call(x)[0]
            found = [y, *torch.autograd.grad(y.sum(), list(ours.parameters()))]
            far.append(max((a - b).abs().max().item() for a, b in zip(found, expected)))
    return far


def vendored(folder: str) -> tuple:
    sys.path.insert(0, folder)
    other = importlib.import_module("their.vendor.lstm")
    names = {name for name in sys.modules if name.startswith("their.vendor.lstm")}
    return compared(gpu_lstm), compared(other), "their.vendor.lstm.kernels.problem" in names, repr(other.LSTM(3, 4))


def again() -> tuple:
    for module in (graph, gpu_lstm):
        importlib.reload(module)
    first = compared(gpu_lstm)
    for name in [name for name in sys.modules if name.startswith("gpu_lstm")]:
        del sys.modules[name]
    other = importlib.import_module("gpu_lstm")
    return first, compared(other), other is not gpu_lstm, repr(other.LSTM(3, 4))


@pytest.mark.parametrize("way", [vendored, again])
def test_two_copies_run_side_by_side(way, tmp_path):
    if way is vendored:
        package = tmp_path / "their/vendor/lstm"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "gpu_lstm", package, ignore=ignore)
        shutil.copytree(ROOT / "kernels", package / "kernels", ignore=ignore)
        for folder in (package.parent, package.parents[1]):
            (folder / "__init__.py").touch()
    with multiprocessing.get_context("fork").Pool(1) as another:  # which has torch
        first, second, is_another, shown = another.apply(way, (str(tmp_path),) if way is vendored else ())
    assert max(first + second) < 1e-6
    assert is_another
    assert shown == "gpu_lstm.LSTM(3, 4)"
