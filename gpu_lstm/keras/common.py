"""What the conversion and the layers both need of Keras."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules import GRU, LSTM, StackedGRU, StackedLSTM


class Pair(NamedTuple):
    """LSTM or GRU: the order of its gates, which have H rows of a weight each, and the classes that compute it."""

    name: str  # of Keras's layer; its cell's is f"{name}Cell"
    keras_gates: str  # where Keras writes c for g, and h for n
    torch_gates: str
    module: type[LSTM] | type[GRU]
    stack: type[StackedLSTM] | type[StackedGRU]

    def to_torch(self, rows: Tensor) -> Tensor:
        """Rows of a weight or bias, from Keras's order to torch's."""
        return _reordered(rows, self.keras_gates, self.torch_gates)

    def to_keras(self, rows: Tensor) -> Tensor:
        """The reverse."""
        return _reordered(rows, self.torch_gates, self.keras_gates)


OF_LSTM = Pair("LSTM", "ifgo", "ifgo", LSTM, StackedLSTM)
OF_GRU = Pair("GRU", "zrn", "rzn", GRU, StackedGRU)
PAIRS = (OF_LSTM, OF_GRU)


def _reordered(rows: Tensor, before: str, after: str) -> Tensor:
    if before == after:
        return rows
    of_gate = dict(zip(before, rows.chunk(len(before))))
    return torch.cat([of_gate[gate] for gate in after])


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
