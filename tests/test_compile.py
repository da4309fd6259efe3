"""The kernels, compiled ahead of time for every architecture. It needs no GPU.

In processes of their own, since in this one the kernels may belong to Triton's interpreter. The tests compile the step
family in full, and of the sequence families the cases that differ most; `python -m gpu_lstm kernels` compiles all.
"""

import json
import os
import subprocess
import sys

import pytest
import triton

OLDER_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
"""Its compiler takes more registers and shared memory than is planned for. The launcher looks at what it became."""

FULL = """
import json
from gpu_lstm.__main__ import _as_json
from gpu_lstm.kernels.triton_lstm.compile import reports, sequence_cases, step_cases

def wanted_step(case):
    # sm_86 and sm_89 have the instructions of sm_80 and the shared memory of sm_120
    return not case.problem.regularised or case.device.architecture not in (86, 89)

def wanted(case):
    p, sm = case.problem, case.device.architecture
    if str(p.dtype) == "torch.bfloat16":
        return sm == 90 or (p.batch == 16 and p.hidden in (128, 768, 1536))
    return p.batch == 16 and (sm == 90 or p.hidden == 768)

if __name__ == "__main__":
    cases = [*filter(wanted_step, step_cases()), *filter(wanted, sequence_cases())]
    print(json.dumps([_as_json(row) for row in reports(cases)]))
"""


def _run(tmp_path, script: str) -> str:
    path = tmp_path / "script.py"  # a file, since the reports come from processes that import it
    path.write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    return json.loads(_run(tmp_path_factory.mktemp("compile"), FULL))


def _dtype(row):
    return row["case"].split(" B=")[0]


@pytest.mark.slow
def test_every_step_kernel_is_compiled_for_every_architecture_and_dtype(rows):
    names = {f"lstm_step_{name}_kernel" for name in ("forward", "backward", "project", "project_backward")}
    dtypes = {"float16", "bfloat16", "float32 tf32", "float32 ieee"}
    expected = {(name, sm, dtype) for name in names for sm in (80, 86, 89, 90, 100, 120) for dtype in dtypes}
    assert expected <= {(row["kernel"], row["architecture"], _dtype(row)) for row in rows}


LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MUST_NOT_BE = {  # what no row may say of a kernel
    "it spills": lambda row, planned: row["spills"],
    "more shared memory than the architecture has": lambda row, planned: row["shared"] > LIMITS[row["architecture"]],
    "more shared memory than was planned": lambda row, planned: planned and row["shared"] > row["plan"]["shared"],
    "half precision and TF32 without tensor cores": lambda row, _: not (row["tensor_core"] or "ieee" in row["case"]),
    "exact float32 by tensor cores": lambda row, _: row["tensor_core"] and "ieee" in row["case"],
    "weights are loaded inside the time loop": lambda row, planned: planned and row["weight_loads"],
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", MUST_NOT_BE)
def test_no_kernel_has_this_fault(rows, fault):
    """`planned`: of the families that hold the weights; the step family reads them in its loop."""
    if OLDER_TRITON and fault == "more shared memory than was planned":
        pytest.skip("planned as Triton 3.9 takes it")
    fault = MUST_NOT_BE[fault]
    assert [row for row in rows if fault(row, row["plan"]["family"] != "step")] == []


@pytest.mark.slow
def test_the_step_kernels_do_load_weights_in_a_loop(rows):
    """So that the check above can fail."""
    assert all(row["weight_loads"] for row in rows if row["plan"]["family"] == "step" and " H=768" in row["case"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "family"),
    [(64, "resident"), (128, "resident"), (256, "cooperative"), (1024, "cooperative"), (1536, "cooperative")],
)
def test_the_families_on_an_h100(rows, hidden, family):
    """In bf16 no hidden size of the table is left to the step family."""
    on_h100 = [row for row in rows if row["architecture"] == 90 and row["case"].endswith(f" H={hidden}")]
    families = {row["plan"]["family"] for row in on_h100 if _dtype(row) == "bfloat16"}
    assert families == {family} or (OLDER_TRITON and hidden == 1536 and families <= {family, "step"})


@pytest.mark.slow
def test_a_kernel_that_spills_is_reported(tmp_path):
    """The check can fail: a thread that may have 32 registers only."""
    script = """
import dataclasses, torch
from gpu_lstm.kernels.triton_lstm import compile
from gpu_lstm.kernels.triton_lstm.planning import Problem
case = compile.Case(Problem(2, 16, 64, torch.float32), False, compile.SEQUENCE_DEVICES[0])
plan = compile.step_plan(case.problem, False)
launch = compile.recorded_launches(case.problem, False, plan)[0]
for launch in (launch, dataclasses.replace(launch, arguments=launch.arguments | dict(maxnreg=32))):
    report = compile.report(launch, case, plan)
    print(report.spills, report.fits)
"""
    spills, fits, more_spills, still_fits = _run(tmp_path, script).split()
    assert (spills, fits, still_fits) == ("0", "True", "False")
    assert int(more_spills) > 0


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_kernel(tmp_path):
    script = """
from gpu_lstm import __main__
from gpu_lstm.kernels.cupy_lstm import compile as cupy
from gpu_lstm.kernels.triton_lstm import compile
cases = compile.step_cases()[:1]
cupy.ARCHITECTURES, cupy.ELEMENTS = (90,), list(cupy.ELEMENTS)[:1]
compile.step_cases, compile.sequence_cases = lambda: cases, lambda: []
if __name__ == "__main__":
    raise SystemExit(__main__.main(["kernels"]))
"""
    title, *rows = _run(tmp_path, script).splitlines()
    assert title.split()[:6] == ["kernel", "case", "sm", "regs", "spills", "shared"]
    assert [row.split()[:2] for row in rows[:2]] == [["triton", "lstm_step_forward"], ["cupy", "lstm_step_forward"]]
    assert not any("DOES NOT FIT" in row for row in rows)


def test_the_numbers_of_steps_and_sequences_are_never_specialised(tmp_path):
    """A kernel compiled for one T and B serves all: their values change no key of the compile cache."""
    script = """
from gpu_lstm.kernels.triton_lstm import cooperative, resident, step
for module in (cooperative, resident, step):
    for name, kernel in vars(module).items():
        if name.endswith("_kernel"):
            free = {p.name for p in kernel.params if p.do_not_specialize}
            numbers = {p.name for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")}
            assert free == numbers, name
            print(name, *free)
"""
    numbers = {line.split()[0]: set(line.split()[1:]) for line in _run(tmp_path, script).splitlines()}
    assert len(numbers) == 8
    for free in numbers.values():
        assert {"T", "B"} <= free
        assert free <= {"T", "B", "step", "batch_start", "steps_before", "steps_now"}
