"""The Numba backend: runs the time loop of steps.py, or by_steps.py where a projection is in the middle of a step."""

from array import array
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import by_steps
from ..by_steps import Part
from ..cache import warn_once
from ..cards import Card
from ..cells import CELLS
from ..contract import Chosen, Launches, NoKernel, OnlyPlan, Refuses, Timer
from ..heads import arranged
from ..layer import aligned, is_product_alone
from ..memory import Buffer, checking, margins
from ..problem import Pass, Problem, Recurrence, in_the_loop
from . import LOOPS, MATMUL, build, equations, record
from .product import DEEP, SEQUENCES, TALL, whole_vectors
from .tile import SIZE

BACKEND = "numba"
PLAN = OnlyPlan(BACKEND)
FIELDS = {f"{name}{end}": name for name in record.TENSORS for end in ("", "_ptr")}
STOPS = "zcmh"  # the names in by_steps.Part, in the order of record.STOPS
# The tensors that the loop reads in a plain inference, see `inference_of`.
PLAIN = {"h0", "c0", "weight_hh", "bias_hh", "resets", "lengths"}
CHUNK = 64  # rows of x that are multiplied at once; for one sequence at a time, an eighth of that
LEAST = 1 << 14  # T B H for which another thread pays
FEW_STEPS = 8  # so many products read W_hh as it is, because a copy in panels costs more than it gains
LARGE = 1 << 23  # M K N of a product that takes no longer than torch's
OF_A_TRIAL = 2  # the same in a trial, so that it covers both products
W_HH, X, GATES, MAKES_PANELS = map(record.PLAIN.index, ("weight_hh", "x", "gates", "makes_panels"))
CODES = dict(zip(("lstm", "gru", "slstm"), equations.CELLS))


def put(call: Any, arguments: dict[str, Any]) -> Any:
    """Write the addresses of tensors, given by the names of pointers, into a record.CALL. Skip all others."""
    for name, t in arguments.items():
        if t is not None and name in FIELDS:
            call[FIELDS[name]] = t.data_ptr()
    return call


def call_of(part: Part, **sizes: int) -> Any:
    """Return a record.CALL of a part without tensors. `sizes` are the fields that do not follow from the part."""
    p, call = part.problem, np.zeros((), record.CALL)
    cell, (of_d, of_n) = CELLS[p.cell], (1, p.columns) if p.heads == 1 else (p.gates * p.columns, 1)
    strides = (of_n, of_d) if part.start == "h" else (of_d, of_n)  # of W_hh, as `arranged` returns it; backward [N, D]
    own = p.batch, p.hidden, p.heads, p.from_x, cell.h_start, p.reverse, CODES[p.cell], cell.kept
    masks = 3 in (p.zoneout_h, p.zoneout_c)
    values = *own, STOPS.index(part.start), STOPS.index(part.end), masks, p.gates * p.columns**2, *strides
    for name, value in (*zip(record.OF_A_PART, values, strict=True), *sizes.items()):
        call[name] = value
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
    call = put(call_of(part, T=arguments["T"], share=part.problem.batch), arguments)

    def launch_step(step: int, **changed: Tensor) -> None:
        call["step"] = step
        launch(LOOPS[backward], call, arguments | changed if checking.on else changed)

    return launch_step


class Division(NamedTuple):
    """How a call of all steps is divided, see record.py."""

    count: int  # the threads that pay
    share: int
    chunk: int
    by_rows: int
    panels: int  # numbers in the panels of W_hh and W_ih, or 0 if there are none


def divided(p: Problem, backward: bool, T: int, features: int, threads: int, trial: bool = False) -> Division:
    """Return the Division of T steps, where the loop multiplies W_ih by x [T, B, features]."""
    count = max(1, min(threads, p.batch // SEQUENCES, T * p.batch * p.hidden // LEAST))
    share = ceil(p.batch / count / SEQUENCES) * SEQUENCES
    by_rows = 0 if backward else OF_A_TRIAL if trial else T if T <= FEW_STEPS else 0
    in_one = p.lengths is None and share >= p.batch
    chunk = min(T, by_rows or T, max(1, CHUNK // p.batch) if in_one else CHUNK // 8)
    N, K = p.gates * p.columns, p.columns
    of_head = N * whole_vectors(K) if backward else K * whole_vectors(N)
    panels = 0 if by_rows >= T else p.heads * of_head + features * whole_vectors(p.heads * N)
    return Division(count, share, chunk, by_rows, panels)


def inference_of(p: Problem) -> Callable[..., None]:
    """Return Launches.inference. Everything that is the same in each call is written into the call once."""
    call = call_of(Part(p, "z", "h"), multiplies=True)
    rest, function = array("q", call.tobytes())[len(record.PLAIN) :], build.function(LOOPS[False])
    of_h, divisions = p.batch * p.hidden, lru_cache(partial(divided, p, False))

    def run(T: int, x: int, states: Sequence[int], marks: Sequence[int], weights: Any) -> None:
        features = 0 if weights.weight_ih is None else weights.weight_ih.shape[1]
        count, share, chunk, by_rows, panels = divisions(T, features, torch.get_num_threads())
        of_gates = 4 * of_h * chunk if features else 0
        work = torch.empty(5 * of_h + of_gates + count * record.SCRATCH + panels, device="cpu")
        taken = torch.zeros((), dtype=torch.int64, device="cpu") if count > 1 else None
        tensors = weights.weight_ih, weights.weight_hh, weights.bias_ih, weights.bias_hh, taken
        given = [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]
        z = work.data_ptr()
        gates = z + SIZE * 5 * of_h
        scratch = gates + SIZE * of_gates
        row = array("q", [0 if t is None else t.data_ptr() for t in given])
        row.extend((x, *states, z, gates, z + SIZE * 4 * of_h, scratch))
        row.extend((scratch + SIZE * count * record.SCRATCH, *marks))
        row.extend((features, T, share, chunk, by_rows, False))
        if not features:
            row[X], row[GATES] = 0, x
        row.extend(rest)
        at = row.buffer_info()[0]
        if panels:
            weight = arranged(given[W_HH], p.width)
            row[W_HH], row[MAKES_PANELS] = weight.data_ptr(), True
            build.run(function, at, 1)
            row[W_HH], row[MAKES_PANELS] = given[W_HH].data_ptr(), False
        build.run(function, at, count)

    return run


def run_all(p: Problem, backward: bool, trial: bool, arguments: dict[str, Any]) -> None:
    """Run all steps at once. Each thread takes shares of the sequences until there are none, and waits only then."""
    T, x = arguments["T"], arguments.get("x_ptr")
    features = 0 if x is None else x.shape[2]
    count, share, chunk, by_rows, panels = divided(p, backward, T, features, torch.get_num_threads(), trial)
    call = call_of(
        Part(p, *("hz" if backward else "zh")), multiplies=True, step=T - 1 if backward else 0,
        I=features, T=T, share=share, chunk=chunk, by_rows=by_rows,
    )  # fmt: skip
    given = arguments | {"scratch": torch.empty(count, record.SCRATCH, device="cpu")}
    given["taken"] = torch.zeros((), dtype=torch.int64, device="cpu")
    if x is not None and "c_ptr" not in arguments:
        given["gates_ptr"] = torch.empty(chunk, p.batch, 4 * p.hidden, device="cpu")
    if panels:  # one thread copies the weights, before the others start
        given["panels"], call["makes_panels"] = torch.empty(panels, device="cpu"), True
        weight = arranged(arguments["weight_hh_ptr"], p.width)  # [heads, D, GATES D], or of one head [GATES D, D]
        read = {name: given.get(name) for name in ("panels", "x_ptr", "weight_ih_ptr")}
        launch(LOOPS[backward], call, read | {"weight_hh_ptr": weight})
        call["makes_panels"] = False
    launch(LOOPS[backward], call, given, count)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a [M, K] b [K, N] to `out`, a contiguous tensor, by the compiled product of matrices."""
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
    (M, K), N = a.shape, b.shape[1]
    count = max(1, min(torch.get_num_threads(), M // TALL))
    share, size = ceil(M / count / TALL) * TALL, DEEP * whole_vectors(N) + TALL * DEEP + record.SCRATCH
    memory, taken = out.new_empty(count, size), torch.zeros((), dtype=torch.int64, device="cpu")
    addresses = [t.data_ptr() for t in (a, b, out, memory, taken)]
    call = np.array([*addresses, M, K, N, *a.stride(), *b.stride(), share, size], np.int64)
    build.run(build.function(MATMUL), call.ctypes.data, count)


@cache
def multiplies_right() -> bool:
    """Check the compiled product once in a process, by products of integers, which are exact in float32."""
    numbers = torch.arange(-350.0, 350, device="cpu").remainder(7)  # [700], more than DEEP
    tall, wide = (torch.stack([numbers.roll(n * n) for n in range(count)]) for count in (2 * TALL + 3, 51))
    ways = [(a, b) for a in (tall, tall.T.contiguous().T) for b in (wide.T, wide.T.contiguous())]  # [131, 700 and 51]
    try:
        for a, b in ways:
            found = {"out": a.new_full((len(tall), len(wide)), torch.nan)}  # not `empty`, which may hold right numbers
            with margins(MATMUL, found) as inside:
                multiply(a, b, inside["out"])
            if not torch.equal(found["out"], torch.mm(a, b)):
                raise RuntimeError(f"wrong numbers, where strides are {a.stride()} and {b.stride()}")
    except RuntimeError as error:
        warn_once(f"the compiled product of matrices fails on this CPU, so torch's own runs instead: {error}")
        return False
    return True


def product(a: Tensor, b: Tensor) -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    if M < TALL or M * K * N < LARGE or not multiplies_right():
        return torch.mm(a, b)
    multiply(a, b, out := a.new_empty(M, N))
    return out


def prepare(problem: Problem, pass_: Pass, plan: OnlyPlan, device: torch.device, trial: bool = False) -> Launches:
    """See contract.Launcher, like the functions below."""
    outside, backward = problem.projected > 0 and not problem.projects_in_loop, pass_.backward
    p = problem._replace(projected=0) if outside else problem
    parts, buffers = by_steps.parts_of(p, backward), by_steps.buffers(p, pass_)
    if not p.projects_in_loop:
        buffers["dz_ptr" if backward else "z_ptr"] = Buffer(p.dtype, (p.batch, 4 * p.hidden))
        buffers["dh_next_ptr" if backward else "h_next_ptr"] = Buffer(p.dtype, (p.batch, p.width))

    def biases_and_x(r: Recurrence, memory: dict[str, Tensor]) -> dict[str, Tensor | None]:
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
        run_all(p, backward, trial, arguments)

    more = biases_and_x if not backward and multiplies_x(problem) else None
    inference = inference_of(p) if more and not pass_.save and not in_the_loop(p, 1).keys() - PLAIN else None
    return Launches(plan, buffers, start, outside, more=more, inference=inference)


def card_of(device: torch.device) -> Card:
    return Card(0, torch.get_num_threads())


def obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    if device.type != "cpu":
        return RuntimeError(f"backend {BACKEND!r} runs on CPU tensors, got {device}")
    return None


def lacks(problem: Problem) -> str | None:
    return None if problem.cell in CODES else f"cell {problem.cell!r}"


def multiplies_x(problem: Problem) -> bool:
    return not (problem.projected or problem.known_h)  # else other numbers are added to the gates before the loop


def choose(
    problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None, timer: Timer | None
) -> OnlyPlan:
    # Compile before the trial: a user may end the process meanwhile, and a trial that ended is a verdict.
    if pass_.backward:  # before the loop, so that whoever finds the loop on disk finds both
        build.function(MATMUL)
    build.function(LOOPS[pass_.backward])
    if refuses is not None and (reason := refuses(PLAN)):
        raise NoKernel(f"no compiled loop can run this layer on this CPU: {reason}")
    return PLAN


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: OnlyPlan | None) -> Chosen:
    return Chosen(PLAN, False, "loop", "a tile of units of a sequence", "the time loop, compiled for this CPU")
