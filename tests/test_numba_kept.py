"""Compiled loops that are kept on disk, and what happens where they cannot be kept."""

import inspect
import os
import re
import subprocess
import sys
import tempfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from standing_in import as_another_process

import gpu_lstm
from gpu_lstm.dispatch import available
from gpu_lstm.kernels import cache, numba_rnn
from gpu_lstm.kernels.numba_rnn import build, launch
from gpu_lstm.verification import verify

numba = pytest.importorskip("numba")
import llvmlite.binding  # noqa: E402

from gpu_lstm.kernels.numba_rnn import functions, steps  # noqa: E402

F32 = np.finfo(np.float32)
ELSEWHERE = [  # versions and CPUs for which nothing that is kept here counts
    (numba, "__version__", "0.99"), (llvmlite, "__version__", "0.99"),
    (llvmlite.binding, "get_host_cpu_name", lambda: "another"),
    (llvmlite.binding.FeatureMap, "flatten", lambda features: "+sse2"),
    (numba.config, "CPU_NAME", "generic"), (numba.config, "CPU_FEATURES", "+sse3"),
]  # fmt: skip


FORKED = """
import os, torch, gpu_lstm
torch.set_num_threads(2)
gru, x = gpu_lstm.GRU(3, 20, backend="numba"), torch.randn(60, 64, 3)
{before}
if (child := os.fork()) == 0:
    found, _ = gru(x)
    torch.set_num_threads(1)
    os._exit(not torch.equal(found, gru(x)[0]))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("before", ["gru(x)", "torch.ones(2**20).exp_()"], ids=["our loops", "torch's threads"])
def test_a_forked_process_computes(before):
    """OpenMP's threads are gone there, also if the loops are first imported after the fork."""
    subprocess.run([sys.executable, "-c", FORKED.format(before=before)], check=True, timeout=60, cwd=ROOT)


def test_functions_are_right_to_two_units_in_the_last_place():
    names = "exp", "sigmoid", "tanh", "above"

    @numba.njit
    def each(x, out):
        for j in range(len(x)):
            out[0, j], out[1, j] = functions.exp(x[j]), functions.sigmoid(x[j])
            out[2, j], out[3, j] = functions.tanh(x[j]), functions.above(x[j])

    x = np.concatenate([np.linspace(-80, 80, 20_001), np.logspace(-30, 0, 500), [0, np.inf, -np.inf, np.nan]]).astype(
        "f"
    )
    found, wide = np.empty((4, len(x)), np.float32), x.astype(float)
    each(x, found)
    with np.errstate(over="ignore"):
        exact = np.exp(wide), 1 / (1 + np.exp(-wide)), np.tanh(wide), np.log1p(np.exp(-abs(wide)))
    for name, ours, true in zip(names, found, exact):
        finite = np.isfinite(x)
        unit = F32.eps * np.maximum(abs(true), F32.tiny)
        assert (abs(ours - true) / unit)[finite].max() <= 2, name
        assert np.isnan(ours[-1]), name
    np.testing.assert_allclose(found[1:, -3:-1], [[1, 0], [1, -1], [0, 0]], atol=1e-37)  # of infinities


ONE_LOOP = """
import sys
from gpu_lstm.kernels.numba_rnn import build
build.function(sys.argv[1])
"""
BOTH_LOOPS = """
import torch, gpu_lstm
for kind in gpu_lstm.LSTM, gpu_lstm.GRU, gpu_lstm.SLSTM:
    grads, x = [], torch.randn(6, 3, 4)
    modules = [kind(4, 5, backend=backend) for backend in ("reference", "numba")]
    for module in modules:
        module.load_state_dict(modules[0].state_dict())
        y, _ = module(x)
        grads.append((y, *torch.autograd.grad(y.square().sum(), module.parameters())))
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected)
"""


def test_loops_that_other_processes_have_kept_are_linked_to_their_own_functions(tmp_path):
    """Numba numbers the functions of each process anew, so that names would be the same in the two loops."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c"]
    others = [subprocess.Popen([*command, ONE_LOOP, name], cwd=ROOT, env=environment) for name in launch.LOOPS]
    assert [other.wait(300) for other in others] == [0, 0]
    subprocess.run([*command, BOTH_LOOPS], check=True, timeout=300, cwd=ROOT, env=environment)


def little(address):
    """Compiled in no time."""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No function is compiled yet, and results go to a folder of this test."""
    monkeypatch.setattr(steps, "little", little, raising=False)
    monkeypatch.setattr(build, "function", inspect.unwrap(build.function))
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "cache")
    cache.warn_once.cache_clear()
    return tmp_path / "cache"


def test_a_compiled_function_is_kept_for_those_who_have_all_that_decides_it(fresh, monkeypatch, caplog):
    caplog.set_level("INFO", "gpu_lstm")

    def said():
        caplog.clear()
        build.function("little")(0)
        return "compiles" in caplog.text

    assert [said(), said()] == [True, False]
    with monkeypatch.context() as patch:  # of the same package in another place
        code = little.__code__.replace(co_filename=__file__.replace("test_", "oracle_"))
        patch.setattr(steps, "little", type(little)(code, globals()))
        assert not said()
    assert fresh.stat().st_mode & 0o077 == 0
    for owner, name, value in (*ELSEWHERE, (cache, "sources", lambda *_: "edited")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert said()
            assert "the loops in the cache are of another version or CPU" in caplog.text


def test_what_can_only_be_read_is_used_and_what_is_damaged_is_compiled_again(fresh, monkeypatch):
    temporary = fresh.parent / "temporary"

    def hits():
        return build.function("little").compiled.cache_hits

    assert [hits(), hits()] == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert hits() == 1
    temporary.mkdir()
    with monkeypatch.context() as patch:  # somebody else's
        patch.setenv(cache.SHARED, str(fresh))
        patch.setattr(cache, "folder", lambda: None)
        patch.setattr(tempfile, "tempdir", str(temporary))
        assert hits() == 1
        assert list(temporary.iterdir()) == []
    for file in fresh.rglob("*.nb[ci]"):
        file.write_bytes(b"")
    said = f"a compiled loop in {fresh}/compiled/.* is damaged, and is compiled again: EOFError"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.warns(UserWarning, match=said):
            assert hits() == 0
    cache.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=said):
        assert hits() == 0
    assert [hits(), hits()] == [0, 1]


def test_what_cannot_be_copied_is_named_with_the_variable_that_helps_and_is_compiled_and_kept(
    fresh, monkeypatch, tmp_path
):
    build.function("little")
    monkeypatch.setenv(cache.SHARED, str(fresh))
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "own")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    said = f"little loop in {fresh}/compiled/.* cannot be copied: No usable temporary directory .*; TMPDIR names "
    with pytest.warns(UserWarning, match=said) as caught:
        assert [build.function("little").compiled.cache_hits for _ in range(2)] == [0, 1]
    assert len(caught) == 1


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(("plant", "said"), [
    (lambda patch, _: patch.setattr(os, "access", lambda *_: False), "PermissionError: .* is read-only; XDG_CACHE"),
    (lambda patch, _: patch.setattr(build.Path, "touch", Mock(side_effect=FULL)), "No space left on device; X"),
    (lambda _, folder: folder.write_text("a file"), "File exists"),
], ids=["read-only", "full", "a file"])  # fmt: skip
def test_a_folder_that_takes_nothing_is_named_once_with_the_reason(fresh, monkeypatch, recwarn, plant, said):
    plant(monkeypatch, fresh)
    for _ in range(2):
        build.function("little")(0)
    (caught,) = recwarn
    assert re.search(f"the compiled little loop is not kept for the next process in .*: {said}", str(caught.message))
    assert not any(fresh.parent.rglob("*.nbi"))


def test_an_error_of_the_compiler_is_short_and_says_where(fresh, monkeypatch, recwarn):
    def wrong(address):
        address + "no number"

    monkeypatch.setattr(steps, "little", wrong)
    said = (
        r"^Numba .* cannot compile the little loop: No implementation of .* During: .* at .*steps.py \(\d+\) Please rep"
    )
    with pytest.raises(RuntimeError, match=said) as raised:
        build.function("little")
    assert len(str(raised.value)) < 500
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:gpu_lstm")
def test_a_verdict_ends_with_whatever_made_or_runs_the_loop(fresh, monkeypatch):
    """A right loop of another Numba or CPU is verified again, and one that was wrong there is not wrong here."""
    gru, x = gpu_lstm.GRU(3, 4, backend="numba"), torch.randn(9, 2, 3)
    verdicts = Mock(return_value="wrong")
    monkeypatch.setattr(verify, "_verdict", verdicts)

    def call():
        as_another_process()
        with torch.no_grad():
            gru(x)

    for number, (owner, name, value) in enumerate([(numba, "__version__", numba.__version__), *ELSEWHERE], start=1):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="no compiled loop can run this layer on this CPU: wrong"):
                    call()
        assert verdicts.call_count == number
    verdicts.return_value = "right"
    with monkeypatch.context() as patch:
        patch.setattr(numba, "__version__", "1.0")
        call()


@pytest.mark.parametrize(
    ("version", "error", "said"),
    [("0.60.0", None, "Numba 0.60.0 is too old"), (None, SystemError("broken"), "SystemError: broken")],
)  # fmt: skip
def test_without_a_numba_that_works_everything_is_as_before(version, error, said, monkeypatch, recwarn):
    def import_packages():
        raise error

    if version:
        monkeypatch.setattr(numba, "__version__", version)
        monkeypatch.setattr(numba, "version_info", numba.version_info._replace(short=(0, 60)))
    else:
        monkeypatch.setattr(numba_rnn, "import_packages", import_packages)
    monkeypatch.setattr(available, "import_problem", inspect.unwrap(available.import_problem))
    gru, x = gpu_lstm.GRU(3, 4), torch.randn(20, 2, 3)
    explained = gpu_lstm.explain(gru, x)
    assert (explained.backend, said in explained.others["numba"]) == ("torch", True)
    assert 'pip install "numba>=0.61"' in explained.others["numba"]
    gru(x)
    assert len([w for w in recwarn if "numba" in str(w.message)]) == (error is not None)
    with pytest.raises(ImportError, match="backend 'numba' needs Numba"):
        gpu_lstm.GRU(3, 4, backend="numba")(x)
