"""Bad input is refused: in torch's own words where it has any, else with what was expected and what came.

And which backend is chosen, by whom, and what it says when it cannot run.
"""

import copy
import re
import warnings
from functools import partial

import pytest
import torch
from comparing import BACKENDS, PLACES
from torch import nn, tensor, zeros
from torch.nn.utils.rnn import pack_sequence

import gpu_lstm
from gpu_lstm import reference
from gpu_lstm.functional import lstm_layer

F64, F16, INT, META = torch.float64, torch.float16, torch.int64, "meta"


def error_of(call, *args, **kwargs):
    """(type, text) of the exception that a call raises, or None, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call(*args, **kwargs)
            error = None
        except Exception as e:
            error = type(e), str(e)
    return error, [(w.category, str(w.message)) for w in caught]


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def states(h, c=None, **kwargs):
    return zeros(h, **kwargs), zeros(h if c is None else c, **kwargs)


# Bad calls of LSTM(3, 4, ...): its other arguments, and the shapes of x, h and c.
FIRST, DEEP, BOTH, PROJECTED = dict(batch_first=True), dict(num_layers=2), dict(bidirectional=True), dict(proj_size=2)
LSTM_SHAPES = [
    # the rank of x, its features, no steps
    ({}, (3,)), ({}, (5, 2, 1, 3)), ({}, (5, 2, 4)), ({}, (5, 4)), (FIRST, (2, 5, 2)),
    ({}, (0, 2, 3)), (FIRST, (2, 0, 3)), ({}, (0, 3)), (DEEP, (0, 0, 3)),
    # the rank of states
    ({}, (5, 2, 3), (2, 4), (2, 4)), ({}, (5, 2, 3), (1, 2, 4), (2, 4)), ({}, (5, 3), (1, 1, 4), (1, 1, 4)),
    # their widths and batch
    ({}, (5, 2, 3), (1, 2, 5), (1, 2, 4)), ({}, (5, 2, 3), (1, 2, 4), (1, 2, 5)),
    ({}, (5, 2, 3), (1, 3, 4), (1, 2, 4)), ({}, (5, 2, 3), (1, 2, 4), (1, 3, 4)),
    (FIRST, (2, 5, 3), (2, 1, 4), (2, 1, 4)), (FIRST, (2, 5, 3), (1, 5, 4), (1, 5, 4)),
    ({}, (5, 3), (2, 4), (1, 4)), (FIRST, (5, 3), (1, 4), (1, 5)),
    # states of one layer, of one direction, h not projected, c projected
    (DEEP, (5, 2, 3), (1, 2, 4), (1, 2, 4)), (BOTH, (5, 2, 3), (1, 2, 4), (1, 2, 4)),
    (PROJECTED, (5, 2, 3), (1, 2, 4), (1, 2, 4)), (PROJECTED, (5, 2, 3), (1, 2, 2), (1, 2, 2)),
    # other than two states
    ({}, (5, 2, 3), (1, 2, 4)), ({}, (5, 2, 3), (1, 2, 4), (1, 2, 4), (1, 2, 4)),
]  # fmt: skip
LSTM_CALLS = {
    "input None": lambda: (None,),
    "input a list": lambda: ([[1.0, 2.0, 3.0]],),
    "float64 input": lambda: (zeros(5, 2, 3, dtype=F64),),
    "float16 input": lambda: (zeros(5, 2, 3, dtype=F16),),
    "int64 input": lambda: (zeros(5, 2, 3, dtype=INT),),
    "hx a tensor": lambda: (zeros(5, 2, 3), zeros(1, 2, 4)),
    "hx of None": lambda: (zeros(5, 2, 3), (None, None)),
    "meta input": lambda: (zeros(5, 2, 3, device=META),),
    "meta hx": lambda: (zeros(5, 2, 3), states((1, 2, 4), device=META)),
    "meta h": lambda: (zeros(5, 2, 3), (zeros(1, 2, 4, device=META), zeros(1, 2, 4))),
    "meta c": lambda: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4, device=META))),
}
# Of LSTMCell(3, 4): the rank of x and its features, the rank of states, batch and widths, unbatched, other than two.
CELL_SHAPES = [
    ((2, 1, 3),), ((),), ((2, 5),), ((5,),), ((2, 3), (1, 2, 4), (2, 4)), ((2, 3), (2, 4), ()),
    ((2, 3), (3, 4), (2, 4)), ((2, 3), (2, 4), (3, 4)), ((2, 3), (2, 5), (2, 4)), ((2, 3), (2, 4), (2, 5)),
    ((3,), (5,), (5,)), ((3,), (2, 4), (2, 4)), ((2, 3), (4,), (4,)), ((2, 3), (2, 4), (4,)),
    ((2, 3), (2, 4)), ((2, 3), (2, 4), (2, 4), (2, 4)),
]  # fmt: skip
# For these torch's text is that of the library that computes, or of a product deep inside.
BADLY_WORDED_CALLS = {
    **{f"LSTM {name} {dtype}": (nn.LSTM, lambda name=name, dtype=dtype: (zeros(5, 2, 3), tuple(
        zeros(1, 2, 4, dtype=dtype if k in name else None) for k in "hc"))) for name in ("h", "c", "h and c")
        for dtype in (F64, F16)},
    "cell float64": (nn.LSTMCell, lambda: (zeros(2, 3, dtype=F64),)),
    "cell int64": (nn.LSTMCell, lambda: (zeros(2, 3, dtype=INT),)),
    "cell hx float64": (nn.LSTMCell, lambda: (zeros(2, 3), states((2, 4), dtype=F64))),
    "cell meta input": (nn.LSTMCell, lambda: (zeros(2, 3, device=META),)),
    "cell meta hx": (nn.LSTMCell, lambda: (zeros(2, 3), states((2, 4), device=META))),
}  # fmt: skip


def call_of(x, *hx):
    """The arguments of a call, by their shapes."""
    return lambda: (zeros(x), tuple(map(zeros, hx))) if hx else (zeros(x),)


BAD_CALLS = {f"LSTM {shapes}": (nn.LSTM, shapes[0], call_of(*shapes[1:])) for shapes in LSTM_SHAPES}
BAD_CALLS |= {f"LSTM {name}": (nn.LSTM, {}, call) for name, call in LSTM_CALLS.items()}
BAD_CALLS |= {"LSTM meta weights": (nn.LSTM, dict(device=META), call_of((5, 2, 3)))}
BAD_CALLS |= {f"cell {shapes}": (nn.LSTMCell, {}, call_of(*shapes)) for shapes in CELL_SHAPES}
BAD_CALLS |= {"cell None": (nn.LSTMCell, {}, lambda: (None,)), "cell ()": (nn.LSTMCell, {}, lambda: (zeros(2, 3), ()))}


def errors(cls, arguments, call, backend, device):
    """Of torch's module and of ours, which it leaves as it was."""
    with torch.device(device):
        ours = getattr(gpu_lstm, cls.__name__)(3, 4, **arguments, backend=backend)
        before = {name: copy.copy(value) for name, value in ours.__dict__.items()}
        (expected, _), (got, _) = (error_of(module, *call()) for module in (cls(3, 4, **arguments), ours))
    assert expected is not None
    assert ours.__dict__.keys() == before.keys()
    assert all(p is before["_parameters"][name] for name, p in ours.named_parameters())
    return expected, got


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_calls_raise_what_torch_raises(backend, bad, device):
    expected, got = errors(*BAD_CALLS[bad], backend, device)
    assert got == expected


@pytest.mark.parametrize("bad", BADLY_WORDED_CALLS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_bad_calls_raise_an_error_of_the_same_type(backend, bad, device):
    cls, call = BADLY_WORDED_CALLS[bad]
    expected, got = errors(cls, {}, call, backend, device)
    assert got[0] is expected[0]
    assert got == expected or backend == "reference"


def packed(*features, steps=(5, 3), dtype=None):
    return pack_sequence([zeros(n, *features, dtype=dtype) for n in steps])


@pytest.mark.parametrize("bad", [
    (packed(4),), (packed(3, dtype=F64),), (packed(3), states((1, 3, 4))), (packed(3), states((1, 2, 5), (1, 2, 4))),
    (packed(3), states((2, 2, 4))), (packed(3), states((2, 4))), (packed(3), states((1, 2, 4), dtype=F64)),
], ids=["features", "float64", "hx batch", "hx width", "hx rows", "hx 2-D", "hx float64"])  # fmt: skip
def test_bad_packed_calls(bad):
    """On the reference they are refused as padded ones are: torch's text is that of a product deep inside."""
    theirs, _ = error_of(nn.LSTM(3, 4), *bad)
    assert theirs is not None
    assert error_of(gpu_lstm.LSTM(3, 4, backend="torch"), *bad)[0] == theirs
    with pytest.raises((RuntimeError, ValueError), match=r"input.size\(-1\)|dtype|Expected hidden\[0\] size"):
        gpu_lstm.LSTM(3, 4, backend="reference")(*bad)


WEIGHTS, BOOL = (zeros(16, 3), zeros(16, 4)), torch.bool


# Bad arguments of the constructors


@pytest.mark.parametrize(("cls", "name", "size", "text"), [
    (gpu_lstm.LSTM, "weight_hh_l0", (16, 3), "Expected weight_hh size (16, 4), got [16, 3]"),
    (gpu_lstm.LSTM, "weight_ih_l0", (12, 4), "Expected weight_ih size (16, 3), got [12, 4]"),
    (gpu_lstm.LSTM, "bias_hh_l0", (64,), "Expected bias_hh size (16,), got [64]"),
    (gpu_lstm.LSTM, "bias_ih_l0", (1,), "Expected bias_ih size (16,), got [1]"),  # which would be broadcast
    (gpu_lstm.LSTMCell, "weight_hh", (16, 5), "Expected weight_hh size (16, 4), got [16, 5]"),
    (gpu_lstm.LSTMCell, "bias_ih", (1,), "Expected bias_ih size (16,), got [1]"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_another_size_is_refused_at_the_next_call(backend, cls, name, size, text):
    """Assigned, or handed over by functional_call: kernels would read beyond it."""
    module = cls(3, 4, backend=backend, **PLACES[backend])
    like = next(module.parameters())
    x = like.new_zeros((2, 1, 3) if cls is gpu_lstm.LSTM else (1, 3))
    with raises(RuntimeError, text):
        torch.func.functional_call(module, {name: like.new_zeros(size)}, x)
    module(x)
    setattr(module, name, nn.Parameter(like.new_zeros(size)))
    with raises(RuntimeError, text):
        module(x)


OF_LSTM = dict(
    dropout=(1.5, -0.1, True, "0.5", "half", None), bias=(1, None), batch_first=(1, None), input_size=(3.0, 0, -1, "3"),
    hidden_size=(4.0, 0, -1, None), num_layers=(0, -1, 1.5, "2"), proj_size=(-1, 4, 5, 1.5, "1"),
    dtype=(INT, "float32"), device=("nowhere",),
)  # fmt: skip
OF_CELL = dict(input_size=(3.0, -1), hidden_size=("4", -4), dtype=(INT,), units=(4,))


@pytest.mark.parametrize(("cls", "name", "value"), [
    (cls, name, value) for cls, wrong in ((nn.LSTM, OF_LSTM), (nn.LSTMCell, OF_CELL)) for name in wrong
    for value in wrong[name]
], ids=str)  # fmt: skip
def test_bad_arguments_raise_what_torch_raises(cls, name, value):
    arguments = dict(input_size=3, hidden_size=4) | ({} if cls is nn.LSTMCell else dict(num_layers=2)) | {name: value}
    theirs = error_of(cls, **arguments)
    assert theirs[0] is not None
    assert error_of(getattr(gpu_lstm, cls.__name__), **arguments) == theirs
    assert cls is not nn.LSTM or error_of(gpu_lstm.compat.LSTM, **arguments) == theirs


@pytest.mark.parametrize("bad", [dict(input_size=3), dict(input_size=3, hidden_size=4, hidden=5)], ids=str)
def test_missing_and_unknown_arguments_raise_type_errors(bad):
    theirs, ours = error_of(nn.LSTM, **bad)[0], error_of(gpu_lstm.LSTM, **bad)[0]
    assert theirs[0] is ours[0] is TypeError
    assert ours[1] == theirs[1].replace("RNNBase", "LSTM")


def test_dropout_of_one_layer_warns_as_torch_does():
    error, theirs = error_of(nn.LSTM, 3, 4, dropout=0.5)
    assert error is None
    assert len(theirs) == 1
    assert error_of(gpu_lstm.LSTM, 3, 4, dropout=0.5) == (None, theirs)
    assert error_of(gpu_lstm.StackedLSTM, 3, [4], dropout=0.5) == (None, theirs)


# Lengths and resets

THREE_FEATURES = dict(
    LSTM=lambda: gpu_lstm.LSTM(3, 4), StackedLSTM=lambda: gpu_lstm.StackedLSTM(3, [4, 2]),
    triton=lambda: gpu_lstm.LSTM(3, 4, backend="triton"), lstm_layer=lambda: partial(lstm_layer, weights=WEIGHTS),
)  # fmt: skip
A_DTYPE = "lengths should be of dtype torch.int32 or torch.int64, got torch."


@pytest.mark.parametrize(("name", "value", "text"), [
    ("lengths", tensor([6, 2]), "Expected lengths from 0 to 5, the number of steps, got lengths from 2 to 6"),
    ("lengths", tensor([3, -1]), "Expected lengths from 0 to 5, the number of steps, got lengths from -1 to 3"),
    ("lengths", tensor([3]), "Expected lengths of shape [2], got [1]"),
    ("lengths", tensor(3), "Expected lengths of shape [2], got []"),
    ("lengths", tensor([[1, 2]]), "Expected lengths of shape [2], got [1, 2]"),
    ("lengths", tensor([1.0, 2.0]), A_DTYPE + "float32"),
    ("lengths", tensor([True, False]), A_DTYPE + "bool"),
    ("lengths", tensor([1, 2], dtype=torch.int16), A_DTYPE + "int16"),
    ("lengths", tensor([1, 2], device=META), "Expected lengths on cpu, where the input is, got meta"),
    ("lengths", [5, 2], "lengths should be a tensor, got: list"),
    ("resets", zeros(2, 5, dtype=BOOL), "Expected resets of shape [5, 2], got [2, 5]"),
    ("resets", zeros(5, dtype=BOOL), "Expected resets of shape [5, 2], got [5]"),
    ("resets", zeros(5, 2, 1, dtype=BOOL), "Expected resets of shape [5, 2], got [5, 2, 1]"),
    ("resets", zeros(5, 2), "resets should be of dtype torch.bool, got torch.float32"),
    ("resets", zeros(5, 2, dtype=torch.uint8), "resets should be of dtype torch.bool, got torch.uint8"),
    ("resets", zeros(5, 2, dtype=BOOL, device=META), "Expected resets on cpu, where the input is, got meta"),
    ("resets", 3, "resets should be a tensor, got: int"),
], ids=lambda value: str(value)[-40:])  # fmt: skip
@pytest.mark.parametrize("what", THREE_FEATURES)
def test_wrong_lengths_and_resets(what, name, value, text):
    with raises(TypeError if "should be a tensor" in text else ValueError, text):
        THREE_FEATURES[what]()(zeros(5, 2, 3), **{name: value})


# Which backend. With float64, "triton" is told apart from the rest by its TypeError.

CALLABLES = dict(
    LSTM=lambda **kwargs: gpu_lstm.LSTM(3, 4, dtype=F64, **kwargs)(zeros(5, 2, 3, dtype=F64)),
    LSTMCell=lambda **kwargs: gpu_lstm.LSTMCell(3, 4, dtype=F64, **kwargs)(zeros(2, 3, dtype=F64)),
    StackedLSTM=lambda **kwargs: gpu_lstm.StackedLSTM(3, [4, 2], dtype=F64, **kwargs)(zeros(5, 2, 3, dtype=F64)),
    lstm_layer=lambda **kwargs: lstm_layer(zeros(5, 2, 3, dtype=F64), [w.double() for w in WEIGHTS], **kwargs),
)
every_callable = pytest.mark.parametrize("call", CALLABLES.values(), ids=CALLABLES)


def refuses_float64(name="triton"):
    return raises(TypeError, f"backend '{name}' takes float16, bfloat16 and float32, got torch.float64")


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


@every_callable
def test_with_ends_with_its_block(call, monkeypatch):
    monkeypatch.delenv("GPU_LSTM_BACKEND", raising=False)
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
    with pytest.warns(
        RuntimeWarning, match=r"^gpu_lstm.backend\('triton'\) chose nothing: write `with gpu_lstm.backend"
    ):
        gpu_lstm.backend("triton")

    @gpu_lstm.backend("triton")
    def decorated():
        with refuses_float64():
            CALLABLES["LSTM"]()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            decorated()
        block = gpu_lstm.backend("triton")
        with block, block:
            pass
        del block
        CALLABLES["LSTM"]()
