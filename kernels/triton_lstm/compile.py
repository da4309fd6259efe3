"""The compile report: every kernel compiled for every architecture, without a GPU.

The launches are recorded from the backend's own entry points, so they have the tiles, constants and argument types of
real ones.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from ..architectures import shared_memory_of
from ..problem import Pass, Problem
from ..report import PRECISIONS, Report
from ..sass import time_loops, usage
from .binary import RecordedLaunch, compile_for
from .choose import plans
from .launch import INTERPRETED, recorded_launches
from .planning import DEVICES, Device, Family, Plan
from .step import step_plan

STEP_DEVICES = [Device(f"sm_{sm}", sm, 1, shared_memory_of(sm)) for sm in (80, 86, 89, 90, 100, 120)]
SEQUENCE_DEVICES = [DEVICES[name] for name in ("a100", "h100", "b200", "rtx5090")]

# Problems by name, see Case. For the step family, whatever else is proposed:
STEP = (
    "B=16 H=768", "B=64 H=130 P=33 ragged", "B=64 H=130 ragged masks", "B=64 H=130 P=33 ragged masks",
    "B=64 H=130 ragged rates", "B=16 H=768 peepholes", "B=64 H=130 P=33 ragged peepholes masks",
    "B=16 H=768 layer norm", "B=64 H=130 ragged peepholes layer norm masks",
)  # fmt: skip
# For the families that hold W_hh:
HIDDEN = (64, 128, 256, 512, 768, 1024, 1536)
SEQUENCE = (
    *(f"B={batch} H={hidden}" for hidden in HIDDEN for batch in (16, 64, 256)),
    *(f"B=16 H={hidden}{ragged} {noise}" for hidden in (64, 768) for ragged in ("", " ragged")
      for noise in ("masks", "rates")),
    *(f"B=16 H={hidden} ragged" for hidden in HIDDEN),
    *(f"B=16 H={hidden} peepholes" for hidden in (128, 768, 1536)),
    "B=16 H=768 ragged peepholes masks", "B=16 H=64 ragged peepholes layer norm masks",
    *(f"B=16 H={hidden} layer norm" for hidden in (32, 64, 128, 256, 768)),
    "B=64 H=768 ragged peepholes layer norm masks",
)  # fmt: skip
# For the pointwise family:
LARGE = tuple(
    f"B=4096 H=1024{variant}"
    for variant in ("", " ragged", " masks", " ragged peepholes masks", " ragged peepholes rates")
)


class Case(NamedTuple):
    """A problem, forward or backward, on one card.

    In its name B is sequences, H hidden units, P projected features. ragged: lengths, and resets to given states, in
    reverse. masks and rates: recurrent dropout and zoneout, in training and not.
    """

    name: str
    dtype: torch.dtype
    precision: str
    backward: bool
    device: Device
    step: bool = False  # by the step family

    def __str__(self) -> str:
        precision = f" {self.precision}" * (self.dtype is torch.float32)
        return f"{str(self.dtype).removeprefix('torch.')}{precision} {self.name}"

    @property
    def problem(self) -> Problem:
        """What the name says."""
        size = {name: int(number) for name, number in re.findall(r"(\w)=(\d+)", self.name)}
        ragged, masks = "ragged" in self.name, "masks" in self.name
        zoneout = 3 if masks else 0 if "rates" in self.name else None
        return Problem(
            2, size["B"], size["H"], self.dtype, size.get("P", 0), self.precision, reverse=ragged,
            lengths=torch.int64 if ragged else None, resets=ragged, reset_h=ragged and zoneout is not None,
            reset_c=ragged, dropout_h=masks, zoneout_h=zoneout, zoneout_c=zoneout,
            peepholes="peepholes" in self.name, norms=("layer norm" in self.name,) * 3,
        )  # fmt: skip


def cases(h100: bool) -> list[Case]:
    """All of them; if `h100`, those of an H100 in bfloat16."""
    every = [
        Case(name, dtype, precision, backward, device, names is STEP)
        for names, precisions, devices in (
            (STEP, PRECISIONS, STEP_DEVICES), (SEQUENCE, PRECISIONS[:3], SEQUENCE_DEVICES),
            (LARGE, PRECISIONS, SEQUENCE_DEVICES),
        )
        for (dtype, precision), name, backward, device
        in itertools.product(precisions, names, (False, True), devices)
    ]  # fmt: skip
    return [c for c in every if not h100 or (c.device.architecture == 90 and c.dtype is torch.bfloat16)]


def reports(cases: Iterable[Case]) -> Iterator[list[Report]]:
    """For each case the reports of its kernels, compiled on all cores."""
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1 in the environment")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_reports_of, cases)


def _reports_of(case: Case) -> list[Report]:
    """For the first plan whose kernels fit; families that hold W_hh come first, but may lack registers."""
    asked = case.problem, case.device, case.backward
    for plan in [step_plan(*asked)] if case.step else sorted(plans(*asked), key=lambda p: p.family is Family.STEP):
        launch, *_ = recorded_launches(case.problem, Pass(case.backward), plan)  # those of other steps are alike
        row = report(launch, case, plan)
        if row.fits:
            break
    return [row]


def report(launch: RecordedLaunch, case: Case, plan: Plan) -> Report:
    """Compile a launch, and report the result."""
    architecture, name = case.device.architecture, launch.kernel.__name__
    compiled = compile_for(launch, architecture)
    found = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"])
    tensor_core = found[1] if found else ""
    tiles = f"{plan.rows}x{plan.columns}, {plan.programs} programs, {tensor_core or 'no tensor core'}"
    ((registers, spills, declared),) = usage(compiled.asm["cubin"], architecture).values()
    shared = declared + compiled.metadata.shared  # the former is inline assembly's, which the latter omits
    return Report(
        name, str(case), architecture, plan, plan.threads, tiles, registers, spills, shared,
        time_loops(compiled.asm["cubin"])[name], tensor_core, _weight_loads(compiled.asm["ttgir"], launch),
    )  # fmt: skip


# Operations whose result points where their operand does.
_OF_POINTERS = ("tt.splat", "tt.addptr", "tt.broadcast", "ttg.convert_layout")


def _weight_loads(ttgir: str, launch: RecordedLaunch) -> int:
    """Loads from arguments named weight*, in Triton's GPU dialect, from where the first loop begins."""
    # By position, since Triton 3.4 does not keep the names. Constants and None are not arguments there.
    given = [p.name for p in launch.kernel.params if not p.is_constexpr and launch.arguments[p.name] is not None]
    (function,) = (line for line in ttgir.splitlines() if "tt.func public" in line)
    arguments = re.findall(r"(%\w+): (?:!tt\.ptr|i32)", function)
    of_weights = {argument for argument, name in zip(arguments, given, strict=True) if name.startswith("weight")}
    loads, in_loop = 0, False
    for line in ttgir.splitlines():
        in_loop |= "scf.for" in line or "scf.while" in line
        if of_weights.isdisjoint(re.findall(r"%[\w#]+", line.split(" loc(")[0])):
            continue
        if result := re.match(rf"\s*(%\w+)(?::\d+)? = ({'|'.join(_OF_POINTERS)})\b", line):
            of_weights.add(result[1])
        loads += in_loop and bool(re.search(r"tt\.load|ttg\.async_copy", line))
    return loads
