"""Which backend is chosen, by whom, and what it says when it cannot run; wrong calls are in test_wrong_calls.py.

With float64, "triton" is told apart from the rest by its TypeError.
"""

import warnings

import pytest
import torch
from torch import zeros

import gpu_lstm
from gpu_lstm.backends import reference
from gpu_lstm.functional import lstm_layer

F64 = torch.float64
WEIGHTS = zeros(16, 3, dtype=F64), zeros(16, 4, dtype=F64)
X = zeros(5, 2, 3, dtype=F64)
CALLABLES = dict(
    LSTM=lambda **kwargs: gpu_lstm.LSTM(3, 4, dtype=F64, **kwargs)(X),
    LSTMCell=lambda **kwargs: gpu_lstm.LSTMCell(3, 4, dtype=F64, **kwargs)(X[0]),
    StackedLSTM=lambda **kwargs: gpu_lstm.StackedLSTM(3, [4, 2], dtype=F64, **kwargs)(X),
    lstm_layer=lambda **kwargs: lstm_layer(X, WEIGHTS, **kwargs),
)
every_callable = pytest.mark.parametrize("call", CALLABLES.values(), ids=CALLABLES)


def refuses_float64(name="triton"):
    return pytest.raises(TypeError, match=f"^backend '{name}' supports .* and float32, got torch.float64$")


@every_callable
def test_who_chooses_the_backend(call, monkeypatch):
    """The argument before `with`, `with` before the environment, which is auto if empty."""
    layer, calls = reference.layer, []
    monkeypatch.setattr(reference, "layer", lambda *given, **options: calls.append(1) or layer(*given, **options))

    def by_reference(**arguments) -> bool:
        calls.clear()
        call(**arguments)
        return bool(calls)

    for backend in ("triton", "cupy", gpu_lstm.Backend.TRITON, gpu_lstm.Backend.CUPY):
        with refuses_float64(gpu_lstm.Backend(backend).value):
            call(backend=backend)
    monkeypatch.setenv("GPU_LSTM_BACKEND", "triton")
    with refuses_float64():
        call()
    with gpu_lstm.backend("reference"):
        assert by_reference()
    with gpu_lstm.backend(gpu_lstm.Backend.TRITON):
        for backend in ("torch", "auto", "reference"):  # of which auto is torch on the CPU
            assert by_reference(backend=backend) is (backend == "reference")
    monkeypatch.setenv("GPU_LSTM_BACKEND", "reference")
    assert by_reference()
    with gpu_lstm.backend("triton"), refuses_float64():
        call()
    with gpu_lstm.backend("torch"), refuses_float64():
        call(backend="triton")
    monkeypatch.setenv("GPU_LSTM_BACKEND", "")
    assert not by_reference()


def test_with_ends_with_its_block(monkeypatch):
    monkeypatch.delenv("GPU_LSTM_BACKEND", raising=False)
    call = CALLABLES["LSTM"]
    with gpu_lstm.backend("triton"):
        with gpu_lstm.backend("torch"):
            call()
        with refuses_float64():
            call()
        with pytest.raises(ValueError, match="unknown backend 'none'"), gpu_lstm.backend("none"):
            pytest.fail("the block was entered")
        with refuses_float64():
            call()
    call()
    with pytest.raises(ZeroDivisionError), gpu_lstm.backend("triton"):
        raise ZeroDivisionError
    call()


def test_a_backend_that_is_chosen_without_with_is_told():
    words = r"^gpu_lstm.backend\('triton'\) chose nothing: write `with gpu_lstm.backend"
    with pytest.warns(RuntimeWarning, match=words):
        gpu_lstm.backend("triton")
    decorated = gpu_lstm.backend("triton")(CALLABLES["LSTM"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with refuses_float64():
                decorated()
        block = gpu_lstm.backend("triton")
        with block, block:
            pass
        del block
        CALLABLES["LSTM"]()
