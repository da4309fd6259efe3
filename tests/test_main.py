"""The doctor: python -m gpu_lstm."""

import contextlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from installed import ROOT
from standing_in import H100, the_cpu_is_a_card, torch_finds

import gpu_lstm
from bench import __main__ as bench_main
from bench import results
from gpu_lstm import __main__ as doctor
from gpu_lstm.__main__ import main
from gpu_lstm.call.choices import BACKEND_VARIABLE, RACE_VARIABLE, Backend, Racing
from gpu_lstm.dispatch import available, race
from gpu_lstm.dispatch.kind import Kind, kind_of
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans import choose
from gpu_lstm.kernels.triton_rnn.plans.choose import always, keep_measured, plans
from gpu_lstm.kernels.triton_rnn.plans.planning import INTERPRETER
from gpu_lstm.verification import verify

CPU = torch.device("cpu")
SMALL = Problem(2, 8, 32, torch.float32, precision="tf32", reverse=True, lengths=torch.int64)
KIND = Kind((SMALL._replace(reverse=False),), (6,), steps=64, training=True, recompute=False, feature=None)
WITHOUT = (
    " on the CPU, and what torch lacks by a loop in Python, since backend 'numba' needs Numba: pip install "
    '"numba>=0.61"'
)
CHECK = verify._key(always(SMALL, INTERPRETER, True), SMALL, Pass(True), CPU)


@pytest.fixture
def findings(nothing_cached, tmp_path):
    """Cache a race, two checks and a plan."""
    won = dict(backend="triton", why="won a race, 2.00 times as fast", seconds={"triton": 1e-3, "torch": 2e-3})
    cache.write("races", race._key(KIND, Backend.TRITON, CPU), won)
    cache.write("checks", CHECK, "right")
    cache.write("checks", CHECK | {"cell": "gru"}, "the RMS error of h is 1")
    problem = Problem(2, 16, 768, torch.bfloat16)
    keep_measured(problem, H100, True, plans(problem, H100, True)[0])
    return tmp_path


def printed_by(capsys, *arguments):
    """Run a command that succeeds. Return the lines of its output, or the content of its JSON."""
    assert main(list(arguments)) == 0
    printed = capsys.readouterr().out
    return json.loads(printed) if "--json" in arguments else printed.splitlines()


@pytest.mark.parametrize(("dtype", "options", "said"), [
    ("tf32", [], "LSTM 8 -> 8, T = 4, B = 2, float32 (tf32), with gradients"),
    ("fp32", ["--inference"], "LSTM 8 -> 8, T = 4, B = 2, float32 (ieee), inference"),
    ("bf16", ["--layers", "2", "--directions", "2"],
     "LSTM 8 -> 8 -> 8, T = 4, B = 2, bfloat16, both directions, with gradients"),
    ("fp16", ["--cell", "gru"], "GRU 8 -> 8, T = 4, B = 2, float16, with gradients"),
])  # fmt: skip
def test_explain_says_of_a_layer_of_these_sizes_what_the_function_says(capsys, dtype, options, said):
    asked = ["explain", "--hidden", "8", "--batch", "2", "--steps", "4", "--dtype", dtype, *options]
    switch = torch.backends.cudnn.allow_tf32
    found, lines = printed_by(capsys, *asked, "--json"), printed_by(capsys, *asked)
    if not torch.cuda.is_available():  # where TF32 is no choice
        said = said.replace(" (tf32)", "").replace(" (ieee)", "")
    assert (found["problem"], lines[0]) == (said, said)
    assert lines[1].split()[:2] == ["backend", f"{found['backend']}:"]
    assert torch.backends.cudnn.allow_tf32 == switch


@pytest.mark.parametrize(("steps", "words", "cell", "options"), [
    (1, "", "LSTM", {}), (2, "", "LSTM", {}), (1024, "--layer-norm", "LSTM", dict(layer_norm=True)),
    (1024, "--cell gru --directions 2", "GRU", dict(bidirectional=True)),
])  # fmt: skip
def test_plan_asks_for_the_plans_of_a_problem_as_calls_have_it(spy, capsys, steps, words, cell, options):
    asked = spy(choose, "plans")
    words = f"plan --device h100 --dtype bf16 --hidden 64 --batch 3 --steps {steps} {words}"
    said = f": {cell} T={steps} B=3 H=64{' layer norm' * ('layer_norm' in options)} bf16"
    assert said in printed_by(capsys, *words.split())[0]
    module = getattr(gpu_lstm, cell)(8, 64, dtype=torch.bfloat16, device="meta", **options)
    problem, *others = kind_of(module._request(torch.empty(steps, 3, 8, dtype=torch.bfloat16, device="meta"))).problems
    wanted = problem._replace(bias_hh=False, side_by_side=1 + len(others))
    assert {call.args[0] for call in asked.mock_calls} == {wanted}


def test_the_doctor_names_versions_devices_and_backends_and_prints_no_secrets(monkeypatch, capsys):
    """The doctor shows eight environment variables, which hold no secrets."""
    for name in ("AWS_SECRET_ACCESS_KEY", "GPU_LSTM_TOKEN", "TRITON_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "a-secret")
    found = printed_by(capsys, "--json")
    assert "a-secret" not in str([found, printed_by(capsys), printed_by(capsys, "races")])
    ours = ["GPU_LSTM_BACKEND", "GPU_LSTM_RACE", "GPU_LSTM_SHARED_CACHE"]
    others = ["NUMBA_CACHE_DIR", "NUMBA_CPU_NAME", "OMP_NUM_THREADS", "TRITON_INTERPRET"]
    assert sorted(found["environment"]) == ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", *ours, *others]
    assert next(iter(found)) == "summary"
    assert found["versions"]["torch"] == torch.__version__
    devices = {device["device"]: device for device in found["devices"]}
    assert set(devices) == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() * torch.cuda.is_available()))}
    assert set(devices["cpu"]["backends"]) == {backend.value for backend in Backend} - {"auto"}
    assert (devices["cpu"]["auto"], devices["cpu"]["backends"]["torch"]) == ("torch", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize(("code", "enabled", "said"), [(0, 1, "on"), (0, 0, "off"), (1, 0, "the driver does not say")])
def test_the_doctor_knows_the_build_of_the_driver_mig_mps_and_free_memory(
    nothing_cached, monkeypatch, capsys, tmp_path, code, enabled, said
):
    """A stubbed nvidia-smi prints the names of the queries, and a stubbed libcuda tells whether there is MPS."""

    def attribute(value, which, device):
        assert (which, device) == (133, 0)  # the number of this attribute in cuda.h
        value._obj.value = enabled
        return code

    (tool := tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "$1" | tr , "\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(cache, "machine", cache.machine.__wrapped__)
    monkeypatch.setattr(doctor, "driver", lambda: Mock(cuDeviceGetAttribute=attribute))
    torch_finds(monkeypatch, is_available=True, device_count=1, mem_get_info=(3 << 29, 80 << 30))
    asked = "driver_version", "mig.mode.current", "compute_mode", "memory.free"
    assert set(asked) < set(printed_by(capsys, "--json")["nvidia-smi"])
    printed = "\n".join(printed_by(capsys))
    for pattern in (*asked, "free memory +1.5 of 80.0 GiB", "multiprocessors +132", f"MPS +{said}"):
        assert re.search(rf"^ +{pattern}", printed, re.MULTILINE), pattern


@pytest.mark.parametrize("name", [BACKEND_VARIABLE, RACE_VARIABLE])
def test_the_doctor_says_that_every_call_raises_where_a_variable_is_wrong(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "nonsense")
    first, *_ = printed_by(capsys)
    assert first.startswith("On this machine gpu_lstm raises: unknown ")
    assert f" 'nonsense' in the environment variable {name}; expected one of " in first


@pytest.mark.parametrize(("name", "said"), [
    ("reference", "gpu_lstm runs backend 'reference', asked for by the variable GPU_LSTM_BACKEND"),
    ("cupy", "backend 'cupy', asked for by the variable GPU_LSTM_BACKEND, raises: backend 'cupy' "),
])  # fmt: skip
def test_the_doctor_names_the_backend_that_the_variable_asks_for(monkeypatch, capsys, name, said):
    monkeypatch.setenv(BACKEND_VARIABLE, name)
    monkeypatch.setitem(sys.modules, "cupy", None)
    first, *_ = printed_by(capsys)
    assert first.startswith(f"On this machine {said}")


@pytest.mark.parametrize(("made", "readable", "said"), [
    ([], False, "names a folder that this user cannot read"), ([], True, "names a folder without cached results"),
    (["races"], True, None),
])  # fmt: skip
def test_a_shared_folder_that_cannot_serve_is_named_and_the_own_one_is_used(
    nothing_cached, monkeypatch, tmp_path, made, readable, said
):
    shared, access = tmp_path / "shared", os.access
    shared.joinpath(*made).mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: (readable or str(path) != str(shared)) and access(path, mode))
    monkeypatch.setenv(cache.SHARED, str(shared))
    with pytest.warns(UserWarning, match=f"^gpu_lstm: {cache.SHARED} {said}: ") if said else contextlib.nullcontext():
        assert cache.folders() == ((shared, nothing_cached) if readable else (nothing_cached,))


def test_without_a_home_nothing_is_cleared(monkeypatch, capsys, tmp_path):
    """The working directory is left alone, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "folder", lambda: None)
    (kept := tmp_path / "None" / "compiled").mkdir(parents=True)
    assert printed_by(capsys, "races", "--clear") == ["cached results cleared: 0"]
    assert kept.is_dir()


def test_cached_results_are_the_users_alone(nothing_cached):
    """The modes do not depend on the umask."""
    before = os.umask(0)
    try:
        cache.write("races", {"card": "cpu"}, {})
    finally:
        os.umask(before)
    of_cache = nothing_cached, *(path for path in nothing_cached.rglob("*") if not path.is_symlink())
    found = {(path.is_dir(), path.stat().st_mode & 0o777) for path in of_cache}
    assert found == {(True, 0o700), (False, 0o600)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize(("numba", "said"), [
    (None, f"and GRU{WITHOUT} (import of numba halted; None in sys.modules)"),
    ("here", "on the CPU, and most GRUs and what torch lacks by the compiled loops of backend 'numba'"),
])  # fmt: skip
def test_the_doctor_says_why_a_backend_is_not_available(monkeypatch, capsys, numba, said):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(available, "import_problem", inspect.unwrap(available.import_problem))
    if numba != "here":
        monkeypatch.setitem(sys.modules, "numba", numba)
    printed = "\n".join(printed_by(capsys))
    for pattern in (
        rf"^On this machine gpu_lstm runs torch's own LSTM {re.escape(said)}; there is no CUDA device that torch",
        r"triton +not available: backend 'triton' runs on CUDA tensors, got cpu; with TRITON_INTERPRET=1 in the "
        r"environment it runs CPU tensors in Triton's interpreter\n", r"cupy +not available: ", r"reference +available",
    ):  # fmt: skip
        assert re.search(pattern, printed), pattern


def test_under_a_driver_that_is_too_old_for_torch_the_doctor_and_the_benchmark_say_so(monkeypatch, capsys, tmp_path):
    """The driver is of CUDA 12.4, and torch is built for CUDA 13. One card is counted, and cannot be used."""
    told = "The NVIDIA driver on your system is too old (found version 12040)"
    refuse = Mock(side_effect=RuntimeError(f"{told}.\n"))
    torch_finds(monkeypatch, init=refuse, get_device_capability=refuse, get_device_name=refuse, is_available=False,
                device_count=1)  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    found = printed_by(capsys, "--json")
    assert [device["device"] for device in found["devices"]] == ["cpu"]
    assert f"there is no CUDA device that torch can use: {told}. This torch is for CUDA 13.2" in found["summary"]
    assert "pip install torch --index-url https://download.pytorch.org/whl/cu126" in printed_by(capsys)[0]
    assert bench_main._parser().parse_args([]).device == "cpu"
    assert bench_main.main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err


def test_the_doctor_says_in_words_what_is_not_there_and_which_processor_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=FileNotFoundError(2, "No such file", "nvidia-smi")))
    assert any("there is no nvidia-smi: no driver of NVIDIA's" in line for line in printed_by(capsys))
    (file := tmp_path / "cpuinfo").write_text(
        "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n"
    )
    monkeypatch.setattr(cache, "Path", lambda _: file)
    assert cache.cpu_name() == "AMD EPYC, cpu family 25, model 17"
    file.write_text("model name\t: AMD EPYC 9554 64-Core Processor\n")
    assert cache.cpu_name() == "AMD EPYC 9554 64-Core Processor"


def test_a_cudnn_that_torch_refuses_is_named_and_stops_neither_the_doctor_nor_the_cache(monkeypatch, capsys):
    told = "cuDNN version incompatibility: PyTorch was compiled against (9, 26, 0) but found runtime version (9, 1, 0)."
    monkeypatch.setattr(torch.backends.cudnn, "version", Mock(side_effect=RuntimeError(told)))
    monkeypatch.setattr(cache, "machine", cache.machine.__wrapped__)
    assert cache.machine(CPU)["cuDNN"] == told
    assert printed_by(capsys, "--json")["versions"]["cuDNN of torch"] == told
    torch_finds(monkeypatch)
    assert results.provenance.__wrapped__("cuda")["cudnn"] == told


@pytest.mark.parametrize("mode", ["on", "read"])
def test_the_doctor_begins_with_what_was_checked_and_raced_on_a_card(findings, monkeypatch, capsys, mode):
    the_cpu_is_a_card(monkeypatch)
    monkeypatch.setattr(available, "why_unavailable", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv(RACE_VARIABLE, mode)
    lost = {"backend": "torch", "why": "", "seconds": {}}
    for changed in ({"steps": 128}, {"card": "another"}):
        cache.write("races", race._key(KIND, Backend.TRITON, CPU) | changed, lost)
    ends = {"on": "; the first call of each kind races", "read": ""}
    assert printed_by(capsys)[0] == (
        "On this machine gpu_lstm runs the kernels of backend 'triton' on the CPU where they are faster: kernels "
        f"checked 2, of which 1 failed; kinds of problems raced 2, won 1{ends[mode]}"
    )


def test_cached_results_are_listed_those_of_another_version_as_they_are(findings, capsys):
    lines = "\n".join(printed_by(capsys, "races"))
    for pattern in (
        r"^races: 1\n  cpu, triton .*: LSTM 6 -> 32, T <= 64, B <= 8, float32 \(tf32\), lengths, with gradients: "
        r"triton: won a race, 2.00 times as fast \(triton 1 ms, torch 2 ms\)\nchecks: 2\n",
        r": LSTM, step 16x16 backward, H = 32, float32, tf32, reverse, lengths: right\n",
        r": GRU, step 16x16 backward, H = 32, float32, tf32, reverse, lengths: the RMS error of h is 1\n",
        r"plans: 1\n  NVIDIA H100 SXM, triton .*: B = 16: LSTM, \w+ \d+x\d+ backward, H = 768, bfloat16",
    ):
        assert re.search(pattern, lines), pattern
    kinds = [entry["kind"] for entry in printed_by(capsys, "races", "--json")]
    assert kinds == ["races", "checks", "checks", "plans"]
    decision = {"backend": "torch", "why": "expected", "seconds": None}
    cache.write("races", {"card": "cpu", "triton": "1"}, decision)
    assert f"  cpu, triton 1: {{'card': 'cpu', 'triton': '1'}}: {decision}" in printed_by(capsys, "races")


def test_a_reader_who_has_read_enough_causes_no_error():
    """It runs in another process, whose output nobody reads any more when it is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gpu_lstm", "races"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_cached_results_are_cleared_and_go_to_another_machine_as_a_folder(findings, monkeypatch, capsys):
    """The folder is copied into the user's own. test_races.py tests a shared folder."""
    other = findings / "other"
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    cache._read.cache_clear()
    assert race._cached(KIND, Backend.TRITON, CPU, Racing.READ) is None
    cache.write("checks", CHECK | {"cell": "another"}, "ours")
    shutil.copytree(findings / "gpu_lstm", other / "gpu_lstm", dirs_exist_ok=True)
    assert race._cached(KIND, Backend.TRITON, CPU, Racing.READ).backend is Backend.TRITON
    assert [len(list(cache.entries(kind))) for kind in cache.KINDS] == [1, 3, 1]
    assert printed_by(capsys, "races", "--clear") == ["cached results cleared: 5"]
    assert race._cached(KIND, Backend.TRITON, CPU, Racing.READ) is None
