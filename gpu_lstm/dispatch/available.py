"""The backends that can run a call here, and the reasons why others cannot."""

import functools

import torch

from ..call.choices import KERNEL_BACKENDS, Backend, requested_backend
from ..call.regularisers import REFERENCE_ONLY
from ..kernels import cache
from ..kernels.contract import launcher_of, package_of
from . import cpu_rule
from .kind import Kind


def backends_for(device: torch.device) -> tuple[Backend, ...]:
    """Return the kernel backends to which AUTO may give tensors of a device, in order of preference."""
    return tuple([b for b in KERNEL_BACKENDS if device.type in package_of(b.value).DEVICES])


def supports(choice: Backend, feature: str | None) -> bool:
    """Whether a backend supports a feature that torch's own lacks. Only the feature's name decides.

    A backend may still refuse a problem that has the feature, see `lacking`.
    """
    if feature is None or choice is Backend.REFERENCE:
        return True
    return choice in KERNEL_BACKENDS and feature not in REFERENCE_ONLY


def select(argument: str | Backend | None, device: torch.device, kind: Kind, transformed: bool) -> Backend:
    """Return the backend that will run a kind of call on this device unless another one wins a race. It is never AUTO.

    `transformed` tells whether the call is within torch.func.vmap or a forward-mode derivative. The reference runs such
    calls, whatever backend was chosen. A chosen backend that cannot run is an error here, too.

    Raises:
        ValueError: the chosen backend does not support the feature of the call.
        ImportError, RuntimeError, TypeError: the chosen backend cannot run, for the reason that the message names.
    """
    choice, feature = requested_backend(argument), kind.feature
    if choice is Backend.AUTO:
        choice = next((b for b in backends_for(device) if why_not(b, device, kind) is None), kind.fallback)
    elif not supports(choice, feature):
        able = " or ".join(repr(b.value) for b in (*backends_for(device), Backend.REFERENCE) if supports(b, feature))
        raise ValueError(f"backend {choice.value!r} does not support {feature}; use {able}")
    elif (problem := why_unavailable(choice, device, kind.dtype)) is not None:
        raise problem
    return Backend.REFERENCE if transformed else choice


def is_compiled_once(kernels: Backend) -> bool:
    """Whether one compilation of a kernel backend serves all problems. If so, cpu_rule decides what is raced."""
    return package_of(kernels.value).is_compiled is not None


def why_no_kernels(device: torch.device, kind: Kind) -> str:
    """Return the reasons why AUTO chooses no kernel backend for a kind of call on this device, in one text."""
    reasons = [why for b in backends_for(device) if (why := why_not(b, device, kind)) is not None]
    return "; ".join(["backend 'auto' chooses it where no kernels run", *reasons])


def why_not(kernels: Backend, device: torch.device, kind: Kind) -> str | None:
    """Return the reason why AUTO does not give a kind of call to a kernel backend, or None if it may."""
    if not supports(kernels, kind.feature):
        return f"backend {kernels.value!r} does not support {kind.feature}"
    package = package_of(kernels.value)
    short = None if package.is_compiled is None else cpu_rule.without_loops(kind)
    waits = f"the loops are not compiled yet, and this call starts no compilation: {short}"
    if short and not all(map(package.was_compiled, kind.passes)):
        return waits  # decided first, so that the packages of the backend are not imported for nothing
    if (problem := why_unavailable(kernels, device, kind.dtype)) is not None:
        return str(problem)
    if short and not all(map(package.is_compiled, kind.passes)):
        return waits
    lacks = lacking(kernels, kind)
    return lacks and f"backend {kernels.value!r} has no {lacks}"


def lacking(kernels: Backend, kind: Kind) -> str | None:
    """Return the feature of a layer that a kernel backend does not support, or None if it supports every feature.

    The backend has to be available.
    """
    return next(filter(None, map(launcher_of(kernels.value).lacks, kind.problems)), None)


def why_unavailable(choice: Backend, device: torch.device, dtype: torch.dtype) -> Exception | None:
    """Return an exception that says why a backend cannot run tensors of this device and dtype, or None if it can."""
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
    """Return the text of an error about a package that a kernel backend needs, or None if all packages can be used."""
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
