"""Keras 3: conversion of its layers, masks and initial values, and its layers LSTM and GRU on the kernels of gpu_lstm.

Importing this module does not import Keras. A call of from_keras or to_keras, or the first use of LSTM or
GRU, imports it.
"""

from typing import TYPE_CHECKING, Any

from .convert import GoBackwards, forget_bias, from_keras, keras_init, lengths_of, to_keras
from .convert import import_keras as _import_keras

if TYPE_CHECKING:
    from .layer import GRU as GRU
    from .layer import LSTM as LSTM

# LSTM and GRU are not in this list, so that `import *` works where Keras is not installed.
__all__ = ["GoBackwards", "forget_bias", "from_keras", "keras_init", "lengths_of", "to_keras"]
_LAYERS = ("LSTM", "GRU")


def __getattr__(name: str) -> Any:
    if name not in _LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_keras()
    from . import layer

    return getattr(layer, name)


def __dir__() -> list[str]:
    return [*globals(), *_LAYERS]
