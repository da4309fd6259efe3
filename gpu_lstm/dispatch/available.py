"""Which backends can run a call here, and why not the others."""

import functools

import torch

from ..call.choices import KERNEL_BACKENDS, Backend, requested_backend
from ..call.modes import only_torch_runs
from ..call.regularisers import REFERENCE_ONLY
from ..kernels import cache
from ..kernels.layer import launcher_of, package_of
from .kind import Kind

KERNEL_DEVICES = ("cuda",)  # whose tensors AUTO gives to kernels
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def backends_with(feature: str) -> tuple[Backend, ...]:
    """The backends that support a feature that torch's own lacks, as far as its name tells; see `lacking`."""
    return *(() if feature in REFERENCE_ONLY else KERNEL_BACKENDS), Backend.REFERENCE


def select(argument: str | Backend | None, device: torch.device, kind: Kind, transformed: bool) -> Backend:
    """The backend that will run a kind of call on this device unless another wins a race: never AUTO.

    `transformed`: whether the call is within torch.func.vmap or a forward-mode derivative. The reference runs those,
    whatever was chosen and can run. Sizes of batch and time decide nothing here.

    Raises:
        ValueError: there is no backend of that name, or an explicitly chosen one does not support the feature.
        ImportError, RuntimeError, TypeError: an explicitly chosen backend cannot run, and why.
    """
    choice, feature = requested_backend(argument), kind.feature
    if choice is Backend.AUTO:
        choice = Backend.TORCH if feature is None else Backend.REFERENCE
        for kernels in KERNEL_BACKENDS if device.type in KERNEL_DEVICES and feature not in REFERENCE_ONLY else ():
            if why_unavailable(kernels, device, kind.dtype) is None and lacking(kernels, kind) is None:
                choice = kernels
                break
    elif feature is not None and choice not in backends_with(feature):
        able = " or ".join(repr(b.value) for b in backends_with(feature))
        raise ValueError(f"backend {choice.value!r} does not support {feature}; use {able}")
    elif (problem := why_unavailable(choice, device, kind.dtype)) is not None:
        raise problem
    return Backend.REFERENCE if transformed else choice


def only_torch_on_a_cpu(argument: str | None) -> bool:
    """Whether a call there that torch's own operator can run has nothing else to run it; see modes.only_torch_runs."""
    return "cpu" not in KERNEL_DEVICES and only_torch_runs(argument)


def lacking(kernels: Backend, kind: Kind) -> str | None:
    """What of a layer or direction a backend of kernels, which is available, does not support; None: it runs all."""
    return next(filter(None, map(launcher_of(kernels.value).lacks, kind.problems)), None)


def why_unavailable(choice: Backend, device: torch.device, dtype: torch.dtype) -> Exception | None:
    """Why `choice` cannot run tensors of this device and dtype; None if it can."""
    if choice not in KERNEL_BACKENDS:
        return None
    name = f"backend {choice.value!r}"
    if torch.version.hip is not None:
        return RuntimeError(f"{name} runs on NVIDIA GPUs; this torch is built for AMD's (ROCm)")
    if dtype not in KERNEL_DTYPES:
        return TypeError(f"{name} supports float16, bfloat16 and float32, got {dtype}")
    if (problem := import_problem(choice)) is not None:
        return ImportError(f"{name} {problem}")
    return launcher_of(choice.value).obstacle(device, dtype)


@functools.cache
def import_problem(choice: Backend) -> str | None:
    """What a backend of kernels needs, and why that cannot be used, for messages; None if it can."""
    package = package_of(choice.value)
    try:
        package.import_packages()
    except Exception as error:
        absent = isinstance(error, ImportError)
        problem = str(error) if absent else f"{type(error).__name__}: {error}"
        if not absent:
            cache.warn_once(f"what backend {choice.value!r} needs is installed, but fails, and is not used: {problem}")
        return f"needs {package.NEEDS} ({problem})"
    return None
