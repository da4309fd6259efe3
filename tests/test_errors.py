"""Bad input is refused: in torch.nn.LSTM's own words where it has any, else with what was expected and what came.

And which backend is chosen, by whom, and what it says when it cannot run.
"""

import os
import re
import subprocess
import sys
import textwrap
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import gpu_lstm
from gpu_lstm.functional import lstm_layer

BACKENDS = ("torch", "reference", "triton")


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


# Bad calls: the arguments of the constructor after input_size=3 and hidden_size=4, and of the call, from `zeros`.

BAD_CALLS = {
    "input 1-D": ({}, lambda zeros: (zeros(3),)),
    "input 4-D": ({}, lambda zeros: (zeros(5, 2, 1, 3),)),
    "input None": ({}, lambda zeros: (None,)),
    "input a list": ({}, lambda zeros: ([[1.0, 2.0, 3.0]],)),
    "features": ({}, lambda zeros: (zeros(5, 2, 4),)),
    "features unbatched": ({}, lambda zeros: (zeros(5, 4),)),
    "features batch_first": (dict(batch_first=True), lambda zeros: (zeros(2, 5, 2),)),
    "float64 input": ({}, lambda zeros: (zeros(5, 2, 3).double(),)),
    "float16 input": ({}, lambda zeros: (zeros(5, 2, 3).half(),)),
    "int64 input": ({}, lambda zeros: (zeros(5, 2, 3).long(),)),
    "no steps": ({}, lambda zeros: (zeros(0, 2, 3),)),
    "no steps batch_first": (dict(batch_first=True), lambda zeros: (zeros(2, 0, 3),)),
    "no steps unbatched": ({}, lambda zeros: (zeros(0, 3),)),
    "no steps nor sequences": (dict(num_layers=2), lambda zeros: (zeros(0, 0, 3),)),
    "hx 2-D": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(2, 4), zeros(2, 4)))),
    "c 2-D": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(2, 4)))),
    "hx 3-D unbatched": ({}, lambda zeros: (zeros(5, 3), (zeros(1, 1, 4), zeros(1, 1, 4)))),
    "h width": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 5), zeros(1, 2, 4)))),
    "c width": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 5)))),
    "h batch": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 3, 4), zeros(1, 2, 4)))),
    "c batch": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 3, 4)))),
    "hx batch_first": (dict(batch_first=True), lambda zeros: (zeros(2, 5, 3), (zeros(2, 1, 4), zeros(2, 1, 4)))),
    "hx of time": (dict(batch_first=True), lambda zeros: (zeros(2, 5, 3), (zeros(1, 5, 4), zeros(1, 5, 4)))),
    "hx of one layer": (dict(num_layers=2), lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4)))),
    "hx of one direction": (dict(bidirectional=True), lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4)))),
    "h not projected": (dict(proj_size=2), lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4)))),
    "c projected": (dict(proj_size=2), lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 2), zeros(1, 2, 2)))),
    "hx unbatched rows": ({}, lambda zeros: (zeros(5, 3), (zeros(2, 4), zeros(1, 4)))),
    "hx unbatched width": (dict(batch_first=True), lambda zeros: (zeros(5, 3), (zeros(1, 4), zeros(1, 5)))),
    "hx of one tensor": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4),))),
    "hx of three tensors": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4), zeros(1, 2, 4)))),
    "hx a tensor": ({}, lambda zeros: (zeros(5, 2, 3), zeros(1, 2, 4))),
    "hx of None": ({}, lambda zeros: (zeros(5, 2, 3), (None, None))),
    "meta input": ({}, lambda zeros: (zeros(5, 2, 3, device="meta"),)),
    "meta hx": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4, device="meta"), zeros(1, 2, 4, device="meta")))),
    "meta h": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4, device="meta"), zeros(1, 2, 4)))),
    "meta c": ({}, lambda zeros: (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4, device="meta")))),
    "meta weights": (dict(device="meta"), lambda zeros: (zeros(5, 2, 3),)),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_calls_raise_what_torch_raises(backend, bad, device):
    arguments, call = BAD_CALLS[bad]
    arguments = dict(device=device) | arguments
    inputs = call(_zeros_on(device))
    (theirs, _), (ours, _) = (
        error_of(module, *inputs)
        for module in (nn.LSTM(3, 4, **arguments), gpu_lstm.LSTM(3, 4, **arguments, backend=backend))
    )
    assert theirs is not None
    assert ours == theirs


def _zeros_on(default):
    return lambda *size, device=default: torch.zeros(*size, device=device)


@pytest.mark.parametrize("which", ["h", "c", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_another_dtype_raise_an_error_of_the_same_type(backend, dtype, which, device):
    """torch's text comes from the library that computes."""
    x = torch.zeros(5, 2, 3, device=device)
    hx = tuple(torch.zeros(1, 2, 4, device=device, dtype=dtype if which in (k, "both") else None) for k in "hc")
    (theirs, _), (ours, _) = (
        error_of(module.to(device), x, hx) for module in (nn.LSTM(3, 4), gpu_lstm.LSTM(3, 4, backend=backend))
    )
    assert theirs is not None
    assert ours[0] is theirs[0]


BAD_PACKED_CALLS = {
    "features": lambda: (pack_sequence([torch.zeros(5, 4), torch.zeros(3, 4)]),),
    "float64": lambda: (pack_sequence([torch.zeros(5, 3), torch.zeros(3, 3)]).double(),),
    "hx batch": lambda: (_packed(), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))),
    "hx width": lambda: (_packed(), (torch.zeros(1, 2, 5), torch.zeros(1, 2, 4))),
    "hx rows": lambda: (_packed(), (torch.zeros(2, 2, 4), torch.zeros(2, 2, 4))),
    "hx 2-D": lambda: (_packed(), (torch.zeros(2, 4), torch.zeros(2, 4))),
    "hx float64": lambda: (_packed(), (torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4).double())),
}


def _packed():
    return pack_sequence([torch.zeros(5, 3), torch.zeros(3, 3)])


@pytest.mark.parametrize("bad", BAD_PACKED_CALLS)
def test_bad_packed_calls_on_the_torch_backend_raise_what_torch_raises(bad):
    arguments = BAD_PACKED_CALLS[bad]()
    theirs, _ = error_of(nn.LSTM(3, 4), *arguments)
    ours, _ = error_of(gpu_lstm.LSTM(3, 4, backend="torch"), *arguments)
    assert theirs is not None
    assert ours == theirs


@pytest.mark.parametrize("bad", BAD_PACKED_CALLS)
def test_bad_packed_calls_on_the_reference_backend_are_refused_as_padded_ones_are(bad):
    """Here torch's text is that of a matrix product deep inside."""
    with pytest.raises((RuntimeError, ValueError), match=r"input.size\(-1\)|dtype|Expected hidden\[0\] size"):
        gpu_lstm.LSTM(3, 4, backend="reference")(*BAD_PACKED_CALLS[bad]())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_is_unchanged_after_errors(backend, device):
    torch.manual_seed(0)
    ours = gpu_lstm.LSTM(3, 4, num_layers=2, backend=backend, device=device)
    x = torch.randn(3, 2, 3, device=device)
    keys, weights, before = set(ours.__dict__), [p.detach().clone() for p in ours.parameters()], ours(x)[0]
    parameters = list(ours.parameters())
    zeros = _zeros_on(device)
    refused = [error_of(ours, *call(zeros))[0] for arguments, call in BAD_CALLS.values() if not arguments]
    assert None not in refused
    assert None not in [
        error_of(ours, x, lengths=torch.tensor([9, 1]))[0],
        error_of(ours, x, resets=torch.zeros(2, 3, dtype=torch.bool, device=device))[0],
    ]
    assert set(ours.__dict__) == keys
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(ours.parameters(), weights, strict=True))
    assert torch.equal(ours(x)[0], before)


BAD_ARGUMENTS = [
    dict(dropout=1.5, num_layers=2), dict(dropout=-0.1, num_layers=2), dict(dropout=True, num_layers=2),
    dict(dropout="0.5", num_layers=2), dict(dropout="half", num_layers=2), dict(dropout=None),
    dict(bias=1), dict(bias=None), dict(batch_first=1), dict(batch_first=None),
    dict(input_size=3.0), dict(input_size=0), dict(input_size=-1), dict(input_size="3"),
    dict(hidden_size=4.0), dict(hidden_size=0), dict(hidden_size=-1), dict(hidden_size=None),
    dict(num_layers=0), dict(num_layers=-1), dict(num_layers=1.5), dict(num_layers="2"),
    dict(proj_size=-1), dict(proj_size=4), dict(proj_size=5), dict(proj_size=1.5), dict(proj_size="1"),
    dict(dtype=torch.int64), dict(dtype="float32"), dict(device="nowhere"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ARGUMENTS, ids=str)
@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.compat.LSTM], ids=["LSTM", "compat"])
def test_bad_arguments_raise_what_torch_raises(cls, bad):
    arguments = dict(input_size=3, hidden_size=4) | bad
    theirs = error_of(nn.LSTM, **arguments)
    assert theirs[0] is not None
    assert error_of(cls, **arguments) == theirs


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


# Lengths and resets

THREE_FEATURES = dict(
    LSTM=lambda: gpu_lstm.LSTM(3, 4), StackedLSTM=lambda: gpu_lstm.StackedLSTM(3, [4, 2]),
    reference=lambda: gpu_lstm.LSTM(3, 4, backend="reference"), triton=lambda: gpu_lstm.LSTM(3, 4, backend="triton"),
    lstm_layer=lambda: partial(lstm_layer, weights=[torch.zeros(16, 3), torch.zeros(16, 4)]),
)  # fmt: skip


@pytest.mark.parametrize(("lengths", "text"), [
    (torch.tensor([6, 2]), "Expected lengths from 0 to 5, the number of steps, got lengths from 2 to 6"),
    (torch.tensor([3, -1]), "Expected lengths from 0 to 5, the number of steps, got lengths from -1 to 3"),
    (torch.tensor([3]), "Expected lengths of shape [2], got [1]"),
    (torch.tensor(3), "Expected lengths of shape [2], got []"),
    (torch.tensor([1, 2, 3]), "Expected lengths of shape [2], got [3]"),
    (torch.tensor([[1, 2]]), "Expected lengths of shape [2], got [1, 2]"),
    (torch.tensor([1.0, 2.0]), "lengths should be of dtype torch.int32 or torch.int64, got torch.float32"),
    (torch.tensor([True, False]), "lengths should be of dtype torch.int32 or torch.int64, got torch.bool"),
    (torch.tensor([1, 2], dtype=torch.int16), "lengths should be of dtype torch.int32 or torch.int64, got torch.int16"),
    (torch.tensor([1, 2], device="meta"), "Expected lengths on cpu, where the input is, got meta"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("what", THREE_FEATURES)
def test_wrong_lengths(what, lengths, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        THREE_FEATURES[what]()(torch.zeros(5, 2, 3), lengths=lengths)


@pytest.mark.parametrize(("resets", "text"), [
    (torch.zeros(2, 5, dtype=torch.bool), "Expected resets of shape [5, 2], got [2, 5]"),
    (torch.zeros(5, dtype=torch.bool), "Expected resets of shape [5, 2], got [5]"),
    (torch.zeros(4, 2, dtype=torch.bool), "Expected resets of shape [5, 2], got [4, 2]"),
    (torch.zeros(5, 2, 1, dtype=torch.bool), "Expected resets of shape [5, 2], got [5, 2, 1]"),
    (torch.zeros(5, 2), "resets should be of dtype torch.bool, got torch.float32"),
    (torch.zeros(5, 2, dtype=torch.uint8), "resets should be of dtype torch.bool, got torch.uint8"),
    (torch.zeros(5, 2, dtype=torch.bool, device="meta"), "Expected resets on cpu, where the input is, got meta"),
], ids=lambda value: str(value)[-40:])  # fmt: skip
@pytest.mark.parametrize("what", THREE_FEATURES)
def test_wrong_resets(what, resets, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        THREE_FEATURES[what]()(torch.zeros(5, 2, 3), resets=resets)


@pytest.mark.parametrize("value", [[5, 2], 3, "5"], ids=str)
@pytest.mark.parametrize("what", THREE_FEATURES)
def test_lengths_and_resets_that_are_no_tensors(what, value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"^lengths should be a tensor, got: {kind}$"):
        THREE_FEATURES[what]()(torch.zeros(5, 2, 3), lengths=value)
    with pytest.raises(TypeError, match=f"^resets should be a tensor, got: {kind}$"):
        THREE_FEATURES[what]()(torch.zeros(5, 2, 3), resets=value)


def test_shapes_of_lengths_and_resets_follow_those_of_the_input():
    lstm = gpu_lstm.LSTM(3, 4, batch_first=True)
    with pytest.raises(ValueError, match=re.escape("Expected resets of shape [2, 5], got [5, 2]")):
        lstm(torch.zeros(2, 5, 3), resets=torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=re.escape("Expected lengths of shape [2], got [5]")):
        lstm(torch.zeros(2, 5, 3), lengths=torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=re.escape("Expected resets of shape [5], got [5, 1]")):
        lstm(torch.zeros(5, 3), resets=torch.zeros(5, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=re.escape("Expected lengths of shape [], got [1]")):
        lstm(torch.zeros(5, 3), lengths=torch.tensor([3]))


@pytest.mark.parametrize("what", ["LSTM", "StackedLSTM", "reference", "triton"])
def test_lengths_together_with_a_packed_sequence(what):
    with pytest.raises(ValueError, match="lengths should not be given together with a PackedSequence"):
        THREE_FEATURES[what]()(_packed(), lengths=torch.tensor([5, 3]))


def test_resets_of_a_packed_sequence_have_the_padded_shape():
    resets = torch.zeros(8, dtype=torch.bool)
    with pytest.raises(ValueError, match=re.escape("Expected resets of shape [5, 2], got [8]")):
        gpu_lstm.LSTM(3, 4)(_packed(), resets=resets)
    with pytest.raises(ValueError, match=re.escape("Expected resets of shape [2, 5], got [8]")):
        gpu_lstm.LSTM(3, 4, batch_first=True)(_packed(), resets=resets)


# Which backend. With float64, "triton" is told apart from the rest by its TypeError.

CALLABLES = dict(
    LSTM=lambda **kwargs: gpu_lstm.LSTM(3, 4, dtype=torch.float64, **kwargs)(torch.zeros(5, 2, 3).double()),
    LSTMCell=lambda **kwargs: gpu_lstm.LSTMCell(3, 4, dtype=torch.float64, **kwargs)(torch.zeros(2, 3).double()),
    StackedLSTM=lambda **kwargs: gpu_lstm.StackedLSTM(3, [4, 2], dtype=torch.float64, **kwargs)(
        torch.zeros(5, 2, 3).double()
    ),
    lstm_layer=lambda **kwargs: lstm_layer(
        torch.zeros(5, 2, 3).double(), [torch.zeros(16, 3).double(), torch.zeros(16, 4).double()], **kwargs
    ),
)
every_callable = pytest.mark.parametrize("call", CALLABLES.values(), ids=CALLABLES)
NO_FLOAT64 = "^backend 'triton' takes float16, bfloat16 and float32, got torch.float64$"


@pytest.mark.parametrize("backend", ["triton", "cupy", gpu_lstm.Backend.TRITON, gpu_lstm.Backend.CUPY])
@every_callable
def test_backends_with_kernels_take_no_float64(call, backend, monkeypatch):
    monkeypatch.delenv("GPU_LSTM_BACKEND", raising=False)
    name = gpu_lstm.Backend(backend).value
    text = f"backend '{name}' takes float16, bfloat16 and float32, got torch.float64"
    with pytest.raises(TypeError, match=f"^{text}$"):
        call(backend=backend)


@every_callable
def test_the_environment_chooses(call, monkeypatch):
    monkeypatch.setenv("GPU_LSTM_BACKEND", "triton")
    with pytest.raises(TypeError, match=NO_FLOAT64):
        call()
    monkeypatch.setenv("GPU_LSTM_BACKEND", "reference")
    call()


@every_callable
def test_with_comes_before_the_environment(call, monkeypatch):
    monkeypatch.setenv("GPU_LSTM_BACKEND", "triton")
    with gpu_lstm.backend("reference"):
        call()
    monkeypatch.setenv("GPU_LSTM_BACKEND", "reference")
    with gpu_lstm.backend("triton"), pytest.raises(TypeError, match=NO_FLOAT64):
        call()


@every_callable
def test_the_argument_comes_before_with(call, monkeypatch):
    monkeypatch.setenv("GPU_LSTM_BACKEND", "triton")
    with gpu_lstm.backend(gpu_lstm.Backend.TRITON):
        call(backend="torch")
    with gpu_lstm.backend("torch"), pytest.raises(TypeError, match=NO_FLOAT64):
        call(backend="triton")


@every_callable
def test_with_ends_with_its_block(call, monkeypatch):
    monkeypatch.delenv("GPU_LSTM_BACKEND", raising=False)
    with gpu_lstm.backend("triton"):
        with gpu_lstm.backend("torch"):
            call()
        with pytest.raises(TypeError, match=NO_FLOAT64):
            call()
        with pytest.raises(ValueError, match="unknown backend 'none'"), gpu_lstm.backend("none"):
            pytest.fail("the block was entered")
        with pytest.raises(TypeError, match=NO_FLOAT64):
            call()
    call()
    with pytest.raises(ZeroDivisionError), gpu_lstm.backend("triton"):
        raise ZeroDivisionError
    call()


def test_auto_is_torch_on_the_cpu(monkeypatch):
    monkeypatch.delenv("GPU_LSTM_BACKEND", raising=False)
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(3, 4, 2), gpu_lstm.LSTM(3, 4, 2, backend="auto")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)
    with gpu_lstm.backend("reference"):  # an argument "auto" is a choice too
        assert torch.equal(ours(x)[0], theirs(x)[0])
    assert torch.equal(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("name", ["cuda", "Triton", "", 1, None])
def test_unknown_backends(name, monkeypatch):
    text = f"unknown backend {name!r}; expected one of 'auto', 'triton', 'cupy', 'torch', 'reference'"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"), gpu_lstm.backend(name):
        pytest.fail("the block was entered")
    if name is not None:
        for cls in (gpu_lstm.LSTM, gpu_lstm.LSTMCell):
            with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
                cls(3, 4, backend=name)
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            gpu_lstm.StackedLSTM(3, [4], backend=name)
    if isinstance(name, str) and name:  # an empty variable counts as unset
        monkeypatch.setenv("GPU_LSTM_BACKEND", name)
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            gpu_lstm.LSTM(3, 4)(torch.zeros(5, 2, 3))


@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.LSTMCell])
def test_explicit_cupy_on_cpu_tensors_says_why_it_cannot_run(cls):
    """Without CuPy it names what to install, with CuPy it asks for CUDA tensors."""
    with pytest.raises((ImportError, RuntimeError), match=r"^backend 'cupy' (needs CuPy and NVRTC|takes CUDA tensors)"):
        cls(3, 4, backend="cupy")(torch.zeros(2, 3))


# What needs an interpreter of its own


def in_a_fresh_interpreter(code: str) -> None:
    """Run `code`, without TRITON_INTERPRET and with no backend chosen."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "GPU_LSTM_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_explicit_triton_on_cpu_tensors_says_why_it_cannot_run():
    pytest.importorskip("triton")
    in_a_fresh_interpreter("""
        import torch, gpu_lstm
        for module, x in (
            (gpu_lstm.LSTM(3, 4, backend="triton"), torch.zeros(5, 2, 3)),
            (gpu_lstm.LSTMCell(3, 4, backend="triton"), torch.zeros(2, 3)),
        ):
            try:
                module(x)
            except RuntimeError as error:
                assert str(error) == (
                    "backend 'triton' takes CUDA tensors, got cpu; with TRITON_INTERPRET=1 in the environment "
                    "it runs CPU tensors in Triton's interpreter"
                ), error
            else:
                raise AssertionError("no error")
        assert gpu_lstm.LSTM(3, 4)(torch.zeros(5, 2, 3))[0].shape == (5, 2, 4)
    """)


def test_without_triton_and_cupy_everything_else_works():
    in_a_fresh_interpreter("""
        import sys
        sys.modules["triton"] = sys.modules["cupy"] = None
        import torch, gpu_lstm
        x = torch.randn(5, 2, 3, requires_grad=True)
        theirs = torch.nn.LSTM(3, 4)
        expected, _ = theirs(x)
        model = gpu_lstm.convert(torch.nn.Sequential(theirs))
        assert type(model[0]) is gpu_lstm.LSTM
        for backend in ("auto", "torch", "reference"):
            with gpu_lstm.backend(backend):
                output, _ = model(x)
                ragged, _ = model[0](x, lengths=torch.tensor([5, 3]), resets=torch.zeros(5, 2, dtype=torch.bool))
                stacked, _ = gpu_lstm.StackedLSTM(3, [4, 2])(x)
                gpu_lstm.LSTMCell(3, 4)(x[0])
                (output.sum() + ragged.sum() + stacked.sum()).backward()
            torch.testing.assert_close(output, expected)
        for backend, text in (
            ("triton", "backend 'triton' cannot be imported: "), ("cupy", "backend 'cupy' needs CuPy and NVRTC: "),
        ):
            try:
                gpu_lstm.LSTM(3, 4, backend=backend)(x)
            except ImportError as error:
                assert str(error).startswith(text), error
            else:
                raise AssertionError("no error")
    """)
