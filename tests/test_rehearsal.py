"""Kernels through Triton's own JIT, driver and launcher, over driver_stub.c, which records the calls of the card.

Each scenario is a function of rehearsal.py, in a process of its own, where kernels are compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu_lstm.verification.timing import ROUNDS

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent / "support"
INCLUDE = Path(triton.__file__).parent / "backends/nvidia/include"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The folder of the stub, and of Triton's compilations."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    flags = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{INCLUDE}"]
    try:
        subprocess.run(["gcc", *flags, HERE / "driver_stub.c", "-o", library], check=True)
    except FileNotFoundError:
        pytest.skip("there is no gcc")
    (folder / "libcuda.so").symlink_to(library)  # older versions of Triton link this name
    return folder


@pytest.fixture
def rehearse(driver, tmp_path):
    """rehearse(scenario, **settings) returns the result of a scenario, with settings in its environment."""
    left_out = "TRITON_INTERPRET", "GPU_LSTM_BACKEND", "GPU_LSTM_RACE", "GPU_LSTM_CACHE", "CC"
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {
        "TRITON_LIBCUDA_PATH": str(driver), "TRITON_CACHE_DIR": str(tmp_path / "triton"), "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path), "DRIVER_STUB_LOG": str(tmp_path / "log"),
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *filter(None, sys.path)]),
    }  # fmt: skip

    def rehearse(scenario, **settings):
        command = [sys.executable, HERE / "rehearsal.py", scenario]
        done = subprocess.run(command, env=environment | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return rehearse


@pytest.mark.deep
def test_kernels_get_what_they_are_meant_to_by_one_compilation_of_each_kind(rehearse):
    """Every argument is in its position, the grid is the plan's, and all programs are resident at once only where they
    wait for each other."""
    results = rehearse("arguments")
    families, precisions = ({result[key] for result in results} for key in ("family", "precision"))
    assert (len(families), len(precisions)) == (5, 4)
    for each in results:
        first, steps = each["steps"] == 5, each["steps"] if each["family"] == "pointwise" else 1
        assert each["mistakes"] == [], each["case"]
        assert (each["compiled"], each["loads"]) == ((each["parts"],) * 2 if first else (0, 0)), each["case"]
        assert len(each["launches"]) == steps * each["parts"], each["case"]
        for launched in each["launches"]:
            assert [*launched["grid"], launched["threads"]] == each["size"], each["case"]
            assert launched["waits"] == (each["family"] in ("cooperative", "step", "held")), each["case"]
            assert launched["result"] == 0, each["case"]


def test_plans_are_compiled_side_by_side_and_timed_on_the_card(rehearse):
    """The choice among timings is tested in test_plan_cache.py."""
    assert rehearse("timing") == dict(place=1, launched=[ROUNDS] * 3, kept=True, threads=3, compiled=3)


@pytest.mark.deep
@pytest.mark.parametrize(("settings", "said"), [
    ({}, None), (dict(PATH=""), "install gcc, or name one in CC"),
    (dict(DRIVER_STUB_REFUSES="1"), "use a newer driver, or an older Triton"),
], ids=str)  # fmt: skip
def test_where_nothing_can_be_launched_the_words_of_triton_and_of_the_driver_are_known(rehearse, settings, said):
    found = rehearse("obstacle", **settings)
    assert found is None if said is None else said in found
