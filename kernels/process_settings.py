"""Settings of the whole process that `with` blocks of the library change."""

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
        """Run a block with another value. Without a value, the block itself changes the setting.

        The first open block saves the old value, and the last one restores it, in whatever thread. If each block
        restored the value that it found, the last of two threads would restore the value that the other had set.
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
        """Run a short block with another value. Other threads that would change the setting wait for its end."""
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
"""The switches of cuBLAS for products of float32, and for sums in half precision.

The precision of the recurrence follows from other switches, those of RNNs. The user's own products, which may run in
other threads at the same time, obey these.
"""
