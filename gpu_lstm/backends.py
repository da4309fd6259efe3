"""Which code runs an LSTM: the backends, what each needs, and how one is chosen."""

import contextlib
import enum
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch

from .transforms import constant_when_traced, need_the_reference

F = TypeVar("F", bound=Callable[..., Any])

ENVIRONMENT_VARIABLE = "GPU_LSTM_BACKEND"

BackendName = Literal["auto", "triton", "cupy", "torch", "reference"]
"""The values of Backend, for type checkers."""


class Backend(enum.Enum):
    """The backends, by the name a user gives."""

    AUTO = "auto"  # for CUDA tensors triton where it can, else cupy where it can; else torch. See `select` for noise
    TRITON = "triton"  # fused Triton kernels
    CUPY = "cupy"  # fused CUDA C++ kernels, for where Triton cannot run
    TORCH = "torch"  # torch's own LSTM: ATen on the CPU, cuDNN on CUDA
    REFERENCE = "reference"  # a plain loop: any device, any dtype, differentiable to any order


_BY_NAME = {b.value: b for b in Backend}  # torch 2.8 does not trace Backend(name)
KERNEL_BACKENDS = (Backend.TRITON, Backend.CUPY)
KERNEL_DEVICES = ("cuda",)  # whose tensors AUTO gives to kernels
RESET_STATES = "reset_states"  # the argument, as errors name it
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_chosen: Backend | None = None  # by the youngest block of `backend(...)`; a plain global, which torch.compile guards on
_blocks: list[tuple[object, "Block"]] = []  # each time that one was entered and is not yet closed, of all threads
_blocks_lock = threading.Lock()


def parse(name: "str | Backend", source: str = "") -> Backend:
    """The Backend called `name`; `source` says where a user finds it, where that is not the call at hand.

    Raises:
        ValueError: there is none of that name.
    """
    found = name if isinstance(name, Backend) else _BY_NAME.get(name) if isinstance(name, str) else None
    if found is None:
        known = ", ".join(map(repr, _BY_NAME))
        raise ValueError(f"unknown backend {name!r}{source}; expected one of {known}")
    return found


def parse_name(name: "str | Backend") -> BackendName:
    """As `parse`, the name itself: what modules keep."""
    return cast(BackendName, parse(name).value)


class Block(contextlib.ContextDecorator):
    """What `backend` returns: a choice that holds within a `with` block, or while a function runs that it decorates."""

    _used = True  # where torch.compile makes one without __init__

    def __init__(self, choice: Backend) -> None:
        self._choice, self._used = choice, False

    def __enter__(self) -> None:
        self._used = True
        entry = object(), self
        try:
            with _blocks_lock:
                _blocks.append(entry)
                _choose_youngest()
        except BaseException:  # an interrupt leaves nothing behind
            self._close([entry])
            raise

    def __exit__(self, *_: object) -> None:
        closed: list[tuple[object, Block]] = []
        try:
            self._close(closed)
        except BaseException:  # nor does it here
            self._close(closed)
            raise

    def _close(self, closed: list[tuple[object, "Block"]]) -> None:
        """Close the entry in `closed`, else its youngest, which is noted there: a second call changes nothing."""
        with _blocks_lock:
            closed[:] = closed or [entry for entry in _blocks if entry[1] is self][-1:]
            _blocks[:] = [entry for entry in _blocks if entry not in closed]
            _choose_youngest()

    def __call__(self, function: F) -> F:
        self._used = True
        return super().__call__(function)

    def __del__(self) -> None:
        if not self._used:
            call = f"gpu_lstm.backend({self._choice.value!r})"
            warnings.warn(f"{call} chose nothing: write `with {call}:`", RuntimeWarning, stacklevel=2)


def backend(name: "BackendName | Backend") -> Block:
    """Choose the backend within a `with` block, for every module and function that was not given one itself.

    It holds for the whole process, as torch.backends' flags do. Of blocks that are open in several threads at once the
    youngest counts; when all are closed, none leaves anything behind. Without `with` nothing is chosen, and a
    RuntimeWarning says so, as for a coroutine that is never awaited.

    Raises:
        ValueError: there is no backend of that name.
    """
    return Block(parse(name))


def _choose_youngest() -> None:
    global _chosen
    _chosen = _blocks[-1][1]._choice if _blocks else None


def requested(argument: "BackendName | Backend | None") -> Backend:
    """What the user asked for: by argument, else by `with backend(...)`, else by environment variable, else auto."""
    if argument is not None:
        return parse(argument)
    if _chosen is not None:
        return _chosen
    return _BY_NAME[_from_environment()]


@constant_when_traced
def _from_environment() -> str:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or Backend.AUTO
    return parse(name, f" in the environment variable {ENVIRONMENT_VARIABLE}").value


def takers(special: str) -> tuple[Backend, ...]:
    """The backends that take what not all do: states to reset to; else a variant of the cell, or a regularised one."""
    kernels = (Backend.TRITON, Backend.CUPY) if special == RESET_STATES else (Backend.TRITON,)
    return *kernels, Backend.REFERENCE


def select(
    argument: "BackendName | Backend | None", device: torch.device, dtype: torch.dtype, special: str | None = None
) -> Backend:
    """The backend that will run tensors of this device and dtype: never AUTO.

    `special` names what a call has that not all take: of several things, that which the fewest take. AUTO then takes a
    backend with kernels that does and can, else the reference.

    Within torch.func.vmap and forward-mode derivatives it is the reference, whatever was chosen and can run.

    Raises:
        ValueError: there is no backend of that name, or an explicitly chosen one does not take `special`.
        ImportError, RuntimeError, TypeError: an explicitly chosen backend cannot run, and why.
    """
    choice = requested(argument)
    if choice is Backend.AUTO:
        choice = Backend.TORCH if special is None else Backend.REFERENCE
        for fused in KERNEL_BACKENDS if device.type in KERNEL_DEVICES else ():
            if (special is None or fused in takers(special)) and can_run(fused, device, dtype):
                choice = fused
                break
    elif special is not None and choice not in takers(special):
        able = " or ".join(repr(b.value) for b in takers(special))
        raise ValueError(f"backend {choice.value!r} takes no {special}; use {able}")
    elif not can_run(choice, device, dtype):
        kind, text = _why_not(choice, device, dtype)
        raise {"ImportError": ImportError, "RuntimeError": RuntimeError, "TypeError": TypeError}[kind](text)
    return Backend.REFERENCE if need_the_reference() else choice


@constant_when_traced
def can_run(choice: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `choice` can run tensors of this device and dtype. Fixed while a process lives: not to be traced."""
    return obstacle(choice, device, dtype) is None


@constant_when_traced
def _why_not(choice: Backend, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Class and text of the obstacle that there is. Not to be traced, as `can_run`."""
    problem = obstacle(choice, device, dtype)
    return type(problem).__name__, str(problem)


def obstacle(choice: Backend, device: torch.device, dtype: torch.dtype) -> Exception | None:
    """Why `choice` cannot run tensors of this device and dtype; None if it can."""
    if choice in KERNEL_BACKENDS and torch.version.hip is not None:
        return RuntimeError(f"backend {choice.value!r} takes NVIDIA GPUs; this torch is built for AMD's (ROCm)")
    match choice:
        case Backend.TRITON:
            return _triton_obstacle(device, dtype)
        case Backend.CUPY:
            return _cupy_obstacle(device, dtype)
        case _:
            return None


@functools.cache
def triton_import_problem() -> str | None:
    """Why the Triton kernels cannot be imported; None if they can."""
    return _problem_with("Triton", lambda: importlib.import_module("gpu_lstm.kernels.triton_lstm.launch"))


@functools.cache
def cupy_import_problem() -> str | None:
    """Why the kernels in CUDA C++ cannot be compiled: CuPy or NVRTC is absent or broken; None if they can."""
    # CuPy looks for NVRTC when it is first called.
    return _problem_with("CuPy", lambda: importlib.import_module("cupy").cuda.nvrtc.getVersion())


def without_triton(problem: str) -> str:
    """What to do about a Triton that cannot be imported, for messages."""
    return f"needs Triton: pip install triton ({problem})"


def _problem_with(package: str, load: Callable[[], object]) -> str | None:
    """What `load` raises: an optional package that is missing or broken stops nobody who did not ask for it."""
    try:
        load()
    except ImportError as error:
        return str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        _say_once(f"{package} is installed, but fails, and is not used: {problem}")
        return problem
    return None


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(f"gpu_lstm: {text}", stacklevel=2)


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    if dtype not in KERNEL_DTYPES:
        return TypeError(f"backend 'triton' takes float16, bfloat16 and float32, got {dtype}")
    problem = triton_import_problem()
    if problem is not None:
        return ImportError(f"backend 'triton' {without_triton(problem)}")
    launch = importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")
    if launch.INTERPRETED:
        if dtype is torch.bfloat16:
            return TypeError("backend 'triton': Triton's interpreter computes wrong bfloat16 products; use float32")
        return None
    if device.type != "cuda":
        return RuntimeError(
            f"backend 'triton' takes CUDA tensors, got {device}; "
            "with TRITON_INTERPRET=1 in the environment it runs CPU tensors in Triton's interpreter"
        )
    too_old = _too_old(Backend.TRITON, device, (8, 0))
    if too_old is not None:
        return too_old
    capability = torch.cuda.get_device_capability(device)
    binary = importlib.import_module("gpu_lstm.kernels.triton_lstm.binary")
    problem = binary.compile_problem(10 * capability[0] + capability[1])
    if problem is not None:
        text = f"Triton compiles nothing for {device}, compute capability {capability[0]}.{capability[1]}: {problem}"
        _say_once(f"{text}. Backend 'auto' does without it.")
        return RuntimeError(f"backend 'triton': {text}")
    return None


def _too_old(choice: Backend, device: torch.device, needed: tuple[int, int]) -> Exception | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= needed:
        return None
    (major, minor), (has_major, has_minor) = needed, capability
    return RuntimeError(
        f"backend {choice.value!r} needs compute capability {major}.{minor}, {device} has {has_major}.{has_minor}"
    )


def _cupy_obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    if dtype not in KERNEL_DTYPES:
        return TypeError(f"backend 'cupy' takes float16, bfloat16 and float32, got {dtype}")
    problem = cupy_import_problem()
    if problem is not None:
        extra = "cupy12" if (torch.version.cuda or "").startswith("12.") else "cupy13"
        return ImportError(f"backend 'cupy' needs CuPy and NVRTC: pip install \"gpu-lstm[{extra}]\" ({problem})")
    if device.type != "cuda":
        return RuntimeError(f"backend 'cupy' takes CUDA tensors, got {device}")
    return _too_old(Backend.CUPY, device, (7, 0))
