"""What a backend is, and its Layer: one layer in one direction on one card, prepared once and then only launched."""

import importlib
import logging
from collections.abc import Callable
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from . import cache, heads, layer_norm, projection
from .cards import Card
from .cells import CELLS
from .memory import ALIGNMENT, Buffer, allocate, buffers_of
from .ordering import in_order
from .problem import MOST, Gradients, Inputs, Pass, Problem, Recurrence, end_index, in_the_loop, unless_reset
from .timeouts import raise_if_timed_out

logger = logging.getLogger("gpu_lstm")

MOST_LAYERS = 1024  # that are kept; a program with more problems, say more batch sizes, makes them again


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


Verify = Callable[["Layer", Pass, Inputs, Any], str | None]
"""verify(layer, pass_, inputs, plan): why a plan's numbers are not right on the layer's device; None if they are."""
Refuses = Callable[[Any], str | None]
"""refuses(plan): the same for one layer, pass and call."""
Prepare = Callable[[Any], Callable[[], object]]
"""prepare(plan)(): run a pass by a plan, as often as it is timed."""
Times = Callable[[list[Any]], tuple[dict[Any, float], dict[Any, RuntimeError]]]
"""times(plans): the seconds of a pass by each plan, and the errors of those that fail."""
Timer = Callable[[torch.device, Prepare, list[Any]], tuple[dict[Any, float], dict[Any, RuntimeError]]]
"""timer(device, prepare, plans): the same for any pass."""


class Package(Protocol):
    """What is known of a backend before what it needs is imported: what its kernels/NAME_rnn/__init__.py has."""

    DEVICES: tuple[str, ...]  # the types of devices whose tensors `auto` may give it
    DTYPES: tuple[torch.dtype, ...]  # that it computes in
    RACED: bool  # whether `auto` races it; if not, dispatch/cpu_rule.py decides
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


class Launches:
    """A plan of a pass, ready to be launched: memory, and arguments by the names of pointers.

    `problem` is as kernels run it, `outside` its projection, as in projection.py; start(arguments) makes all launches,
    which write the `buffers`, and read what is `fixed`, and more(r, memory); result(memory) is h, or dgates, if not
    their buffer.
    """

    at_once: int | None = None  # launches that fit the card together; None: programs do not wait for each other

    def __init__(
        self, problem: Problem, plan: Any, buffers: dict[str, Buffer], start: Callable[[dict[str, Any]], None],
        outside: bool = False, result: Callable[[dict[str, Tensor]], Tensor] | None = None, more: Any = None,
        **fixed: Any,
    ) -> None:  # fmt: skip
        self.plan, self._buffers, self._start, self._more, self.projects_outside = plan, buffers, start, more, outside
        self._result = result or itemgetter("h_ptr" if "h_ptr" in buffers else "dgates_ptr")
        self._fixed, names = fixed | {"B": problem.batch}, tuple(in_the_loop(problem, problem.steps))
        self._tensors, self._pointers = attrgetter(*names), [f"{name}_ptr" for name in names]

    def forward(self, gates: Tensor, r: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As Layer.forward, without a projection unless it is in the time loop."""
        memory = self._run(gates, r, None, {})
        return self._result(memory), memory["h_n_ptr"], memory["c_n_ptr"], memory.get("c_ptr")

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence
    ) -> Gradients:
        """As Layer.backward, except for dh0."""
        read = {"dh_ptr": dh, "dh_n_ptr": dh_n, "c_ptr": c, "norm_hh": r.norm_hh, "norm_c": r.norm_c}
        memory = self._run(gates, r, dc_n, read)
        names = "dh_from_zoneout_ptr", "dc_ptr", "dh_total_ptr", "dreset_h_ptr", "dreset_c_ptr"
        return Gradients(self._result(memory), *map(memory.get, names))

    def _run(self, gates: Tensor, r: Recurrence, dc_n: Tensor | None, read: dict[str, Any]) -> dict[str, Tensor]:
        """The memory, after all launches."""
        steps = gates.shape[0]
        memory = allocate(self._buffers, steps, gates, r.inputs)
        if dc_n is not None:  # the kernel makes it the gradient of c0
            memory["dc_ptr"].copy_(dc_n)
        arguments: dict[str, Any] = {"gates_ptr": gates, "T": steps, **self._fixed}
        arguments.update(zip(self._pointers, self._tensors(r.inputs)))
        arguments |= memory
        arguments |= read
        if self._more is not None:
            arguments |= self._more(r, memory)
        self._start(arguments)
        return memory


class Layer:
    """One problem on one card. Its plan is chosen once for each Pass, by the first call that needs it.

    `verify` is asked once for each plan that is chosen, and never while a CUDA graph is captured. Where it is asked,
    timer() may have a Timer. `trial`, a plan, is used without any. A ValueError says what the backend lacks, or that
    kernels cannot count to a size.
    """

    def __init__(
        self, problem: Problem, device: torch.device, launcher: Launcher, verify: Verify | None = None,
        trial: Any = None, timer: Callable[[], Timer | None] = lambda: None,
    ) -> None:  # fmt: skip
        if (lacking := launcher.lacks(problem)) is not None:
            raise ValueError(f"backend {launcher.BACKEND!r} has no {lacking}")
        _check_count("sequences", problem.batch)
        _check_count("gates of all units", 4 * problem.hidden)
        self.problem, self.device, self.verify, self.backend = problem, device, verify, launcher.BACKEND
        self._index = device.index if device.type == "cuda" else None
        self._launcher, self._trial, self._timer = launcher, trial, timer
        self._prepared: dict[Pass, Launches] = {}
        self._without: dict[Pass, str] = {}  # for which there is no kernel, and why
        self._names = tuple(in_the_loop(problem, problem.steps))
        self._tensors = attrgetter(*self._names)

    def forward(self, gates: Tensor, r: Recurrence, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """h [T, B, P], h_n [1, B, P], c_n [K, B, H] float32, and c, float32 [T, B, H] if `save`, else None.

        `gates` [T, B, 4H] are x W_ih^T + b_ih + b_hh, of a GRU without b_hh and s. The activated gates overwrite them
        if `save`; with a projection, what is at every sequence's first step is overwritten anyway. A RuntimeError says
        that an earlier launch timed out, or that no kernel can run the problem.
        """
        if self._index is not None and self._index != torch.cuda.current_device():  # on which kernels are launched
            with torch.cuda.device(self.device):
                return self.forward(gates, r, save)
        raise_if_timed_out(self.device)
        _check_count("steps", gates.shape[0])
        prepared = self.prepared(SAVE if save else NO_SAVE, r.inputs)
        launch = partial(projection.forward, prepared, self.problem) if prepared.projects_outside else prepared.forward
        overwritten, r = aligned(gates), self._aligned(r)
        if prepared.at_once is not None:  # its programs wait for each other
            launch = partial(in_order, prepared.at_once, self.device, launch)
        results = launch(overwritten, r)
        if overwritten is not gates:
            gates.copy_(overwritten)
        return results

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence,
        of_h0: bool = True,
    ) -> Gradients:  # fmt: skip
        """Gradients, from those of forward's first three results, of which None counts as zero.

        `gates` and c are as forward saved them, and are not written to; of_h0: whether the gradient of h0 is needed.
        """
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.backward(dh, dh_n, dc_n, gates, c, r, of_h0)
        raise_if_timed_out(self.device)
        p = self.problem
        prepared = self.prepared(Pass(True, True, dh is not None, dh_n is not None), r.inputs)
        r = self._aligned(r)
        dh, dh_n, dc_n, gates, c = [None if t is None else aligned(t) for t in (dh, dh_n, dc_n, gates, c)]
        launch = partial(projection.backward, prepared, p) if prepared.projects_outside else prepared.backward
        if prepared.at_once is not None:
            launch = partial(in_order, prepared.at_once, self.device, launch)
        gradients = launch(dh, dh_n, dc_n, gates, c, r)
        return gradients._replace(dh0=_initial_hidden_gradient(p, gradients, dh_n, r) if of_h0 else None)

    def prepared(self, pass_: Pass, inputs: Inputs) -> Launches:
        """A pass, ready to be launched. Its plan is chosen by the first call, whose inputs are these."""
        if (prepared := self._prepared.get(pass_)) is None:
            if pass_ in self._without:
                raise NoKernel(self._without[pass_])
            if self.problem.batch * self.problem.width == 0:  # nothing is launched
                return Launches(self.problem, None, buffers_of(self.problem, pass_), lambda arguments: None)
            capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if (plan := self._trial) is None:
                # What backward computes of dc_n alone is the same by all plans: there is nothing to verify.
                verifies = self.verify is not None and (not pass_.backward or pass_.dh or pass_.dh_n) and not capturing
                refuses = partial(self.verify, self, pass_, inputs) if verifies else None
                timer = self._timer() if verifies else None
                plan = self._launcher.choose(self.problem, self.device, pass_, refuses, timer)
                logger.debug("%s, %s: %s", self.problem, pass_, plan)
            prepared = self._launcher.prepare(self.problem, pass_, plan, self.device, self._trial is not None)
            if not capturing:
                self._prepared[pass_] = prepared
        return prepared

    def has_kernel(self, pass_: Pass, inputs: Inputs) -> bool:
        """Whether a kernel runs a pass of a call with these inputs. If not, one warning says why.

        No is final, unless memory is full while a kernel is verified or timed: the next call tries again.
        """
        if pass_ not in self._without:
            try:
                with torch.cuda.device(-1 if self._index is None else self._index):
                    self.prepared(pass_, inputs)
                return True
            except torch.OutOfMemoryError:
                why = "memory is full, where a kernel has to be verified or timed"
            except NoKernel as error:
                why = str(error)
                self._without[pass_] = why
            cache.warn_once(f"backend 'auto' does without the kernels of {self.backend!r} for {self.problem}: {why}")
        return False

    def with_plan(self, plan: Any, problem: Problem | None = None) -> "Layer":
        """The same layer, or that of a similar problem, with a plan that is to be tried."""
        return Layer(problem or self.problem, self.device, self._launcher, trial=plan)

    def chosen(self, pass_: Pass) -> Chosen:
        """The plan of a pass, else of another in its direction, else the first to be tried. Nothing is compiled."""
        alike = (prepared for other, prepared in self._prepared.items() if other.backward == pass_.backward)
        prepared = self._prepared.get(pass_) or next(alike, None)
        return self._launcher.describe(self.problem, self.device, pass_, prepared and prepared.plan)

    def _aligned(self, r: Recurrence) -> Recurrence:
        """The tensors that the loop reads, aligned."""
        tensors = self._tensors(r.inputs)
        for t in tensors:
            if t.data_ptr() % ALIGNMENT or not t.is_contiguous():
                return r._replace(inputs=r.inputs._replace(**dict(zip(self._names, map(aligned, tensors)))))
        return r


def package_of(backend: str) -> Package:
    """What is known of a backend without what it needs."""
    return cast(Package, importlib.import_module(f".{backend}_rnn", __package__))


def launcher_of(backend: str) -> Launcher:
    """A backend: the one place where it is imported."""
    return cast(Launcher, importlib.import_module(f".{backend}_rnn.launch", __package__))


def machine_of(backend: str, device: torch.device) -> cache.Key:
    """The facts that a verdict or a race of a backend on a device depends on."""
    return cache.machine(device) | package_of(backend).made_by()


_layers: dict[tuple[Launcher, Problem, torch.device], Layer] = {}
plans_in_use: set[tuple] = set()
"""Plans that fit and compute the right numbers, as backends name them: not tried again for another batch."""


def forget() -> None:
    """Choose all plans again."""
    _layers.clear()
    plans_in_use.clear()


def kept_layer(
    launcher: Launcher, problem: Problem, device: torch.device, verify: Verify | None = None,
    timer: Callable[[], Timer | None] = lambda: None,
) -> Layer:  # fmt: skip
    """A backend's Layer for a problem on a device, the same at every call."""
    layer = _layers.get((launcher, problem, device))
    if layer is None:
        if len(_layers) >= MOST_LAYERS:
            forget()
        made = Layer(problem, device, launcher, verify, timer=timer)
        layer = _layers.setdefault((launcher, problem, device), made)
    return layer


SAVE, NO_SAVE = Pass(), Pass(save=False)


def aligned(t: Tensor) -> Tensor:
    """t, or a copy: contiguous, and at an address that is a multiple of 16 bytes, which kernels are compiled for."""
    if t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _check_count(of: str, count: int) -> None:
    if count > MOST:
        raise ValueError(f"expected at most {MOST} {of}, got {count}")


def _initial_hidden_gradient(p: Problem, gradients: Gradients, dh_n: Tensor | None, r: Recurrence) -> Tensor:
    """dh0 [1, B, P]: through the first step, unless it is reset; dh_n [1, B, P] where a sequence has no step."""
    inputs, at = r.inputs, end_index(p, r.inputs.lengths, first=True)
    first = CELLS[p.cell].of_h(gradients.dgates[at], p.hidden)  # [B, rows H]; zero where length is 0
    if r.norm_hh is not None:
        first = layer_norm.gradient(first, r.norm_hh, at)
    dh0 = heads.gradient_of_h(unless_reset(p, first, inputs.resets), inputs.weight_hh, p.width)[None]
    if inputs.dropout_h is not None:
        dh0 = inputs.dropout_h * dh0
    if gradients.dh0 is not None:
        dh0 = dh0 + gradients.dh0.to(dh0.dtype)
    if inputs.lengths is not None and dh_n is not None:
        dh0 = torch.where((inputs.lengths == 0)[:, None], dh_n, dh0)
    return dh0
