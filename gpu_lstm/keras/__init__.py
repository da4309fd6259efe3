"""Keras 3: conversion of its layers to ours and back, its masks and initial values; its layers on our kernels.

Importing this does not import Keras. from_keras, to_keras and the names LSTM and GRU do.
"""

from typing import TYPE_CHECKING, Any

from .convert import GoBackwards, forget_bias, from_keras, keras_init, lengths_of, to_keras
from .convert import import_keras as _import_keras

if TYPE_CHECKING:
    from .layer import GRU as GRU
    from .layer import LSTM as LSTM

# Without the layers, so that `import *` works where Keras is not installed.
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
