"""The Numba backend: runs the time loop of steps.py, or by_steps.py where a projection is in the middle of a step."""

from array import array
from collections.abc import Callable
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
from ..contract import Chosen, Launches, NoKernel, OnlyPlan, Refuses, Timer
from ..heads import arranged
from ..layer import aligned, is_product_alone
from ..memory import Buffer, checking, margins
from ..problem import Pass, Problem, Recurrence, in_the_loop
from . import LOOPS, build, equations, record
from .product import SEQUENCES, whole_vectors
from .tile import SIZE

BACKEND = "numba"
PLAN = OnlyPlan(BACKEND)
TENSORS = frozenset(record.TENSORS)
STOPS = "zcmh"  # the names in by_steps.Part, in the order of record.STOPS
PLAIN = {"h0", "c0", "weight_hh", "bias_hh"}  # tensors of a step that `step_of` can run
CHUNK = 64  # rows of x that are multiplied at once; for one sequence at a time, an eighth of that
LEAST = 1 << 14  # T B H for which another thread pays
CODES = dict(zip(("lstm", "gru", "slstm"), equations.CELLS))


def put(call: Any, arguments: dict[str, Any]) -> Any:
    """Write the addresses of tensors, given by the names of pointers, into a record.CALL. Skip all others."""
    for name, t in arguments.items():
        if isinstance(t, Tensor) and (field := name.removesuffix("_ptr")) in TENSORS:
            call[field] = t.data_ptr()
    return call


def call_of(part: Part, steps_: int, share: int, step: int = 0, way: int = record.BY_STEPS) -> Any:
    """Return a record.CALL without tensors."""
    p, call = part.problem, np.zeros((), record.CALL)
    cell = CELLS[p.cell].h_start, p.reverse, CODES[p.cell], CELLS[p.cell].kept
    sizes = steps_, p.batch, p.hidden, p.heads, p.from_x, *cell, STOPS.index(part.start), STOPS.index(part.end)
    call["masks"] = 3 in (p.zoneout_h, p.zoneout_c)
    for name, size in zip(record.SIZES, (share, *sizes, step, way)):
        call[name] = size
    return call


def launch(name: str, call: Any, arguments: dict[str, Any], count: int = 1) -> None:
    """Call a function of steps.py in `count` threads at once."""
    if checking.on:
        with margins(name, arguments) as inside:
            return build.run(build.function(name), put(call, inside).ctypes.data, count)
    build.run(build.function(name), put(call, arguments).ctypes.data, count)


def bind(part: Part, backward: bool, arguments: dict[str, Any]) -> by_steps.Launch:
    """See by_steps.Bind."""
    arguments = arguments | {"scratch": torch.zeros(record.SCRATCH, device="cpu")}
    call = put(call_of(part, arguments["T"], part.problem.batch), arguments)

    def launch_step(step: int, **changed: Tensor) -> None:
        call["step"] = step
        launch(LOOPS[backward], call, arguments | changed if checking.on else changed)

    return launch_step


def shares_of(p: Problem, T: int) -> tuple[int, int]:
    """Return how many threads pay for a call, and how many sequences a thread takes at a time."""
    count = max(1, min(torch.get_num_threads(), p.batch // SEQUENCES, T * p.batch * p.hidden // LEAST))
    return count, ceil(p.batch / count / SEQUENCES) * SEQUENCES


def step_of(p: Problem) -> Callable[..., None]:
    """Return Launches.step. Everything that is the same at each step is written into the call once."""
    call = call_of(Part(p, "z", "h"), 1, 0, 0, record.BY_ROWS)
    call["chunk"] = 1
    rest, function = array("q", call.tobytes())[len(record.OF_A_STEP) :], build.function(LOOPS[False])
    of_h = p.batch * p.hidden

    def step(x: int, h0: int, c0: int, h: int, h_n: int, c_n: int, weights: Any) -> None:
        (count, share), w_ih = shares_of(p, 1), weights.weight_ih
        work = torch.empty(9 * of_h + count * record.SCRATCH, device="cpu")
        taken = torch.zeros((), dtype=torch.int64, device="cpu") if count > 1 else None
        z, gates, h_next, scratch = [work.data_ptr() + SIZE * n * of_h for n in (0, 4, 8, 9)]
        tensors = w_ih, weights.weight_hh, weights.bias_ih, weights.bias_hh, taken
        given = [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]
        row = array("q", [0 if t is None else t.data_ptr() for t in given])
        if w_ih is None:
            row.extend((0, h0, c0, h, h_n, c_n, z, x, h_next, scratch, 0, share))
        else:
            row.extend((x, h0, c0, h, h_n, c_n, z, gates, h_next, scratch, w_ih.shape[1], share))
        row.extend(rest)
        build.run(function, row.buffer_info()[0], count)

    return step


def run_all(p: Problem, backward: bool, arguments: dict[str, Any]) -> None:
    """Run all steps at once. Each thread takes shares of the sequences until there are none, and waits only then."""
    T = arguments["T"]
    count, share = shares_of(p, T)
    call = call_of(Part(p, *("hz" if backward else "zh")), T, share, T - 1 if backward else 0, record.BY_ROWS)
    given = arguments | {"scratch": torch.empty(ceil(p.batch / share), record.SCRATCH, device="cpu")}
    features = 0
    if (x := arguments.get("x_ptr")) is not None:
        features = call["I"] = x.shape[2]
        in_one = p.lengths is None and share >= p.batch
        call["chunk"] = chunk = min(T, max(1, CHUNK // p.batch) if in_one else CHUNK // 8)
        given["gates_ptr"] = torch.empty(chunk, p.batch, 4 * p.hidden, device="cpu")
    if T > 1:
        # [heads, D, GATES D], or of one head [GATES D, D]. For heads of one unit `arranged` returns a view.
        weight = arranged(arguments["weight_hh_ptr"], p.width).contiguous()
        of_heads = weight.mT if (p.heads > 1) == backward else weight
        K, N = of_heads.shape[-2:]
        size = p.heads * K * whole_vectors(N) + features * whole_vectors(p.heads * N)
        given |= {"weight_hh_ptr": weight, "panels": torch.empty(size, device="cpu")}
        for name, stride in zip(("n", "k", "head"), reversed(of_heads.stride())):
            call[f"stride_{name}"] = stride
        call["way"], call["to_panels"] = record.BY_PANELS, True
        if count > 1:  # one thread copies the weight, before the others start
            call["B"] = 0
            launch(LOOPS[backward], call, given)
            call["B"], call["to_panels"] = p.batch, False
    taken = torch.zeros((), dtype=torch.int64, device="cpu")
    launch(LOOPS[backward], call, given | {"taken": taken}, count)


def prepare(problem: Problem, pass_: Pass, plan: OnlyPlan, device: torch.device, trial: bool = False) -> Launches:
    """See contract.Launcher, like the functions below."""
    outside, backward = problem.projected > 0 and not problem.projects_in_loop, pass_.backward
    p = problem._replace(projected=0) if outside else problem
    parts, buffers = by_steps.parts_of(p, backward), by_steps.buffers(p, pass_)
    if not p.projects_in_loop:
        buffers["dz_ptr" if backward else "z_ptr"] = Buffer(p.dtype, (p.batch, 4 * p.hidden))
        buffers["dh_next_ptr" if backward else "h_next_ptr"] = Buffer(p.dtype, (p.batch, p.width))
    of_x = not (backward or pass_.save or outside or p.projects_in_loop or p.known_h)

    def more(r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor | None]:
        i = r.inputs
        if not is_product_alone(i):
            return {}
        given = {"bias_ih_ptr": i.bias_ih, "bias_hh_ptr": i.bias_hh}
        return given if i.weight_ih is None else given | {"x_ptr": i.x, "weight_ih_ptr": aligned(i.weight_ih)}

    def start(arguments: dict[str, Any]) -> None:
        if p.lengths is torch.int32:
            arguments["lengths_ptr"] = arguments["lengths_ptr"].long()
        if p.projects_in_loop:
            return by_steps.run_steps([partial(bind, part, backward) for part in parts], arguments, p, backward)
        for name in ("hh", "c"):
            if (norm := arguments.get(f"norm_{name}")) is not None:
                arguments |= {f"{part}_{name}": aligned(getattr(norm, part)) for part in ("v", "mean", "scale")}
        run_all(p, backward, arguments)

    is_step = of_x and p.steps == 1 and not in_the_loop(p, 1).keys() - PLAIN
    return Launches(
        plan, buffers, start, outside, more=more if of_x else None, of_x=of_x, step=step_of(p) if is_step else None
    )


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
    # Compile before the trial: a user may end the process meanwhile, and a trial that ended is a verdict.
    build.function(LOOPS[pass_.backward])
    if refuses is not None and (reason := refuses(PLAN)):
        raise NoKernel(f"no compiled loop can run this layer on this CPU: {reason}")
    return PLAN


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: OnlyPlan | None) -> Chosen:
    return Chosen(PLAN, False, "loop", "a tile of units of a sequence", "the time loop, compiled for this CPU")
