"""What docs/production.md says: its image, without docker and without a network, its failures, its logs."""

import fcntl
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from installed import ROOT, checkout, empty_environment, run

pytest.importorskip("numba")
PAGE = (ROOT / "docs/production.md").read_text()
(DOCKERFILE,) = re.findall(r"```dockerfile\n(.*?)```", PAGE, flags=re.DOTALL)
LINES = [line.split(" ", 1) for line in DOCKERFILE.splitlines()]
HIDDEN = int(re.search(r"--hidden (\d+)$", DOCKERFILE, re.MULTILINE)[1])
NOT_TOLD = "GPU_LSTM_", "XDG_CACHE_HOME", "TRITON_", "NUMBA_", "PYTHON"  # of the environment of the tests
OF_TESTS = {name: value for name, value in os.environ.items() if not name.startswith(NOT_TOLD)}
OF_TESTS |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def image(tmp_path_factory) -> Path:
    """What stands for /, after COPY and RUN. Other workers wait for the first, since compiling takes long."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "image"
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "finished").exists():
            make_image(root)
            (root / "finished").touch()
    return root


def make_image(root: Path) -> None:
    """Each line of the Dockerfile that makes something, with /src and /opt in a folder."""
    shutil.rmtree(root, ignore_errors=True)
    python = empty_environment(root / "python")
    (pip := python.with_name("pip")).write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
    pip.chmod(0o755)
    assert ["COPY", "gpu_lstm /src"] in LINES
    checkout(root / "src")
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_ROOT_USER_ACTION": "ignore", "HOME": str(root)}
    path = {"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for line in [rest for word, rest in LINES if word == "RUN"]:
        done = run(["sh", "-ec", re.sub(r"(?<![\w/])/(?=src|opt)", f"{root}/", line)], cwd=root, env=offline | path)
        assert "gpu_lstm compile" not in line or not done.stderr, done.stderr


def in_process(code: str, *arguments: str, python: str | Path = sys.executable, **environment) -> subprocess.CompletedProcess:
    """A program, in which main(*words) is the command line."""
    program = "import sys\ndef main():\n    from gpu_lstm import __main__ as command\n"
    program += "    sys.exit(command.main(sys.argv[1:]))\n" + textwrap.dedent(code)
    told = {name: value for name, value in (OF_TESTS | environment).items() if value is not None}
    return subprocess.run([python, "-W", "error:gpu_lstm", "-c", program, *arguments], env=told, capture_output=True,
                          text=True, timeout=600)  # fmt: skip


FIRST_CALLS = """
    import itertools, logging, torch, gpu_lstm
    from gpu_lstm.backends import verify
    from gpu_lstm.kernels.numba_rnn import build
    logging.basicConfig(level="INFO")
    def verdict(layer, pass_, *_):
        raise AssertionError(f"verified again: {layer.problem} {pass_}")
    verify._verdict = verdict
    x, H = torch.randn(50, 5, 3), int(sys.argv[1])
    lengths, resets = torch.tensor([50, 3, 0, 9, 20]), torch.rand(50, 5) < 0.2
    for cell, both, backend, lost in itertools.product(["LSTM", "GRU", "SLSTM"], [False, True], [None, "numba"], range(3)):
        module = getattr(gpu_lstm, cell)(3, H, bidirectional=both, backend=backend)
        for given in ({}, dict(lengths=lengths), dict(resets=resets), dict(lengths=lengths, resets=resets)):
            with torch.no_grad():
                module(x, **given)
            y, state = module(x, **given)
            h_n = state if cell == "GRU" else state[0]
            sum(t.square().mean() for t in ([y], [h_n], [y, h_n])[lost]).backward()
    print([build.function(name).compiled.cache_hits for name in ("forward", "backward")])
"""


def test_in_the_image_a_first_training_and_a_first_inference_compile_and_verify_nothing(image):
    """As a user without a home, to whom the folder is read-only."""
    (shared,) = [rest.split("=")[1] for word, rest in LINES if word == "ENV"]
    folder = Path(f"{image}{shared}")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in before)
    serving = dict(GPU_LSTM_SHARED_CACHE=str(folder), HOME="/nonexistent", PYTHONPATH=None)
    done = in_process(FIRST_CALLS, str(HIDDEN), python=image / "python/bin/python", **serving)
    assert (done.returncode, done.stdout) == (0, "[1, 1]\n"), done.stderr
    assert "compiles" not in done.stderr
    assert re.search(rf"INFO:gpu_lstm:GRU 3 -> {HIDDEN}, .*: numba: asked for by the argument `backend`", done.stderr)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    arguments = re.search("gpu_lstm (compile .*)", DOCKERFILE)[1].split()
    check = in_process("main()", *arguments, python=image / "python/bin/python", **serving)
    assert (check.returncode, check.stderr) == (0, ""), check.stderr
    assert f"kept in {folder}/compiled/" in check.stdout


def test_a_size_that_was_not_named_is_verified_at_its_first_call(image):
    done = in_process(FIRST_CALLS, str(HIDDEN + 1), XDG_CACHE_HOME=str(image / "opt"))
    assert "verified again" in done.stderr
