"""The kernels, compiled ahead of time for every architecture. It needs no GPU.

In processes of their own, since in this one the kernels may belong to Triton's interpreter. The tests compile the step
family in full, and of the sequence families the cases that differ most; `python -m gpu_lstm kernels` compiles all.
"""

import json
import os
import subprocess
import sys

import pytest

FULL = """
import json
from gpu_lstm.__main__ import _as_json
from gpu_lstm.kernels.triton_lstm.compile import reports, sequence_cases, step_cases

def wanted(case):
    p, sm = case.problem, case.device.architecture
    if str(p.dtype) == "torch.bfloat16":
        return sm == 90 or (p.batch == 16 and p.hidden in (128, 768, 1536))
    return p.batch == 16 and (sm == 90 or p.hidden == 768)

if __name__ == "__main__":
    cases = [*step_cases(), *filter(wanted, sequence_cases())]
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


def test_every_step_kernel_is_compiled_for_every_architecture_and_dtype(rows):
    names = {f"lstm_step_{name}_kernel" for name in ("forward", "backward", "project", "project_backward")}
    dtypes = {"float16", "bfloat16", "float32 tf32", "float32 ieee"}
    expected = {(name, sm, dtype) for name in names for sm in (80, 86, 89, 90, 100, 120) for dtype in dtypes}
    assert expected <= {(row["kernel"], row["architecture"], _dtype(row)) for row in rows}


def test_no_kernel_spills(rows):
    assert [row for row in rows if row["spills"]] == []


def test_shared_memory_is_within_the_limit_of_the_architecture(rows):
    limit = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
    assert [row for row in rows if row["shared"] > limit[row["architecture"]]] == []


def test_what_planning_says_fits_fits(rows):
    planned = [row for row in rows if row["plan"]["family"] != "step"]
    assert [row for row in planned if row["shared"] > row["plan"]["shared"]] == []


def test_half_precision_and_tf32_products_use_tensor_cores(rows):
    assert [row for row in rows if not row["tensor_core"] and "ieee" not in row["case"]] == []


def test_float32_products_are_exact_where_asked(rows):
    assert [row for row in rows if row["tensor_core"] and "ieee" in row["case"]] == []


def test_weights_are_loaded_before_the_time_loop(rows):
    sequence = [row for row in rows if row["plan"]["family"] != "step"]
    assert [row for row in sequence if row["weight_loads"]] == []


def test_the_step_kernels_do_load_weights_in_a_loop(rows):
    """So that the check above can fail."""
    assert all(row["weight_loads"] for row in rows if row["plan"]["family"] == "step" and " H=768" in row["case"])


@pytest.mark.parametrize(
    ("hidden", "family"),
    [(64, "resident"), (128, "resident"), (256, "cooperative"), (1024, "cooperative"), (1536, "cooperative")],
)
def test_the_families_on_an_h100(rows, hidden, family):
    """In bf16 no hidden size of the table is left to the step family."""
    on_h100 = [row for row in rows if row["architecture"] == 90 and row["case"].endswith(f" H={hidden}")]
    families = {row["plan"]["family"] for row in on_h100 if _dtype(row) == "bfloat16"}
    assert families == {family}


def test_a_kernel_that_spills_is_reported(tmp_path):
    """The check can fail: one warp with far too large a tile."""
    script = """
import dataclasses, torch
from gpu_lstm.kernels.triton_lstm import compile
from gpu_lstm.kernels.triton_lstm.planning import Problem
case = compile.Case(Problem(2, 64, 256, torch.float32), False, compile.SEQUENCE_DEVICES[0])
plan = compile.step_plan(case.problem, False)
launch = compile.recorded_launches(case.problem, False, plan)[0]
tiles = dict(BLOCK_B=64, BLOCK_H=64, num_warps=1)
report = compile.report(dataclasses.replace(launch, constants=launch.constants | tiles), case, plan)
print(report.spills, report.fits)
"""
    spills, fits = _run(tmp_path, script).split()
    assert int(spills) > 0
    assert fits == "False"


def test_the_command_prints_a_row_for_each_kernel(tmp_path):
    script = """
from gpu_lstm import __main__
from gpu_lstm.kernels.cupy_lstm import compile as cupy
from gpu_lstm.kernels.triton_lstm import compile
cases = compile.step_cases()[:1]
cupy.SHARED = {90: 227}
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
        assert free <= {"T", "B", "step", "batch_start", "first", "turns"}
