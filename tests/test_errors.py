"""Which backend is chosen, by whom, and what it says when it cannot run: with float64 "triton" raises a TypeError."""

import contextlib
import importlib.util
import inspect
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from standing_in import CUDA, the_cpu_is_a_card
from test_first_call import selected
from torch import zeros
from torch.utils.flop_counter import FlopCounterMode

import gpu_lstm
from gpu_lstm.backends import reference
from gpu_lstm.call import choices
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.dispatch.available import why_unavailable
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels import cupy_rnn, triton_rnn
from gpu_lstm.kernels.triton_rnn import features, launch

F64 = torch.float64
X, *WEIGHTS = (zeros(size, dtype=F64) for size in ((5, 2, 3), (16, 3), (16, 4)))
CALLABLES = dict(
    LSTM=lambda **kwargs: gpu_lstm.LSTM(3, 4, dtype=F64, **kwargs)(X),
    LSTMCell=lambda **kwargs: gpu_lstm.LSTMCell(3, 4, dtype=F64, **kwargs)(X[0]),
    StackedLSTM=lambda **kwargs: gpu_lstm.StackedLSTM(3, [4, 2], dtype=F64, **kwargs)(X),
    lstm_layer=lambda **kwargs: lstm_layer(X, WEIGHTS, **kwargs),
)


def refuses_float64(name="triton"):
    return pytest.raises(TypeError, match=f"^backend '{name}' supports .* and float32, got torch.float64$")


@pytest.mark.parametrize("call", CALLABLES.values(), ids=CALLABLES)
def test_what_chooses_the_backend(call, monkeypatch):
    """The argument overrides `with`, and `with` the environment, which means auto if empty."""
    layer = Mock(side_effect=reference.layer_by_reference)
    monkeypatch.setattr(reference, "layer_by_reference", layer)

    def by_reference(**arguments) -> bool:
        layer.reset_mock()
        call(**arguments)
        return layer.called

    for backend in ("triton", gpu_lstm.Backend.CUPY):
        with refuses_float64(gpu_lstm.Backend(backend).value):
            call(backend=backend)
    monkeypatch.setenv("GPU_LSTM_BACKEND", "triton")
    with refuses_float64():
        call()
    assert gpu_lstm.backend("reference")(by_reference)()
    for backend in ("torch", "auto", "reference"):  # of which auto is torch on the CPU
        found = gpu_lstm.backend(gpu_lstm.Backend.TRITON)(by_reference)(backend=backend)
        assert found is (backend == "reference")
    monkeypatch.setenv("GPU_LSTM_BACKEND", "reference")
    assert by_reference()
    with gpu_lstm.backend("torch"), refuses_float64():
        call(backend="triton")
    monkeypatch.setenv("GPU_LSTM_BACKEND", "")
    assert not by_reference()


def test_a_backend_that_is_chosen_without_with_is_told():
    with pytest.warns(RuntimeWarning, match=r"^gpu_lstm.backend\('triton'\) chose nothing: write `with gpu_lstm.backe"):
        gpu_lstm.backend("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decorated = gpu_lstm.backend("triton")(CALLABLES["LSTM"])
        for _ in range(2):
            with refuses_float64():
                decorated()
        block = gpu_lstm.backend("triton")
        with block, block:
            pass
        del block


def test_a_block_inside_a_compiled_function():
    """It chooses the graph's backend, which refuses what it does in eager mode; what is left out of the graph, too."""
    lstm, x = gpu_lstm.LSTM(3, 4), torch.randn(2, 1, 3)
    seen = []
    torch.compiler.reset()  # after an error a function is left out of graphs

    def inside(x, backend="reference"):
        with gpu_lstm.backend(backend):
            return lstm(x)[0]

    @torch.compiler.disable
    def left_out():
        seen.append(choices.requested_racing())

    def racing(x):
        with gpu_lstm.racing("off"):
            left_out()
        return x + 1

    def graph(module, _):
        [layer] = [node for node in module.graph.nodes if "gpu_lstm" in str(node.target)]
        assert "reference" in layer.args
        return module

    torch.testing.assert_close(torch.compile(inside, backend=graph, fullgraph=True)(x), inside(x))
    lstm.double()
    with refuses_float64():
        torch.compile(inside, backend="eager")(x.double(), "triton")
    torch.compile(racing, backend="eager")(x)
    assert seen == [choices.Racing.OFF]


@pytest.mark.parametrize("way", ["eager", "compiled", "watched"])
def test_auto_skips_kernels_that_lack_something_without_a_name(way, monkeypatch):
    """An explicit choice is refused."""
    the_cpu_is_a_card(monkeypatch)
    monkeypatch.setattr(available, "why_unavailable", lambda name, *_: OSError() if name.value == "cupy" else None)
    monkeypatch.setattr(launch, "lacks", lambda problem: "projections" if problem.projected else None)
    lstm, x = gpu_lstm.LSTM(3, 8, proj_size=4), torch.randn(2, 1, 3)

    def in_a_mode(lstm):
        with FlopCounterMode(display=False):
            return lstm(x)

    runs = dict(
        eager=lambda lstm: lstm(x), compiled=torch.compile(lambda lstm: lstm(x), backend="eager", fullgraph=True),
        watched=in_a_mode,
    )  # fmt: skip
    expected = gpu_lstm.LSTM(3, 8, proj_size=4, backend="torch")
    expected.load_state_dict(lstm.state_dict())
    with gpu_lstm.racing("off"), torch.no_grad():
        torch.testing.assert_close(runs[way](lstm), expected(x))
        assert gpu_lstm.explain(lstm, x).others["triton"] == "it has no projections"
        lstm.backend = "triton"
        with pytest.raises(ValueError, match=r"^backend 'triton' has no projections$"):
            lstm(x)


def test_a_torch_for_amd_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for backend in (Backend.TRITON, Backend.CUPY):
        assert "ROCm" in str(why_unavailable(backend, CUDA, torch.float32))
    assert selected() is Backend.TORCH


@pytest.mark.parametrize("error", [OSError("libcuda.so"), RuntimeError("bad build"), AttributeError("no attribute")])
def test_a_broken_package_stops_nobody_who_did_not_ask_for_it(monkeypatch, nothing_cached, error):
    monkeypatch.setattr(available, "import_problem", inspect.unwrap(available.import_problem))
    for package in (cupy_rnn, triton_rnn):
        monkeypatch.setattr(package, "import_packages", Mock(side_effect=error))
    with pytest.warns(UserWarning, match=f"is installed, but fails, and is not used: .*{error}"):
        assert selected() is Backend.TORCH
    with pytest.raises(ImportError, match=str(error)):
        selected("triton")


@pytest.mark.skipif(not launch.INTERPRETED, reason="of Triton's interpreter")
@pytest.mark.parametrize(("triton", "numpy", "runs"), [
    ("3.6.0", "2.4.0", False), ("3.4.0", "2.10.1", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.0", True),
])  # fmt: skip
def test_an_interpreter_that_numpy_is_too_new_for_says_so_at_once(monkeypatch, triton, numpy, runs):
    """Rather than that only 0-dimensional arrays can be converted to Python scalars, in the middle of a kernel."""
    monkeypatch.setattr(features.triton, "__version__", triton)
    monkeypatch.setattr(np, "__version__", numpy)
    spec = importlib.util.spec_from_file_location("features_again", features.__file__)
    said = pytest.raises(ImportError, match=f"Triton {triton} needs NumPy below 2.4, got {numpy}: pip install")
    with contextlib.nullcontext() if runs else said:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
