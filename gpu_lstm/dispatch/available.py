"""Which backends can run a call here, and why not the others."""

import functools

import torch

from ..call.choices import KERNEL_BACKENDS, Backend, requested_backend
from ..call.regularisers import REFERENCE_ONLY
from ..kernels import cache
from ..kernels.contract import launcher_of, package_of
from . import cpu_rule
from .kind import Kind


def backends_for(device: torch.device) -> tuple[Backend, ...]:
    """The backends of kernels to which AUTO may give tensors of a device, in its order."""
    return tuple([b for b in KERNEL_BACKENDS if device.type in package_of(b.value).DEVICES])


def supports(choice: Backend, feature: str | None) -> bool:
    """Whether a backend supports a feature that torch's own lacks, as far as its name tells; see `lacking`."""
    if feature is None or choice is Backend.REFERENCE:
        return True
    return choice in KERNEL_BACKENDS and feature not in REFERENCE_ONLY


def select(argument: str | Backend | None, device: torch.device, kind: Kind, transformed: bool) -> Backend:
    """The backend that will run a kind of call on this device unless another wins a race: never AUTO.

    `transformed`: whether the call is within torch.func.vmap or a forward-mode derivative. The reference runs those,
    whatever was chosen and can run. Errors say why a backend that was asked for cannot run: a ValueError where it does
    not support the feature.
    """
    choice, feature = requested_backend(argument), kind.feature
    if choice is Backend.AUTO:
        choice = Backend.TORCH if feature is None else Backend.REFERENCE
        for kernels in backends_for(device):
            if why_not(kernels, device, kind) is None and lacking(kernels, kind) is None:
                choice = kernels
                break
    elif not supports(choice, feature):
        able = " or ".join(repr(b.value) for b in (*backends_for(device), Backend.REFERENCE) if supports(b, feature))
        raise ValueError(f"backend {choice.value!r} does not support {feature}; use {able}")
    elif (problem := why_unavailable(choice, device, kind.dtype)) is not None:
        raise problem
    return Backend.REFERENCE if transformed else choice


def is_compiled_once(kernels: Backend) -> bool:
    """Whether a backend of kernels follows cpu_rule before it is raced."""
    return package_of(kernels.value).is_compiled is not None


def why_no_kernels(device: torch.device, kind: Kind) -> str:
    """Why AUTO gives a kind of call on this device to no kernels."""
    reasons = [why for b in backends_for(device) if (why := why_not(b, device, kind)) is not None]
    return "; ".join(["backend 'auto' chooses it where no kernels run", *reasons])


def why_not(kernels: Backend, device: torch.device, kind: Kind) -> str | None:
    """Why AUTO does not give a kind of call to a backend of kernels; None if it may."""
    if not supports(kernels, kind.feature):
        return f"backend {kernels.value!r} does not support {kind.feature}"
    by_rule = is_compiled_once(kernels)
    if by_rule and (why := cpu_rule.waits(kernels, kind, for_any=True)) is not None:
        return why  # so that what the backend needs is not imported for nothing
    if (problem := why_unavailable(kernels, device, kind.dtype)) is not None:
        return str(problem)
    return cpu_rule.waits(kernels, kind) if by_rule else None


def lacking(kernels: Backend, kind: Kind) -> str | None:
    """What of a layer or direction a backend of kernels, which is available, does not support; None: it runs all."""
    return next(filter(None, map(launcher_of(kernels.value).lacks, kind.problems)), None)


def why_unavailable(choice: Backend, device: torch.device, dtype: torch.dtype) -> Exception | None:
    """Why `choice` cannot run tensors of this device and dtype; None if it can."""
    if choice not in KERNEL_BACKENDS:
        return None
    name = f"backend {choice.value!r}"
    if torch.version.hip is not None and device.type == "cuda":
        return RuntimeError(f"{name} runs on NVIDIA GPUs; this torch is built for AMD's (ROCm)")
    dtypes = package_of(choice.value).DTYPES
    if dtype not in dtypes:
        *most, last = (str(each).removeprefix("torch.") for each in dtypes)
        return TypeError(f"{name} supports {', '.join(most)}{' and ' * bool(most)}{last}, got {dtype}")
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
