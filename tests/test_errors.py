"""Which backend is chosen, by whom, and what it says when it cannot run: with float64 "triton" raises a TypeError."""

import warnings
from unittest.mock import Mock

import pytest
import torch
from torch import zeros

import gpu_lstm
from gpu_lstm.backends import reference
from gpu_lstm.functional import lstm_layer

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
    layer = Mock(side_effect=reference.run_layer)
    monkeypatch.setattr(reference, "run_layer", layer)

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
    lstm, x = gpu_lstm.LSTM(3, 4), torch.randn(2, 1, 3)

    def inside(x):
        with gpu_lstm.backend("reference"):
            return lstm(x)[0]

    torch.testing.assert_close(torch.compile(inside, backend="eager", fullgraph=True)(x), inside(x))
