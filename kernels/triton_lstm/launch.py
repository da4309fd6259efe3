"""The launches of the Triton backend: a plan of one problem and pass, prepared once and then only launched."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from math import ceil
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..layer import Chosen, Gradients, Layer, Verify, gradients_in
from ..memory import Buffer, allocate, checking, gradients_of, margins, results_of
from ..problem import NO_UNIT, Inputs, Pass, Problem, Recurrence, Unit, in_the_loop, steps_of
from ..timeouts import KERNELS, error_word
from . import features, pointwise
from .binary import RecordedLaunch
from .choose import (
    FAMILIES,
    candidates,
    card_of,
    choose_plan,
    errors_as_of_torch,
    load,
    measured_plan,
    plans_in_use,
)
from .cooperative import EXCHANGED
from .planning import Family, Launch, Plan

INTERPRETED: bool = features.INTERPRETED.value


def interpret(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run a kernel in Triton's interpreter, every argument by its parameter's name."""
    kernel[grid](**arguments)


launch_kernel: Launch | None = interpret if INTERPRETED else None
"""What makes every launch; None: the compiled kernel itself. Tests replace it."""


class Kernel:
    """A kernel as one plan launches it: its constants and options are fixed, and a call passes the rest."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], options: dict[str, Any]) -> None:
        self._kernel, self._grid = kernel, grid
        self._names = tuple(name for name in kernel.arg_names if name not in constants)
        constants = {name: constants[name] for name in kernel.arg_names[len(self._names) :]}  # they come last
        self._constants, self._fixed = constants.values(), constants | options
        self._run: Callable[..., None] | None = None  # of the compiled kernel

    def __call__(self, launch: Launch | None, arguments: dict[str, Any]) -> None:
        """Launch it with those of the arguments that it has parameters for; what is absent is None."""
        launch = launch or launch_kernel
        if launch is None and self._run is not None and not checking.on:
            self._run(*map(arguments.get, self._names), *self._constants)
            return
        own = {name: arguments.get(name) for name in self._names}
        with margins(self._kernel.__name__, own) if checking.on else contextlib.nullcontext(own) as given:
            if launch is not None:
                launch(self._kernel, self._grid, **given, **self._fixed)
                return
            self._run = self._run or load(self._kernel, self._grid, given | self._fixed)[(*self._grid, 1, 1)[:3]]
            with errors_as_of_torch():
                self._run(*given.values(), *self._constants)


class Prepared:
    """A plan of one problem and pass; see layer.Prepared. `launch` makes its launches, by default `launch_kernel`.

    On `trial` it waits a second for other programs, not as long as the user's calls.
    """

    def __init__(
        self, problem: Problem, which: Pass, plan: Plan, device: torch.device, launch: Launch | None = None,
        trial: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self._launch, family, way = plan, launch, FAMILIES[plan.family], which.backward
        one_round = problem.steps == 1 and plan.parts == 1 and not problem.projected and not problem.normalised
        waits = plan.family is Family.COOPERATIVE or (plan.family is Family.STEP and not one_round)
        self.at_once = plan.side_by_side if waits else None
        self.projects_outside = problem.projected > 0 and (plan.family is not Family.STEP or plan.held > 0)
        if self.projects_outside:
            problem = problem._replace(projected=0)
        kernel = family.KERNELS[way]
        options = dict(num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.registers,
                       launch_cooperative_grid=waits, **features.OPTIONS)  # fmt: skip
        self._kernel = Kernel(kernel, plan.grid, _constants(problem, which, plan), options)
        self._loop = pointwise.LOOPS[way] if plan.family is Family.POINTWISE else None
        names = tuple(in_the_loop(problem, problem.steps))
        self._batch = problem.batch
        self._problem, self._tensors, self._pointers = problem, attrgetter(*names), [f"{name}_ptr" for name in names]
        self._operands, buffers = family.OPERANDS[way], family.BUFFERS[way]
        self._error = error_word(device, kernel.__name__, trial) if kernel.__name__ in KERNELS else None

        self._buffers = gradients_of(problem) if way else results_of(problem)
        if buffers is not None:
            self._buffers |= buffers(problem, plan)
        if waits:  # the programs of each batch tile count themselves in
            self._buffers["arrivals_ptr"] = Buffer(torch.int32, (ceil(problem.batch / plan.rows),), fill=0)
        if not which.save:
            del self._buffers["c_ptr"]
        if EXCHANGED in self._buffers and not problem.norms[0]:  # then dgates are what is exchanged
            del self._buffers["dgates_ptr"]
        # Final states are written at every step, except for sequences of length 0; cooperative kernels read c there.
        self._starts: dict[str, str] = {}
        if not way and problem.lengths is not None:
            self._starts = {"h_n_ptr": "h0", "c_n_ptr": "c0"}
        elif not way and plan.family is Family.COOPERATIVE:
            self._starts = {"c_n_ptr": "c0"}
        for name in self._starts:
            del self._buffers[name]
        own, of_h = results_of(problem)["h_ptr"], self._buffers.get("h_ptr")
        self._h_is_cut = None if of_h in (own, None) else of_h.size != own.size  # rows of words; else h0 at its end

    def forward(self, gates: Tensor, r: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As layer.Layer.forward, without a projection unless it is in the time loop."""
        steps = steps_of(gates)
        memory = allocate(self._buffers, steps, gates)
        for name, state in self._starts.items():
            memory[name] = getattr(r.given, state).clone()
        self._run(gates, r, steps, memory, {})
        h = memory["h_ptr"]
        if self._h_is_cut is not None:  # not a view, since autograd forbids changing one in place
            p = self._problem
            h = h[:-1, :, : p.width].contiguous() if self._h_is_cut else h.resize_(steps, p.batch, p.width)
        return h, memory["h_n_ptr"], memory["c_n_ptr"], memory.get("c_ptr")

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence
    ) -> Gradients:
        """As layer.Layer.backward."""
        p, steps = self._problem, steps_of(gates)
        memory = allocate(self._buffers, steps, gates)
        if dc_n is not None:  # the kernel makes it the gradient of c0
            memory["dc_ptr"].copy_(dc_n)
        read = {"dh_ptr": dh, "dh_n_ptr": dh_n, "c_ptr": c}
        if p.normalised:
            read |= zip(("unit_hh_ptr", "scale_hh_ptr", "unit_c_ptr", "scale_c_ptr"), (*r.unit_hh, *r.unit_c))
        self._run(gates, r, steps, memory, read)
        dgates = memory.get("dgates_ptr")
        if dgates is None:  # [T, B, 4, H or one more]
            dgates = memory[EXCHANGED][..., : p.hidden].reshape(steps, p.batch, 4 * p.hidden)
        return gradients_in(memory, dgates)

    def _run(
        self, gates: Tensor, r: Recurrence, steps: int, memory: dict[str, Tensor], read: dict[str, Tensor | None]
    ) -> None:
        """One launch, or one per step, of what it writes and what it reads."""
        arguments: dict[str, Any] = {
            **dict(zip(self._pointers, self._tensors(r.given))), **memory, **read, "gates_ptr": gates,
            "error_ptr": self._error, "T": steps, "B": self._batch,
        }  # fmt: skip
        if self._operands is not None:
            arguments |= self._operands(self._problem, self.plan, r, memory)
        if self._loop is None:
            self._kernel(self._launch, arguments)
        else:
            self._loop(partial(self._kernel, self._launch), arguments, self._problem)


def _constants(problem: Problem, which: Pass, plan: Plan) -> dict[str, Any]:
    """What problem, pass and plan fix, for kernels of all families."""
    return dict(
        H=problem.hidden, P=problem.width, REVERSE=problem.reverse, SAVE=which.save, PROJECT=problem.projected > 0,
        PEEPHOLES=problem.peepholes, PRECISION=problem.precision,
        BLOCK_B=plan.rows, BLOCK_H=plan.columns, BLOCK_K=plan.k,
        UNITS=plan.columns, CHUNKS=plan.k, WARPS=plan.num_warps, PARTS=plan.parts, AHEAD=plan.ahead,
        HELD=plan.held > 0,
    )  # fmt: skip


_layers: dict[tuple[Problem, torch.device], Layer] = {}


def layer_of(problem: Problem, device: torch.device, verify: Verify | None = None) -> Layer:
    """The layer of a problem on a device; every call returns the same one."""
    layer = _layers.get((problem, device))
    if layer is None:
        layer = _layers.setdefault((problem, device), Layer(problem, device, sys.modules[__name__], verify))
    return layer


def forget() -> None:
    """Choose all plans again, since more has been measured."""
    _layers.clear()
    plans_in_use.clear()


def choose(layer: Layer, which: Pass, given: Inputs) -> Plan:
    """The plan of a layer's pass; see layer.Launcher."""
    # With neither gradient, backward returns zeros except for what dc_n contributes, which all plans compute alike.
    has_results = not which.backward or which.dh or which.dh_n
    verify = None
    if layer.verify is not None and has_results and not layer.is_capturing():
        verify = partial(layer.verify, layer, which, given)
    return choose_plan(layer.problem, layer.device, which, partial(recorded_launches, layer.problem, which), verify)


def prepare(problem: Problem, which: Pass, plan: Plan, device: torch.device, trial: bool = False) -> Prepared:
    """A plan, ready to be launched; see layer.Launcher."""
    return Prepared(problem, which, plan, device, trial=trial)


def describe(layer: Layer, which: Pass, plan: Plan | None) -> Chosen:
    """A plan, and how it was chosen; see layer.Launcher."""
    card = card_of(layer.device)
    plan = plan or candidates(layer.problem, card, which)[0]
    return Chosen(plan, plan == measured_plan(layer.problem, card, which.backward))


def recorded_launches(problem: Problem, which: Pass, plan: Plan) -> list[RecordedLaunch]:
    """What a plan launches, without launching it: tensors are on the meta device."""
    launches: list[RecordedLaunch] = []

    def record(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        given = {name: a.detach() if isinstance(a, Tensor) else a for name, a in arguments.items()}  # in these sizes
        launches.append(RecordedLaunch(kernel, grid, given))

    meta = torch.device("meta")
    prepared = Prepared(problem, which, plan, meta, record)
    if prepared.projects_outside:  # then all gradients of m are given
        problem, which = problem._replace(projected=0), which._replace(dh=True, dh_n=False)
    gates, r = call_of(problem, meta)
    if which.backward:
        results = allocate(results_of(problem), problem.steps, gates)
        dh, dh_n = (results[name] if there else None for name, there in (("h_ptr", which.dh), ("h_n_ptr", which.dh_n)))
        prepared.backward(dh, dh_n, None, gates, results["c_ptr"], r)
    else:
        prepared.forward(gates, r)
    return launches


def call_of(problem: Problem, device: torch.device) -> tuple[Tensor, Recurrence]:
    """The gates and tensors of a call; zeros. What kernels do not read, x and W_ih, has no features."""
    p = problem

    def zeros(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    given = {name: zeros(*like.size, dtype=like.dtype) for name, like in in_the_loop(p, p.steps).items()}
    unit_hh = unit_c = NO_UNIT
    if p.norms[0]:
        unit_hh = Unit(zeros(p.steps, p.batch, 4 * p.hidden), zeros(p.steps, p.batch, dtype=torch.float32))
    if p.norms[1]:
        unit_c = Unit(
            *(zeros(*size, dtype=torch.float32) for size in ((p.steps, p.batch, p.hidden), (p.steps, p.batch)))
        )
    inputs = Inputs(x=zeros(p.steps, p.batch, 0), weight_ih=zeros(4 * p.hidden, 0), **given)
    return zeros(p.steps, p.batch, 4 * p.hidden), Recurrence(inputs, unit_hh, unit_c)
