"""The contract of a backend: its package, its launcher, its plans and its launches."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from . import cache
from .cards import Card
from .memory import Arguments, Buffers, Memory
from .problem import Pass, Problem, Recurrence


class Chosen(NamedTuple):
    """A plan, how it was chosen, and its description for users."""

    plan: Any  # of the backend's own class
    measured: bool = False  # whether it was the fastest on this card; otherwise it is the first that fits
    family: str = ""  # of kernels
    tiles: str = ""  # how the programs share a layer, in words
    why: str = ""
    each_step: int = 0  # the kernels of ours that each step launches; 0 if all steps are one launch


class NoKernel(RuntimeError):
    """No kernel of a backend can run a pass of a problem on a card, or none computes the right numbers there."""


Refuses = Callable[[Any], str | None]
"""refuses(plan) returns why a plan must not be used for a layer, pass and call, or None if it may."""
Prepare = Callable[[Any], Callable[[], object]]
"""prepare(plan) returns a function that runs a pass by a plan. The function is called once for each timing."""
Timed = tuple[dict[Any, float], dict[Any, RuntimeError]]
"""The seconds of a pass by each plan, and the errors of the plans that fail."""
Times = Callable[[list[Any]], Timed]
"""times(plans) times a pass by each of the plans."""
Timer = Callable[[torch.device, Prepare, list[Any]], Timed]
"""timer(device, prepare, plans) does the same for the pass that `prepare` prepares."""


class Package(Protocol):
    """The facts about a backend that need no import of its packages. kernels/NAME_rnn/__init__.py has them."""

    DEVICES: tuple[str, ...]  # the types of devices whose tensors `auto` may give to the backend
    DTYPES: tuple[torch.dtype, ...]  # the dtypes of the calls that it runs
    IN_FLOAT32: tuple[torch.dtype, ...]  # the dtypes among them whose calls it computes in float32, and rounds
    was_compiled: Callable[[Pass], bool] | None
    """was_compiled(pass_) tells whether the cache has the compiled function that runs a pass, for any CPU and versions.

    One function runs the pass of every problem, and its compilation takes ten seconds. The answer needs no import. If
    `was_compiled` and `is_compiled` are None, each problem has kernels of its own."""
    is_compiled: Callable[[Pass], bool] | None
    """is_compiled(pass_) tells whether the cache has the function for this CPU and the installed versions."""
    PACKAGES: tuple[str, ...]  # the packages whose versions belong in a bug report
    NEEDS: str  # what to install, and how

    def made_by(self) -> cache.Key:
        """Return the names and versions of everything that makes and runs the kernels.

        torch, the device and the library's own sources are not among them. The result is part of the keys of verdicts
        and races. The function is called only if the backend can run here.
        """

    def import_packages(self) -> None:
        """Import the packages that the backend needs. If this raises any error, the backend is not used."""


class Launcher(Protocol):
    """A backend, as the module kernels/NAME_rnn/launch.py has it."""

    BACKEND: str  # its name
    product: Callable[[Tensor, Tensor], Tensor]
    """product(a, b) returns a [M, K] b [K, N], a product over all steps. It runs outside the time loop."""

    def card_of(self, device: torch.device) -> Card:
        """Return the part of a device that plans may use.

        The current context may have fewer multiprocessors than the device, and some may be left to other kernels.
        """

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> Exception | None:
        """Return the exception to raise if the backend cannot run tensors of this device and dtype, else None."""

    def lacks(self, problem: Problem) -> str | None:
        """Return the feature of a problem that the backend does not support, or None if it supports all of them."""

    def multiplies_x(self, problem: Problem) -> bool:
        """Return whether forward computes W_ih x, if nothing else is a part of the gates before the loop."""

    def choose(
        self, problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None, timer: Timer | None
    ) -> Any:
        """Return the best plan for a pass that `refuses` does not refuse. Raise NoKernel if there is none.

        Without a `timer` no plan is timed.
        """

    def prepare(self, problem: Problem, pass_: Pass, plan: Any, device: torch.device, trial: bool = False) -> Any:
        """Return the Launches of a plan. In a `trial`, programs wait only briefly for other programs."""

    def describe(self, problem: Problem, device: torch.device, pass_: Pass, plan: Any) -> Chosen:
        """Describe a plan for `Layer.chosen`. None stands for the plan that would be tried first."""


class Launches(NamedTuple):
    """The plan of a pass, ready to be launched: the buffers that a Layer allocates, and the function that launches.

    start(arguments) makes all launches. `arguments` has the values of pointers by their names: the `buffers`, which the
    kernels write, the tensors that the time loop reads, `error_ptr`, and the result of more(r, memory). In more and
    result, `memory` has the allocated buffers by their names. result(memory) returns h or dgates. If `result` is None,
    they are the buffers "h_ptr" and "dgates_ptr".
    """

    plan: Any
    buffers: Buffers
    start: Callable[[Arguments], None]
    projects_outside: bool = False  # whether the kernels run the recurrence of m, see projection.py
    result: Callable[[Memory], Tensor] | None = None
    more: Callable[[Recurrence, Memory], Arguments] | None = None
    error_ptr: Tensor | None = None  # see timeouts.error_word
    at_once: int | None = None  # how many launches fit the card together; None if programs do not wait for each other
    inference: Callable[..., None] | None = None
    """inference(T, x, (h0, c0, h, h_n, c_n), (resets, lengths), weights) runs a layer of float32 without saving.

    All arguments but T and the weights are addresses, of contiguous tensors. Absent tensors are 0. Without `h` only the
    final states are stored. Those of sequences of length 0 stay as they are. `lengths` are int64."""


class OnlyPlan(NamedTuple):
    """The plan of a backend that runs every problem in one way. Plans of other backends have the same four members."""

    backend: str
    slower: str | None = None  # why torch's own layer is probably faster, if it can run the problem

    @property
    def identity(self) -> dict[str, Any]:
        """The facts that the numbers of this plan may depend on, as JSON values.

        The batch size need not be among them.
        """
        return {"kernel": self.backend}

    def sequences_enough(self, problem: Problem) -> int:
        """Return how many of a problem's sequences make its kernel run all of its code, for verification."""
        return min(problem.batch, 3)


def package_of(backend: str) -> Package:
    """Return the package of a backend, without importing the packages that the backend needs."""
    return cast(Package, importlib.import_module(f".{backend}_rnn", __package__))


def launcher_of(backend: str) -> Launcher:
    """Return the launcher of a backend. It is imported nowhere else."""
    return cast(Launcher, importlib.import_module(f".{backend}_rnn.launch", __package__))


def machine_of(backend: str, device: torch.device) -> cache.Key:
    """Return the facts that a verdict or a race of a backend on a device depends on."""
    return cache.machine(device) | package_of(backend).made_by()
