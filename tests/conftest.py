"""Options and the environment of the tests."""

import os

import pytest

# The tests run side by side, a process a core; torch reads it when it is imported, here and in processes of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():
    # The Triton kernels run in Triton's interpreter, which is chosen when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, rather than skip, what needs a GPU")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            if config.getoption("--require-gpu"):
                item.add_marker(pytest.mark.usefixtures("no_gpu_is_an_error"))
            else:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def no_gpu_is_an_error():
    pytest.fail("needs a CUDA device, and --require-gpu was given")


@pytest.fixture
def device() -> str:
    """Where the kernels run: CUDA if there is one, else the CPU, by the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def exact_float32_products():
    """Kernels take float32 products exactly, not in TF32, so that results can be held to float64's."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("gpu_lstm.precision._cudnn_takes_tf32", lambda: False)
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def host_or_card(request) -> str:
    """Where the kernels in CUDA C++ run: compiled by g++, or by NVRTC."""
    return request.param


@pytest.fixture
def nan_in_fresh_memory():
    """New tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
