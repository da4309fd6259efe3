"""Kernels through Triton's own JIT, driver and launcher, over driver_stub.c: which calls a card gets, and its faults.

Each scenario is a function of rehearsal.py, in a process of its own, where kernels are compiled.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
INCLUDE = Path(triton.__file__).parent / "backends/nvidia/include"
SECONDS = 3600  # a scenario takes far less, also on a loaded machine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The folder of the stub, and of what Triton compiles."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    flags = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{INCLUDE}"]
    try:
        subprocess.run(["gcc", *flags, HERE / "driver_stub.c", "-o", library], check=True)
    except FileNotFoundError:
        pytest.skip("there is no gcc")
    (folder / "libcuda.so").symlink_to(library)  # by this name older versions of Triton link it
    return folder


@pytest.fixture
def start(driver, tmp_path):
    """start(scenario): its process, with results of its own on disk; those of a test share them.

    No process outlives the test, nor a compiler that one has started, however it ends.
    """
    started = []

    def start(*scenario, **environment):
        names = "TRITON_INTERPRET", "GPU_LSTM_BACKEND", "GPU_LSTM_RACE", "GPU_LSTM_CACHE", "CC"
        settings = {name: value for name, value in os.environ.items() if name not in names} | {
            "TRITON_LIBCUDA_PATH": str(driver), "TRITON_CACHE_DIR": str(driver / "triton"), "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(tmp_path), "DRIVER_STUB_LOG": str(tmp_path / f"log{len(started)}"),
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, sys.path)]),
        } | environment  # fmt: skip
        command, pipes = [sys.executable, HERE / "rehearsal.py", *scenario], dict.fromkeys(("stdout", "stderr"), PIPE)
        started.append(subprocess.Popen(command, env=settings, text=True, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def rehearse(start):
    return lambda *scenario, **environment: results_of(start(*scenario, **environment))


def results_of(process):
    said, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return json.loads(said.splitlines()[-1])


@pytest.mark.deep
def test_kernels_get_what_they_are_meant_to_by_one_compilation_of_each_kind(rehearse, tmp_path):
    """Every argument in its position; the grid; and all programs resident at once where they wait, and only there."""
    results = rehearse("arguments", TRITON_CACHE_DIR=str(tmp_path / "triton"))  # where nothing was compiled before
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


def test_nothing_is_loaded_into_a_capture_after_a_call_and_without_one_the_error_says_what_to_do(rehearse):
    captured, error, tried, outside = rehearse("capture")
    assert [(event["event"], event["result"]) for event in captured] == [("launch", 0)] * 2
    assert "operation not permitted when stream is capturing" in error
    assert "call the layer once before the capture" in error
    assert [event["result"] for event in tried] == [900]
    assert [event["event"] for event in outside] == ["load", "launch"], "what failed is not kept"


@pytest.mark.deep
@pytest.mark.parametrize(("fault", "error"), [
    ("refused_loads=2", "OutOfMemoryError: Triton Error [CUDA]: out of memory"),
    ("failed=710", "AcceleratorError: CUDA error: device-side assert triggered"),
], ids=["full memory", "an assertion of somebody else's kernel"])  # fmt: skip
def test_an_error_of_the_device_is_raised_as_it_is_until_it_is_over_and_blamed_on_nobody(rehearse, fault, error):
    """But that memory is full is no error where `auto` can use torch's."""
    *failed, auto, kernels = rehearse("before_and_after", fault)
    if "OutOfMemory" in error:
        assert [(each["error"], each["right"]) for each in failed[::2]] == [(None, True)] * 2
        assert ["uses 'torch' for LSTM 8 -> 32" in each["said"] for each in failed[::2]] == [True, False], "once"
        failed = failed[1::2]
    assert {(each["error"], each["said"]) for each in failed} == {(error, "")}
    assert not any(kind for each in failed for kind in each["stored"].values())
    assert auto["error"] is kernels["error"] is None
    assert any("kernel" in event for event in kernels["events"])


@pytest.mark.deep
def test_plans_are_for_the_multiprocessors_of_the_context(rehearse):
    """As in a green context or a share of MPS. A layer that was planned for more says that they are too few."""
    first, later = rehearse("fewer_multiprocessors")
    grids = [math.prod(event["grid"]) for event in first["events"] if event["event"] == "launch"]
    assert first["error"] is None
    assert grids == [64, 16]
    assert "kernels use 66 of the 132 multiprocessors of cuda:0" in first["said"]
    assert later["error"] == "RuntimeError: Triton Error [CUDA]: too many blocks in cooperative launch"


@pytest.mark.deep
def test_a_second_process_compiles_verifies_and_races_nothing(start):
    """Nor do two at once disturb each other."""
    twins = [results_of(process) for process in [start("training") for _ in range(2)]]
    third = results_of(start("training"))
    assert third["compiled"] == max(each["compiled"] for each in twins)
    for each in (*twins, third):
        assert (each["error"], each["stored"]["checks"]) == (None, ["right", "right"])
        assert [race["backend"] for race in each["stored"]["races"]] == ["triton"]
    launches = [event["kernel"] for event in third["events"] if event["event"] == "launch"]
    assert launches == [f"lstm_resident_{way}_kernel" for way in ("forward", "backward")] * 2, "two steps come first"
