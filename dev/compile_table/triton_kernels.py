"""Compile the kernels of the Triton backend for every architecture.

The launches are recorded from the backend's own entry points. So they have the tiles, constants and argument types of
real launches.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from gpu_lstm.kernels.cards import Card
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn.launch import INTERPRETED, recorded_launches
from gpu_lstm.kernels.triton_rnn.parameters import Sizes, in_tuples, names_of
from gpu_lstm.kernels.triton_rnn.plans.choose import RecordedLaunch, plans
from gpu_lstm.kernels.triton_rnn.plans.planning import DEVICES, Held, Plan, Step
from gpu_lstm.kernels.triton_rnn.plans.tiles import split_plans, step_plan

from .placement import misplaced
from .report import PRECISIONS, Report, read

STEP_ARCHITECTURES = (80, 86, 89, 90, 100, 120)

SEQUENCE_CARDS = [DEVICES[name] for name in ("a100", "h100", "b200", "rtx5090")]
HIDDEN = (64, 128, 256, 512, 768, 1024, 1536)
BATCHES = (16, 64, 256)


_POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


def compile_for(launch: RecordedLaunch, architecture: int) -> CompiledKernel:
    """Compile the kernel of a launch. Pointers count as aligned to 16 bytes, as torch's allocator returns them."""
    kernel, arguments = launch.kernel, in_tuples(launch.kernel, launch.arguments)
    signature, constants, aligned = {}, {}, {}

    def type_of(value: Any, *place: int) -> Any:
        """Return Triton's word for the type of an argument.

        `place` is the number of the parameter and, in a tuple, the number in the tuple.
        """
        if isinstance(value, torch.Tensor):
            aligned[place] = [["tt.divisibility", 16]]
            return _POINTER[value.dtype]
        if isinstance(value, tuple) and not isinstance(value, Sizes):
            return type(value)(*(type_of(each, *place, n) for n, each in enumerate(value)))
        if isinstance(value, int):
            return "i32"
        constants[place] = value
        return "constexpr"

    for i, name in enumerate(kernel.arg_names):
        signature[name] = type_of(arguments[name], i)
    options = {k: v for k, v in arguments.items() if k not in signature}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@dataclass(frozen=True)
class Case:
    """A problem, forward or backward, on one card."""

    problem: Problem
    backward: bool
    card: Card
    step: bool = False  # whether to use only the step family
    split: bool = False  # whether its products are divided into parts of K

    def __str__(self) -> str:
        p = self.problem
        words = {
            str(p.dtype).removeprefix("torch."): True,
            p.precision: p.dtype is torch.float32,
            f"B={p.batch}": True,
            f"H={p.hidden}" if p.heads == 1 else f"H={p.heads}x{p.hidden // p.heads}": True,
            f"P={p.projected}": p.projected,
            "ragged": p.lengths,
            "GRU": p.cell == "gru",
            "sLSTM": p.cell == "slstm",
            "peepholes": p.weight_peephole,
            "layer norm": p.normalised,
            "masks" if p.dropout_h else "rates": p.regularised,
        }
        return " ".join(word for word, is_said in words.items() if is_said)


VARIANTS = {
    "ragged": dict(lengths=torch.int64, resets=True, reset_c=True, reverse=True),
    "masks": dict(dropout_h=True, zoneout_h=3, zoneout_c=3),  # noise in training mode
    "rates": dict(zoneout_h=0, zoneout_c=0),  # noise in eval()
    "peepholes": dict(weight_peephole=True),
    "norms": dict(gain_hh=True, gain_c=True, bias_c=True),
    "projected": dict(projected=512),
    "gru": dict(cell="gru"),
    "slstm": dict(cell="slstm"),
    "heads": dict(heads=4),
}


def problem_with(problem: Problem, words: str) -> Problem:
    """Return a problem with some of the VARIANTS.

    If the kernels also read the h to reset to, since its product is not in the gates, resets have a given h.
    """
    fields = {"reset_h": "ragged" in words and ("masks" in words or "rates" in words)}
    for word in words.split():
        fields |= VARIANTS[word]
    return problem._replace(**fields)


def cases(h100: bool) -> list[Case]:
    """Return all cases. If `h100`, return only those of an H100 in bfloat16."""
    every = [*step_cases(), *split_cases(), *sequence_cases(), *large_cases()]
    return [c for c in every if not h100 or (c.card.architecture == 90 and c.problem.dtype is torch.bfloat16)]


def step_cases() -> list[Case]:
    """Return cases of the step family: every dtype, precision and architecture, with noise, without, and variants."""
    cards = [Card(architecture, 1) for architecture in STEP_ARCHITECTURES]
    kinds = (
        (16, 768, ""), (64, 130, "ragged"), (64, 130, "ragged masks"), (64, 130, "ragged rates"),
        (16, 768, "peepholes"), (64, 130, "ragged masks peepholes"), (64, 130, "ragged masks gru"),
        (64, 520, "ragged masks heads"), (64, 130, "ragged slstm"), (64, 520, "slstm heads"),
    )  # fmt: skip
    return [
        Case(problem_with(Problem(2, batch, hidden, dtype, 0, precision), words), backward, card, True)
        for (dtype, precision), (batch, hidden, words), backward, card
        in itertools.product(PRECISIONS, kinds, (False, True), cards)
    ]  # fmt: skip


def split_cases() -> list[Case]:
    """Return cases with products of parts of K: sizes for every kind of tiles, ragged, with noise and peepholes."""
    kinds = [(16, 2048, ""), (64, 1024, ""), (256, 1024, ""), (256, 1000, "")]
    kinds += [(64, 1024, "gru"), (256, 1024, "ragged masks peepholes")]
    return [
        Case(problem_with(Problem(2, batch, hidden, dtype, 0, precision), words), True, card, True, True)
        for (dtype, precision), (batch, hidden, words), card
        in itertools.product(PRECISIONS[:3], kinds, SEQUENCE_CARDS)
    ]  # fmt: skip


def sequence_cases() -> list[Case]:
    """Return cases for the families that hold W_hh: sizes and batches, noise by masks and by rates, and variants."""
    kinds = [(batch, hidden, "") for hidden, batch in itertools.product(HIDDEN, BATCHES)]
    kinds += [(512, 256, ""), (1024, 256, "")]  # in these, programs of the step family hold W_hh
    kinds += itertools.product((16,), (64, 768), ("masks", "rates", "ragged masks", "ragged rates"))
    kinds += itertools.product((16,), HIDDEN, ("ragged",))
    kinds += itertools.product((16,), (128, 768, 1536), ("peepholes",))
    kinds += [(batch, hidden, "ragged masks peepholes") for batch, hidden in ((16, 768), (16, 64), (64, 768))]
    kinds += [(16, 64, "gru"), (16, 64, "ragged masks gru"), (4096, 128, "gru"), (512, 256, "gru")]
    kinds += itertools.product((16,), (512, 768, 1536), ("gru",))
    kinds += itertools.product((16, 256), (512, 1024), ("heads",))  # heads of 128 units, and of 256
    kinds += itertools.product((16, 256), (512,), ("ragged masks heads", "slstm heads", "ragged slstm heads"))
    kinds += itertools.product((16,), (1024,), ("ragged masks heads", "slstm heads"))
    kinds += [(256, 512, "ragged heads"), (16, 512, "gru heads"), (16, 128, "slstm"), (16, 768, "slstm")]
    return [
        Case(problem_with(Problem(2, batch, hidden, dtype, 0, precision), words), backward, card)
        for (dtype, precision), (batch, hidden, words), backward, card
        in itertools.product(PRECISIONS[:3], kinds, (False, True), SEQUENCE_CARDS)
    ]  # fmt: skip


def large_cases() -> list[Case]:
    """Return cases of the pointwise family: sizes, ragged, noise, peepholes, and steps that two launches divide."""
    kinds = "", "ragged", "masks", "ragged masks peepholes", "ragged rates peepholes", "gru", "heads", "slstm"
    kinds += "norms", "ragged masks peepholes norms", "ragged masks projected"
    return [
        Case(problem_with(Problem(2, 4096, 1024, dtype, 0, precision), words), backward, card)
        for (dtype, precision), words, backward, card
        in itertools.product(PRECISIONS, kinds, (False, True), SEQUENCE_CARDS)
    ]  # fmt: skip


def reports(cases: Iterable[Case]) -> Iterator[Report]:
    """Yield a report of each case. Cases are compiled on all cores."""
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1 in the environment")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(report_of, cases)


def report_of(case: Case) -> Report:
    """Return the report of the first plan whose kernels fit.

    Families that hold W_hh come first, but may need too many registers.
    """
    of = case.problem, case.card, case.backward
    if case.step:
        proposed = split_plans(*of) if case.split else [step_plan(*of)]
    else:
        proposed = sorted(plans(*of), key=lambda plan: isinstance(plan.family, Step))
    for plan in proposed:
        rows = [report(launch, case, plan) for launch in recorded_launches(case.problem, Pass(case.backward), plan)]
        row = max(rows, key=lambda row: (not row.fits, row.registers))  # the worst part of a step
        if row.fits:
            break
    return row


def report(launch: RecordedLaunch, case: Case, plan: Plan) -> Report:
    """Compile a launch, and report the result."""
    architecture = case.card.architecture
    compiled = compile_for(launch, architecture)
    instruction = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"])
    tensor_core = instruction[1] if instruction else ""
    tiles = f"{plan.rows}x{plan.units}, {plan.programs} programs, {tensor_core or 'no tensor core'}"
    # Triton's metadata omit the shared memory that inline assembly declares.
    resources = read(compiled.asm["cubin"], architecture, compiled.metadata.shared)
    weight_loads = _weight_loads_in_loops(compiled.asm["ttgir"], launch)
    return Report(
        launch.kernel.__name__, str(case), architecture, plan, 32 * plan.num_warps, tiles, **resources,
        tensor_core=tensor_core, weight_loads=weight_loads, in_profiles=compiled.metadata.name,
        misplaced=_misplaced(compiled.asm["ptx"], launch, case, plan) if isinstance(plan.family, Held) else 0,
    )  # fmt: skip


def _parameters(launch: RecordedLaunch) -> list[str]:
    """Return the parameters of a compiled kernel. Constants and None are not among them."""
    return [name for names in names_of(launch.kernel) for name in names if launch.arguments[name] is not None]


def _misplaced(ptx: str, launch: RecordedLaunch, case: Case, plan: Plan) -> int:
    """Return `misplaced` for W_hh [4H, D]. K is the features of h, or in backward the gates."""
    p, blocks = case.problem, plan.units * (1 if case.backward else 4) // 64

    def place(k: int) -> int:
        gate, unit = divmod(k, p.hidden // p.heads)  # within a head
        return p.size * ((gate * p.hidden + unit) * p.columns if case.backward else k)

    return misplaced(ptx, _parameters(launch).index("weight_hh_ptr"), place, p.size, blocks)


# Operations whose result points to the same memory as their operand.
_OF_POINTERS = ("tt.splat", "tt.addptr", "tt.broadcast", "ttg.convert_layout")


def _weight_loads_in_loops(ttgir: str, launch: RecordedLaunch) -> int:
    """Count the loads inside of loops from arguments that are named weight*, in Triton's GPU dialect."""
    depth, loads = 0, 0
    loops: list[int] = []  # for each open loop, the depth outside of it
    (function,) = (line for line in ttgir.splitlines() if "tt.func public" in line)
    arguments = re.findall(r"(%[\w.]+): (?:!tt\.ptr|i32)", function)
    named = zip(arguments, _parameters(launch), strict=True)  # by position, since Triton 3.4 does not keep the names
    of_weights = {argument for argument, name in named if name.startswith("weight")}
    for line in ttgir.splitlines():
        names = set(re.findall(r"%[\w.#]+", line.split(" loc(")[0]))
        result = re.match(r"\s*(%\w+)(?::\d+)? = (\S+)", line)
        if result and result[2] in _OF_POINTERS and names & of_weights:
            of_weights.add(result[1])
        if loops and re.search(r"tt\.load|ttg\.async_copy|inline_asm.*\bld\.", line) and names & of_weights:
            loads += 1
        if "scf.for" in line or "scf.while" in line:
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()
    return loads
