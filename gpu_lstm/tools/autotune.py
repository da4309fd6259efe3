"""Measure which kernels are fastest on the present GPU, and cache the result."""

import importlib

import torch

from ..backends.verify import verify
from ..call.checks import check_heads, check_positive
from ..call.choices import Backend
from ..call.modes import recurrent_precision
from ..dispatch.available import why_unavailable
from ..dispatch.route import forget
from ..kernels.cells import CELLS
from ..kernels.problem import Problem


def autotune(
    hidden_size: int, batch: int, *, steps: int = 256, dtype: torch.dtype = torch.float32, proj_size: int = 0,
    device: torch.device | str = "cuda", cell: str = "lstm", heads: int = 1,
) -> dict[str, str]:  # fmt: skip
    """Time the Triton kernels that a layer could run, on the present GPU, and cache the fastest.

    It takes seconds to minutes. The result is cached by card and version of Triton, and used from then on for layers of
    this size and batch. The logger "gpu_lstm" writes a line at INFO for each plan.

    Args:
        hidden_size, proj_size, dtype: of the layer: float16, bfloat16 or float32.
        batch: sequences, B.
        steps: time steps to measure with, T.
        device: a CUDA device.
        cell: "lstm", "gru" or "slstm".
        heads: of the layer, as for LSTM.

    Returns:
        For "forward" and "backward" the fastest family of kernels and why it was proposed.

    Raises:
        TypeError, ValueError: a size that is not an int, or too small; proj_size >= hidden_size, or
            of a GRU; dtype that is not one; an unknown cell; heads that do not divide hidden_size, or with proj_size.
        ImportError, RuntimeError, TypeError: the Triton kernels cannot run on this device or dtype, and why.
        RuntimeError: a CUDA graph is being captured, or no plan can be timed.
    """
    for name, size in dict(hidden_size=hidden_size, batch=batch, steps=steps, proj_size=proj_size or 1).items():
        check_positive(name, size)
    if cell not in CELLS:
        raise ValueError(f"cell should be one of {', '.join(map(repr, CELLS))}, got {cell!r}")
    if proj_size and CELLS[cell].one_state:
        raise ValueError(f"proj_size should be 0 for a {cell.upper()}, which has no projection, got {proj_size}")
    if proj_size >= hidden_size:
        raise ValueError(f"proj_size has to be smaller than hidden_size, got {proj_size} and {hidden_size}")
    check_heads(heads, hidden_size, proj_size)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype should be a torch.dtype, got: {type(dtype).__name__}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("autotune times kernels on a CUDA device, and torch finds none here")
    if (problem := why_unavailable(Backend.TRITON, device, dtype)) is not None:
        raise problem
    if importlib.import_module("..kernels.triton_rnn.launch", __package__).INTERPRETED:
        raise RuntimeError("autotune times compiled kernels: TRITON_INTERPRET=1 is in the environment")
    precision = recurrent_precision(dtype)
    layer = Problem(min(steps, 2), batch, hidden_size, dtype, proj_size, precision, cell=cell, heads=heads)
    measure = importlib.import_module("..kernels.triton_rnn.plans.autotune", __package__).autotune
    fastest = measure(layer, device, steps, verify)
    forget()
    return {name: f"{plan.family.name}: {plan.why}" for name, plan in fastest.items()}
