"""LSTM for PyTorch on NVIDIA GPUs: a drop-in for torch.nn.LSTM, with lengths, resets and stacks of any sizes."""

from . import compat, functional, keras
from .backends import Backend, backend
from .convert import convert, from_haste, to_torch
from .health import check
from .modules import LSTM, LSTMCell, StackedLSTM
from .stream import Stream
from .trace import trace
from .tuning import autotune

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "Backend",
    "LSTMCell",
    "StackedLSTM",
    "Stream",
    "autotune",
    "backend",
    "check",
    "compat",
    "convert",
    "from_haste",
    "functional",
    "keras",
    "to_torch",
    "trace",
]
