"""The Numba backend: the loops of loops.py, compiled for this CPU when they are first called."""

import functools
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import by_steps
from ..by_steps import Part
from ..cards import Card
from ..cells import CELLS
from ..heads import arranged
from ..layer import Chosen, Launches, NoKernel, OnlyPlan, Refuses
from ..memory import Buffer, checking, margins
from ..problem import Pass, Problem
from . import loops
from .equations import NUMBERS, ROWS

BACKEND = "numba"
PLAN = OnlyPlan(BACKEND)
STOPS = "zcmh"  # as by_steps.Part has them


def call_of(part: Part, arguments: dict[str, Any]) -> loops.Call:
    """What compiled functions are given of arguments by the names of pointers."""
    p, arrays = part.problem, {}
    for name in ("zoneout_h", "zoneout_c"):
        t = arguments.get(f"{name}_ptr")
        if t is not None and t.dim() == 0:
            arguments = arguments | {f"{name}_ptr": None, f"{name.replace('zoneout', 'rate')}_ptr": t}
    for names, dtype in ((loops.FLOATS, np.float32), (loops.BOOLS, np.bool_), (("lengths",), np.int64)):
        none = np.empty(0, dtype)
        for name in names:
            t = arguments.get(f"{name}_ptr")
            arrays[name] = none if t is None else t.detach().numpy().reshape(-1)
    sizes = arguments["T"], p.batch, p.hidden, p.heads, p.from_x, CELLS[p.cell].h_start, int(p.reverse), NUMBERS[p.cell]
    return loops.Call(**arrays, **dict(zip(loops.SIZES, (*sizes, STOPS.index(part.start), STOPS.index(part.end)))))


def bind(part: Part, backward: bool, arguments: dict[str, Any]) -> by_steps.Launch:
    """See by_steps.Bind."""
    function, tile, batch = loops.before_product if backward else loops.after_product, np.zeros(ROWS, np.float32), part.problem.batch
    call = call_of(part, arguments)

    def launch(step: int, **changed: Tensor) -> None:
        given = call._replace(**{name.removesuffix("_ptr"): t.numpy().reshape(-1) for name, t in changed.items()})
        function(given, tile, step, 0, batch)

    return launch


def run_all(p: Problem, backward: bool, arguments: dict[str, Any]) -> None:
    """All steps in one call."""
    part = by_steps.parts_of(p, backward)[0]
    weight = arranged(arguments["weight_hh_ptr"], p.width)
    if p.heads > 1:
        weight = weight.mT if backward else weight
    elif not backward:
        weight = weight.T
    call, weight = call_of(part, arguments), weight.contiguous().detach().numpy().reshape(-1)
    function = loops.backward if backward else loops.forward
    function(call, weight, 0, p.batch)


def prepare(problem: Problem, pass_: Pass, plan: OnlyPlan, device: torch.device, trial: bool = False) -> Launches:
    """See layer.Launcher; as what follows below."""
    outside, backward = problem.projected > 0 and not problem.projects_in_loop, pass_.backward
    p = problem._replace(projected=0) if outside else problem
    buffers = by_steps.buffers(p, pass_)
    names = ("dz_ptr", 4 * p.hidden), ("dh_next_ptr", p.width)
    buffers |= {name.removeprefix("" if backward else "d"): Buffer(p.dtype, (p.batch, size)) for name, size in names}

    def start(arguments: dict[str, Any]) -> None:
        if p.lengths is torch.int32:
            arguments["lengths_ptr"] = arguments["lengths_ptr"].long()
        if p.only_by_steps:
            binds = [partial(bind, part, backward) for part in by_steps.parts_of(p, backward)]
            loop = by_steps.backward_steps if backward else by_steps.forward_steps
            return loop(binds, arguments, p)
        if not backward:
            arguments["h_next_ptr"].copy_(by_steps.first_operand(arguments, p))
        if checking.on:
            with margins("backward" if backward else "forward", arguments) as inside:
                return run_all(p, backward, inside)
        run_all(p, backward, arguments)

    prepared = Launches(p, plan, buffers, start, itemgetter("dgates_ptr" if backward else "h_ptr"))
    prepared.projects_outside = outside
    return prepared


def card_of(device: torch.device) -> Card:
    return Card(0, torch.get_num_threads())


def obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    if device.type != "cpu":
        return RuntimeError(f"backend {BACKEND!r} needs CPU tensors, got {device}")
    if dtype is not torch.float32:
        return TypeError(f"backend {BACKEND!r} supports float32, got {dtype}")
    return None


def lacks(problem: Problem) -> str | None:
    return None if problem.cell in NUMBERS else f"cell {problem.cell!r}"


def choose(problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None) -> OnlyPlan:
    if refuses is not None and (reason := refuses(PLAN)):
        raise NoKernel(f"no compiled loop can run this layer on this CPU: {reason}")
    return PLAN


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: OnlyPlan | None) -> Chosen:
    return Chosen(PLAN, False, "loop", "a tile of units of a sequence", "the time loop, compiled for this CPU")
