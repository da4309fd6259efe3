"""Wrong calls, by public name: the type of the error, its text, and that nothing is changed by the call.

A text says what was expected and what came. Where torch.nn.LSTM has the same call, type and text are its own: those
that only repeat torch are in test_errors.py, which asks torch itself.
"""

import copy
import math
import os
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn, tensor, zeros
from torch.nn.utils.rnn import pack_sequence

import bench.__main__
import gpu_lstm
import gpu_lstm.__main__
from gpu_lstm import backends, keras, races
from gpu_lstm.functional import lstm_layer

BOOL, F64, F16, META = torch.bool, torch.float64, torch.float16, "meta"
X, H, C = zeros(5, 2, 3), zeros(1, 2, 4), zeros(1, 2, 4)
WEIGHTS = zeros(16, 3), zeros(16, 4)
PEEPING = gpu_lstm.LSTM(3, 4, peepholes=True, layer_norm=True)
HASTE = dict(kernel=zeros(3, 16), recurrent_kernel=zeros(4, 16), bias=zeros(16))
PACKED = pack_sequence([zeros(5, 3), zeros(3, 3)])
PAIRS = [(zeros(2, 4), zeros(2, 4))] * 2  # of StackedLSTM(3, [4, 4])
NESTED = torch.nested.nested_tensor([zeros(4, 3), zeros(2, 3)], layout=torch.jagged)
NESTED_STEP = torch.nested.nested_tensor([zeros(3), zeros(2)], layout=torch.jagged)


def modules(backend):
    """Made once: a wrong call leaves them as they are."""
    drops = dict(recurrent_dropout=0.5, zoneout=0.5, weight_drop=0.5) if backend == "reference" else {}
    lstm = gpu_lstm.LSTM(3, 4, backend=backend)
    return SimpleNamespace(
        lstm=lstm,
        deep=gpu_lstm.LSTM(3, 4, 2, dropout=0.5, backend=backend, **drops or dict(weight_drop=0.5)),
        first=gpu_lstm.LSTM(3, 4, batch_first=True, backend=backend),
        both=gpu_lstm.LSTM(3, 4, bidirectional=True, backend=backend),
        compat=gpu_lstm.compat.LSTM(3, 4, backend=backend),
        stack=gpu_lstm.StackedLSTM(3, [4, 4], dropout=0.5, backend=backend, **drops or dict(weight_drop=0.5)),
        one=gpu_lstm.StackedLSTM(3, [4], backend=backend),
        cell=gpu_lstm.LSTMCell(3, 4, backend=backend),
        anyones=gpu_lstm.LSTM(3, 4),
        stream=gpu_lstm.Stream(lstm.eval(), 2),
        stream_of_stack=gpu_lstm.Stream(gpu_lstm.StackedLSTM(3, [4, 4], backend=backend), 2),
        dropping=nn.ModuleDict({name: gpu_lstm.LSTM(3, 4, 2, **{name: 0.5}) for name in DROPS}),
        backwards=keras.GoBackwards(gpu_lstm.LSTM(3, 4, batch_first=True, backend=backend)),
        without_bias=nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 4, bias=False)]),
        of_another=MyLSTM(3, 4),
        trace=gpu_lstm.trace(lstm, X),
        backend=backend,
    )  # fmt: skip


class MyLSTM(nn.LSTM):
    pass


def layer(m, **arguments):
    return lstm_layer(**dict(x=X, weights=WEIGHTS, backend=m.backend) | arguments)


def with_parameter(module, name, value):
    """A call with another tensor in the place of a parameter."""
    return torch.func.functional_call(module, {name: value}, zeros(2, 3) if isinstance(module, nn.RNNCellBase) else X)


def missing(module, name):
    """A call without a parameter, which comes back."""
    parameter = module._parameters[name]
    module._parameters[name] = None
    try:
        return module(X)
    finally:
        module._parameters[name] = parameter


def by(backend, module, *arguments, **options):
    with gpu_lstm.backend(backend):
        return module(*arguments, **options)


def in_environment(name, value, call):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(name, value)
        call()


DROPOUT = r"^dropout should be a number in range \[0, 1\] representing the probability of an element being zeroed$"
DROPPED = r"^{} should be a number in range \[0, 1\] representing the probability of an element being zeroed, got {}$"
ZONEOUT = (
    r"^zoneout should be a number in range \[0, 1\] representing the probability of an element staying as it was, or a "
    "pair of them for h and c, got {}$"
)
UNKNOWN = r"^unknown backend {}; expected one of 'auto', 'triton', 'cupy', 'torch', 'reference'$"
A_BOOL, AN_INT, A_TENSOR = (
    f"^{{}} should be {kind}, got: {{}}$" for kind in ("of type bool", "of type int", "a tensor")
)
DENSE = "^{}: Expected input to be a dense tensor, got {}$"
PAIR = r"^{}\(\): argument 'hx' \(position 2\) must be tuple of Tensors, not {}$"
A_LIST = r"^hx should be a list of pairs \(h, c\), one a layer, got{}: {}$"
SIZE = r"^Expected {} size {}, got {}$"
OTHER_DTYPE = r"^Input and {} tensors are not the same dtype, found input tensor with {} and {} tensor with {}$"
ELSEWHERE = "^Input and {} tensors are not at the same device, found input tensor at {} and {} tensor at {}$"
RATES = {
    "recurrent_dropout": (2.0, -0.5, "0.5", None, [0.1], math.nan, True),
    "weight_drop": (1.5, -1, (0.1, 0.2), "a"),
}
ZONEOUTS = (2.0, -0.5, [0.1, 0.1], (0.1,), (0.1, 0.2, 0.3), (0.1, 2), "0.1", None, math.nan, True, {"h": 0.1})
DROPS = ("dropout", "recurrent_dropout", "zoneout", "weight_drop")
NAMES = ("cuda", "Triton", "", 1, ["torch"])


def rates():
    """(name, wrong value, text) of what regularises."""
    for name, values in RATES.items():
        yield from ((name, value, DROPPED.format(name, re.escape(repr(value)))) for value in values)
    yield from (("zoneout", value, ZONEOUT.format(re.escape(repr(value)))) for value in ZONEOUTS)


CLASSES = {
    "LSTM": lambda **kwargs: gpu_lstm.LSTM(3, 4, **kwargs),
    "StackedLSTM": lambda **kwargs: gpu_lstm.StackedLSTM(**dict(input_size=3, hidden_sizes=[4, 4]) | kwargs),
    "compat.LSTM": lambda **kwargs: gpu_lstm.compat.LSTM(3, 4, **kwargs),
    "LSTMCell": lambda **kwargs: gpu_lstm.LSTMCell(3, 4, **kwargs),
}


def wrong_arguments():
    """(class, argument, wrong value, error, text)"""
    for cls in CLASSES:
        yield from ((cls, "backend", value, ValueError, UNKNOWN.format(".*")) for value in NAMES)
        for value in ("yes", 1, None) if cls != "LSTMCell" else ():
            for name in ("recompute", "peepholes"):
                yield cls, name, value, TypeError, A_BOOL.format(name, type(value).__name__)
        for value, error, got in (
            ("hh", TypeError, "str"),
            (1, TypeError, "int"),
            (("hh", "x"), ValueError, ".*'x'.*"),
        ):
            text = (
                "of type bool, or a tuple of names, got: " if error is TypeError else "a bool, or name some of .* got "
            )
            yield cls, "layer_norm", value, error, f"^layer_norm should be {text}{got}$"
    for cls in ("LSTM", "StackedLSTM"):
        yield from ((cls, name, value, ValueError, text) for name, value, text in rates())
    yield from (("compat.LSTM", name, value, ValueError, text) for name, value, text in [*rates()][:2])
    for name, value in dict(residual="no", bias=1, batch_first="no", bidirectional="no").items():
        yield "StackedLSTM", name, value, TypeError, A_BOOL.format(name, type(value).__name__)
    yield from (("StackedLSTM", "dropout", value, ValueError, DROPOUT) for value in (2.0, -0.5, "half", None, True))
    for value in (4, {4, 5}, "44", None, {4: 1}, 4.0, (size for size in (4, 5))):
        text = f"^hidden_sizes should be a sequence of ints, got: {type(value).__name__}$"
        yield "StackedLSTM", "hidden_sizes", value, TypeError, text
    for value in (2.0, None, "4", [4, 5]):
        text = AN_INT.format("hidden_size", type(value).__name__)
        yield "StackedLSTM", "hidden_sizes", [4, value], TypeError, text
    for value, text in (([], "^hidden_sizes must have at least one layer$"),
                        ([4, 0], "^hidden_size must be greater than zero$"),
                        ([4, -1], "^hidden_size must be greater than zero$")):  # fmt: skip
        yield "StackedLSTM", "hidden_sizes", value, ValueError, text
    yield "StackedLSTM", "input_size", 0, ValueError, "^input_size must be greater than zero$"
    yield "StackedLSTM", "input_size", "3", TypeError, AN_INT.format("input_size", "str")


def wrong_attributes():
    """(module, attribute, wrong value, error, text), set later."""
    for module in ("lstm", "stack"):
        yield from ((module, name, value, ValueError, text) for name, value, text in rates())
        yield from ((module, "dropout", value, ValueError, DROPOUT) for value in (2.0, -0.5, "half", None, [0.5]))
    for module in ("lstm", "stack", "cell", "compat"):
        yield module, "backend", "cuda", ValueError, UNKNOWN.format("'cuda'")
    for module, name in (("stack", "recompute"), ("stack", "residual"), ("compat", "recompute")):
        yield module, name, "yes", TypeError, A_BOOL.format(name, "str")


TAKERS = (  # of reset_states: name, call, and right ones, one a sequence
    ("LSTM", lambda m: lambda **options: m.lstm(X, **options), (H, C)),
    ("StackedLSTM", lambda m: lambda **options: m.stack(X, **options), PAIRS),
    ("lstm_layer", lambda m: lambda **options: layer(m, **options), PAIRS[0]),
)


def wrong_reset_states():
    """(name, call, wrong states, error, its text, what is wrong)."""
    (lstm, of_lstm, _), (stack, of_stack, _), (function, of_layer, _) = TAKERS
    sizes = r"^Expected {} of reset_states of size \[{}2, 4\], one a sequence, or \[{}5, 2, 4\], one a step, got {}$"
    dtype = "^Expected {} of reset_states of dtype torch.float32, got torch.{}$"
    a_pair = r"^reset_states should be a pair of tensors \(h, c\), got: {}$"
    yield lstm, of_lstm, (H, zeros(1, 2, 5)), ValueError, sizes.format("c", "1, ", "1, ", r"\[1, 2, 5\]"), "wide"
    yield lstm, of_lstm, (H[0], C), ValueError, sizes.format("h", "1, ", "1, ", r"\[2, 4\]"), "of no layer"
    yield lstm, of_lstm, (H.double(), C), ValueError, dtype.format("h", "float64"), "float64"
    yield lstm, of_lstm, (H, C.long()), ValueError, dtype.format("c", "int64"), "int64"
    yield lstm, of_lstm, (H.to(META), C), ValueError, "^Expected h of .* on cpu, .*, got meta$", "elsewhere"
    yield lstm, of_lstm, (H, None), TypeError, A_TENSOR.format("c of reset_states", "NoneType"), "None"
    yield lstm, of_lstm, torch.stack([H, C]), TypeError, a_pair.format("Tensor"), "a tensor"
    yield lstm, of_lstm, (H,), ValueError, r"^Expected reset_states of two states \(h, c\), got 1$", "one"
    yield function, of_layer, (H, C), ValueError, sizes.format("h", "", "", r"\[1, 2, 4\]"), "of a module"
    yield function, of_layer, 1, TypeError, a_pair.format("int"), "a number"
    yield (
        stack, of_stack, (H, C), TypeError, a_pair.replace("states", "states of layer 0").format("Tensor"), "torch's",
    )  # fmt: skip
    yield stack, of_stack, H, TypeError, r"^reset_states should be a list of pairs \(h, c\), got: Tensor$", "a tensor"
    yield stack, of_stack, PAIRS[:1], ValueError, "^Expected reset_states of 2 pairs, one a layer, got 1$", "few"
    yield (
        stack, of_stack, [PAIRS[0], (zeros(2, 4), zeros(2, 5))], ValueError,
        r"^Expected c of reset_states of layer 1 of size \[2, 4\], .* got \[2, 5\]$", "wide",
    )  # fmt: skip


CALLS = [
    *((f"{cls} {name}={value}".split(" at ")[0], error, text,
       lambda m, cls=cls, name=name, value=value: CLASSES[cls](**{name: value}))
      for cls, name, value, error, text in wrong_arguments()),
    *((f"{module}.{name} = {value}", error, text,
       lambda m, module=module, name=name, value=value: setattr(getattr(m, module), name, value))
      for module, name, value, error, text in wrong_attributes()),
    # Weights of a wrong size
    ("functional_call weight_hh_l0", RuntimeError, SIZE.format("weight_hh", r"\(16, 4\)", r"\[16, 3\]"),
     lambda m: with_parameter(m.lstm, "weight_hh_l0", zeros(16, 3))),
    ("functional_call weight_ih_l0", RuntimeError, SIZE.format("weight_ih", r"\(16, 3\)", r"\[12, 3\]"),
     lambda m: with_parameter(m.compat, "weight_ih_l0", zeros(12, 3))),
    ("functional_call bias_ih_l1", RuntimeError, SIZE.format("bias_ih", r"\(16,\)", r"\[1\]"),
     lambda m: with_parameter(m.deep, "bias_ih_l1", zeros(1))),
    ("functional_call bias_hh_l0_reverse", RuntimeError, SIZE.format("bias_hh", r"\(16,\)", r"\[16, 1\]"),
     lambda m: with_parameter(m.both, "bias_hh_l0_reverse", zeros(16, 1))),
    ("functional_call of a stack", RuntimeError, SIZE.format("weight_ih", r"\(16, 4\)", r"\[16, 5\]"),
     lambda m: with_parameter(m.stack, "layers.1.weight_ih_l0", zeros(16, 5))),
    ("functional_call of a cell", RuntimeError, SIZE.format("bias_ih", r"\(16,\)", r"\[1\]"),
     lambda m: with_parameter(m.cell, "bias_ih", zeros(1))),
    ("weight_hh_l0 None", TypeError, A_TENSOR.format("weight_hh", "NoneType"),
     lambda m: missing(m.lstm, "weight_hh_l0")),
    ("bias_hh_l0 None", RuntimeError, "^bias_ih and bias_hh should be given together$",
     lambda m: missing(m.lstm, "bias_hh_l0")),
    ("functional_call weight_peephole", RuntimeError, SIZE.format("weight_peephole", r"\(12,\)", r"\[16\]"),
     lambda m: with_parameter(PEEPING, "weight_peephole_l0", zeros(16))),
    ("LSTMCell peepholes=1", TypeError, A_BOOL.format("peepholes", "int"),
     lambda m: gpu_lstm.LSTMCell(3, 4, peepholes=1)),
    *((f"lstm_layer peepholes, {backend}", ValueError,
       f"^backend '{backend}' takes no peepholes; use 'triton' or 'reference'$",
       lambda m, backend=backend: lstm_layer(X, [*WEIGHTS[:2], None, None, None, zeros(12)], backend=backend))
      for backend in ("torch", "cupy")),
    ("lstm_layer peepholes as a matrix", RuntimeError, "^weight_peephole must have 1 dimensions, got 2$",
     lambda m: lstm_layer(X, [*WEIGHTS[:2], None, None, None, zeros(3, 4)])),
    *((f"lstm_layer layer_norm, {backend}", ValueError,
       f"^backend '{backend}' takes no layer_norm; use 'triton' or 'reference'$",
       lambda m, backend=backend: lstm_layer(X, [*WEIGHTS[:2], *[None] * 6, zeros(4)], backend=backend))
      for backend in ("torch", "cupy")),
    ("LSTM layer_norm proj_size", ValueError,
     "^layer_norm is not defined with a projection: expected proj_size 0, got 2$",
     lambda m: gpu_lstm.LSTM(3, 4, proj_size=2, layer_norm=("ih",))),
    ("lstm_layer layer_norm weight_hr", ValueError,
     "^layer_norm is not defined with a projection: expected proj_size 0, got 2$",
     lambda m: lstm_layer(X, [WEIGHTS[0], zeros(16, 2), None, None, zeros(2, 4), None, zeros(16)])),
    ("lstm_layer bias_c alone", RuntimeError, "^bias_c should be given together with gain_c$",
     lambda m: lstm_layer(X, [*WEIGHTS[:2], *[None] * 7, zeros(4)])),
    ("functional_call gain_hh", RuntimeError, SIZE.format("gain_hh", r"\(16,\)", r"\[4\]"),
     lambda m: with_parameter(PEEPING, "gain_hh_l0", zeros(4))),
    ("lstm.peepholes = True", AttributeError, "peepholes", lambda m: setattr(m.lstm, "peepholes", True)),
    # Input of LSTM
    ("LSTM nested", RuntimeError, DENSE.format("LSTM", "a nested tensor"), lambda m: m.lstm(NESTED)),
    ("LSTM sparse", RuntimeError, DENSE.format("LSTM", "a tensor of layout torch.sparse_coo"),
     lambda m: m.lstm(X.to_sparse())),
    ("compat.LSTM sparse", RuntimeError, DENSE.format("LSTM", ".*sparse_coo"), lambda m: m.compat(X.to_sparse())),
    ("LSTM features", RuntimeError, "^input.size.-1. must be equal to input_size. Expected 3, got 4$",
     lambda m: m.deep(zeros(5, 2, 4))),
    ("LSTM rank", ValueError, "^LSTM: Expected input to be 2D or 3D, got 4D instead$",
     lambda m: m.deep(zeros(5, 2, 3, 1))),
    ("LSTM float64", ValueError, "^(RNN input dtype|input must have the type) .*float(32|64)",
     lambda m: m.deep(X.double())),
    ("LSTM T = 0", RuntimeError, "^Expected sequence length to be larger than 0 in RNN$",
     lambda m: m.deep(zeros(0, 2, 3))),
    # hx of LSTM
    ("LSTM hx a tensor", TypeError, PAIR.format("lstm", "Tensor"), lambda m: m.lstm(X, torch.stack([H, C]))),
    ("LSTM hx a tensor, deep", TypeError, PAIR.format("lstm", "Tensor"), lambda m: m.deep(X, zeros(2, 2, 2, 4))),
    ("LSTM hx a tensor, lengths", TypeError, PAIR.format("lstm", "Tensor"),
     lambda m: m.lstm(X, torch.stack([H, C]), lengths=tensor([5, 3]))),
    ("LSTM hx a tensor, packed", TypeError, PAIR.format("lstm", "Tensor"),
     lambda m: m.lstm(PACKED, torch.stack([H, C]))),
    ("compat.LSTM hx a tensor", TypeError, PAIR.format("lstm", "Tensor"), lambda m: m.compat(X, torch.stack([H, C]))),
    ("LSTM three states", RuntimeError, "^lstm expects two hidden states$", lambda m: m.lstm(X, (H, C, C))),
    ("LSTM three states, packed", RuntimeError, "^lstm expects two hidden states$",
     lambda m: m.lstm(PACKED, (H, C, C))),
    ("LSTM one state, packed", RuntimeError, "^lstm expects two hidden states$", lambda m: m.lstm(PACKED, (H,))),
    ("LSTM hx of one layer", RuntimeError, SIZE.format(r"hidden\[0\]", r"\(2, 2, 4\)", r"\[1, 2, 4\]"),
     lambda m: m.deep(X, (H, C))),
    ("LSTM hx float64, weight drop", RuntimeError, OTHER_DTYPE.format("hidden", ".*32", "hidden", ".*64"),
     lambda m: m.deep(X, (zeros(2, 2, 4, dtype=F64), zeros(2, 2, 4)))),
    ("LSTM hx float64, packed, weight drop", RuntimeError, OTHER_DTYPE.format("hidden", ".*32", "hidden", ".*64"),
     lambda m: m.deep(PACKED, (zeros(2, 2, 4, dtype=F64), zeros(2, 2, 4)))),
    # lengths and resets; test_errors.py has more
    ("LSTM lengths a list", TypeError, A_TENSOR.format("lengths", "list"), lambda m: m.deep(X, lengths=[5, 2])),
    ("LSTM lengths of another batch", ValueError, r"^Expected lengths of shape \[2\], got \[3\]$",
     lambda m: m.deep(X, lengths=tensor([5, 2, 1]))),
    ("LSTM lengths too long", ValueError, "^Expected lengths from 0 to 5, .* got lengths from 2 to 6$",
     lambda m: m.deep(X, lengths=tensor([6, 2]))),
    ("LSTM lengths float", ValueError, "^lengths should be of dtype torch.int32 or torch.int64, got torch.float32$",
     lambda m: m.deep(X, lengths=tensor([5.0, 2.0]))),
    ("LSTM lengths packed", ValueError, "^lengths should not be given together with a PackedSequence",
     lambda m: m.deep(PACKED, lengths=tensor([5, 3]))),
    ("LSTM resets a bool", TypeError, A_TENSOR.format("resets", "bool"), lambda m: m.deep(X, resets=True)),
    ("LSTM resets turned round", ValueError, r"^Expected resets of shape \[2, 5\], got \[5, 2\]$",
     lambda m: m.first(zeros(2, 5, 3), resets=zeros(5, 2, dtype=BOOL))),
    # reset_states
    *((f"{name} reset_states alone", ValueError, "^Expected resets together with reset_states, .*, got None$",
       lambda m, call=call, states=states: call(m)(reset_states=states)) for name, call, states in TAKERS),
    *((f"{name} reset_states {text}", error, expected,
       lambda m, call=call, wrong=wrong: call(m)(resets=zeros(5, 2, dtype=BOOL), reset_states=wrong))
      for name, call, wrong, error, expected, text in wrong_reset_states()),
    ("LSTM reset_states turned round", ValueError,
     r"^Expected c of reset_states of size \[1, 2, 4\], .*, or \[1, 2, 5, 4\], one a step, got \[1, 5, 2, 4\]$",
     lambda m: m.first(zeros(2, 5, 3), resets=zeros(2, 5, dtype=BOOL), reset_states=(H, zeros(1, 5, 2, 4)))),
    ("LSTM reset_states of torch", ValueError,
     "^backend 'torch' takes no reset_states; use 'triton' or 'cupy' or 'reference'$",
     lambda m: by("torch", m.anyones, X, resets=zeros(5, 2, dtype=BOOL), reset_states=(H, C))),
    ("LSTM lengths unbatched", ValueError, r"^Expected lengths of shape \[\], got \[1\]$",
     lambda m: m.lstm(X[:, 0], lengths=tensor([3]))),
    ("LSTM resets unbatched", ValueError, r"^Expected resets of shape \[5\], got \[5, 1\]$",
     lambda m: m.first(X[:, 0], resets=zeros(5, 1, dtype=BOOL))),
    *((f"{module} resets packed", ValueError, rf"^Expected resets of shape \[{shape}\], got \[8\]$",
       lambda m, module=module: getattr(m, module)(PACKED, resets=zeros(8, dtype=BOOL)))
      for module, shape in (("lstm", "5, 2"), ("first", "2, 5"))),
    ("LSTM unknown argument", TypeError, "unexpected keyword argument 'length'",
     lambda m: m.lstm(X, length=tensor([5, 2]))),
    ("LSTM TorchRL's mask", TypeError, "^LSTM takes lengths, .* LSTMModule .* hand it a gpu_lstm.compat.LSTM$",
     lambda m: m.first(zeros(2, 5, 3), mask=zeros(2, 5, dtype=BOOL))),
    # StackedLSTM
    ("StackedLSTM None", TypeError, A_TENSOR.format("input", "NoneType"), lambda m: m.stack(None)),
    ("StackedLSTM a list", TypeError, A_TENSOR.format("input", "list"), lambda m: m.stack([[1.0, 2.0, 3.0]])),
    ("StackedLSTM an array", TypeError, A_TENSOR.format("input", "ndarray"), lambda m: m.stack(X.numpy())),
    ("StackedLSTM nested", RuntimeError, DENSE.format("StackedLSTM", "a nested tensor"), lambda m: m.stack(NESTED)),
    ("StackedLSTM sparse", RuntimeError, DENSE.format("StackedLSTM", ".*sparse_coo"), lambda m: m.stack(X.to_sparse())),
    *((f"StackedLSTM rank {rank}", ValueError, f"^StackedLSTM: Expected input to be 2D or 3D, got {rank}D instead$",
       lambda m, rank=rank: m.stack(zeros([3] * rank))) for rank in (1, 4)),
    ("StackedLSTM features", RuntimeError, "^input.size.-1. must be equal to input_size. Expected 3, got 4$",
     lambda m: m.stack(zeros(5, 2, 4))),
    ("StackedLSTM float64", ValueError, r"^RNN input dtype \(torch.float64\) does not match weight dtype .*float32\). ",
     lambda m: m.stack(X.double())),
    ("StackedLSTM elsewhere", RuntimeError, ELSEWHERE.format("parameter", META, "parameter", "cpu"),
     lambda m: m.stack(X.to(META))),
    ("StackedLSTM residual", ValueError, r"^residual=True needs .* got inputs of \[3, 4\] and outputs of \[4, 5\] ",
     lambda m: gpu_lstm.StackedLSTM(3, [4, 5], residual=True)),
    ("StackedLSTM torch's hx", TypeError, A_LIST.format(" for layer 0", "Tensor"),
     lambda m: m.stack(X, (zeros(2, 2, 4), zeros(2, 2, 4)))),
    ("StackedLSTM hx a tensor", TypeError, A_LIST.format("", "Tensor"), lambda m: m.stack(X, zeros(2, 2, 2, 4))),
    ("StackedLSTM hx a dict", TypeError, A_LIST.format("", "dict"), lambda m: m.stack(X, dict(enumerate(PAIRS)))),
    ("StackedLSTM hx a pair of one layer", TypeError, A_LIST.format(" for layer 0", "Tensor"),
     lambda m: m.one(X, PAIRS[0])),
    ("StackedLSTM hx of one layer too few", RuntimeError, "^Expected hx of 2 pairs, one a layer, got 1$",
     lambda m: m.stack(X, PAIRS[:1])),
    ("StackedLSTM hx empty", RuntimeError, "^Expected hx of 2 pairs, one a layer, got 0$", lambda m: m.stack(X, [])),
    ("StackedLSTM hx 3-D", RuntimeError, r"^Expected h of layer 0 of size \[2, 4\], got \[1, 2, 4\]$",
     lambda m: m.stack(X, [(H, C), PAIRS[1]])),
    ("StackedLSTM hx unbatched", RuntimeError, r"^Expected c of layer 1 of size \[4\], got \[1, 4\]$",
     lambda m: m.stack(X[:, 0], [(zeros(4), zeros(4)), (zeros(4), zeros(1, 4))])),
    ("StackedLSTM hx elsewhere", RuntimeError, ELSEWHERE.format("hidden", "cpu", "hidden", META),
     lambda m: m.stack(X, [PAIRS[0], (zeros(2, 4), zeros(2, 4, device=META))])),
    ("StackedLSTM one state", RuntimeError, r"^Expected two states \(h, c\) of layer 0, got 1$",
     lambda m: m.stack(X, [PAIRS[0][:1], PAIRS[1]])),
    ("StackedLSTM three states", RuntimeError, r"^Expected two states \(h, c\) of layer 1, got 3$",
     lambda m: m.stack(X, [PAIRS[0], (*PAIRS[1], zeros(2, 4))])),
    ("StackedLSTM hx of None", TypeError, A_TENSOR.format("c of layer 0", "NoneType"),
     lambda m: m.stack(X, [(zeros(2, 4), None), PAIRS[1]])),
    ("StackedLSTM hx of lists", TypeError, A_TENSOR.format("h of layer 0", "list"),
     lambda m: m.stack(X, [([0.0], [0.0]), PAIRS[1]])),
    ("StackedLSTM hx wide", RuntimeError, r"^Expected h of layer 1 of size \[2, 4\], got \[2, 5\]$",
     lambda m: m.stack(X, [PAIRS[0], (zeros(2, 5), zeros(2, 4))])),
    ("StackedLSTM hx float16", RuntimeError, OTHER_DTYPE.format("hidden", ".*32", "hidden", ".*16"),
     lambda m: m.stack(X, [PAIRS[0], (zeros(2, 4, dtype=F16), zeros(2, 4))])),
    ("StackedLSTM lengths", ValueError, r"^Expected lengths of shape \[2\], got \[5\]$",
     lambda m: m.stack(X, lengths=tensor([1] * 5))),
    # LSTMCell
    ("LSTMCell hx a tensor", TypeError, PAIR.format("lstm_cell", "Tensor"),
     lambda m: m.cell(zeros(2, 3), zeros(2, 2, 4))),
    ("LSTMCell sparse", RuntimeError, DENSE.format("LSTMCell", ".*sparse_coo"),
     lambda m: m.cell(zeros(2, 3).to_sparse())),
    ("LSTMCell nested", RuntimeError, DENSE.format("LSTMCell", "a nested tensor"), lambda m: m.cell(NESTED_STEP)),
    ("LSTMCell one state", RuntimeError, "^lstm_cell expects two hidden states$",
     lambda m: m.cell(zeros(2, 3), [zeros(2, 4)])),
    ("LSTMCell rank", ValueError, "^LSTMCell: Expected input to be 1D or 2D, got 3D instead$", lambda m: m.cell(X)),
    # functional.lstm_layer
    ("lstm_layer x None", TypeError, A_TENSOR.format("input", "NoneType"), lambda m: layer(m, x=None)),
    ("lstm_layer x packed", TypeError, A_TENSOR.format("input", "PackedSequence"), lambda m: layer(m, x=PACKED)),
    ("lstm_layer x nested", RuntimeError, DENSE.format("lstm_layer", "a nested tensor"), lambda m: layer(m, x=NESTED)),
    ("lstm_layer x sparse", RuntimeError, DENSE.format("lstm_layer", ".*_coo"), lambda m: layer(m, x=X.to_sparse())),
    ("lstm_layer x unbatched", RuntimeError, "^input must have 3 dimensions, got 2$",
     lambda m: layer(m, x=zeros(5, 3))),
    ("lstm_layer weights a tensor", TypeError, "^weights should be a tuple or list of tensors, got: Tensor$",
     lambda m: layer(m, weights=zeros(2, 16, 4))),
    ("lstm_layer weights None", TypeError, "^weights should be a tuple or list of tensors, got: NoneType$",
     lambda m: layer(m, weights=None)),
    ("lstm_layer one weight", ValueError, r"^Expected weights of 2 to 10 tensors \(weight_ih, .*\), got 1$",
     lambda m: layer(m, weights=WEIGHTS[:1])),
    ("lstm_layer eleven weights", ValueError, r"^Expected weights of 2 to 10 tensors \(.*gain_c, bias_c\), got 11$",
     lambda m: layer(m, weights=[*WEIGHTS, *[None] * 9])),
    ("lstm_layer weight_hh None", TypeError, A_TENSOR.format("weight_hh", "NoneType"),
     lambda m: layer(m, weights=(WEIGHTS[0], None))),
    ("lstm_layer bias a list", TypeError, A_TENSOR.format("bias_hh", "list"),
     lambda m: layer(m, weights=(*WEIGHTS, zeros(16), [0.0] * 16))),
    ("lstm_layer weight_hh a scalar", RuntimeError, "^weight_hh must have 2 dimensions, got 0$",
     lambda m: layer(m, weights=(WEIGHTS[0], tensor(1.0)))),
    ("lstm_layer weight_hr 1-D", RuntimeError, "^weight_hr must have 2 dimensions, got 1$",
     lambda m: layer(m, weights=(*WEIGHTS, None, None, zeros(4)))),
    ("lstm_layer a bias of one", RuntimeError, SIZE.format("bias_ih", r"\(16,\)", r"\[1\]"),
     lambda m: layer(m, weights=(*WEIGHTS, zeros(1), zeros(1)))),
    ("lstm_layer weight_ih", RuntimeError, SIZE.format("weight_ih", r"\(16, 3\)", r"\[16, 2\]"),
     lambda m: layer(m, weights=(zeros(16, 2), WEIGHTS[1]))),
    ("lstm_layer weight_hh", RuntimeError, SIZE.format("weight_hh", r"\(16, 4\)", r"\[16, 5\]"),
     lambda m: layer(m, weights=(WEIGHTS[0], zeros(16, 5)))),
    ("lstm_layer weight_hh and weight_hr", RuntimeError, SIZE.format("weight_hh", r"\(16, 2\)", r"\[16, 4\]"),
     lambda m: layer(m, weights=(*WEIGHTS, None, None, zeros(2, 4)))),
    ("lstm_layer float64", RuntimeError, OTHER_DTYPE.format("parameter", ".*64", "parameter", ".*32"),
     lambda m: layer(m, x=X.double())),
    ("lstm_layer one bias", RuntimeError, "^bias_ih and bias_hh should be given together$",
     lambda m: layer(m, weights=(*WEIGHTS, zeros(16)))),
    ("lstm_layer H = 0", ValueError, "^hidden_size must be greater than zero$",
     lambda m: layer(m, weights=(zeros(0, 3), zeros(0, 0)))),
    ("lstm_layer P = 0", ValueError, "^proj_size must be greater than zero$",
     lambda m: layer(m, weights=(zeros(16, 3), zeros(16, 0), None, None, zeros(0, 4)))),
    ("lstm_layer hx a tensor", TypeError, PAIR.format("lstm", "Tensor"), lambda m: layer(m, hx=zeros(2, 2, 4))),
    ("lstm_layer one state", RuntimeError, "^lstm expects two hidden states$", lambda m: layer(m, hx=(zeros(2, 4),))),
    ("lstm_layer no state", RuntimeError, "^lstm expects two hidden states$", lambda m: layer(m, hx=())),
    ("lstm_layer hx of None", TypeError, A_TENSOR.format(r"hidden\[0\]", "NoneType"),
     lambda m: layer(m, hx=(None, None))),
    ("lstm_layer hx a number", TypeError, PAIR.format("lstm", "int"), lambda m: layer(m, hx=1)),
    ("lstm_layer hx 1-D", RuntimeError, SIZE.format(r"hidden\[0\]", r"\(2, 4\)", r"\[4\]"),
     lambda m: layer(m, hx=(zeros(4), zeros(2, 4)))),
    ("lstm_layer hx wide", RuntimeError, SIZE.format(r"hidden\[1\]", r"\(2, 4\)", r"\[2, 5\]"),
     lambda m: layer(m, hx=(zeros(2, 4), zeros(2, 5)))),
    ("lstm_layer hx float64", RuntimeError, OTHER_DTYPE.format("hidden", ".*32", "hidden", ".*64"),
     lambda m: layer(m, hx=(zeros(2, 4, dtype=F64), zeros(2, 4)))),
    ("lstm_layer hx elsewhere", RuntimeError, ELSEWHERE.format("hidden", "cpu", "hidden", META),
     lambda m: layer(m, hx=(zeros(2, 4, device=META), zeros(2, 4)))),
    ("lstm_layer reverse", TypeError, A_BOOL.format("reverse", "str"), lambda m: layer(m, reverse="no")),
    ("lstm_layer lengths", TypeError, A_TENSOR.format("lengths", "list"), lambda m: layer(m, lengths=[1, 2])),
    ("lstm_layer resets", ValueError, "^resets should be of dtype torch.bool, got torch.float32$",
     lambda m: layer(m, resets=zeros(5, 2))),
    ("lstm_layer backend", ValueError, UNKNOWN.format("'none'"), lambda m: layer(m, backend="none")),
    # backend, racing, Backend, the environment
    *((f"backend({name!r})", ValueError, UNKNOWN.format(".*"), lambda m, name=name: gpu_lstm.backend(name))
      for name in (*NAMES, None)),
    ("Backend", ValueError, "^'cuda' is not a valid Backend$", lambda m: gpu_lstm.Backend("cuda")),
    *((f"racing({name!r})", ValueError, "^unknown mode of racing .*; expected one of 'on', 'read', 'off'$",
       lambda m, name=name: gpu_lstm.racing(name)) for name in ("never", "", None, True, ["on"])),
    ("GPU_LSTM_BACKEND", ValueError, "^unknown backend 'cuda' in the environment variable GPU_LSTM_BACKEND; expected",
     lambda m: in_environment("GPU_LSTM_BACKEND", "cuda", lambda: lstm_layer(X, WEIGHTS))),
    ("GPU_LSTM_RACE", ValueError, "^unknown mode of racing 'yes' in the environment variable GPU_LSTM_RACE; expected",
     lambda m: in_environment("GPU_LSTM_RACE", "yes", races.mode)),
    # explain, trace
    *((f"{function} of {type(value).__name__}", TypeError,
       rf"^{function} takes an? .*LSTM.* got .*{type(value).__name__}$",
       lambda m, function=function, value=value: getattr(gpu_lstm, function)(value, X))
      for function in ("explain", "trace") for value in (None, [1], nn.GRU(3, 4))),
    *((f"{function} x {type(value).__name__}", TypeError, A_TENSOR.format("x", type(value).__name__),
       lambda m, function=function, value=value: getattr(gpu_lstm, function)(m.lstm, value))
      for function in ("explain", "trace") for value in (None, [[1.0]], 3)),
    ("explain sparse", RuntimeError, DENSE.format("LSTM", ".*_coo"), lambda m: gpu_lstm.explain(m.lstm, X.to_sparse())),
    ("explain features", RuntimeError, "Expected 3, got 4$", lambda m: gpu_lstm.explain(m.stack, zeros(5, 2, 4))),
    ("trace hx", TypeError, A_LIST.format("", "Tensor"), lambda m: gpu_lstm.trace(m.stack, X, zeros(2, 2, 2, 4))),
    ("Trace.plot a name", TypeError, "'str' object cannot be interpreted as an integer",
     lambda m: m.trace.plot("first")),
    ("Trace.plot beyond", IndexError, "^sequence 2 of a batch of 2$", lambda m: m.trace.plot(2)),
    # Stream
    *((f"Stream of {type(value).__name__}", TypeError,
       f"^Stream takes an LSTM or a StackedLSTM, got {type(value).__name__}$",
       lambda m, value=value: gpu_lstm.Stream(value, 2)) for value in (None, [1], nn.LSTM(3, 4))),
    ("Stream both", ValueError, "^Stream takes one direction, got bidirectional=True",
     lambda m: gpu_lstm.Stream(m.both, 2)),
    ("Stream batch None", TypeError, AN_INT.format("batch", "NoneType"), lambda m: gpu_lstm.Stream(m.lstm, None)),
    ("Stream batch 2.0", TypeError, AN_INT.format("batch", "float"), lambda m: gpu_lstm.Stream(m.lstm, 2.0)),
    ("Stream batch -1", ValueError, "^batch must not be negative, got -1$", lambda m: gpu_lstm.Stream(m.lstm, -1)),
    ("Stream hx a tensor", TypeError, PAIR.format("lstm", "Tensor"),
     lambda m: gpu_lstm.Stream(m.lstm, 2, torch.stack([H, C]))),
    ("Stream hx broadcast", RuntimeError, r"^Expected h_0 of size \[1, 2, 4\], got \[1, 1, 4\]$",
     lambda m: gpu_lstm.Stream(m.lstm, 2, (zeros(1, 1, 4), C))),
    ("Stream hx unbatched", RuntimeError, r"^Expected c_0 of size \[1, 2, 4\], got \[2, 4\]$",
     lambda m: gpu_lstm.Stream(m.lstm, 2, (H, zeros(2, 4)))),
    ("Stream hx float64", RuntimeError, "^Expected h_0 of dtype torch.float32, got torch.float64$",
     lambda m: gpu_lstm.Stream(m.lstm, 2, (H.double(), C.double()))),
    ("Stream hx int64", RuntimeError, "^Expected c_0 of dtype torch.float32, got torch.int64$",
     lambda m: gpu_lstm.Stream(m.lstm, 2, (H, C.long()))),
    ("Stream hx elsewhere", RuntimeError, "^Expected h_0 on cpu, got meta$",
     lambda m: gpu_lstm.Stream(m.lstm, 2, (H.to(META), C))),
    ("Stream hx of lists", TypeError, A_TENSOR.format("h_0", "list"),
     lambda m: gpu_lstm.Stream(m.lstm, 2, ([0.0], [0.0]))),
    ("Stream one state", RuntimeError, "^lstm expects two hidden states$", lambda m: gpu_lstm.Stream(m.lstm, 2, (H,))),
    ("Stream torch's hx of a stack", TypeError, A_LIST.format(" for layer 0", "Tensor"),
     lambda m: gpu_lstm.Stream(m.stack, 2, (zeros(2, 2, 4), zeros(2, 2, 4)))),
    ("Stream hx of one layer", RuntimeError, "^Expected hx of 2 pairs, one a layer, got 1$",
     lambda m: gpu_lstm.Stream(m.stack, 2, PAIRS[:1])),
    ("Stream hx of a stack, wide", RuntimeError, r"^Expected c of layer 1 of size \[2, 4\], got \[2, 1\]$",
     lambda m: gpu_lstm.Stream(m.stack, 2, [PAIRS[0], (zeros(2, 4), zeros(2, 1))])),
    ("stream None", TypeError, A_TENSOR.format("x", "NoneType"), lambda m: m.stream(None)),
    ("stream packed", TypeError, A_TENSOR.format("x", "PackedSequence"), lambda m: m.stream(PACKED)),
    ("stream of another batch", ValueError, r"^expected \(N, I\) or \(T, N, I\) with N = 2, got \(3, 3\)$",
     lambda m: m.stream(zeros(3, 3))),
    ("stream unbatched", ValueError, r"^expected \(N, I\) or \(T, N, I\) with N = 2, got \(3,\)$",
     lambda m: m.stream(zeros(3))),
    ("stream time first", ValueError, r"^expected \(N, I\) or \(N, T, I\) with N = 2, got \(5, 2, 3\)$",
     lambda m: gpu_lstm.Stream(m.first, 2)(X)),
    *((f"stream in training, {name}", ValueError, r"drops out in training mode; call eval\(\)",
       lambda m, name=name: gpu_lstm.Stream(m.dropping[name], 2)(zeros(2, 3))) for name in DROPS),
    ("stream features", RuntimeError, "Expected 3, got 4$", lambda m: m.stream_of_stack(zeros(2, 4))),
    ("stream float64", ValueError, "^(RNN input dtype|input must have the type) .*float(32|64)",
     lambda m: m.stream(zeros(2, 3, dtype=F64))),
    ("stream sparse", RuntimeError, DENSE.format("LSTM", ".*_coo"), lambda m: m.stream(zeros(5, 2, 3).to_sparse())),
    ("stream.reset a list", TypeError, A_TENSOR.format("which", "list"), lambda m: m.stream.reset([True, False])),
    ("stream.reset ints", ValueError, r"^expected bool of shape \(2,\), got torch.int64 \(2,\)$",
     lambda m: m.stream.reset(tensor([1, 0]))),
    ("stream.reset elsewhere", ValueError, "^Expected which on cpu, got meta$",
     lambda m: m.stream.reset(zeros(2, dtype=BOOL, device=META))),
    *((f"stream active {text}", error, expected, lambda m, wrong=wrong: m.stream(zeros(2, 3), active=wrong))
      for text, wrong, error, expected in (
          ("a list", [True, False], TypeError, A_TENSOR.format("active", "list")),
          ("of a chunk", zeros(5, 2, dtype=BOOL), ValueError,
           r"^expected bool of shape \(2,\), got torch.bool \(5, 2\)$"),
          ("ints", tensor([1, 0]), ValueError, r"^expected bool of shape \(2,\), got torch.int64 \(2,\)$"),
          ("elsewhere", zeros(2, dtype=BOOL, device=META), ValueError, "^Expected active on cpu, got meta$"))),
    *((f"stream.reorder {text}", error, expected, lambda m, wrong=wrong: m.stream_of_stack.reorder(wrong))
      for text, wrong, error, expected in (
          ("a list", [1, 0], TypeError, A_TENSOR.format("index", "list")),
          ("a mask", tensor([True, False]), ValueError, r"^expected int64 of shape \(2,\), got torch.bool \(2,\)$"),
          ("of three", tensor([0, 1, 1]), ValueError, r"^expected int64 of shape \(2,\), got torch.int64 \(3,\)$"),
          ("beyond", tensor([0, 2]), ValueError, r"^Expected index from 0 to 1, got \[0, 2\]$"),
          ("before", tensor([0, -1]), ValueError, r"^Expected index from 0 to 1, got \[0, -1\]$"))),
    ("stream.state of another batch", RuntimeError, r"^Expected h_0 of size \[1, 2, 4\], got \[1, 3, 4\]$",
     lambda m: setattr(m.stream, "state", (zeros(1, 3, 4), C))),
    # convert, to_torch, from_haste
    *((f"{function.__name__} of {type(value).__name__}", TypeError,
       f"^{function.__name__} takes a torch.nn.Module, got {type(value).__name__}$",
       lambda m, function=function, value=value: function(value))
      for function in (gpu_lstm.convert, gpu_lstm.to_torch) for value in (None, [nn.LSTM(3, 4)], {"a": 1}, nn.LSTM)),
    ("to_torch of a stack", TypeError, r"^'0' is a StackedLSTM of sizes \[4, 4\]",
     lambda m: gpu_lstm.to_torch(nn.Sequential(m.stack, m.lstm))),
    ("to_torch of weight drop", ValueError, "^'0' has .*=0.5, which torch.nn.LSTM has not$",
     lambda m: gpu_lstm.to_torch(nn.Sequential(m.deep, m.lstm))),
    *((f"from_haste of {type(value).__name__}", TypeError,
       f"^from_haste takes a haste_pytorch.LSTM, a LayerNormLSTM or its state_dict, got {type(value).__name__}$",
       lambda m, value=value: gpu_lstm.from_haste(value)) for value in (None, [1], "haste", zeros(3, 16))),
    ("from_haste of torch's", ValueError, r"^expected the parameters .* got \['bias_hh_l0', ",
     lambda m: gpu_lstm.from_haste(m.of_another)),
    ("from_haste of numbers", ValueError, "^expected the parameters .* got ..1', '2'.$",
     lambda m: gpu_lstm.from_haste({1: 1, "2": 2})),
    ("from_haste of an array", TypeError, A_TENSOR.format("kernel", "ndarray"),
     lambda m: gpu_lstm.from_haste(HASTE | {"kernel": zeros(3, 16).numpy()})),
    ("from_haste of scalars", ValueError, r"^expected sizes \[I, 4H\], .* got \[\[\], \[\], \[\]\]$",
     lambda m: gpu_lstm.from_haste(dict.fromkeys(HASTE, tensor(1.0)))),
    ("from_haste H = 0", ValueError, "^hidden_size must be greater than zero$",
     lambda m: gpu_lstm.from_haste(dict(kernel=zeros(3, 0), recurrent_kernel=zeros(0, 0), bias=zeros(0)))),
    ("from_haste turned round", ValueError, r"^expected sizes \[I, 4H\].* got \[\[16, 3\], \[4, 16\], \[16\]\]$",
     lambda m: gpu_lstm.from_haste(HASTE | {"kernel": zeros(16, 3)})),
    ("from_haste of some", ValueError, r"^expected the parameters .*recurrent_kernel.* got \['bias', 'kernel'\]$",
     lambda m: gpu_lstm.from_haste({name: HASTE[name] for name in ("kernel", "bias")})),
    ("from_haste sizes", ValueError, r"^expected sizes .* got \[\[3, 16\], \[4, 16\], \[4\]\]$",
     lambda m: gpu_lstm.from_haste(HASTE | {"bias": zeros(4)})),
    # resets_from_dones
    *((f"resets_from_dones of {type(value).__name__}", TypeError, A_TENSOR.format("dones", type(value).__name__),
       lambda m, value=value: gpu_lstm.resets_from_dones(value)) for value in (None, [[True]], zeros(5, 2).numpy())),
    *((f"resets_from_dones {value.dtype} {value.dim()}", ValueError, r"^Expected bool dones \[T, B\] with T > 0, got ",
       lambda m, value=value: gpu_lstm.resets_from_dones(value))
      for value in (zeros(5, 2), zeros(5, dtype=BOOL), tensor(True), zeros(0, 2, dtype=BOOL))),
    ("resets_from_dones first a list", TypeError, A_TENSOR.format("first", "list"),
     lambda m: gpu_lstm.resets_from_dones(zeros(5, 2, dtype=BOOL), [True, False])),
    ("resets_from_dones first", ValueError, r"^Expected bool first \[2\] on cpu, got torch.bool \[3\] on cpu$",
     lambda m: gpu_lstm.resets_from_dones(zeros(5, 2, dtype=BOOL), zeros(3, dtype=BOOL))),
    ("resets_from_dones elsewhere", ValueError, r"^Expected bool first \[2\] on cpu, got torch.bool \[2\] on meta$",
     lambda m: gpu_lstm.resets_from_dones(zeros(5, 2, dtype=BOOL), zeros(2, dtype=BOOL, device=META))),
    # autotune, check
    ("autotune H = 0", ValueError, "^hidden_size must be at least 1, got 0$", lambda m: gpu_lstm.autotune(0, 1)),
    ("autotune batch", ValueError, "^batch must be at least 1, got -1$", lambda m: gpu_lstm.autotune(4, -1)),
    ("autotune steps", TypeError, AN_INT.format("steps", "float"), lambda m: gpu_lstm.autotune(4, 1, steps=2.5)),
    ("autotune hidden_size", TypeError, AN_INT.format("hidden_size", "str"), lambda m: gpu_lstm.autotune("4", 1)),
    ("autotune proj_size", ValueError, "^proj_size has to be smaller than hidden_size, got 4 and 4$",
     lambda m: gpu_lstm.autotune(4, 1, proj_size=4)),
    ("autotune dtype", TypeError, "^dtype should be a torch.dtype, got: str$",
     lambda m: gpu_lstm.autotune(4, 1, dtype="bf16")),
    ("autotune float64", TypeError, "^backend 'triton' takes float16, bfloat16 and float32, got torch.float64$",
     lambda m: gpu_lstm.autotune(4, 1, dtype=F64, device="cpu")),
    ("check", TypeError, "takes 0 positional arguments but 1 was given", lambda m: gpu_lstm.check("cuda")),
    # keras
    *((f"GoBackwards of {type(value).__name__}", TypeError, "^GoBackwards takes an LSTM or a StackedLSTM, got ",
       lambda m, value=value: keras.GoBackwards(value)) for value in (None, [1], nn.LSTM(3, 4, batch_first=True))),
    ("GoBackwards time first", ValueError, "batch_first=True, got bidirectional=False and batch_first=False$",
     lambda m: keras.GoBackwards(m.lstm)),
    ("backwards None", TypeError, A_TENSOR.format("input", "NoneType"), lambda m: m.backwards(None)),
    ("backwards unbatched", ValueError, r"^Expected input of 3 dimensions \(N, T, I\), got 2$",
     lambda m: m.backwards(X[0])),
    ("backwards lengths", TypeError, A_TENSOR.format("lengths", "list"),
     lambda m: m.backwards(zeros(2, 5, 3), lengths=[1, 2])),
    *((f"{function.__name__} of {type(value).__name__}", TypeError,
       f"^Expected an LSTM or a module that holds one, got {type(value).__name__}$",
       lambda m, function=function, value=value: function(value))
      for function in (keras.keras_init, keras.forget_bias) for value in (None, [nn.LSTM(3, 4)], nn.Linear(3, 4))),
    ("forget_bias of some without", ValueError, "^Expected an LSTM with a bias, got bias=False$",
     lambda m: keras.forget_bias(m.without_bias)),
    ("forget_bias a name", TypeError, "^value should be a number, got: str$", lambda m: keras.forget_bias(m.lstm, "1")),
    ("forget_bias None", TypeError, "^value should be a number, got: NoneType$",
     lambda m: keras.forget_bias(m.lstm, None)),
    *((f"to_keras of {type(value).__name__}", TypeError, "^to_keras takes an LSTM, StackedLSTM or GoBackwards, got ",
       lambda m, value=value: keras.to_keras(value)) for value in (None, [1], nn.GRU(3, 4))),
    ("from_keras freeze", TypeError, A_BOOL.format("freeze_second_bias", "str"),
     lambda m: keras.from_keras(None, freeze_second_bias="no")),
    ("lengths_of a list", TypeError, A_TENSOR.format("mask", "list"), lambda m: keras.lengths_of([[True]])),
    ("lengths_of ints", ValueError, r"^Expected a mask \[N, T\] of dtype torch.bool, got \[2, 5\] of torch.float32$",
     lambda m: keras.lengths_of(zeros(2, 5))),
    ("lengths_of a gap", ValueError, "row 0 has a gap: step 1 is masked, but a later one is not$",
     lambda m: keras.lengths_of(tensor([[True, False, True]]))),
]  # fmt: skip


@pytest.fixture(scope="module", params=["torch", "reference"])
def m(request):
    return modules(request.param)


def picture(m):
    """All that a call could change: what modules hold, random numbers, and who was chosen to run."""
    seen = {}
    for name, value in vars(m).items():
        for path, module in value.named_modules() if isinstance(value, nn.Module) else ():
            seen[name, path] = {key: copy.copy(attribute) for key, attribute in vars(module).items()}
            seen[name, path, "values"] = [(id(t), t.tolist()) for t in module.state_dict(keep_vars=True).values()]
    for stream in (m.stream, m.stream_of_stack):
        seen[stream] = [(id(t), t.tolist()) for state in stream._state for t in state]
    seen["random"] = torch.get_rng_state().numpy().tobytes()
    seen["chosen"] = backends._chosen, list(backends._blocks), races._mode, dict(os.environ)
    return seen


@pytest.mark.parametrize(("error", "text", "call"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_a_wrong_call_is_refused_and_changes_nothing(m, error, text, call):
    before = picture(m)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=text) as raised:
            call(m)
    assert raised.type is error
    assert picture(m) == before


def test_the_table_is_long_and_names_all_that_is_public():
    assert len({row[0] for row in CALLS}) == len(CALLS) >= 200
    names = " ".join(row[0] for row in CALLS)
    assert [name for name in gpu_lstm.__all__ if name not in names and name not in ("functional", "keras")] == []


# Command lines: exit status 2, one line that says why, nothing on stdout


OURS, BENCH = gpu_lstm.__main__.main, bench.__main__.main
PLAN = ["plan", "--hidden", "8", "--batch", "2", "--device", "h100"]
LEAST, WHOLE = "expected at least 1, got {}$", "expected a whole number, got '{}'$"
COMMANDS = [
    (OURS, ["nonsense"], "invalid choice: 'nonsense'"),
    (OURS, ["--nonsense"], "unrecognized arguments: --nonsense"),
    (OURS, ["plan"], "the following arguments are required: --hidden, --batch, --device"),
    (OURS, [*PLAN, "--hidden", "0"], "argument --hidden: " + LEAST.format(0)),
    (OURS, [*PLAN, "--hidden", "many"], "argument --hidden: " + WHOLE.format("many")),
    (OURS, [*PLAN, "--hidden", "1.5"], "argument --hidden: " + WHOLE.format("1.5")),
    (OURS, [*PLAN, "--batch", "-1"], "argument --batch: " + LEAST.format("-1")),
    (OURS, [*PLAN, "--steps", "-3"], "argument --steps: " + LEAST.format("-3")),
    (OURS, [*PLAN, "--steps", "0"], "argument --steps: " + LEAST.format(0)),
    (OURS, [*PLAN, "--dtype", "fp64"], "argument --dtype: invalid choice: 'fp64'"),
    (OURS, [*PLAN, "--directions", "3"], "argument --directions: invalid choice: 3"),
    (OURS, [*PLAN, "--device", "k80"], "^unknown device 'k80'; known: h100, a100, "),
    (OURS, [*PLAN, "--hidden", "1000000"], "^W_hh of 1000000 units takes 8000 GB, more than any known card has$"),
    (OURS, ["kernels"], "^python -m gpu_lstm kernels compiles them: unset TRITON_INTERPRET in the environment$"),
    (OURS, ["races", "--merge", "{binary}"], "binary.csv: expected what `python -m gpu_lstm races --export` writes: "),
    (OURS, ["races", "--merge", "{deep}"], "deep.json: expected what `python -m gpu_lstm races --export` writes: "),
    (OURS, ["races", "--merge", "{absent}"], "No such file or directory: '.*absent'$"),
    (OURS, ["races", "--export", "{absent}/file"], "No such file or directory: '.*absent/file'$"),
    (OURS, ["races", "--clear", "--export", "file"], "argument --export: not allowed with argument --clear$"),
    (BENCH, ["compare", "{binary}", "{binary}"], "binary.csv: .*; expected what `python -m bench` writes$"),
    (BENCH, ["compare", "{zipped}", "{zipped}"], "results.zip: .*; expected what `python -m bench` writes$"),
    (BENCH, ["compare", "{empty}", "{empty}"], "empty.csv: No columns .*; expected what `python -m bench` writes$"),
    (BENCH, ["compare", "{absent}", "{absent}"], "No such file or directory: '.*absent'$"),
    (BENCH, ["compare", "{folder}", "{folder}"], "Is a directory: '"),
    (BENCH, ["compare", "{absent}"], "the following arguments are required: new$"),
    (BENCH, ["compare", "a", "b", "--fail-under", "half"], "argument --fail-under: invalid float value: 'half'$"),
    (BENCH, ["gpu", "--minutes", "-3", "--out", "{absent}"],
     "argument --minutes: expected more than 0 minutes, got '-3'$"),
    (BENCH, ["gpu", "--minutes", "nan", "--out", "{absent}"],
     "argument --minutes: expected more than 0 minutes, got 'nan'$"),
    (BENCH, ["--cases", "nonsense"], "^python -m bench: unknown case 'nonsense'; known groups: headline, "),
    (BENCH, ["--providers", "nobody"], "argument --providers: invalid choice: 'nobody'"),
    (BENCH, ["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    (BENCH, ["--out", "{folder}", "--device", "cpu"], "^python -m bench: .*File exists: '"),
    (BENCH, ["--base", "no-such-commit", "--out", "{absent}", "--device", "cpu"], "no commit 'no-such-commit'"),
]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu_lstm.kernels.triton_lstm.launch.INTERPRETED", True)
    binary, deep, zipped, empty = (tmp_path / name for name in ("binary.csv", "deep.json", "results.zip", "empty.csv"))
    binary.write_bytes(bytes(range(256)))
    deep.write_text("[" * 10**6)
    zipped.write_bytes(b"PK\3\4" + bytes(range(128, 256)))
    empty.touch()
    found = dict(binary=binary, deep=deep, zipped=zipped, empty=empty, folder=tmp_path, absent=tmp_path / "absent")
    yield found
    assert sorted(tmp_path.iterdir()) == sorted((binary, deep, zipped, empty))


@pytest.mark.parametrize(("main", "arguments", "text"), COMMANDS, ids=[" ".join(row[1]) for row in COMMANDS])
def test_a_wrong_command_line_ends_with_2_and_says_why(files, capsys, main, arguments, text):
    try:
        status = main([argument.format(**files) for argument in arguments])
    except SystemExit as end:  # argparse's
        status = end.code
    printed, told = capsys.readouterr()
    assert (status, printed) == (2, "")
    *usage, line = told.rstrip("\n").split("\n")
    assert not usage or usage[0].startswith("usage: ")
    assert re.search(text, line), line
