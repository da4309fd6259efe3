"""The launches of the Triton backend. A plan of a problem and pass is prepared once, and then only launched.

This module is a contract.Launcher, which describes the functions without a docstring here.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from math import ceil
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import by_steps, cache
from ..cards import REGISTERS, cuda_obstacle
from ..cells import CELLS
from ..contract import Chosen, Launches, Refuses, Timer, launcher_of
from ..layer import Layer
from ..memory import Arguments, allocate, buffers_of, checking, margins
from ..problem import Inputs, Normed, Pass, Problem, Recurrence, in_the_loop
from ..timeouts import error_word
from . import features
from .parameters import Sizes, in_tuples, names_of
from .plans import choose as choosing
from .plans.choose import FAMILIES, RecordedLaunch, card_of, choose_plan, errors_as_of_torch, load
from .plans.planning import Plan, Pointwise

INTERPRETED: bool = features.INTERPRETED.value
MOST_STEPS, LEAST_STEPS = 256, 4  # limits of the steps with which plans are timed
MOST_GATES = 1 << 24  # about the most elements of gates with which plans are timed

Launch = Callable[..., None]
"""launch(kernel, grid, **arguments) launches a kernel. Arguments have the names of pointers and parameters."""


def _interpret(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    kernel[grid](**in_tuples(kernel, arguments))


launch_kernel: Launch | None = _interpret if INTERPRETED else None
"""The function that makes every launch. With None the compiled kernel is launched. Tests replace it."""


class Kernel:
    """A kernel as one plan launches it. `fixed` has its sizes "S" and its options, and a call passes the rest."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], fixed: Arguments, launch: Launch | None) -> None:
        self._kernel, self._grid, self._fixed, self._launch = kernel, grid, fixed, launch
        parameters = names_of(kernel)
        self._names = tuple(itertools.chain(*parameters))
        ends = itertools.accumulate(map(len, parameters), initial=0)
        # Converts the values of all names to the values of the parameters, some of which are tuples.
        self._in_tuples = itemgetter(*(slice(*ab) if ab[1] - ab[0] > 1 else ab[0] for ab in itertools.pairwise(ends)))
        self._compiled: Callable[..., None] | None = None

    def __call__(self, arguments: Arguments) -> None:
        """Launch the kernel with the arguments for which it has parameters, and with None for those that are absent."""
        launch = self._launch or launch_kernel
        if launch is None and self._compiled is not None and not checking.on:
            self._compiled(*self._in_tuples(tuple(map(arguments.get, self._names))), self._fixed["S"])
            return
        arguments = {name: arguments.get(name) for name in self._names}
        with margins(self._kernel.__name__, arguments) if checking.on else contextlib.nullcontext(arguments) as inside:
            if launch is not None:
                launch(self._kernel, self._grid, **inside, **self._fixed)
                return
            if self._compiled is None:
                self._compiled = load(self._kernel, self._grid, inside | self._fixed)[self._grid]
            with errors_as_of_torch():
                self._compiled(*self._in_tuples(tuple(inside.values())), self._fixed["S"])

    def bind(self, arguments: Arguments) -> by_steps.Launch:
        """See by_steps.Bind. A loaded kernel is bound to addresses. Arguments that change are in no tuple."""
        compiled = self._compiled
        if self._launch or launch_kernel or compiled is None or checking.on:
            return lambda **changed: self(arguments | changed)
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in map(arguments.get, self._names)]
        given, parameters = list(self._in_tuples(tuple(values))), self._kernel.arg_names

        def launch_again(**changed: Any) -> None:
            for name, value in changed.items():
                given[parameters.index(name)] = value
            compiled(*given, self._fixed["S"])

        return launch_again


BACKEND = "triton"


def prepare(
    problem: Problem, pass_: Pass, plan: Plan, device: torch.device, trial: bool = False, launch: Launch | None = None
) -> Launches:
    """See contract.Launcher. `launch` makes the launches, by default `launch_kernel`.

    Programs of a trial wait for other programs for a second only. Programs of the user's calls wait longer.
    """
    family, backward = FAMILIES[type(plan.family)], pass_.backward
    p = family.within(problem)
    waits, result = family.waits(p, plan), family.results[backward]
    kernel, more, loop = family.kernels[backward], family.arguments[backward], family.loop
    options = dict(
        num_warps=plan.num_warps, num_stages=plan.num_stages, launch_cooperative_grid=waits,
        maxnreg=min(255, REGISTERS // (32 * plan.num_warps * plan.blocks)), **features.OPTIONS,
    )  # fmt: skip
    kernels = []
    for part in by_steps.parts_of(p, backward):  # there is one part, except in the pointwise family
        sizes = _sizes(part, plan, backward)
        grid = dataclasses.replace(plan, programs=sizes.TILES).grid if loop else plan.grid
        kernels.append(Kernel(kernel, grid, {"S": sizes} | options, launch))
    start = partial(loop, [each.bind for each in kernels], p=p, backward=backward) if loop else kernels[0]
    return Launches(
        plan, family.buffers(p, plan, pass_), start, p != problem, result and partial(result, p),
        more and partial(more, p, plan), error_word(device, kernel.__name__, trial) if waits else None,
        plan.side_by_side // plan.heads if waits else None,
    )  # fmt: skip


def _sizes(part: by_steps.Part, plan: Plan, backward: bool) -> Sizes:
    p = part.problem
    per, units, cell = max(1, 4 // p.size), p.hidden // p.heads, CELLS[p.cell]
    return Sizes(
        CELL=p.cell, GATES=cell.rows, FROM_X=p.from_x, KEPT=cell.kept, EMPTY=cell.empty[-1], H=p.hidden, HEADS=p.heads,
        D=units, REVERSE=p.reverse, PRECISION=p.precision, PER=per, W=ceil(units / per), BLOCK_B=plan.rows,
        UNITS=plan.units, TILES=ceil(units / plan.units), WARPS=plan.num_warps, START=part.start, END=part.end,
        **FAMILIES[type(plan.family)].sizes(p, plan, backward),
    )  # fmt: skip


def obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    if INTERPRETED:
        wrong = "backend 'triton': Triton's interpreter computes wrong bfloat16 products; use float32"
        return TypeError(wrong) if dtype is torch.bfloat16 else None
    instead = "; with TRITON_INTERPRET=1 in the environment it runs CPU tensors in Triton's interpreter"
    if (error := cuda_obstacle(BACKEND, device, (8, 0), instead)) is not None:
        return error
    major, minor = torch.cuda.get_device_capability(device)
    if (problem := choosing.launch_problem(device, 10 * major + minor)) is None:
        return None
    text = f"Triton launches nothing on {device}, compute capability {major}.{minor}: {problem}"
    cache.warn_once(f"{text}. Backend 'auto' does without it.")
    return RuntimeError(f"backend 'triton': {text}")


def lacks(problem: Problem) -> None:
    return None


def multiplies_x(problem: Problem) -> bool:
    return False


product = torch.mm


def choose(
    problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None, timer: Timer | None
) -> Plan:  # fmt: skip
    times = timer and partial(timer, device, partial(prepare_run, problem, device, pass_))
    return choose_plan(problem, device, pass_, partial(recorded_launches, problem, pass_), refuses, times)


def prepare_run(problem: Problem, device: torch.device, pass_: Pass, plan: Plan) -> Callable[[], object]:
    """Return a function that runs a pass of a layer by a plan, on zeros.

    It runs enough steps to show the time of a step.
    """
    layer = Layer(problem, device, launcher_of(BACKEND), trial=plan)
    enough = MOST_GATES // (4 * problem.batch * problem.hidden)
    steps = 1 if problem.steps == 1 else min(MOST_STEPS, max(LEAST_STEPS, enough))
    given = arguments_of(problem._replace(steps=steps), device, pass_)
    return partial(layer.backward if pass_.backward else layer.forward, *given)


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: Plan | None) -> Chosen:
    card = card_of(device)
    plan = plan or choosing.candidates(problem, card, pass_)[0]
    measured = plan == choosing.measured_plan(problem, card, pass_.backward)
    each_step = len(by_steps.parts_of(problem, pass_.backward)) if isinstance(plan.family, Pointwise) else 0
    return Chosen(plan, measured, plan.family.name, plan.tiles, plan.why, each_step)


def recorded_launches(problem: Problem, pass_: Pass, plan: Plan) -> list[RecordedLaunch]:
    """Return the launches of a plan without making them. Tensors are on the meta device."""
    launches: list[RecordedLaunch] = []

    def record(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        # A layer may change the sizes of its own tensors afterwards.
        arguments = {n: a.detach() if isinstance(a, Tensor) else a for n, a in arguments.items()}
        launches.append(RecordedLaunch(kernel, grid, arguments))

    meta, p = torch.device("meta"), FAMILIES[type(plan.family)].within(problem)
    if p != problem:  # the projection is outside of the loop, and gives the loop a gradient of m at all steps
        pass_ = pass_._replace(dh=True, dh_n=False)
    loads = partial(prepare, launch=record)
    recorder: Any = SimpleNamespace(BACKEND=BACKEND, lacks=lacks, multiplies_x=multiplies_x, prepare=loads)
    layer, given = Layer(p, meta, recorder, trial=plan), arguments_of(p, meta, pass_)
    if pass_.backward:
        layer.backward(*given, of_h0=False)
    else:
        layer.forward(*given)
    return launches


def arguments_of(problem: Problem, device: torch.device, pass_: Pass) -> tuple[Any, ...]:
    """Return the arguments of Layer.forward or Layer.backward for a pass: zeros, where all sequences have all steps."""
    gates, r = call_of(problem, device)
    if r.inputs.lengths is not None:
        r.inputs.lengths.fill_(problem.steps)
    if not pass_.backward:
        return gates, r, pass_.save
    h, h_n, _, c = (t.zero_() for t in allocate(buffers_of(problem, Pass()), problem.steps, gates, r.inputs).values())
    return (h if pass_.dh else None), (h_n if pass_.dh_n else None), None, gates, c, r


def call_of(problem: Problem, device: torch.device) -> tuple[Tensor, Recurrence]:
    """Return gates and tensors of a call, all zeros. x and W_ih have no features, since kernels do not read them."""
    p, f32 = problem, torch.float32

    def zeros(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def normed(features: int, dtype: torch.dtype) -> Normed:
        moment = zeros(p.steps, p.batch, 1, dtype=f32)
        return Normed(zeros(p.steps, p.batch, features, dtype=dtype), moment, moment, zeros(features, dtype=dtype))

    norm_hh, norm_c = normed(4 * p.hidden, p.dtype) if p.gain_hh else None, normed(p.hidden, f32) if p.gain_c else None
    in_loop = {name: zeros(*size, dtype=dtype) for name, (size, dtype) in in_the_loop(p, p.steps).items()}
    inputs = Inputs(x=zeros(p.steps, p.batch, 0), weight_ih=zeros(p.gates * p.hidden, 0), **in_loop)
    return zeros(p.steps, p.batch, 4 * p.hidden), Recurrence(inputs, norm_hh, norm_c)
