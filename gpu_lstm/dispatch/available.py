"""Which backends can run a call here, and why not the others."""

import functools
import importlib

import torch

from ..call.choices import KERNEL_BACKENDS, Backend, requested_backend
from ..call.options import RESET_STATES
from ..call.regularisers import ABLE
from ..kernels import cache

KERNEL_DEVICES = ("cuda",)  # whose tensors AUTO gives to kernels
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def backends_with(feature: str) -> tuple[Backend, ...]:
    """The backends that support a feature that not all do: states to reset to, a variant of the cell, a regulariser."""
    kernels = ("triton", "cupy") if feature == RESET_STATES else ("triton",)
    return tuple(map(Backend, ABLE.get(feature, (*kernels, "reference"))))


def select(
    argument: str | Backend | None, device: torch.device, dtype: torch.dtype, feature: str | None, transformed: bool
) -> Backend:
    """The backend that will run tensors of this device and dtype unless another wins a race: never AUTO.

    `feature` is the one of a call that the fewest backends support; `transformed`, whether it is within torch.func.vmap
    or a forward-mode derivative: those the reference runs, whatever was chosen and can run.

    Raises:
        ValueError: there is no backend of that name, or an explicitly chosen one does not support the feature.
        ImportError, RuntimeError, TypeError: an explicitly chosen backend cannot run, and why.
    """
    choice = requested_backend(argument)
    if choice is Backend.AUTO:
        choice = Backend.TORCH if feature is None else Backend.REFERENCE
        for kernels in KERNEL_BACKENDS if device.type in KERNEL_DEVICES else ():
            supported = feature is None or kernels in backends_with(feature)
            if supported and why_unavailable(kernels, device, dtype) is None:
                choice = kernels
                break
    elif feature is not None and choice not in backends_with(feature):
        able = " or ".join(repr(b.value) for b in backends_with(feature))
        raise ValueError(f"backend {choice.value!r} does not support {feature}; use {able}")
    elif (problem := why_unavailable(choice, device, dtype)) is not None:
        raise problem
    return Backend.REFERENCE if transformed else choice


def why_unavailable(choice: Backend, device: torch.device, dtype: torch.dtype) -> Exception | None:
    """Why `choice` cannot run tensors of this device and dtype; None if it can."""
    if choice not in KERNEL_BACKENDS:
        return None
    name = f"backend {choice.value!r}"
    if torch.version.hip is not None:
        return RuntimeError(f"{name} runs on NVIDIA GPUs; this torch is built for AMD's (ROCm)")
    if dtype not in KERNEL_DTYPES:
        return TypeError(f"{name} supports float16, bfloat16 and float32, got {dtype}")
    return _triton_obstacle(device, dtype) if choice is Backend.TRITON else _cupy_obstacle(device)


@functools.cache
def import_problem(choice: Backend) -> str | None:
    """Why the packages of a backend of kernels cannot be used; None if they can.

    One that is absent or broken must not stop users who did not ask for it.
    """
    try:
        if choice is Backend.TRITON:
            importlib.import_module("..kernels.triton_rnn.launch", __package__)
        else:
            importlib.import_module("cupy").cuda.nvrtc.getVersion()  # CuPy looks for NVRTC when it is first called
    except ImportError as error:
        return str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        package = "Triton" if choice is Backend.TRITON else "CuPy"
        cache.warn_once(f"{package} is installed, but fails, and is not used: {problem}")
        return problem
    return None


def without_triton(problem: str) -> str:
    """What to do about a Triton that cannot be imported, for messages."""
    return f"needs Triton: pip install triton ({problem})"


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    if (problem := import_problem(Backend.TRITON)) is not None:
        return ImportError(f"backend 'triton' {without_triton(problem)}")
    launch = importlib.import_module("..kernels.triton_rnn.launch", __package__)
    if launch.INTERPRETED:
        if dtype is torch.bfloat16:
            return TypeError("backend 'triton': Triton's interpreter computes wrong bfloat16 products; use float32")
        return None
    if device.type != "cuda":
        return RuntimeError(
            f"backend 'triton' runs on CUDA tensors, got {device}; "
            "with TRITON_INTERPRET=1 in the environment it runs CPU tensors in Triton's interpreter"
        )
    if (too_old := _too_old(Backend.TRITON, device, (8, 0))) is not None:
        return too_old
    major, minor = torch.cuda.get_device_capability(device)
    choose = importlib.import_module("..kernels.triton_rnn.choose", __package__)
    if (problem := choose.launch_problem(device, 10 * major + minor)) is None:
        return None
    text = f"Triton launches nothing on {device}, compute capability {major}.{minor}: {problem}"
    cache.warn_once(f"{text}. Backend 'auto' does without it.")
    return RuntimeError(f"backend 'triton': {text}")


def _too_old(choice: Backend, device: torch.device, needed: tuple[int, int]) -> Exception | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= needed:
        return None
    at_least, has = (".".join(map(str, pair)) for pair in (needed, capability))
    return RuntimeError(f"backend {choice.value!r} needs compute capability {at_least}, {device} has {has}")


def _cupy_obstacle(device: torch.device) -> Exception | None:
    if (problem := import_problem(Backend.CUPY)) is not None:
        extra = "cupy12" if (torch.version.cuda or "").startswith("12.") else "cupy13"
        return ImportError(f"backend 'cupy' needs CuPy and NVRTC: pip install \".[{extra}]\" in a clone ({problem})")
    if device.type != "cuda":
        return RuntimeError(f"backend 'cupy' runs on CUDA tensors, got {device}")
    return _too_old(Backend.CUPY, device, (7, 0))
