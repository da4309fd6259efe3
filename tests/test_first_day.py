"""What a card, its driver and its machine can do to a first call: what the user sees, and that the numbers survive."""

import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from installed import ROOT

import gpu_lstm
from bench import __main__ as bench_main
from bench import cases
from gpu_lstm.__main__ import main
from gpu_lstm.backends import schedule
from gpu_lstm.call import choices
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.kernels import timeouts
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_lstm import choose, exchange, launch
from gpu_lstm.kernels.triton_lstm.planning import DEVICES

CUDA, H100 = torch.device("cuda", 0), DEVICES["h100"]


@pytest.fixture
def card(monkeypatch, nothing_cached):
    """A card that cannot load kernels, as each test finds out anew."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(choose, "compile_problem", lambda architecture: None)
    choose._load_problem.cache_clear()
    yield
    choose._load_problem.cache_clear()


CAUSES = {  # what Triton or the driver says, and a word of what the user is told to do
    "no C compiler": (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "gcc"),
    "no Python.h": (RuntimeError("Command '['gcc', 'main.c']' returned non-zero exit status 1."), "python3-dev"),
    "old driver": (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "newer driver"),
    "old driver, PTX": (RuntimeError("the provided PTX was compiled with an unsupported toolchain."), "newer driver"),
    "unknown": (OSError("no space left on device"), "no space left"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_where_nothing_can_be_launched_the_user_is_told_why_and_auto_does_without(card, monkeypatch, cause):
    error, cure = CAUSES[cause]
    monkeypatch.setattr(choose, "load", lambda *_: exec("raise error", {"error": error}))
    monkeypatch.setattr(available, "cupy_import_problem", lambda: "not here")
    with pytest.warns(UserWarning, match="launches nothing on cuda:0.*Backend 'auto' does without it"):
        assert available.select(None, CUDA, torch.float32, None, False) is Backend.TORCH
    with pytest.raises(RuntimeError, match=f"backend 'triton': .*{cure}"):
        available.select("triton", CUDA, torch.float32, None, False)


def test_memory_that_is_full_says_nothing_about_the_card(card, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(choose, "load", lambda *_: exec("raise error", {"error": error}))
    with pytest.raises(torch.OutOfMemoryError):
        available.select("triton", CUDA, torch.float32, None, False)
    monkeypatch.setattr(choose, "load", lambda *_: None)
    assert available.select("triton", CUDA, torch.float32, None, False) is Backend.TRITON


def test_an_empty_kernel_is_loaded_once_and_never_into_a_capture(card, monkeypatch):
    loaded = []
    monkeypatch.setattr(choose, "load", lambda kernel, *_: loaded.append(kernel.__name__))
    for capturing in (True, False, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert available.select("triton", CUDA, torch.float32, None, False) is Backend.TRITON
        assert loaded == ([] if capturing else ["empty_kernel"])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("hidden", [64, 256, 768, 1024])
def test_the_last_smaller_batch_of_an_epoch_compiles_nothing(monkeypatch, hidden, backward):
    """It uses the plan of the others, unless that is estimated to be much slower."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch, "error_word", lambda device, kernel, trial=False: None)
    monkeypatch.setattr(choose, "card_of", lambda device: H100)
    monkeypatch.setattr(launch, "card_of", lambda device: H100)
    monkeypatch.setattr(choose, "load", lambda *_: SimpleNamespace(n_spills=0))
    launch.forget()
    problem, which = Problem(2, 64, hidden, torch.bfloat16), Pass(backward)
    given = launch.call_of(problem, torch.device("meta"))[1].inputs
    plan = launch.layer_of(problem, CUDA).prepared(which, given).plan
    ours = [launch.layer_of(problem._replace(batch=batch), CUDA).chosen(which).plan for batch in range(1, 64)]
    least = 33 if (hidden, backward) == (1024, True) else 9  # there a cooperative plan is faster for half the batch
    assert ours[least - 1 :] == [plan] * (64 - least)
    larger = launch.layer_of(problem._replace(batch=4096), CUDA)
    assert larger.chosen(which).plan == choose.plans(larger.problem, H100, backward)[0], "it may not fit a larger one"
    launch.forget()


PAGE = (ROOT / "docs" / "first_gpu_run.md").read_text()
SPANS = [*re.findall(r"```\n(.*?)\n```", PAGE, re.DOTALL), *re.findall(r"`([^`\n]+)`", PAGE)]
COLLECT = """
import json, pytest, sys
options = "--collect-only", "-q", "-p", "no:cacheprovider"
print(json.dumps([int(pytest.main([*words, *options])) for words in json.loads(sys.argv[1])]))
"""


def commands(module: str) -> list[list[str]]:
    """The arguments of each command of a module on the page of the first run."""
    start = f"python -m {module}"
    return [shlex.split(span)[3:] for span in dict.fromkeys(SPANS) if f"{span} ".startswith(f"{start} ")]


def test_every_command_of_the_page_of_the_first_run_is_understood(capsys):
    for words in commands("bench"):
        options = bench_main._parser().parse_args(words)
        assert cases.choose("cuda", options.cases)
    for words in commands("gpu_lstm"):
        plan = [*words, "--hidden", "768", "--batch", "16", "--device", "h100"]  # of which the page speaks
        assert main(plan if words == ["plan"] else words) == 0
    capsys.readouterr()
    assert all(len(commands(module)) > 2 for module in ("bench", "gpu_lstm", "pytest"))
    with mock.patch("gpu_lstm.autotune", mock.create_autospec(gpu_lstm.autotune)) as autotune:
        eval(next(span for span in SPANS if span.startswith("gpu_lstm.autotune(")))
    autotune.assert_called_once()


@pytest.mark.deep
def test_every_pytest_command_of_the_page_of_the_first_run_finds_tests():
    found = commands("pytest")
    for words in found:
        assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
    there = [[word for word in words if word != "--require-gpu"] for words in found]
    assert [len(words) for words in there] == [len(words) - 1 for words in found]
    command = [sys.executable, "-c", COLLECT, json.dumps(there)]
    said = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True).stdout
    assert json.loads(said.splitlines()[-1]) == [0] * len(found)


def test_every_name_on_the_page_of_the_first_run_exists():
    folders = ROOT / "gpu_lstm", ROOT / "kernels", ROOT / "tests"
    files = [path.as_posix() for folder in folders for path in folder.rglob("*.py")]
    for name in (span for span in SPANS if span.endswith(".py") and " " not in span):
        assert any(file.endswith(f"/{name}") for file in files), name
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for names in re.findall(r"\.\[([\w,]+)\]", PAGE):
        assert set(names.split(",")) <= extras, names
    variables = {timeouts.TIMEOUT, timeouts.SPARE, choices.BACKEND_VARIABLE}
    assert set(re.findall(r"GPU_LSTM_\w+", PAGE)) == variables
    assert callable(schedule.schedule_of)
    assert callable(choose.plans)
    assert "`LONGER = 0` in `exchange.py`" in PAGE
    assert "LONGER" in vars(exchange)
    assert "def test_two_grids_at_once" in (ROOT / "tests" / "test_gpu.py").read_text()
