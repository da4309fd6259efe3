"""The kernels in CUDA C++, compiled by NVRTC from NVIDIA's wheel: no CuPy is needed."""

import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_lstm.kernels.cards import Card
from gpu_lstm.kernels.cupy_rnn.planning import Plan, plans
from gpu_lstm.kernels.cupy_rnn.source import KERNELS, OPTIONS, join, name_expression, optional, texts
from gpu_lstm.kernels.problem import Problem

from .report import PRECISIONS, Report, read

CARDS = (Card(70, 80), Card(75, 40), Card(80, 108), Card(86, 84), Card(89, 58), Card(90, 132), Card(100, 148),
         Card(120, 170))  # fmt: skip
SIZES = (*((b, h, "lstm") for b, h in ((16, 64), (16, 256), (16, 768), (64, 1024), (16, 2048))), (16, 768, "gru"))
"""Sequences, hidden units, and of which cell."""


class Case(NamedTuple):
    """A problem, and a plan for it."""

    problem: Problem
    backward: bool
    card: Card
    plan: Plan

    def __str__(self) -> str:
        p = self.problem
        precision = f" {p.precision}" * (p.dtype is torch.float32)
        return f"{str(p.dtype).removeprefix('torch.')}{precision} B={p.batch} H={p.hidden}" + " GRU" * (p.cell == "gru")


class Binary(NamedTuple):
    """One kernel for one architecture."""

    ptx: str
    cubin: bytes
    log: str  # the compiler's warnings, except those of old architectures


def cases(h100: bool) -> list[Case]:
    """For every size the best plan that keeps the weights, and the best that reads them at every step.

    If `h100`, only for an H100 and in bfloat16.
    """
    different: dict[tuple, Case] = {}
    for card, (dtype, precision), (batch, hidden, cell), backward in product(CARDS, PRECISIONS, SIZES, (False, True)):
        if h100 and (card.architecture != 90 or dtype is not torch.bfloat16):
            continue
        problem = Problem(2, batch, hidden, dtype, precision=precision, cell=cell)
        for kept in (True, False):
            of_kind = [plan for plan in plans(problem, card, backward) if (plan.chunks > 0) == kept]
            if of_kind:
                plan = min(of_kind, key=lambda plan: plan.clocks)
                key = card, dtype, backward, plan.template(backward)
                different.setdefault(key, Case(problem, backward, card, plan))
    return list(different.values())


def reports(cases: Iterable[Case]) -> Iterator[Report]:
    """A report of each case."""
    for case in cases:
        architecture, plan, binary = case.card.architecture, case.plan, compile_for(case)
        kept = f"{plan.chunks} chunks kept" if plan.chunks else "W_hh read"
        instruction = re.search(r"mma\.sync\S+", binary.ptx)
        # In the time loop: what follows the first wait for other blocks.
        weight_loads = binary.ptx.partition("ld.relaxed.gpu")[2].count("ld.global.v4.b32")
        yield Report(
            KERNELS[case.backward], str(case), architecture, plan, plan.threads,
            f"{plan.threads} threads x {plan.units} units, {kept}", **read(binary.cubin, architecture, plan.shared),
            tensor_core=instruction[0] if instruction else "", weight_loads=weight_loads,
        )  # fmt: skip


def architectures() -> list[int]:
    """Those of CARDS that the installed NVRTC supports; from CUDA 13 on, none before sm_75."""
    count = ctypes.c_int()
    _nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _nvrtc().nvrtcGetSupportedArchs(known)
    return [card.architecture for card in CARDS if card.architecture in known]


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC from NVIDIA's wheel; the oldest one installed, which supports the most architectures.

    Raises:
        ImportError: there is no such wheel.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    libraries = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    if not libraries:
        raise ImportError("NVRTC is missing: pip install nvidia-cuda-nvrtc-cu12")
    return ctypes.CDLL(str(min(libraries, key=lambda path: path.name)))


@functools.cache
def compile_for(case: Case, present: frozenset[str] | None = None) -> Binary:
    """The kernel of a case, compiled for its card as the launcher does it, for all optional arguments or those present.

    Raises:
        ImportError: NVRTC is missing.
        RuntimeError: it does not compile, with the compiler's messages.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()

    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC failed with status {status}\n{log() if program else ''}")

    def result(name: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(nvrtc, f"nvrtcGet{name}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, f"nvrtcGet{name}")(program, buffer))
        return buffer.raw

    def log() -> str:
        lines = result("ProgramLog").rstrip(b"\0").decode().splitlines()
        return "\n".join(line for line in lines if not re.match("nvrtc: warning: Architectures prior to", line))

    template = case.plan.template(case.backward)
    kernel = KERNELS[case.backward]
    present = frozenset(optional(kernel)) if present is None else present
    expression = name_expression(kernel, case.problem.dtype, template, present).encode()
    options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture=sm_{case.card.architecture}")]
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), join(texts()).encode(), b"lstm.cu", 0, None, None))
    try:
        check(nvrtc.nvrtcAddNameExpression(program, expression))
        check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)))
        return Binary(result("PTX").rstrip(b"\0").decode(), result("CUBIN"), log())
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
