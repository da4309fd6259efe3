"""What type checkers make of a user's program, over all of the public API, whichever way gpu_lstm was installed."""

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from installed import build, environment, run

import gpu_lstm
from gpu_lstm.call.choices import BackendName

PROGRAM = Path(__file__).with_name("typed_program.py")
CACHE = PROGRAM.parents[1] / ".mypy_cache" / "strict"  # of torch's files: half a minute the first time
MISTAKES = [
    *(f'gpu_lstm.{call}, backend="trition")' for call in (
        "LSTM(6, 8", "StackedLSTM(6, [8]", "LSTMCell(6, 8", "functional.lstm_layer(x, [x, x]",
        "keras.from_keras(None")),
    'gpu_lstm.backend("trition")', 'gpu_lstm.racing("of")', "lstm(packed, lengths=x)", "lstm(x)[0].batch_sizes",
    "lstm.forward(x)[0].batch_sizes", "lstm(packed)[0].relu()", "lstm.forward(packed)[0].relu()",
    "gpu_lstm.compat.LSTM(6, 8)(packed)[0].relu()", "stack(packed)[0].relu()", "stack(x, (x, x))", "stack(x)[1].relu()",
    "gpu_lstm.keras.GoBackwards(lstm)(x)[0].batch_sizes", "gpu_lstm.LSTMCell(6, 8)(packed)",
    "a: torch.nn.LSTM = gpu_lstm.convert(torch.nn.LSTM(6, 8))", "b: gpu_lstm.LSTM = gpu_lstm.to_torch(lstm)",
    "c: torch.nn.Sequential = gpu_lstm.convert(torch.nn.Linear(6, 8))", "gpu_lstm.resets_from_dones(3)",
    "d: torch.nn.Sequential = gpu_lstm.to_torch(torch.nn.Linear(6, 8))", "gpu_lstm.explain(lstm, x).backed",
    "gpu_lstm.Stream(torch.nn.LSTM(6, 8), batch=3)", "gpu_lstm.Stream(lstm, batch=3)(x).batch_sizes",
    "gpu_lstm.trace(lstm, x).layers[0][0].forgot", "gpu_lstm.explain(torch.nn.LSTM(6, 8), x)",
    'gpu_lstm.autotune("64", 16)', "gpu_lstm.from_haste(3)"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("checker", "interpreter", "install"), [
    (f"mypy --strict --cache-dir {CACHE}", "--python-executable", "wheel"), ("pyright", "--pythonpath", "editable"),
], ids=["mypy", "pyright"])  # fmt: skip
def test_type_checkers_accept_a_program_and_find_every_mistake(tmp_path, checker, interpreter, install):
    """No error in the one file, and one in every line of the other."""
    folder, source = tmp_path / "environment", str(PROGRAM.parents[1])
    given = list(map(str, build(tmp_path / "dist", "wheel"))) if install == "wheel" else ["--editable", source]
    python = environment(folder, install=given)
    code = "import gpu_lstm, gpu_lstm.kernels as k; print(gpu_lstm.__file__, k.__file__, sep='\\n')"
    for file in run([str(python), "-c", code], cwd=tmp_path).stdout.splitlines():
        assert Path(file).is_relative_to(folder if install == "wheel" else source)
    header = "def mistaken(lstm: gpu_lstm.LSTM, stack: gpu_lstm.StackedLSTM, x: torch.Tensor, packed: PackedSequence):"
    imports = "import torch, gpu_lstm\nfrom torch.nn.utils.rnn import PackedSequence"
    (tmp_path / "program.py").write_text(PROGRAM.read_text())
    (tmp_path / "mistakes.py").write_text("\n    ".join([f"{imports}\n{header}", *MISTAKES]) + "\n")
    command = [sys.executable, "-m", *checker.split(), interpreter, str(python), "program.py", "mistakes.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "program.py:" not in said.stdout, said.stdout
    found = {int(line) for line in re.findall(r"mistakes\.py:(\d+)(?::\d+)?(?: -|:) error", said.stdout)}
    missed = [mistake for line, mistake in enumerate(MISTAKES, start=4) if line not in found]
    assert not missed, f"{checker} does not detect {missed}\n{said.stdout}{said.stderr}"


def test_the_program_runs_and_is_over_all_of_the_public_api_which_dir_shows(capsys):
    runpy.run_path(str(PROGRAM), run_name="__main__")
    assert "torch.Size([5, 2, 3])" in capsys.readouterr().out
    for name in gpu_lstm.__all__:
        assert re.search(rf"\bgpu_lstm\.{name}\b", PROGRAM.read_text()), name
    assert sorted(name for name in dir(gpu_lstm) if not name.startswith("__")) == sorted(gpu_lstm.__all__)
    assert "__version__" in dir(gpu_lstm)
    assert get_args(BackendName) == tuple(backend.value for backend in gpu_lstm.Backend)


@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.StackedLSTM, gpu_lstm.LSTMCell], ids=lambda cls: cls.__name__)
def test_forward_says_what_it_accepts_and_raises(cls):
    said = vars(cls)["forward"].__doc__
    for name in inspect.signature(cls.forward).parameters:
        assert name == "self" or re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", said, re.MULTILINE), name
    assert all(title in said for title in ("Args:", "Returns:", "Raises:"))
