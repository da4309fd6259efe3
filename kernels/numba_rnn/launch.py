"""The Numba backend: the time loop of steps.py; by_steps.py's where something is in the middle of a step."""

from functools import partial
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import by_steps
from ..by_steps import Part
from ..cards import Card
from ..cells import CELLS
from ..heads import arranged
from ..layer import Chosen, Launches, NoKernel, OnlyPlan, Refuses, Timer
from ..memory import Buffer, checking, margins
from ..problem import Pass, Problem
from . import build, equations, steps
from .product import SEQUENCES, whole_vectors

BACKEND = "numba"
PLAN = OnlyPlan(BACKEND)
LOOPS = "forward", "backward"  # of steps.py
TENSORS = frozenset(steps.TENSORS)
STOPS = "zcmh"  # as by_steps.Part has them, in the order of steps.STOPS
SHORT = 2  # steps for which panels of the weight are not made
LEAST = 1 << 14  # units of all steps and sequences that pay for another thread
CODES = dict(zip(("lstm", "gru", "slstm"), equations.CELLS))


def put(call: Any, arguments: dict[str, Any]) -> Any:
    """Addresses of tensors into a steps.CALL, of those that it knows, by the names of pointers."""
    for name, t in arguments.items():
        if isinstance(t, Tensor) and (field := name.removesuffix("_ptr")) in TENSORS:
            call[field] = t.data_ptr()
    return call


def call_of(part: Part, steps_: int, share: int, step: int = 0, way: int = steps.BY_STEPS) -> Any:
    """A steps.CALL without tensors."""
    p, call = part.problem, np.zeros((), steps.CALL)
    cell = CELLS[p.cell].h_start, p.reverse, CODES[p.cell], CELLS[p.cell].kept
    sizes = steps_, p.batch, p.hidden, p.heads, p.from_x, *cell, STOPS.index(part.start), STOPS.index(part.end)
    for name, size in zip(steps.SIZES, (*sizes, step, share, way)):
        call[name] = size
    return call


def launch(name: str, call: Any, arguments: dict[str, Any], count: int = 1) -> None:
    """Call a function of steps.py in so many threads."""
    if checking.on:
        with margins(name, arguments) as inside:
            return build.run(build.function(name), put(call, inside).ctypes.data, count)
    build.run(build.function(name), put(call, arguments).ctypes.data, count)


def bind(part: Part, backward: bool, arguments: dict[str, Any]) -> by_steps.Launch:
    """See by_steps.Bind."""
    arguments = arguments | {"scratch": torch.zeros(steps.SCRATCH, device="cpu")}
    call = put(call_of(part, arguments["T"], part.problem.batch), arguments)

    def launch_step(step: int, **changed: Tensor) -> None:
        call["step"] = step
        launch(LOOPS[backward], call, arguments | changed if checking.on else changed)

    return launch_step


def run_all(part: Part, backward: bool, arguments: dict[str, Any]) -> None:
    """All steps at once. Each thread takes shares of the sequences until there are no more, and waits but then."""
    p, T = part.problem, arguments["T"]
    count = max(1, min(torch.get_num_threads(), p.batch // SEQUENCES, T * p.batch * p.hidden // LEAST))
    share = ceil(p.batch / count / SEQUENCES) * SEQUENCES
    call = call_of(part, T, share, T - 1 if backward else 0, steps.BY_ROWS)
    scratch = torch.empty(ceil(p.batch / share), steps.SCRATCH, device="cpu")
    given = arguments | {"scratch": scratch}
    if (1 if backward else SHORT) < T:
        weight = arranged(arguments["weight_hh_ptr"], p.width)  # [heads, D, GATES D], or of one head [GATES D, D]
        of_heads = weight.mT if (p.heads > 1) == backward else weight
        K, N = of_heads.shape[-2:]
        panels = torch.empty(p.heads, K, whole_vectors(N), device="cpu")
        given |= {"weight_hh_ptr": weight, "panels": panels}
        for name, stride in zip(("n", "k", "head"), reversed(of_heads.stride())):
            call[f"stride_{name}"] = stride
        call["way"], call["to_panels"] = steps.BY_PANELS, True
        if count > 1:  # one thread makes them, before there are shares to take
            call["B"] = 0
            launch(LOOPS[backward], call, given)
            call["B"], call["to_panels"] = p.batch, False
    taken = torch.zeros((), dtype=torch.int64, device="cpu")
    launch(LOOPS[backward], call, given | {"taken": taken}, count)


def prepare(problem: Problem, pass_: Pass, plan: OnlyPlan, device: torch.device, trial: bool = False) -> Launches:
    """See layer.Launcher; as what follows below."""
    outside, backward = problem.projected > 0 and not problem.projects_in_loop, pass_.backward
    p = problem._replace(projected=0) if outside else problem
    parts, buffers = by_steps.parts_of(p, backward), by_steps.buffers(p, pass_)
    if not p.only_by_steps:
        buffers["dz_ptr" if backward else "z_ptr"] = Buffer(p.dtype, (p.batch, 4 * p.hidden))
        buffers["dh_next_ptr" if backward else "h_next_ptr"] = Buffer(p.dtype, (p.batch, p.width))

    def start(arguments: dict[str, Any]) -> None:
        if p.lengths is torch.int32:
            arguments["lengths_ptr"] = arguments["lengths_ptr"].long()
        for name, width in (("zoneout_h_ptr", p.width), ("zoneout_c_ptr", p.hidden)):  # a mask, or a rate
            if (stays := arguments.get(name)) is not None:
                arguments[name] = stays.float().expand(arguments["T"], p.batch, width).contiguous()
        if p.only_by_steps:
            loop = by_steps.backward_steps if backward else by_steps.forward_steps
            return loop([partial(bind, part, backward) for part in parts], arguments, p)
        if not backward:
            arguments["h_next_ptr"].copy_(by_steps.first_operand(arguments, p))
        run_all(parts[0], backward, arguments)

    return Launches(p, plan, buffers, start, outside)


def card_of(device: torch.device) -> Card:
    return Card(0, torch.get_num_threads())


def obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    if device.type != "cpu":
        return RuntimeError(f"backend {BACKEND!r} runs on CPU tensors, got {device}")
    return None


def lacks(problem: Problem) -> str | None:
    return None if problem.cell in CODES else f"cell {problem.cell!r}"


def choose(
    problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None, timer: Timer | None
) -> OnlyPlan:
    # Not within a trial: users may end the process meanwhile.
    build.function(LOOPS[pass_.backward])
    if refuses is not None and (reason := refuses(PLAN)):
        raise NoKernel(f"no compiled loop can run this layer on this CPU: {reason}")
    return PLAN


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: OnlyPlan | None) -> Chosen:
    return Chosen(PLAN, False, "loop", "a tile of units of a sequence", "the time loop, compiled for this CPU")
