"""The launcher of the CuPy backend. The kernels of cuda/ are compiled at first use. by_steps.py launches them at every
step."""

import functools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import by_steps
from ..by_steps import Part
from ..cards import Card, cuda_obstacle
from ..contract import Chosen, Launches, NoKernel, OnlyPlan, Refuses, Timer
from ..memory import Arguments, checking, margins
from ..problem import Pass, Problem

FOLDER = Path(__file__).with_name("cuda")
CELLS = "lstm", "gru", "slstm"  # the cells in equations.cu
FILES = "instructions", "elements", "equations", "steps"
"""The files of the folder, in an order where each uses only the files before it."""
KERNELS = "after_product", "before_product"
ELEMENTS = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
OPTIONS = ("-std=c++17",)
THREADS = 128  # threads of a block, as in steps.cu
PLAN = OnlyPlan("cupy", "cupy's kernels are slower")


@functools.cache
def texts() -> dict[str, str]:
    return {name: FOLDER.joinpath(f"{name}.cu").read_text() for name in FILES}


def join(texts: dict[str, str]) -> str:
    """Join all files to one text. The compiler's messages still name the file and the line."""
    return "\n".join(f'#line 1 "{name}.cu"\n{text}' for name, text in texts.items())


@functools.cache
def layout() -> Any:
    """Return the numpy dtype of the struct `Call`, read from the source of steps.cu."""
    import numpy

    body = re.search(r"struct Call \{(.*?)\};", re.sub("//.*", "", texts()["steps"]), re.DOTALL)
    assert body is not None
    fields = [field.split()[-1] for field in re.split("[,;]", body[1]) if field.strip()]
    return numpy.dtype([(f.lstrip("*"), numpy.uint64 if "*" in f else numpy.int32) for f in fields], align=True)


def put(call: Any, arguments: Arguments) -> Any:
    """Put arguments into a `Call`, tensors as their addresses and None as a null pointer, and return it."""
    for name, a in arguments.items():
        call[name.removesuffix("_ptr")] = address(a) if isinstance(a, Tensor) else a or 0
    return call


address = Tensor.data_ptr  # tests replace these two


@functools.cache
def loaded(device: torch.device, name: str) -> Callable[..., None]:
    """Load a kernel on a device, which must be the current one. The result is called with grid, block and arguments."""
    import cupy

    return cupy.RawModule(code=join(texts()), options=OPTIONS, name_expressions=[name]).get_function(name)


def name_of(part: Part, backward: bool) -> str:
    """Return the C++ name of the kernel that computes a part of every step."""
    p = part.problem
    return f"{KERNELS[backward]}<{ELEMENTS[p.dtype]}, {p.cell.capitalize()}, '{part.start}', '{part.end}'>"


def bind(part: Part, backward: bool, device: torch.device, arguments: Arguments) -> by_steps.Launch:
    """Bind the arguments of a part, see by_steps.Bind. CuPy passes a numpy array of one element by value."""
    import numpy

    p, function = part.problem, loaded(device, name_of(part, backward))
    sizes = dict(H=p.hidden, heads=p.heads, from_x=p.from_x, reverse=p.reverse)
    sizes |= dict(rate_h=p.zoneout_h == 0, rate_c=p.zoneout_c == 0)
    given = {n: a for n, a in (arguments | sizes).items() if n.removesuffix("_ptr") in layout().names}
    call, shape = put(numpy.zeros((), layout()), given), ((p.batch, -(-p.hidden // THREADS)), (THREADS,))

    def launch(**changed: Any) -> None:
        if checking.on:
            with margins(KERNELS[backward], given | changed) as inside:
                return function(*shape, (put(call, inside),))
        function(*shape, (put(call, changed),))

    return launch


def prepare(problem: Problem, pass_: Pass, plan: OnlyPlan, device: torch.device, trial: bool = False) -> Launches:
    """Prepare the launches of a pass, see contract.Launcher, which also describes the functions below."""
    p, backward = by_steps.within(problem), pass_.backward
    binds = [partial(bind, part, backward, device) for part in by_steps.parts_of(p, backward)]

    def start(arguments: Arguments) -> None:
        if p.lengths is torch.int64:
            arguments["lengths_ptr"] = arguments["lengths_ptr"].int()
        with stream(device):
            by_steps.run_steps(binds, arguments, p, backward)

    return Launches(plan, by_steps.buffers(p, pass_), start, p != problem)


def stream(device: torch.device) -> Any:
    """Return torch's current stream on a device as a stream of CuPy."""
    import cupy

    current = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(current, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(current)
    # CuPy before 14 has no from_external, and older versions of torch have no __cuda_stream__.
    return cupy.cuda.ExternalStream(current.cuda_stream, device.index)


BACKEND = "cupy"


def card_of(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    return Card(10 * properties.major + properties.minor, properties.multi_processor_count)


def obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    return cuda_obstacle(BACKEND, device, (7, 0))


def lacks(problem: Problem) -> str | None:
    return None if problem.cell in CELLS else f"cell {problem.cell!r}"


def multiplies_x(problem: Problem) -> bool:
    return False


product = torch.mm


def choose(
    problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None, timer: Timer | None
) -> OnlyPlan:
    if refuses is not None and (reason := refuses(PLAN)):
        raise NoKernel(f"no kernel in CUDA C++ can run this layer on this card: {reason}")
    return PLAN


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: OnlyPlan | None) -> Chosen:
    parts, count = by_steps.parts_of(problem, pass_.backward), by_steps.launches_of(problem, pass_.backward)
    why = f"{count} launches for each step, with the product by cuBLAS: they run everything everywhere"
    return Chosen(PLAN, False, "pointwise", "a thread for each cell", why, len(parts))
