"""LSTM and GRU for PyTorch on CPUs and NVIDIA GPUs. They replace torch.nn's modules and have more options."""

from pathlib import Path

# An installed package has the kernels in this folder. A checkout has them next to it, and needs no installation.
if not Path(__file__).with_name("kernels").exists():
    __path__.append(str(Path(__file__).parents[1]))

from . import compat, functional, keras
from .call.choices import Backend, backend, racing
from .call.sequences import resets_from_dones
from .kernels.timeouts import check
from .modules import GRU, LSTM, SLSTM, GRUCell, LSTMCell, StackedGRU, StackedLSTM
from .tools.convert import convert, to_torch
from .tools.explain import explain
from .tools.stream import Stream
from .tools.trace import trace
from .tools.xlstm import use_for_slstm

__version__ = "0.2.0"

__all__ = [
    "GRU", "LSTM", "SLSTM", "Backend", "GRUCell", "LSTMCell", "StackedGRU", "StackedLSTM", "Stream", "backend",
    "check", "compat", "convert", "explain", "functional", "keras", "racing", "resets_from_dones",
    "to_torch", "trace", "use_for_slstm",
]  # fmt: skip


def __dir__() -> list[str]:
    """Return the public names, without the submodules that the imports above define."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
