"""Functions of the commands ppo, models, acting and cpu: compare ways to compute the same, and keep rows of figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from . import report, results, timing
from .measure import relative_errors

WHERE = "date", "commit", "device", "torch", "gpu_lstm"  # the columns of results.provenance that a stored row has


def put(row: dict[str, Any], file: Path | None, device: str = "cpu") -> None:
    """Print a row, and add it to a CSV file with its provenance. An interrupted run keeps the rows before."""
    named = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    report.console().print("; ".join(named), soft_wrap=True)
    if file is not None:
        where = results.provenance(device)
        table = pd.DataFrame([row | {name: where[name] for name in WHERE}])
        table.to_csv(file, mode="a", header=not file.exists(), index=False, float_format="%.4g")


def speed(name: str, ratios: np.ndarray) -> dict[str, float]:
    """Return columns with the median of the ratios of all rounds, and with their 20th and 80th percentile."""
    return dict(zip((f"{name}times as fast", f"{name}p20", f"{name}p80"), timing.percentiles(ratios)))


def with_gradients(y: Tensor, module: nn.Module, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Return an output, and in training the gradients of all parameters of the module."""
    if not y.requires_grad:
        return {"output": y}
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, list(parameters.values()), dy)
    return {"output": y} | {f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients)}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Raise a RuntimeError if a result differs from the expected one by more than `tolerance`, relative to its norm."""
    truth = {name: value.detach().double() for name, value in expected.items()}
    for name, error in relative_errors(found, truth).items():
        if not error <= tolerance:
            raise RuntimeError(f"{name} differs by {error:.2g}, expected at most {tolerance:g}")
