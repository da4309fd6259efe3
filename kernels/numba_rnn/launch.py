"""The Numba backend: the time loop of steps.py; by_steps.py's where something is in the middle of a step."""

from functools import partial
from math import ceil
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
from . import build, steps, threads
from .product import SEQUENCES

BACKEND = "numba"
PLAN = OnlyPlan(BACKEND)
STOPS = "zcmh"  # as by_steps.Part has them, in the order of steps.STOPS
LEAST = 1 << 14  # units of all steps and sequences that pay for another thread
CODES = dict(zip(("lstm", "gru", "slstm"), steps.CELLS))


def call_of(part: Part, arguments: dict[str, Any]) -> Any:
    """What compiled functions are given, of arguments by the names of pointers: a steps.CALL."""
    p, call = part.problem, np.zeros((), steps.CALL)
    put(call, arguments)
    if p.zoneout_h == 0:
        call["zoneout_h"], call["rate_h"] = 0, call["zoneout_h"]
    if p.zoneout_c == 0:
        call["zoneout_c"], call["rate_c"] = 0, call["zoneout_c"]
    sizes = arguments["T"], p.batch, p.hidden, p.heads, p.from_x, CELLS[p.cell].h_start, p.reverse, CODES[p.cell]
    for name, size in zip(steps.SIZES[2:], (*sizes, STOPS.index(part.start), STOPS.index(part.end))):
        call[name] = size
    return call


def put(call: Any, arguments: dict[str, Any]) -> None:
    """Addresses of tensors into a call, of those that it knows."""
    for name, t in arguments.items():
        if isinstance(t, Tensor) and (field := name.removesuffix("_ptr")) in steps.CALL.names:
            call[field] = t.data_ptr()


def bind(part: Part, backward: bool, arguments: dict[str, Any]) -> by_steps.Launch:
    """See by_steps.Bind."""
    name = "before_product" if backward else "after_product"
    function, call, scratch = build.function(name), call_of(part, arguments), torch.zeros(steps.SCRATCH)

    def launch(step: int, **changed: Tensor) -> None:
        if checking.on:
            with margins(name, arguments | changed) as inside:
                return start(step, call_of(part, inside))
        put(call, changed)
        start(step, call)

    def start(step: int, call: Any) -> None:
        call["step"], call["scratch"] = step, scratch.data_ptr()
        function(call.ctypes.data)

    return launch


def run_all(part: Part, backward: bool, arguments: dict[str, Any]) -> None:
    """All steps at once."""
    weight = arranged(arguments["weight_hh_ptr"], part.problem.width)  # [heads, D, GATES D], or of one head [GATES D, D]
    if (part.problem.heads > 1) == backward:
        weight = weight.mT
    name, arguments = "backward" if backward else "forward", arguments | {"weight_ptr": weight.contiguous()}
    if checking.on:
        with margins(name, arguments) as inside:
            return _in_shares(name, part, inside)
    _in_shares(name, part, arguments)


def _in_shares(name: str, part: Part, arguments: dict[str, Any]) -> None:
    """Each thread takes shares of the sequences until there are no more, so that threads wait once for each other."""
    batch, call = part.problem.batch, call_of(part, arguments)
    units = arguments["T"] * batch * part.problem.hidden
    count = max(1, min(torch.get_num_threads(), ceil(batch / SEQUENCES), units // LEAST))
    call["share"] = share = ceil(batch / count / SEQUENCES) * SEQUENCES
    scratch, taken = torch.zeros(ceil(batch / share), steps.SCRATCH), torch.zeros((), dtype=torch.int64)
    put(call, {"scratch": scratch, "taken": taken})
    threads.run(build.function(name), call.ctypes.data, count)


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
        if p.only_by_steps:
            loop = by_steps.backward_steps if backward else by_steps.forward_steps
            return loop([partial(bind, part, backward) for part in parts], arguments, p)
        if not backward:
            arguments["h_next_ptr"].copy_(by_steps.first_operand(arguments, p))
        run_all(parts[0], backward, arguments)

    prepared = Launches(p, plan, buffers, start, itemgetter("dgates_ptr" if backward else "h_ptr"))
    prepared.projects_outside = outside
    return prepared


def card_of(device: torch.device) -> Card:
    return Card(0, torch.get_num_threads())


def obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    if device.type != "cpu":
        return RuntimeError(f"backend {BACKEND!r} runs on CPU tensors, got {device}")
    return None


def lacks(problem: Problem) -> str | None:
    return None if problem.cell in CODES else f"cell {problem.cell!r}"


def choose(problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None) -> OnlyPlan:
    if refuses is not None and (reason := refuses(PLAN)):
        raise NoKernel(f"no compiled loop can run this layer on this CPU: {reason}")
    return PLAN


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: OnlyPlan | None) -> Chosen:
    return Chosen(PLAN, False, "loop", "a tile of units of a sequence", "the time loop, compiled for this CPU")
