"""What the conversion and the layers both need of Keras."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules import GRU, LSTM, StackedGRU, StackedLSTM


class Pair(NamedTuple):
    """LSTM or GRU: its name in Keras, and the classes that compute it here."""

    name: str  # of Keras's layer; its cell's is f"{name}Cell"
    module: type[LSTM] | type[GRU]
    stack: type[StackedLSTM] | type[StackedGRU]

    def reordered(self, rows: Tensor) -> Tensor:
        """Rows of a weight or bias, H a gate, from Keras's order of gates to torch's, or back.

        An LSTM's are i, f, g, o in both. A GRU's are z, r, n in Keras and r, z, n in torch.
        """
        if self.name == "LSTM":
            return rows
        first, second, third = rows.chunk(3)
        return torch.cat([second, first, third])

    def weights_of(self, cell: Any, tensor_of: Callable[[Any], Tensor]) -> list[Tensor]:
        """W_ih, W_hh and, with a bias, b_ih and b_hh of a Keras cell. An LSTM's b_hh, which Keras lacks, is 0."""
        weights = [tensor_of(cell.kernel).T, tensor_of(cell.recurrent_kernel).T]
        if cell.use_bias:
            bias = tensor_of(cell.bias)
            weights += bias.unbind() if bias.dim() == 2 else (bias, torch.zeros_like(bias))
        return list(map(self.reordered, weights))


OF_LSTM = Pair("LSTM", LSTM, StackedLSTM)
OF_GRU = Pair("GRU", GRU, StackedGRU)
PAIRS = (OF_LSTM, OF_GRU)


def import_keras() -> ModuleType:
    """Keras; an ImportError says what to install."""
    try:
        return importlib.import_module("keras")
    except ImportError as error:
        raise ImportError(
            f'this needs Keras 3 and a backend for it ({error}): pip install ".[keras]" from a clone of gpu_lstm, and '
            "to let Keras run on torch set KERAS_BACKEND=torch in the environment before it is imported"
        ) from error


def check_equations(keras: ModuleType, cell: Any) -> None:
    """Raise ValueError unless a cell has tanh, sigmoid and, of a GRU, the reset gate after the product."""
    for name, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
        function = getattr(cell, name)
        if function not in (getattr(keras.activations, expected), getattr(keras.ops, expected)):
            actual = getattr(function, "__name__", function)
            raise ValueError(f"{name}={actual!r} has no counterpart; expected {expected!r}")
    if not getattr(cell, "reset_after", True):
        raise ValueError(
            "reset_after=False has no counterpart; expected True: here the reset gate multiplies W_hn h + b_hn, "
            "and not h before the product"
        )
