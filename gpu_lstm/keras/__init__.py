"""Keras 3: conversion of its layers to ours and back, its masks and initial values; its LSTM layer on our kernels.

Importing this does not import Keras. from_keras, to_keras and the name LSTM do.
"""

from typing import TYPE_CHECKING, Any

from .checks import import_keras as _import_keras
from .convert import GoBackwards, forget_bias, from_keras, keras_init, lengths_of, to_keras

if TYPE_CHECKING:
    from .layer import LSTM as LSTM

# Without LSTM, so that `import *` works where Keras is not installed.
__all__ = ["GoBackwards", "forget_bias", "from_keras", "keras_init", "lengths_of", "to_keras"]


def __getattr__(name: str) -> Any:
    if name != "LSTM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_keras()
    from .layer import LSTM

    return LSTM


def __dir__() -> list[str]:
    return [*globals(), "LSTM"]
