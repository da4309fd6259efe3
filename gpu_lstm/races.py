"""Cached results of races, verifications and autotuning, for a program that ships those of its cards."""

from pathlib import Path

from .dispatch.run import forget
from .kernels import cache  # type: ignore[import-not-found]  # a folder next to gpu_lstm/ in a checkout


def merge(*paths: str | Path) -> int:
    """Add the results that `python -m gpu_lstm races --export FILE` wrote.

    Call it before the first call of a model. Results of other cards or versions do no harm: they count only there.
    Returns how many results were new.

    Raises:
        OSError, ValueError: a file cannot be read, or is no such file.
    """
    added: int = cache.merge(paths)
    forget()
    return added
