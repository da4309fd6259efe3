"""What the conversion and the layer both need of Keras."""

import importlib
from types import ModuleType
from typing import Any


def import_keras() -> ModuleType:
    """Keras; an ImportError says what to install."""
    try:
        return importlib.import_module("keras")
    except ImportError as error:
        raise ImportError(
            f'this needs Keras 3 and a backend of it ({error}): pip install ".[keras]" from a clone of gpu_lstm, and '
            "to let Keras run on torch set KERAS_BACKEND=torch in the environment before it is imported"
        ) from error


def check_activations(keras: ModuleType, cell: Any) -> None:
    """Raise ValueError unless those of a cell are tanh and sigmoid."""
    for name, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
        function = getattr(cell, name)
        if function not in (getattr(keras.activations, expected), getattr(keras.ops, expected)):
            actual = getattr(function, "__name__", function)
            raise ValueError(f"{name}={actual!r} has no counterpart; expected {expected!r}")
