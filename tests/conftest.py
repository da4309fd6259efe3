"""Options, fixtures and the environment of the tests."""

import dataclasses
import fcntl
import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

# The tests run side by side, one process per core. torch reads this when it is imported, here and in processes of
# tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses torch's deterministic mode
import torch

if "WITHOUT_ONEDNN" in os.environ:  # see `make test-cpus`
    torch.backends.mkldnn.enabled = False

if not torch.cuda.is_available():
    # The Triton kernels run in Triton's interpreter, which is chosen when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The rule decides which backend runs on a CPU, so that no test depends on a race.
    os.environ.setdefault("GPU_LSTM_RACE", "off")


ROOT = Path(__file__).parents[1]
BYTES_OF_A_WORKER = 4 << 30  # on a card: its context, the modules that Triton loads, and the tensors of most tests


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="an error where there is no GPU, not skipped tests")


def pytest_configure(config):
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        from gpu_lstm.__main__ import why_no_cuda

        raise pytest.UsageError(f"--require-gpu: {why_no_cuda()}")
    if torch.cuda.is_available() and config.option.log_level is None:
        config.option.log_level = "INFO"  # a test that fails shows which plans it ran
    if importlib.util.find_spec("triton"):
        try:
            import gpu_lstm.kernels.triton_rnn.features  # noqa: F401
        # An interpreter that does not work with this NumPy: every kernel's test would fail.
        except ImportError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(optionalhook=True)  # a hook of pytest-xdist, for -n auto
def pytest_xdist_auto_num_workers(config):
    """Return as many workers as the free memory of the card holds."""
    if torch.cuda.is_available():
        return max(1, min(os.cpu_count() or 1, torch.cuda.mem_get_info()[0] // BYTES_OF_A_WORKER))
    return None


def pytest_collection_modifyitems(config, items):
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else ()
        is_ours = "device" in item.fixturenames and "device" not in parameters  # the fixture below
        if is_ours or vars(item.module).keys() & {"DEVICE", "PLACES", "every_backend"}:
            item.add_marker(pytest.mark.device)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """End a process in which the card has stopped working. It would fail all other tests, and faster than others pass.
    pytest-xdist starts another process for them."""
    result = yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.rand(1, device="cuda")  # this raises after a broken capture
        except RuntimeError as error:
            said = f"the card does not work in this process any more, after {item.nodeid}: {error}"
            if not hasattr(item.config, "workerinput"):
                pytest.exit(said, returncode=1)
            print(said, file=sys.stderr, flush=True)
            os._exit(1)
    return result


def pytest_collection_finish():
    gc.freeze()  # later collections skip everything that has been imported


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
        import triton.language as tl
        from concurrent_interpreter import make_types_once, prepared_once
        from memory_checks import check_interpreted_kernels
        from triton.runtime import interpreter

        check_interpreted_kernels()
        make_types_once()
        interpreter.GridExecutor.__call__ = prepared_once()(interpreter.GridExecutor.__call__)
        of_scalar = functools.cache(interpreter._get_np_dtype)  # it makes a table at each call
        interpreter._get_np_dtype = lambda t: (
            np.dtype(np.uint64) if isinstance(t.scalar, tl.pointer_type) else of_scalar(t.scalar)
        )
        # Otherwise the builder computes whether sums fit into 32 bits, and ignores the answer unless it debugs.
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@pytest.fixture(autouse=True, scope="session")
def kernels_are_given_what_they_expect():
    """Check, in every process of the tests, that a layer is given the tensors that its Problem describes."""
    if not importlib.util.find_spec("triton"):
        return
    from standing_in import assert_contract

    from gpu_lstm.kernels.layer import Layer

    def checked(run, gates, r):
        def wrapper(layer, *given, **options):
            assert_contract(layer, given[gates], given[r])
            return run(layer, *given, **options)

        return wrapper

    Layer.forward, Layer.backward = checked(Layer.forward, 0, 1), checked(Layer.backward, 3, 5)


@pytest.fixture(autouse=True)
def kernels_write_nowhere_else():
    """Check that kernels write inside their tensors. On a card a test has to ask for it: every launch is waited for, so
    that none is captured and no two run at once."""
    if (memory := sys.modules.get("gpu_lstm.kernels.memory")) is not None:
        memory._Checking.on = not torch.cuda.is_available()  # for all threads; autograd has one thread for each card


@pytest.fixture
def within_margins(kernels_write_nowhere_else):
    """Check the launches of this test on a card, too."""
    sys.modules["gpu_lstm.kernels.memory"]._Checking.on = True


@pytest.fixture
def device() -> str:
    """The device where the kernels run: CUDA if available, else the CPU, in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def exact_float32_products():
    """Kernels compute float32 products exactly, not in TF32, so that results can be compared with float64."""
    # By torch's older switch, for all of cuDNN: torch.compile asks it, and refuses a mixture of both.
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def with_onednn(monkeypatch):
    """torch gives an LSTM on a CPU to oneDNN, even where all other tests run without oneDNN."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)


@pytest.fixture(autouse=True)
def decided_again():
    """Forget all decisions and seed torch, so that a stubbed card or choice does not outlast its test, and a test draws
    the same numbers whichever tests ran before."""
    torch.manual_seed(0)
    if (route := sys.modules.get("gpu_lstm.dispatch.route")) is not None:
        route.forget()


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path):
    """Start as on a new machine: nothing is cached, the environment chooses nothing, and no warning has been given.
    Return the cache's folder. It keeps functions that Numba compiled, since compiling takes seconds."""
    from gpu_lstm.call import choices
    from gpu_lstm.kernels import cache

    (compiled := cache.folder() / "compiled").mkdir(mode=0o700, parents=True, exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache.folder().mkdir(mode=0o700)
    (cache.folder() / "compiled").symlink_to(compiled)
    for name in (choices.BACKEND_VARIABLE, choices.RACE_VARIABLE, cache.SHARED):
        monkeypatch.delenv(name, raising=False)
    for function in (cache._read, cache.warn_once):
        function.cache_clear()
    return tmp_path / "gpu_lstm"


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name) returns a Mock that makes and records the calls of this function from now on."""

    def spy(owner, name):
        monkeypatch.setattr(owner, name, Mock(side_effect=getattr(owner, name)))
        return getattr(owner, name)

    return spy


@pytest.fixture
def launched(spy):
    """A Mock that makes and records the launches of Triton's kernels from now on."""
    from gpu_lstm.kernels.triton_rnn import launch

    return spy(launch, "launch_kernel")


@pytest.fixture
def an_h100(monkeypatch, nothing_cached):
    """A stubbed H100 on which no plan was measured or chosen yet, and on which all kernels load."""
    from standing_in import a_card

    a_card(monkeypatch)


@pytest.fixture
def card(monkeypatch):
    """The CPU as a card whose only plan is the step family's. The plan compiles, and is verified as on a card."""
    from standing_in import plans_are_verified_on_the_cpu

    plans_are_verified_on_the_cpu(monkeypatch)


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory) -> dict:
    """The JSON that compiling.py prints: few cases where slow tests are left out, more where versions.py asks for
    them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    how = "quick" if "not deep" in request.config.getoption("markexpr") else "usual"
    how = "whole" if "WHOLE_TABLE" in os.environ else how
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with open(base / "compiled.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait for the first
        if not (base / "compiled.json").exists():
            found = subprocess.check_output([sys.executable, ROOT / "tests/support/compiling.py", how], env=environment)
            (base / "compiled.json").write_bytes(found)
    return json.loads((base / "compiled.json").read_text())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def host_or_card(request) -> str:
    """The device of the kernels in CUDA C++: "cpu", where g++ compiles them, or "cuda", where NVRTC does."""
    return request.param


@pytest.fixture
def nan_in_fresh_memory():
    """New tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nothing_raced(monkeypatch, nothing_cached):
    """Backend 'auto' follows the rule for CPUs."""
    from gpu_lstm.call import choices

    monkeypatch.setenv(choices.RACE_VARIABLE, "off")
