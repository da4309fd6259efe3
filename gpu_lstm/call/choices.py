"""What a user chose for the whole process: the backend, and whether `auto` races backends."""

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
    """The backends, by the name a user gives."""

    AUTO = "auto"  # kernels, where they can run and are faster; else torch
    TRITON = "triton"  # fused Triton kernels
    CUPY = "cupy"  # fused CUDA C++ kernels, for where Triton cannot run
    NUMBA = "numba"  # the time loop, compiled for a CPU
    TORCH = "torch"  # torch's own LSTM or GRU: ATen on the CPU, cuDNN on CUDA
    REFERENCE = "reference"  # a plain loop: any device, any dtype, differentiable to any order


AnyBackend = BackendName | Backend | None
"""The argument `backend` of modules and functions. None leaves the choice to the process."""


class Racing(enum.Enum):
    """Whether `auto` races, by the name a user gives."""

    ON = "on"  # race what was not raced yet, and cache the result
    READ = "read"  # use cached results only
    OFF = "off"  # neither: the expected winner


KERNEL_BACKENDS = tuple(b for b in Backend if b.value not in ("auto", "torch", "reference"))
"""Those in kernels/NAME_rnn. `auto` takes the first that can run a call."""


class Block(contextlib.ContextDecorator, Generic[E]):
    """A choice that holds within a `with` block, or while a function that it decorates runs.

    `opened` are all such blocks of the process that are open, the last opened first: that one counts, in whatever order
    they close. At the end is one that chooses nothing, and stays. Threads read and change the list at once: every
    access is one call of a list's method, which no other one can interrupt.
    """

    _used = True  # for those that torch.compile makes without __init__

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
            self._opened.remove(self)  # the last entry of this block

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
    """Choose the backend within a `with` block, for every module and function that was not given one itself.

    It holds for the whole process, as torch.backends' flags do, so also in the threads in which autograd runs backward;
    of blocks in several threads the last opened counts. Without `with` nothing is chosen, as a RuntimeWarning says.

    Raises:
        ValueError: there is no backend of that name.
    """
    choice = _parse(Backend, name, "backend")
    return Block(chosen_backends, choice, f"gpu_lstm.backend({choice.value!r})")


def racing(mode: Literal["on", "read", "off"]) -> Block:
    """Choose within a `with` block whether backend "auto" races; for the whole process, as the environment variable.

    Whatever the backend, the plans of kernels are timed only where the mode is "on".

    Args:
        mode: "on", "read" (use cached results only, as on a cluster or in CI) or "off".

    Raises:
        ValueError: another mode.
    """
    choice = _parse(Racing, mode, "mode of racing")
    return Block(chosen_racings, choice, f"gpu_lstm.racing({choice.value!r})")


def parse_backend_name(name: str | Backend) -> BackendName:
    """The name of a Backend, which modules store; a ValueError if there is no Backend of that name."""
    return cast(BackendName, _parse(Backend, name, "backend").value)


def _parse(enum: type[E], name: object, what: str, source: str = "") -> E:
    """The member of that name; `source` says where the name comes from, if not from the call itself."""
    if isinstance(name, enum):
        return name
    try:
        return enum(name)
    except ValueError:
        expected = ", ".join(repr(member.value) for member in enum)
        raise ValueError(f"unknown {what} {name!r}{source}; expected one of {expected}") from None


def requested_backend(argument: str | Backend | None) -> Backend:
    """What the user asked for: by argument, else by `with backend(...)`, else by environment variable, else auto."""
    chosen = chosen_backends[0].value if argument is None else argument
    if chosen is not None:
        return _parse(Backend, chosen, "backend")
    name = os.environ.get(BACKEND_VARIABLE) or Backend.AUTO
    return _parse(Backend, name, "backend", f" in the environment variable {BACKEND_VARIABLE}")


def requested_racing() -> Racing:
    """The mode: by `with racing(...)`, else by environment variable, else on."""
    if chosen_racings[0].value is not None:
        return chosen_racings[0].value
    name = os.environ.get(RACE_VARIABLE) or Racing.ON.value
    return _parse(Racing, name, "mode of racing", f" in the environment variable {RACE_VARIABLE}")
