"""Settings of the whole process that `with` blocks of ours change."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch


class Setting:
    """A setting of the whole process that `with` blocks change, in any threads."""

    def __init__(self, get: Callable[[], Any], set: Callable[[Any], Any]) -> None:
        self._get, self._set, self.lock = get, set, threading.RLock()
        self._open, self._before = 0, None

    @contextlib.contextmanager
    def changed(self, *value: Any) -> Iterator[None]:
        """A block with another value; none: the block itself changes it.

        The first open block saves the old value, and the last one restores it, in whatever thread. If each restored
        what it found, the last of two threads would restore what the other had set.
        """
        with self.lock:
            if not self._open:
                self._before = self._get()
            self._open += 1
        try:
            if value:
                with self.lock:
                    self._set(*value)
            yield
        finally:
            with self.lock:
                self._open -= 1
                if not self._open:
                    self._set(self._before)

    @contextlib.contextmanager
    def held(self, value: Any) -> Iterator[None]:
        """A short block with another value, during which all other threads wait that would change it."""
        with self.lock:
            before = self._get()
            try:
                self._set(value)
                yield
            finally:
                self._set(before)


def _setting(name: str) -> Setting:
    return Setting(*[partial(access, torch.backends.cuda.matmul, name) for access in (getattr, setattr)])


precision, accumulation = _setting("fp32_precision"), _setting("allow_fp16_accumulation")
"""Of cuBLAS, for float32 and half. The recurrence obeys other switches; the user's products in other threads, these."""
