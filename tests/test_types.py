"""What type checkers make of a user's program, over all of the public API, whichever way gpu_lstm was installed."""

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from installed import build, environment

import gpu_lstm
from gpu_lstm.call.choices import BackendName

PROGRAM = Path(__file__).with_name("typed_program.py")
MISTAKES = """
gpu_lstm.LSTM(6, 8, backend="trition")
gpu_lstm.StackedLSTM(6, [8], backend="trition")
gpu_lstm.LSTMCell(6, 8, backend="trition")
gpu_lstm.backend("trition")
gpu_lstm.racing("of")
gpu_lstm.functional.lstm_layer(x, [x, x], backend="trition")
gpu_lstm.keras.from_keras(None, backend="trition")
lstm(packed, lengths=x)
lstm.forward(packed, lengths=x)
lstm(x)[0].batch_sizes
lstm.forward(x)[0].batch_sizes
lstm(packed)[0].relu()
lstm.forward(packed)[0].relu()
gpu_lstm.compat.LSTM(6, 8)(packed)[0].relu()
stack(packed)[0].relu()
gpu_lstm.keras.GoBackwards(lstm)(x)[0].batch_sizes
stack(x, (x, x))
stack(x)[1].relu()
gpu_lstm.LSTMCell(6, 8)(packed)
a: torch.nn.LSTM = gpu_lstm.convert(torch.nn.LSTM(6, 8))
b: gpu_lstm.LSTM = gpu_lstm.to_torch(lstm)
c: torch.nn.Sequential = gpu_lstm.convert(torch.nn.Linear(6, 8))
d: torch.nn.Sequential = gpu_lstm.to_torch(torch.nn.Linear(6, 8))
gpu_lstm.Stream(torch.nn.LSTM(6, 8), batch=3)
gpu_lstm.Stream(lstm, batch=3)(x).batch_sizes
gpu_lstm.trace(lstm, x).layers[0][0].forgot
gpu_lstm.explain(lstm, x).backed
gpu_lstm.explain(torch.nn.LSTM(6, 8), x)
gpu_lstm.autotune("64", 16)
gpu_lstm.resets_from_dones(3)
gpu_lstm.from_haste(3)
""".strip().splitlines()


@pytest.mark.slow
def test_type_checkers_accept_a_program_and_find_every_mistake(tmp_path):
    program, mistakes = tmp_path / "program.py", tmp_path / "mistakes.py"
    program.write_text(PROGRAM.read_text())
    header = "def mistaken(lstm: gpu_lstm.LSTM, stack: gpu_lstm.StackedLSTM, x: torch.Tensor, packed: PackedSequence):"
    imports = "import torch, gpu_lstm\nfrom torch.nn.utils.rnn import PackedSequence"
    mistakes.write_text("\n    ".join([f"{imports}\n{header}", *MISTAKES]) + "\n")
    wheel = [str(build("wheel", tmp_path / "dist"))]
    for number, install in enumerate((wheel, ["--editable", str(PROGRAM.parents[1])])):
        python = environment(tmp_path / f"environment-{number}", install=install)
        _check(["mypy", "--strict", "--python-executable", str(python)], program, mistakes)
    _check(["pyright", "--pythonpath", str(python)], program, mistakes)  # which reads sources, with py.typed or without


def _check(checker: list[str], program: Path, mistakes: Path) -> None:
    """No error in the one file, and one in every line of the other."""
    command = [sys.executable, "-m", *checker, program.name, mistakes.name]
    said = subprocess.run(command, cwd=program.parent, capture_output=True, text=True)
    assert "program.py:" not in said.stdout, said.stdout
    found = {int(line) for line in re.findall(r"mistakes\.py:(\d+)(?::\d+)?(?: -|:) error", said.stdout)}
    missed = [mistake for line, mistake in enumerate(MISTAKES, start=4) if line not in found]
    assert not missed, f"{checker[0]} does not see {missed}\n{said.stdout}{said.stderr}"


def test_the_program_runs_and_is_over_all_of_the_public_api(capsys):
    runpy.run_path(str(PROGRAM), run_name="__main__")
    assert "torch.Size([5, 2, 3])" in capsys.readouterr().out
    for name in gpu_lstm.__all__:
        assert re.search(rf"\bgpu_lstm\.{name}\b", PROGRAM.read_text()), name


def test_the_names_for_type_checkers_are_those_of_the_backends():
    assert get_args(BackendName) == tuple(backend.value for backend in gpu_lstm.Backend)


def test_dir_shows_the_public_names():
    shown = [name for name in dir(gpu_lstm) if not name.startswith("__")]
    assert sorted(shown) == sorted(gpu_lstm.__all__)
    assert "__version__" in dir(gpu_lstm)


@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.StackedLSTM, gpu_lstm.LSTMCell], ids=lambda cls: cls.__name__)
def test_forward_says_what_it_takes_and_raises(cls):
    said = vars(cls)["forward"].__doc__
    for name in inspect.signature(cls.forward).parameters:
        assert name == "self" or re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", said, re.MULTILINE), name
    for title in ("Args:", "Returns:", "Raises:"):
        assert title in said
