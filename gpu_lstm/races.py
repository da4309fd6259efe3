"""Cached results of races, verifications and autotuning, for programs that ship those for their cards."""

from pathlib import Path

from .dispatch.route import forget
from .kernels import cache


def merge(*paths: str | Path) -> int:
    """Add the results that `python -m gpu_lstm races --export FILE` wrote.

    Call it before the first call of a model; returns how many were new. Results for other cards or versions do no harm.

    Raises:
        OSError, ValueError: a file cannot be read, or was not written by that command.
    """
    added: int = cache.merge(paths)
    forget()
    return added
