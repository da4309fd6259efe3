"""Every kernel, compiled ahead of time for every architecture. It needs no GPU.

In processes of their own, since in this one the kernels may belong to Triton's interpreter.
"""

import json
import os
import subprocess
import sys

import pytest


def _run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return json.loads(_run("-m", "gpu_lstm", "kernels", "--json"))


def test_every_kernel_is_compiled_for_every_architecture_and_dtype(rows):
    seen = {(row["kernel"], row["architecture"], row["problem"].split(" B=")[0]) for row in rows}
    kernels = {f"lstm_step_{name}_kernel" for name in ("forward", "backward", "project", "project_backward")}
    dtypes = {"float16", "bfloat16", "float32 tf32", "float32 ieee"}
    assert seen == {(k, sm, d) for k in kernels for sm in (80, 86, 89, 90, 100, 120) for d in dtypes}


def test_no_kernel_spills(rows):
    assert [row for row in rows if row["spills"]] == []


def test_shared_memory_is_within_the_limit_of_the_architecture(rows):
    limit = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
    assert [row for row in rows if row["shared"] > limit[row["architecture"]]] == []


def test_half_precision_and_tf32_products_use_tensor_cores(rows):
    assert [row for row in rows if not row["tensor_core"] and "ieee" not in row["problem"]] == []


def test_float32_products_are_exact_where_asked(rows):
    assert [row for row in rows if row["tensor_core"] and "ieee" in row["problem"]] == []


def test_a_kernel_that_spills_is_reported():
    """The check can fail: one warp with far too large a tile."""
    script = """
import dataclasses, torch
from gpu_lstm.kernels.triton_lstm import compile
problem = compile.Problem(torch.float32, 64, 256)
forward = compile.recorded_launches(problem)[0]
tiles = dict(BLOCK_B=64, BLOCK_H=64, num_warps=1)
report = compile.report(dataclasses.replace(forward, constants=forward.constants | tiles), problem, 80)
print(report.spills, report.fits)
"""
    spills, fits = _run("-c", script).split()
    assert int(spills) > 0
    assert fits == "False"
