"""Choices of the user for the whole process: the backend, and whether "auto" races backends."""

import contextlib
import enum
import os
import warnings
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
E = TypeVar("E", bound=enum.Enum)

BACKEND_VARIABLE = "GPU_LSTM_BACKEND"
RACE_VARIABLE = "GPU_LSTM_RACE"

BackendName = Literal["auto", "triton", "cupy", "numba", "torch", "reference"]
"""The values of Backend, for type checkers."""


class Backend(enum.Enum):
    """The backends. The values are the names that users give."""

    AUTO = "auto"  # kernels where they can run and are faster, otherwise torch
    TRITON = "triton"  # fused Triton kernels
    CUPY = "cupy"  # fused CUDA C++ kernels, for machines on which Triton cannot run
    NUMBA = "numba"  # the time loop, compiled for a CPU
    TORCH = "torch"  # torch's own LSTM or GRU: ATen on the CPU, cuDNN on CUDA
    REFERENCE = "reference"  # a plain loop for any device and any dtype, differentiable to any order


AnyBackend = BackendName | Backend | None
"""The argument `backend` of modules and functions. None leaves the choice to the process."""


class Racing(enum.Enum):
    """The modes of racing, which decide whether "auto" races backends. The values are the names that users give."""

    ON = "on"  # race where no result is cached, and cache the result
    READ = "read"  # use cached results only
    OFF = "off"  # use the backend that is expected to win


KERNEL_BACKENDS = tuple(b for b in Backend if b.value not in ("auto", "torch", "reference"))
"""The backends in kernels/NAME_rnn. "auto" uses the first one that can run a call."""


class Block(contextlib.ContextDecorator, Generic[E]):
    """A choice that holds within a `with` block, or while a function runs that it decorates.

    `opened` contains all blocks of this kind that are open in the process, with the last opened block first. The first
    one decides, in whatever order the blocks close. The last element is a block that chooses nothing and is never
    removed.

    Several threads may read and change the list at the same time. Every access is therefore one call of a method of
    list, which another thread cannot interrupt.
    """

    # A block that was never used warns when it is deleted. torch.compile makes blocks without calling __init__, which
    # would set this to False. They do not warn.
    _used = True

    def __init__(self, opened: list["Block[E]"], value: E | None, call: str) -> None:
        self.value, self._opened, self._call, self._used = value, opened, call, False

    def __enter__(self) -> None:
        self._used = True
        try:
            self._opened.insert(0, self)
        except BaseException:  # an interrupt leaves nothing behind
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self in self._opened:
            self._opened.remove(self)  # the entry of this block that was inserted last

    def __call__(self, function: F) -> F:
        self._used = True
        return super().__call__(function)

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(f"{self._call} chose nothing: write `with {self._call}:`", RuntimeWarning, stacklevel=2)


_nothing: Block[Any] = Block([], None, "")
_nothing._used = True
chosen_backends: list[Block[Backend]] = [_nothing]
chosen_racings: list[Block[Racing]] = [_nothing]


def backend(name: BackendName | Backend) -> Block:
    """Choose the backend within a `with` block.

    The choice holds for every module and function that was not given a backend itself. It holds for the whole process,
    as the flags of torch.backends do. So it also holds in the threads in which autograd runs backward. If several
    threads open blocks, the block that was opened last decides. Without `with` nothing is chosen, and a RuntimeWarning
    says so.

    Args:
        name: "auto", "triton", "cupy", "numba", "torch" or "reference".

    Raises:
        ValueError: There is no backend of this name.
    """
    choice = _parse(Backend, name, "backend")
    return Block(chosen_backends, choice, f"gpu_lstm.backend({choice.value!r})")


def racing(mode: Literal["on", "read", "off"]) -> Block:
    """Choose within a `with` block whether backend "auto" races. The choice holds for the whole process.

    The environment variable GPU_LSTM_RACE sets the same mode. Whatever the backend is, the plans of its kernels are
    timed only if the mode is "on".

    Args:
        mode: "on", "read" or "off". "read" uses cached results only, for example on a cluster or in CI.

    Raises:
        ValueError: There is no such mode.
    """
    choice = _parse(Racing, mode, "mode of racing")
    return Block(chosen_racings, choice, f"gpu_lstm.racing({choice.value!r})")


def parse_backend_name(name: str | Backend) -> BackendName:
    """Return the name of a Backend, which modules store. Raise ValueError if there is no Backend of this name."""
    return cast(BackendName, _parse(Backend, name, "backend").value)


def _parse(enum: type[E], name: object, what: str, source: str = "") -> E:
    """Return the member of an Enum by its name, or the member itself. Raise ValueError if there is none.

    `what` and `source` are parts of the message. `source` says where the name comes from, if it was not given in the
    call.
    """
    if isinstance(name, enum):
        return name
    try:
        return enum(name)
    except ValueError:
        expected = ", ".join(repr(member.value) for member in enum)
        raise ValueError(f"unknown {what} {name!r}{source}; expected one of {expected}") from None


def requested_backend(argument: str | Backend | None) -> Backend:
    """Return the backend that the user asked for.

    The argument decides, then the innermost `with backend(...)`, then the environment variable. The default is AUTO.
    """
    chosen = chosen_backends[0].value if argument is None else argument
    if chosen is not None:
        return _parse(Backend, chosen, "backend")
    name = os.environ.get(BACKEND_VARIABLE) or Backend.AUTO
    return _parse(Backend, name, "backend", f" in the environment variable {BACKEND_VARIABLE}")


def requested_racing() -> Racing:
    """Return the mode of racing. `with racing(...)` decides, then the environment variable. The default is ON."""
    if chosen_racings[0].value is not None:
        return chosen_racings[0].value
    name = os.environ.get(RACE_VARIABLE) or Racing.ON.value
    return _parse(Racing, name, "mode of racing", f" in the environment variable {RACE_VARIABLE}")
