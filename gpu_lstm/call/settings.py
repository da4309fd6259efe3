"""Settings of the whole process that `with` blocks of ours change, and a block in which none of the caller's act."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..kernels import private, projection


class Setting:
    """A setting of the whole process that `with` blocks change.

    The first open block saves the old value, and the last one restores it, in whatever thread. If each restored what it
    found, the last of two threads would restore what the other had set.
    """

    def __init__(self, get: Callable[[], Any], set: Callable[..., Any]) -> None:
        self._get, self._set, self._lock = get, set, threading.Lock()
        self._open, self._before = 0, None

    @contextlib.contextmanager
    def changed(self, *value: Any) -> Iterator[None]:
        """A block with another value; none: the block itself changes it."""
        with self._lock:
            if not self._open:
                self._before = self._get()
            self._open += 1
        try:
            if value:
                self._set(*value)
            yield
        finally:
            with self._lock:
                self._open -= 1
                if not self._open:
                    self._set(self._before)


_default_dtype = Setting(torch.get_default_dtype, torch.set_default_dtype)
_anomalies = Setting(
    lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
    lambda mode: torch.set_anomaly_enabled(*mode),
)


def _products() -> tuple[str, bool]:
    with projection.lock:  # whose blocks set back what they found
        return _matmul.fp32_precision, _matmul.allow_fp16_accumulation


def _set_products(facts: tuple[str, bool]) -> None:
    with projection.lock:
        _matmul.fp32_precision, _matmul.allow_fp16_accumulation = facts


_matmul, EXACT = torch.backends.cuda.matmul, ("ieee", False)
products = Setting(_products, _set_products)
"""The precision of cuBLAS, EXACT or less, for float32 and half. The recurrence obeys other switches."""


def without_hooks() -> contextlib.AbstractContextManager:
    """A block in which no hooks of saved tensors act, such as torch.utils.checkpoint's."""
    if not private.hooks_are_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@contextlib.contextmanager
def alone(grad: bool) -> Iterator[None]:
    """A block for computations of our own inside a user's call: none of the caller's contexts acts on them.

    These are hooks of saved tensors, anomaly detection, function modes (such as a default device), a default dtype and
    inference mode; autograd is on if `grad`.
    """
    with (
        _default_dtype.changed(torch.float32), _anomalies.changed((False, True)), private.WithoutTorchFunction(),
        torch.inference_mode(False), torch.set_grad_enabled(grad), without_hooks(),
    ):  # fmt: skip
        yield
