"""The contract of a backend: what its package, its launcher, its plans and its launches are."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from . import cache
from .cards import Card
from .memory import Buffer
from .problem import Pass, Problem, Recurrence


class Chosen(NamedTuple):
    """A plan, how it was chosen, and what a user is told about it."""

    plan: Any  # the backend's own
    measured: bool = False  # on this card; else the first that fits
    family: str = ""  # of kernels
    tiles: str = ""  # how its programs share a layer, in words
    why: str = ""
    each_step: int = 0  # launches at every step; 0: all steps are in one


class NoKernel(RuntimeError):
    """No kernel of a backend can run a pass of a problem on a card, or none computes the right numbers there."""


Refuses = Callable[[Any], str | None]
"""refuses(plan): why a plan is not used for a layer, pass and call; None if it is."""
Prepare = Callable[[Any], Callable[[], object]]
"""prepare(plan)(): run a pass by a plan, as often as it is timed."""
Times = Callable[[list[Any]], tuple[dict[Any, float], dict[Any, RuntimeError]]]
"""times(plans): the seconds of a pass by each plan, and the errors of those that fail."""
Timer = Callable[[torch.device, Prepare, list[Any]], tuple[dict[Any, float], dict[Any, RuntimeError]]]
"""timer(device, prepare, plans): the same for any pass."""


class Package(Protocol):
    """What is known of a backend before what it needs is imported: what its kernels/NAME_rnn/__init__.py has."""

    DEVICES: tuple[str, ...]  # the types of devices whose tensors `auto` may give it
    DTYPES: tuple[torch.dtype, ...]  # of calls that it runs
    IN_FLOAT32: tuple[torch.dtype, ...]  # those of DTYPES in which it does not compute: results are rounded to them
    is_compiled: Callable[..., bool] | None
    """is_compiled(pass_, for_any=False): whether the function that runs a pass of all problems is in the cache, for
    this CPU and these versions or, without importing anything, for any. Its compilation takes ten seconds. None: each
    problem has kernels of its own."""
    PACKAGES: tuple[str, ...]  # whose versions users are asked for
    NEEDS: str  # what to install, and how

    def made_by(self) -> cache.Key:
        """Names and versions of everything that makes and runs its kernels, beside torch, the device and our sources.

        They are part of the keys of verdicts and races. The backend can run here.
        """

    def import_packages(self) -> None:
        """Import what it needs. If that raises anything, the backend is not used."""


class Launcher(Protocol):
    """A backend: what its module kernels/NAME_rnn/launch.py has."""

    BACKEND: str  # its name

    def card_of(self, device: torch.device) -> Card:
        """What plans may use of a device: its context may have fewer multiprocessors, and some are left to others."""

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> Exception | None:
        """Why it cannot run tensors of this device and dtype, to be raised; None if it can."""

    def lacks(self, problem: Problem) -> str | None:
        """What of a problem it does not support; None if it runs it."""

    def choose(
        self, problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None, timer: Timer | None
    ) -> Any:
        """The plan for a pass, the best one that `refuses` does not refuse. Raises NoKernel if there is none.

        Without a `timer` nothing is timed.
        """

    def prepare(self, problem: Problem, pass_: Pass, plan: Any, device: torch.device, trial: bool = False) -> Any:
        """The Launches of a plan. In a trial they wait for other programs only briefly."""

    def describe(self, problem: Problem, device: torch.device, pass_: Pass, plan: Any) -> Chosen:
        """What `Layer.chosen` returns for a plan; for None, of the plan that would be tried first."""


class Launches(NamedTuple):
    """A plan of a pass, ready to be launched: the memory that a Layer allocates, and what makes all launches.

    start(arguments) makes them from arguments by the names of pointers: the `buffers`, which they write, what the time
    loop reads, `error_ptr`, and more(r, memory). result(memory) is h, or dgates, if it is not the buffer itself.
    """

    plan: Any
    buffers: dict[str, Buffer]
    start: Callable[[dict[str, Any]], None]
    projects_outside: bool = False  # kernels run the recurrence of m, see projection.py
    result: Callable[[dict[str, Tensor]], Tensor] | None = None
    more: Callable[[Recurrence, dict[str, Tensor]], dict[str, Any]] | None = None
    error_ptr: Tensor | None = None  # see timeouts.error_word
    at_once: int | None = None  # launches that fit the card together; None: programs do not wait for each other
    of_x: bool = False  # whether forward is given x in place of the gates, and multiplies it in the loop
    step: Callable[..., None] | None = None
    """step(x, h0, c0, h, h_n, c_n, weights): a step of a layer, where all but the weights are addresses."""


class OnlyPlan(NamedTuple):
    """The plan of a backend that runs every problem in one way. Plans of other backends have the same three."""

    backend: str
    slower: str | None = None  # why torch's own is expected to be faster, where it can run the problem; None: it is not

    @property
    def identity(self) -> dict[str, Any]:
        """What its numbers may depend on, as JSON values; the number of sequences need not be in it."""
        return {"kernel": self.backend}

    def sequences_enough(self, problem: Problem) -> int:
        """How many of a problem's sequences show all that its kernel does, for verification."""
        return min(problem.batch, 3)


def package_of(backend: str) -> Package:
    """What is known of a backend without what it needs."""
    return cast(Package, importlib.import_module(f".{backend}_rnn", __package__))


def launcher_of(backend: str) -> Launcher:
    """A backend: the one place where it is imported."""
    return cast(Launcher, importlib.import_module(f".{backend}_rnn.launch", __package__))


def machine_of(backend: str, device: torch.device) -> cache.Key:
    """The facts that a verdict or a race of a backend on a device depends on."""
    return cache.machine(device) | package_of(backend).made_by()
