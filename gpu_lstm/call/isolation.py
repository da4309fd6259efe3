"""Blocks in which no setting of the caller acts."""

import contextlib
from collections.abc import Iterator

import torch

from ..kernels import private
from ..kernels.process_settings import Setting

_default_dtype = Setting(torch.get_default_dtype, torch.set_default_dtype)
_anomalies = Setting(
    lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
    lambda mode: torch.set_anomaly_enabled(*mode),
)


def without_hooks() -> contextlib.AbstractContextManager:
    """Return a block in which no hooks of saved tensors act, such as the hooks of torch.utils.checkpoint."""
    if not private.hooks_are_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@contextlib.contextmanager
def alone(grad: bool) -> Iterator[None]:
    """A block for our own computations inside a user's call. None of the caller's contexts acts on them.

    These contexts are hooks of saved tensors, anomaly detection, function modes (such as a default device), a default
    dtype and inference mode. Autograd is on if `grad`.
    """
    with (
        _default_dtype.changed(torch.float32), _anomalies.changed((False, True)), private.WithoutTorchFunction(),
        torch.inference_mode(False), torch.set_grad_enabled(grad), without_hooks(),
    ):  # fmt: skip
        yield
