"""Wrong calls of the whole public API, the table of test_wrong_calls.

A row is (error, call, ...). A call is an expression of the names in this file and of `m`, the modules of one backend.
In an error "..." stands for any text.
"""

# ruff: noqa: F401  (names of calls)

import copy
import math
import os
from unittest.mock import patch

import torch
from torch import nn, tensor, zeros
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import gpu_lstm
from gpu_lstm import keras
from gpu_lstm.call.choices import requested_racing
from gpu_lstm.functional import dense as whole
from gpu_lstm.functional import gru_layer, lstm_layer, of_heads, slstm_layer

BOOL, F64, F16, INT, COMPLEX, META = torch.bool, torch.float64, torch.float16, torch.int64, torch.complex64, "meta"
SEQ, H0, C0, H2, RESETS = zeros(5, 2, 3), zeros(1, 2, 4), zeros(1, 2, 4), zeros(2, 4), zeros(5, 2, dtype=BOOL)
WEIGHTS, GRU_WEIGHTS = (zeros(16, 3), zeros(16, 4)), (zeros(12, 3), zeros(12, 4))
PLAIN, NORMED = (*WEIGHTS, None, None, None), (*WEIGHTS, *[None] * 6, zeros(4))
PACKED = pack_sequence([zeros(5, 3), zeros(3, 3)])
PAIRS = [(H2, H2)] * 2  # states of StackedLSTM(3, [4, 4])
NESTED = torch.nested.nested_tensor([zeros(4, 3), zeros(2, 3)], layout=torch.jagged)
GRU, LINEAR, CELL = nn.GRU(3, 4), nn.Linear(3, 4), gpu_lstm.LSTMCell(3, 4)
TORCHS, TORCHS_FIRST = nn.LSTM(3, 4), nn.LSTM(3, 4, batch_first=True)
WITHOUT_BIAS = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 4, bias=False)])
DROPS = ("dropout", "recurrent_dropout", "zoneout", "weight_drop")


def packed(features, **options):
    return pack_sequence([zeros(5, features, **options), zeros(3, features, **options)])


def kind_of(value):
    return type(eval(value)).__name__


def layer(m, **arguments):
    return lstm_layer(**dict(x=SEQ, weights=WEIGHTS, backend=m.backend) | arguments)


def gru(m, **arguments):
    return gru_layer(**dict(x=SEQ, weights=GRU_WEIGHTS, backend=m.backend) | arguments)


def slstm(**arguments):
    return slstm_layer(**dict(z=zeros(5, 2, 16), weight_hh=WEIGHTS[1], backend="reference") | arguments)


def given(module):
    """Return the arguments of a call. A cell gets its states, so that torch's operator could run it at once."""
    if isinstance(module, nn.RNNCellBase):
        return H2[:, :3], H2 if isinstance(module, gpu_lstm.GRUCell) else PAIRS[0]
    return (SEQ,)


def handed(module, name, *size):
    """Call a module by functional_call, with a tensor of another size instead of a parameter."""
    return torch.func.functional_call(module, {name: zeros(size)}, given(module))


def assigned(module, name, *size):
    """Call a module with a parameter of another size, or with none. The parameter is restored afterwards."""
    parameter = module._parameters[name]
    setattr(module, name, nn.Parameter(zeros(size)) if size else None)
    try:
        return module(*given(module))
    finally:
        setattr(module, name, parameter)


a_bool = "TypeError: {} should be of type bool, got: {}".format
an_int = "TypeError: {} should be of type int, got: {}".format
a_tensor = "TypeError: {} should be a tensor, got: {}".format
dense = "RuntimeError: {}: Expected input to be a dense tensor, got {}".format
pair = "TypeError: {}(): argument 'hx' (position 2) must be tuple of Tensors, not {}".format
a_list = "TypeError: {} should be a list of pairs (h, c), one a layer, got{}: {}".format
size = "RuntimeError: Expected {} size {}, got {}".format
DTYPES = "RuntimeError: Input and {0} tensors are not the same dtype, found input tensor with torch.{1} and {0} tensor "
dtypes = f"{DTYPES}with torch.{{2}}".format
DEVICES = "RuntimeError: Input and {0} tensors are not at the same device, found input tensor at {1} and {0} tensor at "
devices = f"{DEVICES}{{2}}".format
BACKENDS = "'auto', 'triton', 'cupy', 'numba', 'torch', 'reference'"
unknown = f"ValueError: unknown backend {{}}; expected one of {BACKENDS}".format
SPARSE, A_NESTED = "a tensor of layout torch.sparse_coo", "a nested tensor"
RANGE = "should be a number in range [0, 1] representing the probability of an element"
DROPOUT = f"{RANGE} being zeroed"
ZONEOUT = f"ValueError: zoneout {RANGE} staying as it was, or a pair of them for h and c, got "
PROJECTED = "ValueError: layer_norm is not defined with a projection: expected proj_size 0, got 2"
TWO = "RuntimeError: lstm expects two hidden states"
FEATURES = "RuntimeError: input.size(-1) must be equal to input_size. Expected 3, got 4"
FOUR = "hx should be a tuple of 4 tensors (h, c, n, m), got"
FLOAT64 = "ValueError: ...input...torch.float64..."
NAMES = ("'cuda'", "'Triton'", "''", "1", "['torch']")


def of_arguments():
    """Yield calls with wrong arguments of the constructors, and wrong attributes. In a text {v} is the value and {k}
    its type."""
    classes = "LSTM(3, 4", "StackedLSTM(3, [4, 4]", "LSTMCell(3, 4", "GRU(3, 4", "StackedGRU(3, [4, 4]", "GRUCell(3, 4"
    lstm, stack, cell, gru, gru_stack, gru_cell = made = [f"gpu_lstm.{cls}, {{0}}={{1}})" for cls in classes]
    later, of_gru = "setattr(m.stack, '{0}', {1})", "setattr(m.gru, '{0}', {1})"
    rates, a_rate = ("2.0", "-0.5", "'0.5'", "None", "[0.1]", "math.nan"), f"ValueError: {{0}} {DROPOUT}, got {{v!r}}"
    for text, templates, name, values in (
        (unknown("..."), [lstm, later, cell, gru], "backend", NAMES),
        (a_bool("{0}", "{k}"), [later, gru, "gpu_lstm.compat.LSTM(3, 4, {0}={1})"], "recompute", ("'yes'", "1")),
        (a_bool("{0}", "{k}"), [later], "batch_first", ("'yes'",)),
        (a_bool("{0}", "{k}"), made[:3], "peepholes", ("'yes'",)),
        ("TypeError: layer_norm should be of type bool, or a tuple of names, got: {k}", made[:3], "layer_norm",
         ("'hh'",)),
        ("ValueError: layer_norm should be a bool, or name some of ... got ...'x'...", made[:3], "layer_norm",
         ("('hh', 'x')",)),
        (a_rate, [lstm, later, of_gru], "recurrent_dropout", (*rates, "True")),
        (a_rate, [stack, gru_stack], "weight_drop", ("1.5", "(0.1, 0.2)")),
        (ZONEOUT + "{v!r}", [lstm, later], "zoneout", (*rates, "(0.1,)", "(0.1, 2)", "{'h': 0.1}")),
        (f"ValueError: dropout {DROPOUT}", [stack, of_gru], "dropout", (*rates, "True")),
        ("ValueError: zoneout of a GRU should be one number in range [0, 1], for its one state, got {v!r}",
         [gru, gru_stack, of_gru], "zoneout", ("(0.1, 0.2)", "(0.1, 0.1)")),
        ("TypeError: ...unexpected keyword argument '{0}'...", [gru, gru_stack, gru_cell], "peepholes", ("True",)),
        ("ValueError: proj_size argument is only supported for LSTM, not RNN or GRU", [gru], "proj_size", ("2", "0")),
        *((a_bool("{0}", "{k}"), [stack, gru_stack], name, ("'no'",))
          for name in ("batch_first", "bidirectional", "bias")),
        (a_bool("{0}", "{k}"), [stack, later], "residual", ("'yes'",)),
        ("TypeError: hidden_sizes should be a sequence of ints, got: {k}", ["gpu_lstm.StackedLSTM(3, {1})"], "",
         ("4", "{4, 5}", "'44'", "(size for size in (4, 5))")),
        (an_int("hidden_size", "{k}"), ["gpu_lstm.StackedLSTM(3, [4, {1}])"], "", ("2.0", "None", "'4'")),
    ):  # fmt: skip
        for value in values:
            found = text.format(name, k=kind_of(value), v=eval(value))
            yield found, *(template.format(name, value) for template in templates)


def of_lengths_and_resets():
    """Yield calls with wrong lengths and resets, for a batch of 2 sequences with 5 steps."""
    limits = "ValueError: Expected lengths from 0 to 5, the number of steps, got lengths from"
    a_dtype = "ValueError: lengths should be of dtype torch.int32 or torch.int64, got torch."
    for text, argument in (
        (f"{limits} 2 to 6", "lengths=tensor([6, 2])"), (f"{limits} -1 to 3", "lengths=tensor([3, -1])"),
        ("ValueError: Expected lengths of shape [2], got [1]", "lengths=tensor([3])"),
        (a_dtype + "float32; use lengths.long()...", "lengths=tensor([1.0, 2.0])"),
        ("ValueError: Expected lengths on cpu, where the input is, got meta", "lengths=tensor([1, 2], device=META)"),
        (a_tensor("lengths", "list; use torch.as_tensor..."), "lengths=[5, 2]"),
        ("ValueError: Expected resets of shape [5, 2], got [5, 2, 1]; use resets.squeeze(-1)",
         "resets=RESETS[..., None]"),
        ("ValueError: resets should be of dtype torch.bool, got torch.float32; use resets.bool()",
         "resets=zeros(5, 2)"),
        ("ValueError: resets should be of dtype torch.bool, got torch.uint8; use resets.squeeze(-1).bool()",
         "resets=RESETS[..., None].byte()"),
        ("ValueError: resets should be of dtype torch.bool, got torch.float32", "resets=zeros(5, 3)"),
        ("ValueError: Expected resets of shape [5, 2], got [5, 3, 1]", "resets=zeros(5, 3, 1, dtype=BOOL)"),
        ("ValueError: Expected resets on cpu, where the input is, got meta", "resets=RESETS.to(META)"),
        (a_tensor("resets", "bool"), "resets=True")):  # fmt: skip
        yield text, *(f"{call}, {argument})" for call in ("m.lstm(SEQ", "m.gru_stack(SEQ", "layer(m"))


def of_reset_states():
    yield "ValueError: Expected resets together with reset_states, got None", "m.lstm(SEQ, reset_states=(H0, C0))"
    sizes = "ValueError: Expected {0} of reset_states of size [{1}2, 4], one a sequence, or [{1}5, 2, 4], one a step, "
    sizes = f"{sizes}got {{2}}".format
    for text, call, states in (
        (sizes("c", "1, ", [1, 2, 5]), "m.lstm(SEQ", "(H0, zeros(1, 2, 5))"),
        (sizes("h", "", [1, 2, 4]), "layer(m", "(H0, C0)"), (sizes("h", "1, ", [2, 4]), "m.gru(SEQ", "H2"),
        ("ValueError: Expected c of reset_states of layer 1 of size [2, 4], ... got [2, 5]", "m.stack(SEQ",
         "[PAIRS[0], (H2, zeros(2, 5))]"),
        ("ValueError: Expected c of reset_states of dtype torch.float32, got torch.int64", "m.lstm(SEQ",
         "(H0, C0.long())"),
        ("ValueError: Expected h of ... on cpu, ..., got meta", "m.lstm(SEQ", "(H0.to(META), C0)"),
        (a_tensor("c of reset_states", "NoneType"), "m.lstm(SEQ", "(H0, None)"),
        ("TypeError: reset_states should be a pair of tensors (h, c), got: Tensor", "m.lstm(SEQ",
         "torch.stack([H0, C0])"),
        ("ValueError: Expected reset_states of two states (h, c), got 1", "m.lstm(SEQ", "(H0,)"),
        (a_tensor("reset_states", "tuple"), "m.gru(SEQ", "(H0, H0)"),
        (a_list("reset_states", "", "Tensor"), "m.stack(SEQ", "H0"),
        ("ValueError: Expected reset_states of 2 tensors, one a layer, got 1", "m.gru_stack(SEQ", "[H2]")):  # fmt: skip
        yield text, f"{call}, resets=RESETS, reset_states={states})"


CALLS = [
    *of_arguments(),
    *of_lengths_and_resets(),
    *of_reset_states(),
    ("ValueError: hidden_sizes must have at least one layer", "gpu_lstm.StackedLSTM(3, [])"),
    ("ValueError: hidden_size must be greater than zero", "gpu_lstm.StackedLSTM(3, [4, 0])",
     *(f"{of}(m, weights=(zeros(0, 3), zeros(0, 0)))" for of in ("layer", "gru")), "slstm(weight_hh=zeros(0, 4))"),
    ("ValueError: input_size must be greater than zero", "gpu_lstm.StackedLSTM(0, [4, 4])"),
    (an_int("input_size", "str"), "gpu_lstm.StackedLSTM('3', [4, 4])"),
    # Weights. Kernels would read beyond one that is too small, and some would be broadcast.
    *((size(name, f"{expected}", f"{[*got]}"), f"handed(m.triton, '{name}_l0', *{got})",
       f"assigned(m.lstm, '{name}_l0', *{got})", f"handed(m.cell, '{name}', *{got})",
       f"assigned(m.torchs_cell, '{name}', *{got})")
      for name, got, expected in (
        ("weight_hh", (16, 3), (16, 4)), ("weight_ih", (12, 4), (16, 3)), ("bias_hh", (64,), (16,)),
        ("bias_ih", (1,), (16,)), ("bias_hh", (16, 1), (16,)))),
    (size("bias_ih", "(16,)", "[1]"), "handed(m.deep, 'bias_ih_l1', 1)"),
    (size("weight_ih", "(16, 4)", "[16, 5]"), "handed(m.stack, 'layers.1.weight_ih_l0', 16, 5)"),
    (size("weight_peephole", "(12,)", "[16]"), "handed(m.variant, 'weight_peephole_l0', 16)"),
    (a_tensor("weight_hh", "NoneType"), "assigned(m.lstm, 'weight_hh_l0')", "layer(m, weights=(WEIGHTS[0], None))"),
    ("AttributeError: ...weight_hh_l0...", "delattr(lstm := copy.deepcopy(m.lstm), 'weight_hh_l0'), lstm(SEQ)"),
    ("RuntimeError: bias_ih and bias_hh should be given together", "assigned(m.lstm, 'bias_hh_l0')"),
    *((f"ValueError: backend 'torch' does not support {name}; use 'numba' or 'reference'", *calls) for name, *calls in (
        ("peepholes", "lstm_layer(SEQ, [*PLAIN, zeros(12)], backend='torch')"),
        ("layer_norm", "lstm_layer(SEQ, NORMED, backend='torch')"),
        ("a projection to as many features as units",
         "lstm_layer(SEQ, [*WEIGHTS[:2], None, None, zeros(4, 4)], backend='torch')"),
        ("reset_states", "gpu_lstm.backend('torch')(m.auto)(SEQ, resets=RESETS, reset_states=(H0, C0))"),
        *((name, f"gpu_lstm.backend('torch')(m.dropping['{name}'])(SEQ)") for name in ("recurrent_dropout", "zoneout")),
        ("slstm cells", "gpu_lstm.backend('torch')(m.slstm)(SEQ)", "slstm(backend='torch')"))),
    ("RuntimeError: weight_peephole must have 1 dimensions, got 2", "lstm_layer(SEQ, [*PLAIN, zeros(3, 4)])"),
    (PROJECTED, "gpu_lstm.LSTM(3, 4, proj_size=2, layer_norm=('ih',))",
     "lstm_layer(SEQ, [WEIGHTS[0], zeros(16, 2), None, None, zeros(2, 4), None, zeros(16)])"),
    ("RuntimeError: bias_c should be given together with gain_c", "lstm_layer(SEQ, [*WEIGHTS, *[None] * 7, zeros(4)])"),
    ("AttributeError: ...peepholes...", "setattr(m.lstm, 'peepholes', True)"),
    # Advice that follows torch's words
    ("AttributeError: ...; expected a tensor; use torch.as_tensor...", "m.lstm(SEQ.numpy())", "m.lstm(SEQ.tolist())"),
    ("...use torch.as_tensor...", "m.cell(SEQ[0].numpy())"),
    ("...hx is one tensor: a cell expects (h, c)", "m.cell(zeros(2, 3), H2)"),
    ("...lengths and resets are given by keyword...", "m.lstm(SEQ, tensor([5, 2]))", "m.lstm(SEQ, RESETS)",
     "m.lstm(SEQ, zeros(2, 2, 4))"),
    ("ValueError: lengths should be ..., got torch.bool; lengths and resets are given by keyword",
     "m.lstm(SEQ, None, RESETS)"),
    ("...first two dimensions change places, see batch_first...", "m.first(SEQ, (H0, C0))",
     "m.first(SEQ, lengths=tensor([5, 2]))", "m.lstm(SEQ, resets=RESETS.T)"),
    # Input of LSTM, and hx, where torch's own words are no guide
    (dense("LSTM", A_NESTED), "m.lstm(NESTED)"),
    (dense("LSTM", SPARSE), "m.lstm(SEQ.to_sparse())", "m.stream(SEQ.to_sparse())"),
    *((f"RuntimeError: {text}", f"m.lstm(PackedSequence({data}, tensor({sizes})))") for text, data, sizes in (
        ("Expected data of 5 rows, the sum of batch_sizes, got 4", "zeros(4, 3)", [2, 2, 1]),
        ("Expected batch_sizes that never grow and are never negative, got [0, 2]", "zeros(2, 3)", [0, 2]),
        ("input must have 2 dimensions, got 3", "zeros(3, 1, 3)", [2, 1]))),
    (FEATURES, "m.lstm(packed(4))", "m.stack(zeros(5, 2, 4))", "m.stream_of_stack(zeros(2, 4))",
     "gpu_lstm.explain(m.lstm, zeros(5, 2, 4))"),
    (size("hidden[0]", "(1, 2, 4)", "[2, 4]"), "m.lstm(PACKED, (H2, H2))"),
    (FLOAT64, "m.deep(SEQ.double())", "m.stack(SEQ.double())", "m.stream(zeros(2, 3, dtype=F64))"),
    (pair("lstm", "Tensor"), "m.deep(SEQ, zeros(2, 2, 2, 4))", "m.lstm(PACKED, SEQ)", "layer(m, hx=SEQ)",
     "gpu_lstm.Stream(m.lstm, 2, SEQ)"),
    (TWO, "m.lstm(PACKED, (H0, C0, C0))", "m.lstm(PACKED, (H0,))", "layer(m, hx=())",
     "gpu_lstm.Stream(m.lstm, 2, (H0,))"),
    (dtypes("hidden", "float32", "float64"), "m.deep(SEQ, (zeros(2, 2, 4, dtype=F64), zeros(2, 2, 4)))",
     "m.gru(PACKED, H0.double())", "layer(m, hx=(H2.double(), H2))", "m.slstm(SEQ, (H0.double(), C0, C0, C0))"),
    ("ValueError: lengths should not be given together with a PackedSequence...",
     "m.deep(PACKED, lengths=tensor([5, 3]))"),
    ("ValueError: Expected resets of shape [2, 5], got [5, 2]", "m.first(zeros(2, 5, 3), resets=RESETS)"),
    ("ValueError: Expected lengths of shape [], got [1]", "m.lstm(SEQ[:, 0], lengths=tensor([3]))"),
    ("ValueError: Expected resets of shape [2, 5], got [8]", "m.first(PACKED, resets=zeros(8, dtype=BOOL))"),
    ("ValueError: Expected c of reset_states of size [1, 2, 4], ..., or [1, 2, 5, 4], one a step, got [1, 5, 2, 4]",
     "m.first(zeros(2, 5, 3), resets=RESETS.T, reset_states=(H0, zeros(1, 5, 2, 4)))"),
    ("TypeError: ...unexpected keyword argument 'length'...", "m.lstm(SEQ, length=tensor([5, 2]))"),
    ("TypeError: LSTM accepts lengths, ... LSTMModule ... hand it a gpu_lstm.compat.LSTM",
     "m.first(zeros(2, 5, 3), mask=zeros(2, 5, dtype=BOOL))"),
    ("TypeError: SLSTM accepts lengths, and no mask", "m.slstm(SEQ, mask=RESETS)"),
    # No steps. torch refuses them in these words.
    ("RuntimeError: Expected sequence length to be larger than 0 in RNN", "m.stack(zeros(0, 2, 3))",
     "m.stack(zeros(0, 0, 3))", "m.stream(zeros(0, 2, 3))", "layer(m, x=zeros(0, 0, 3), backend='triton')",
     "slstm(z=zeros(0, 2, 16))"),
    # StackedLSTM
    (a_tensor("input", "ndarray; use torch.as_tensor..."), "m.stack(SEQ.numpy())", "layer(m, x=SEQ.numpy())"),
    (dense("StackedLSTM", A_NESTED), "m.stack(NESTED)"), (dense("StackedLSTM", SPARSE), "m.stack(SEQ.to_sparse())"),
    ("ValueError: StackedLSTM: Expected input to be 2D or 3D, got 4D instead", "m.stack(zeros(3, 3, 3, 3))"),
    (devices("parameter", META, "cpu"), "m.stack(SEQ.to(META))"),
    ("ValueError: residual=True needs ... got inputs of [3, 4] and outputs of [4, 5] ...",
     "gpu_lstm.StackedLSTM(3, [4, 5], residual=True)"),
    (a_list("hx", " for layer 0", "Tensor"), "m.one(SEQ, PAIRS[0])", "gpu_lstm.Stream(m.stack, 2, PAIRS[0])"),
    (a_list("hx", "", "Tensor"), "m.stack(SEQ, zeros(2, 2, 2, 4))", "gpu_lstm.trace(m.stack, SEQ, zeros(2, 2, 2, 4))"),
    ("RuntimeError: Expected hx of 2 pairs, one a layer, got 1", "m.stack(SEQ, PAIRS[:1])"),
    ("RuntimeError: Expected two states (h, c) of layer 1, got 3", "m.stack(SEQ, [PAIRS[0], (*PAIRS[1], H2)])"),
    (a_tensor("c of layer 0", "NoneType"), "m.stack(SEQ, [(H2, None), PAIRS[1]])"),
    # LSTMCell, beyond torch's checks
    (dense("LSTMCell", SPARSE), "m.cell(zeros(2, 3).to_sparse())"),
    # GRU, StackedGRU, gru_layer, GRUCell, where torch's own words are no guide
    (a_tensor("hx", "tuple"), "m.gru(PACKED, (H0, C0))", "gru(m, hx=(H2, H2))"),
    (size("hidden", "(2, 4)", "[1, 2, 4]"), "gru(m, hx=H0)"),
    (size("h of layer 1", "(2, 4)", "[2, 5]"), "m.gru_stack(SEQ, [H2, zeros(2, 5)])"),
    ("TypeError: hx should be a list of tensors, one a layer, got: Tensor", "m.gru_stack(SEQ, H0)"),
    ("RuntimeError: Expected hx of 2 tensors, one a layer, got 1", "m.gru_stack(SEQ, [H2])"),
    (size("weight_hh", "(12, 4)", "[16, 4]"), "handed(m.gru, 'weight_hh_l0', 16, 4)"),
    ("ValueError: Expected weights of 2 to 4 tensors (weight_ih, ... bias_ih, bias_hh), got 5",
     "gru(m, weights=[*GRU_WEIGHTS, None, None, zeros(2, 4)])"),
    # SLSTM, slstm_layer, use_for_slstm
    (f"RuntimeError: {FOUR} 2", "m.slstm(PACKED, (H0, C0))", "gpu_lstm.Stream(m.slstm, 2, (H0, C0))",
     "slstm(hx=(H2, H2))"),
    (f"TypeError: {FOUR}: Tensor", "m.slstm(SEQ, H0)"),
    (a_tensor("m", "NoneType"), "m.slstm(SEQ, (H0, C0, C0, None))"),
    (size("n", "(1, 2, 4)", "[1, 3, 4]"), "m.slstm(SEQ, (H0, C0, zeros(1, 3, 4), C0))"),
    (size("c", "(2, 4)", "[1, 2, 4]"), "slstm(hx=(H2, C0, H2, H2))"),
    (devices("hidden", "cpu", META), "m.slstm(SEQ, (H0, C0, C0.to(META), C0))", "slstm(hx=(H2.to(META), H2, H2, H2))",
     "layer(m, hx=(H2.to(META), H2))", "m.stack(SEQ, [PAIRS[0], (H2, H2.to(META))])"),
    ("ValueError: hidden_size must be divisible by heads, got hidden_size=4 and heads=3",
     *(f"gpu_lstm.{cls}(3, 4, heads=3)" for cls in ("SLSTM", "LSTM", "GRU", "LSTMCell", "GRUCell")),
     "gpu_lstm.StackedGRU(3, [6, 4], heads=3)", "layer(m, heads=3)", "gru(m, heads=3)", "slstm(heads=3)",
     "of_heads(WEIGHTS[1], 3)"),
    ("ValueError: heads must be greater than zero", "setattr(m.lstm, 'heads', 0)"),
    *((f"ValueError: {name} is not supported by {cls}, got {value}", f"setattr({module}, '{name}', {value})")
      for cls, module, name, value in (
        ("GRU", "m.gru", "peepholes", True), ("StackedGRU", "m.gru_stack", "layer_norm", ("ih",)),
        ("SLSTM", "m.slstm", "peepholes", True), ("LSTMCell", "m.cell", "zoneout", 0.1),
        ("GRUCell", "m.gru_cell", "recurrent_dropout", 0.5))),
    ("ValueError: Expected zeros between the 2 heads of weight_hh, got 32 other weights",
     "of_heads(torch.ones(16, 4), 2)"),
    *((f"ValueError: Expected weight_hh with a multiple of {n} rows and a divisor of {n} columns, got {got}", call)
      for n, got, call in ((11, [16, 4], "whole(WEIGHTS[1], 11)"), (3, [4, 3], "of_heads(zeros(4, 3), 3)"),
                           (4, [16, 3], "whole(zeros(16, 3), 4)"))),
    (an_int("hidden_size", "str"), "whole(WEIGHTS[1], '4')"),
    ("ValueError: hidden_size must be greater than zero", "whole(WEIGHTS[1], 0)"),
    *((an_int("heads", kind_of(heads)), *(f"{call}, heads={heads})" for call in calls)) for heads, calls in (
        ("2.0", ("gpu_lstm.SLSTM(3, 4",)), ("'2'", ("layer(m", "slstm(bias=None")))),
    ("TypeError: ...unexpected keyword argument 'zoneout'...", "gpu_lstm.SLSTM(3, 4, zoneout=0.1)"),
    ("ValueError: recompute is not supported by SLSTM: its gates depend on states that are not kept",
     "setattr(m.slstm, 'recompute', True)"),
    ("ValueError: zoneout is not supported by SLSTM: it would have to choose among 4 states",
     "setattr(m.slstm, 'zoneout', (0.1, 0.0))"),
    ("ValueError: reset_states are not supported by SLSTM: its resets leave an empty state",
     "m.slstm(SEQ, resets=RESETS, reset_states=(H0, C0, C0, C0))"),
    ("TypeError: backend 'numba' supports float16, bfloat16 and float32, got torch.float64",
     "lstm_layer(SEQ.double(), [t.double() for t in WEIGHTS], backend='numba')"),
    ("RuntimeError: backend 'numba' runs on CPU tensors, got meta",
     "gpu_lstm.backend('numba')(gpu_lstm.LSTM(3, 4, device=META))(SEQ.to(META))"),
    (a_tensor("z", "NoneType"), "slstm(z=None)"), (a_tensor("weight_hh", "NoneType"), "slstm(weight_hh=None)"),
    ("RuntimeError: z must have 3 dimensions, got 2", "slstm(z=zeros(2, 16))"),
    (size("z", "(5, 2, 16)", "[5, 2, 3]"), "slstm(z=SEQ)"), (size("bias", "(16,)", "[4]"), "slstm(bias=zeros(4))"),
    (dense("slstm_layer", SPARSE), "slstm(z=zeros(5, 2, 16).to_sparse())"),
    ("TypeError: use_for_slstm accepts a torch.nn.Module, got list", "gpu_lstm.use_for_slstm([LINEAR])"),
    ("ValueError: there is none of xlstm.blocks.slstm.cell.sLSTMCell_vanilla, ... in the Linear",
     "gpu_lstm.use_for_slstm(LINEAR)"), (a_bool("on", "int"), "gpu_lstm.use_for_slstm(LINEAR, 1)"),
    # functional.lstm_layer
    (a_tensor("input", "NoneType"), "layer(m, x=None)", "gru(m, x=None)", "m.backwards(None)"),
    (a_tensor("input", "PackedSequence"), "layer(m, x=PACKED)"), (dense("lstm_layer", A_NESTED), "layer(m, x=NESTED)"),
    (dense("lstm_layer", SPARSE), "layer(m, x=SEQ.to_sparse())"),
    ("RuntimeError: input must have 3 dimensions, got 2", "layer(m, x=zeros(5, 3))"),
    ("TypeError: weights should be a tuple or list of tensors, got: Tensor", "layer(m, weights=zeros(2, 16, 4))"),
    ("ValueError: Expected weights of 2 to 10 tensors (weight_ih, ...), got 1", "layer(m, weights=WEIGHTS[:1])"),
    (size("weight_hh", "(16, 2)", "[16, 4]"), "layer(m, weights=(*WEIGHTS, None, None, zeros(2, 4)))",
     "layer(m, heads=2)", "slstm(heads=2)", "handed(m.slstm, 'weight_hh_l0', 16, 4)"),
    (size("weight_hh", "(16, 4)", "[16, 2]"), "layer(m, weights=(WEIGHTS[0], zeros(16, 2)))"),
    ("ValueError: heads are not defined with a projection: expected proj_size 0, got 2",
     "layer(m, weights=(WEIGHTS[0], zeros(16, 2), None, None, zeros(2, 4)), heads=2)",
     "gpu_lstm.LSTM(3, 4, heads=2, proj_size=2)"),
    ("ValueError: layer_norm of 'hh' or 'c' is over all units: expected heads=1, got 2",
     "lstm_layer(SEQ, NORMED, heads=2)",
     *(f"gpu_lstm.LSTM(3, 4, heads=2, layer_norm={norms})" for norms in ("True", "('c',)"))),
    (dtypes("parameter", "float64", "float32"), "layer(m, x=SEQ.double())", "m.lstm(packed(3, dtype=F64))",
     "slstm(z=zeros(5, 2, 16, dtype=F64))"),
    ("ValueError: proj_size must be greater than zero",
     "layer(m, weights=(zeros(16, 3), zeros(16, 0), None, None, zeros(0, 4)))"),
    (size("hidden[1]", "(2, 4)", "[2, 5]"), "layer(m, hx=(H2, zeros(2, 5)))"),
    (a_bool("reverse", "str"), "layer(m, reverse='no')", "gru(m, reverse='no')", "slstm(reverse='no')"),
    ("TypeError: input should be of a floating point dtype, got: torch.complex64", "layer(m, x=SEQ.to(COMPLEX))"),
    (unknown("'none'"), "layer(m, backend='none')", "slstm(backend='none')"),
    # backend, racing, Backend, the environment
    *((unknown("..."), f"gpu_lstm.backend({name})") for name in (*NAMES, "None")),
    ("ValueError: 'cuda' is not a valid Backend", "gpu_lstm.Backend('cuda')"),
    *(("ValueError: unknown mode of racing ...; expected one of 'on', 'read', 'off'", f"gpu_lstm.racing({name})")
      for name in ("'fast'", "''", "None", "['on']")),
    (unknown("'cuda' in the environment variable GPU_LSTM_BACKEND"),
     "patch.dict(os.environ, GPU_LSTM_BACKEND='cuda')(lstm_layer)(SEQ, WEIGHTS)"),
    ("ValueError: unknown mode of racing 'yes' in the environment variable GPU_LSTM_RACE; expected...",
     "patch.dict(os.environ, GPU_LSTM_RACE='yes')(requested_racing)()"),
    # explain, trace
    *((f"TypeError: {function} accepts a...LSTM... got ...{kind_of(value)}", f"gpu_lstm.{function}({value}, SEQ)")
      for function, value in (("explain", "LINEAR"), ("trace", "None"))),
    *((f"TypeError: {function} accepts an LSTM, ... got Sequential: give it the module '1' of it",
       f"gpu_lstm.{function}(nn.Sequential(LINEAR, m.lstm, m.gru), SEQ)") for function in ("explain", "Stream")),
    (a_tensor("x", "NoneType"), "gpu_lstm.explain(m.lstm, None)", "gpu_lstm.trace(m.lstm, None)"),
    # Stream
    ("TypeError: Stream accepts an LSTM, a GRU, an SLSTM or a stack, got LSTM of torch.nn: convert it...",
     "gpu_lstm.Stream(TORCHS, 2)"),
    ("ValueError: Stream runs one direction, got bidirectional=True...", "gpu_lstm.Stream(m.both, 2)"),
    (an_int("batch", "float"), "gpu_lstm.Stream(m.lstm, 2.0)"),
    ("ValueError: batch must not be negative, got -1", "gpu_lstm.Stream(m.lstm, -1)"),
    *((text, f"gpu_lstm.Stream(m.lstm, 2, {states})") for text, states in (
        (size("hidden[0]", "(1, 2, 4)", "[1, 1, 4]"), "(zeros(1, 1, 4), C0)"),
        (dtypes("hidden", "float32", "float64"), "(H0.double(), C0.double())"),
        (devices("hidden", "cpu", META), "(H0.to(META), C0)"),
        (a_tensor("h_0", "list"), "([0.0], [0.0])"))),
    (a_tensor("x", "NoneType"), "m.stream(None)"), (a_tensor("x", "PackedSequence"), "m.stream(PACKED)"),
    ("ValueError: expected (N, I) or (T, N, I) with N = 2, got (3, 3)", "m.stream(zeros(3, 3))"),
    ("ValueError: expected (N, I) or (N, T, I) with N = 2, got (5, 2, 3)", "gpu_lstm.Stream(m.first, 2)(SEQ)"),
    *(("ValueError: ...drops out in training mode; call eval()...",
       f"gpu_lstm.Stream(m.dropping['{name}'], 2)(zeros(2, 3))") for name in DROPS),
    *((text.format(name), call.format(value)) for name, call in (
        ("which", "m.stream.reset({})"), ("active", "m.stream(zeros(2, 3), active={})")) for text, value in (
          (a_tensor("{}", "list"), "[True, False]"),
          ("ValueError: expected bool of shape (2,), got torch.bool (5, 2)", "RESETS"),
          ("ValueError: Expected {} on cpu, got meta", "zeros(2, dtype=BOOL, device=META)"))),
    *((text, f"m.stream_of_stack.reorder({value})") for text, value in (
        (a_tensor("index", "list"), "[1, 0]"),
        ("ValueError: expected int64 of shape (2,), got torch.bool (2,)", "tensor([True, False])"),
        ("ValueError: Expected index from 0 to 1, got [0, -1]", "tensor([0, -1])"))),
    # convert, to_torch
    ("TypeError: convert accepts a torch.nn.Module, got list", "gpu_lstm.convert([TORCHS])"),
    ("TypeError: to_torch accepts a torch.nn.Module, got type", "gpu_lstm.to_torch(nn.LSTM)"),
    *((f"TypeError: the model itself is a Stacked{kind} of sizes [4, 4]; a torch.nn.{kind} has layers of one size, and "
       "no list of states", f"gpu_lstm.to_torch(m.{module})")
      for kind, module in (("LSTM", "stack"), ("GRU", "gru_stack"))),
    # resets_from_dones
    (a_tensor("dones", "list"), "gpu_lstm.resets_from_dones([[True]])"),
    *(("ValueError: Expected bool dones [T, N] of a step or more, got ...", f"gpu_lstm.resets_from_dones({value})")
      for value in ("zeros(5, dtype=BOOL)", "zeros(0, 2, dtype=BOOL)", "zeros(5, 2, 3)")),
    *((f"ValueError: Expected bool dones [T, N] of a step or more, got torch.{got}",
       f"gpu_lstm.resets_from_dones({value})") for got, value in (
        ("float32 [5, 2]; use dones.bool()", "zeros(5, 2)"),
        ("bool [5, 2, 1]; use dones.squeeze(-1)", "RESETS[..., None]"),
        ("float32 [5, 2, 1]; use dones.squeeze(-1).bool()", "zeros(5, 2, 1)"))),
    ("ValueError: Expected bool first [2] on cpu, got torch.float32 [2, 1] on cpu; use first.squeeze(-1).bool()",
     "gpu_lstm.resets_from_dones(RESETS, zeros(2, 1))"),
    (a_tensor("first", "list"), "gpu_lstm.resets_from_dones(RESETS, [True, False])"),
    *((f"ValueError: Expected bool first [2] on cpu, got torch.bool {got}",
       f"gpu_lstm.resets_from_dones(RESETS, zeros({value}, dtype=BOOL))")
      for got, value in (("[3] on cpu", "3"), ("[2] on meta", "2, device=META"))),
    # check
    ("TypeError: ...takes 0 positional arguments but 1 was given", "gpu_lstm.check('cuda')"),
    # keras, where Keras is not needed
    ("TypeError: GoBackwards accepts an LSTM, a GRU or a stack of them, got ...", "keras.GoBackwards(TORCHS_FIRST)"),
    ("ValueError: ...batch_first=True, got bidirectional=False and batch_first=False", "keras.GoBackwards(m.lstm)"),
    ("ValueError: Expected input of 3 dimensions (N, T, I), got 2", "m.backwards(SEQ[0])"),
    ("ValueError: Expected lengths from 0 to 5, ... got lengths from 1 to 6",
     "m.backwards(zeros(2, 5, 3), lengths=tensor([1, 6]))"),
    *((f"TypeError: Expected {what} or a module that holds one, got {kind_of(value)}", f"keras.{function}({value})")
      for function, what, value in (("keras_init", "an LSTM, a GRU", "LINEAR"), ("forget_bias", "an LSTM", "GRU"))),
    ("ValueError: Expected an LSTM with a bias, got bias=False", "keras.forget_bias(m.without_bias)"),
    ("ValueError: value should be finite, got nan", "keras.forget_bias(m.lstm, float('nan'))"),
    ("TypeError: value should be a number, got: str", "keras.forget_bias(m.lstm, '1')"),
    ("TypeError: to_keras accepts an LSTM, a GRU or a stack of them, or GoBackwards, got LSTMCell",
     "keras.to_keras(CELL)"),
    (a_bool("freeze_second_bias", "str"), "keras.from_keras(None, freeze_second_bias='no')"),
    (a_tensor("mask", "list"), "keras.lengths_of([[True]])"),
    ("ValueError: Expected a mask [N, T] of dtype torch.bool, got [2, 5] of torch.float32",
     "keras.lengths_of(zeros(2, 5))"),
    ("ValueError: ...row 1 has a gap: step 1 is masked, but a later one is not",
     "keras.lengths_of(tensor([[1, 1, 1], [1, 0, 1]]).bool())"),
]  # fmt: skip
