"""from_keras, to_keras, masks and initial values, against Keras itself."""

import copy
import os
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from comparing import both_kinds
from pairs import random_inputs, weighing
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras

import gpu_lstm
from gpu_lstm.keras import GoBackwards, forget_bias, from_keras, keras_init, lengths_of, to_keras

N, T, I, H = 3, 5, 6, 4
LENGTHS = torch.tensor([3, 5, 0])
MASK = torch.arange(T) < LENGTHS[:, None]
LSTM, GRU, RNN, BOTH = keras.layers.LSTM, keras.layers.GRU, keras.layers.RNN, keras.layers.Bidirectional
CELL, GRU_CELL, STACK = keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.StackedRNNCells


def rnn(kind, cell, sizes=(H,), wrap=lambda cells, dtype: cells, **options):
    return RNN(wrap([kind(n, **cell) for n in sizes], dtype=cell["dtype"]), dtype=cell["dtype"], **options)


ONE_WAY = {}
for name, of_layer, of_cell in (("LSTM", LSTM, CELL), ("GRU", GRU, GRU_CELL)):
    ONE_WAY |= {
        name: lambda cell, layer=of_layer, **options: layer(H, **cell, **options),
        f"RNN {name}": partial(rnn, of_cell, wrap=lambda cells, dtype: cells[0]),
        f"cells {name}": partial(rnn, of_cell, sizes=(H, H + 1)), f"one cell {name}": partial(rnn, of_cell),
        f"StackedRNNCells {name}": partial(rnn, of_cell, sizes=(H, H, H + 2), wrap=STACK)}  # fmt: skip
KINDS = ONE_WAY | {
    f"Bidirectional {name}": lambda cell, way=ONE_WAY[name], **options: BOTH(way(cell, **options), dtype=cell["dtype"])
    for name in ("LSTM", "RNN LSTM", "GRU", "RNN GRU")
}
MASKED = [kind for kind in KINDS if "one" not in kind]  # a stack of one cell fails in Keras when it has a mask


@pytest.fixture(autouse=True)
def on_the_cpu():
    with keras.device("cpu"):
        yield


def build(kind, dtype="float32", use_bias=True, **options):
    layer = KINDS[kind]({"dtype": dtype, "use_bias": use_bias}, return_sequences=True, return_state=True, **options)
    layer.build((None, None, I))
    random = np.random.default_rng(0)
    layer.set_weights([random.normal(scale=0.5, size=weights.shape) for weights in layer.get_weights()])
    return layer


def in_keras_order(output, states):
    """Return a module's results as a flat list, in Keras's order."""
    # The states of a stack's layers; a layer of a GRU has one state.
    rows = states if isinstance(states, list) else [states]
    of_each = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [output, *(state for row in of_each for one in (zip(*row) if row[0].dim() == 3 else [row]) for state in one)]


def in_torch_order(variable, gradient):
    """Return a variable or its gradient as torch has it, with each row of a bias apart. In Keras a GRU has the order z,
    r, n."""
    rows = [gradient.T] if "kernel" in variable.name else gradient.reshape(-1, gradient.shape[-1])
    return [torch.cat([row.chunk(3)[k] for k in (1, 0, 2)]) if "gru" in variable.path else row for row in rows]


def assert_equal(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=tolerance)


def check(layer, module, mask=None, initial=True):
    """Check that results and gradients of a layer and a module agree. docs/keras.md tests masks that repeat the
    output."""
    dtype = next(module.parameters()).dtype
    # Keras's cells multiply in float32 on torch whatever their dtype. The same holds for layers with a mask, and for
    # all layers of Keras 3.12.
    kind = type(getattr(layer, "forward_layer", layer))
    exact = dtype is torch.float64 and mask is None and kind in (LSTM, GRU) and hasattr(BOTH, "_can_attempt_fused_lstm")
    inputs = random_inputs(getattr(module, "module", module), N, steps=T)
    x, hx = tree_map(lambda t: t.to(dtype).requires_grad_(), inputs)
    leaves, states = tree_leaves(hx) if initial else [], None
    if initial:  # Keras takes a list of states, and for cells a list of lists
        of_cells = isinstance(hx, list)
        states = [[*row] if isinstance(row, tuple) else [row] for row in hx] if of_cells else in_keras_order(x, hx)[1:]
    actual = in_keras_order(*module(x, hx if initial else None, lengths=None if mask is None else lengths_of(mask)))
    expected = keras.tree.flatten(layer(x, initial_state=states, mask=mask))
    assert_equal(actual, expected, 1e-13 if exact else 1e-6)
    ours = [parameter for parameter in module.parameters() if parameter.requires_grad]
    variables = layer.trainable_variables
    got, true = (torch.autograd.grad(found, [*of, x, *leaves], weighing(found)) for found, of in (
        (actual, ours), (expected, [variable.value for variable in variables])))  # fmt: skip
    of_weights = [row for variable, g in zip(variables, true) for row in in_torch_order(variable, g)]
    assert_equal(got, [*of_weights, *true[len(variables) :]], 1e-12 if exact else 1e-5)


ZERO, BACK = dict(zero_output_for_mask=True), dict(go_backwards=True)


@pytest.mark.parametrize(("kind", "use_bias", "initial", "masked", "options"), [
    *((kind, not masked, True, masked, ZERO) for kind in KINDS for masked in (False, True)),
    # Backwards the masked steps come first. There Keras has no output to repeat, so it gives zeros.
    *((kind, True, True, True, BACK | ZERO) for kind in ONE_WAY),
    *((kind, True, *row) for kind in ("LSTM", "GRU") for row in (
        (False, False, BACK), (True, False, dict(unroll=True)),
        (True, False, dict(activation=keras.ops.tanh, recurrent_activation=keras.activations.sigmoid)))),
], ids=lambda each: re.sub(" at 0x[0-9a-f]+", "", str(each)))  # fmt: skip
def test_results_and_gradients_are_equal(kind, use_bias, initial, masked, options):
    layer = build(kind, "float64", use_bias, **options)
    check(layer, from_keras(layer), MASK if masked and kind in MASKED else None, initial)


@pytest.mark.parametrize("kind", ["Bidirectional LSTM", "cells LSTM", "cells GRU"])
def test_what_is_trained_is_a_copy_and_the_second_bias_of_an_lstm_and_another_backend_only_if_asked(kind):
    layer = build(kind)
    before = layer.get_weights()
    for freeze, backend in ((True, None), (False, "reference")):
        module = from_keras(layer, backend=backend, freeze_second_bias=freeze)
        assert module.backend == backend
        for name, parameter in module.named_parameters():
            second = "bias_hh" in name and "LSTM" in kind
            assert parameter.requires_grad is not (freeze and second)
            assert second is not bool(parameter.any())
            parameter.detach().zero_()
    assert all(map(np.array_equal, layer.get_weights(), before))


def test_what_is_not_trained_there_is_not_trained_here_and_back():
    layer = build("cells LSTM")
    layer.cell.cells[0].trainable = False
    module = from_keras(layer, freeze_second_bias=False)
    assert [{p.requires_grad for p in one.parameters()} for one in module.layers] == [{False}, {True}]
    assert to_keras(module).trainable
    layer = to_keras(module.requires_grad_(False))
    assert not layer.trainable
    assert not any(p.requires_grad for p in from_keras(layer).parameters())


def built(kind, *args, **kwargs):
    (layer := kind(*args, **kwargs)).build((N, T, I))
    return layer


@pytest.mark.parametrize(("policy", "dtype"), [
    ("mixed_bfloat16", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)])  # fmt: skip
@both_kinds
def test_dtype_is_that_of_the_variables(policy, dtype, kind):
    options = dict(dtype=policy, recurrent_initializer="glorot_uniform")  # torch has no QR in half precision
    layer = built(KINDS[f"cells {kind}"], options)
    module = from_keras(layer)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    kernel = layer.cell.cells[0].kernel
    assert torch.equal(module.layers[0].weight_ih_l0, *in_torch_order(kernel, kernel.value))
    assert f"torch.{to_keras(module).cell.cells[0].kernel.dtype}" == str(dtype)


Cell, Layer = type("Cell", (CELL,), {}), type("Layer", (LSTM,), {})
OTHER_UNITS, OTHER_KIND = (dict(backward_layer=kind(n, go_backwards=True)) for kind, n in ((LSTM, H + 1), (GRU, H)))
LAYERS = [  # a wrong option is a ValueError, a wrong class a TypeError
    *((partial(built, layer, H, **{name: value}), f"{name}={value or 'linear'!r}") for layer, name, value in (
        (LSTM, "activation", None), (LSTM, "dropout", 0.2), (GRU, "stateful", True),
        (GRU, "recurrent_dropout", 0.2))),
    (lambda: built(RNN, CELL(H, recurrent_activation="hard_sigmoid")), "recurrent_activation='hard_sigmoid'"),
    (lambda: built(RNN, [GRU_CELL(H), GRU_CELL(H, reset_after=False)]),
     "reset_after=False has no counterpart; expected True"),
    *((lambda mode=mode: built(BOTH, LSTM(H), mode), f"merge_mode={mode!r}") for mode in ("sum", None)),
    (lambda: built(BOTH, LSTM(H), **OTHER_UNITS), r"same units in all cells, got \[4, 5\]"),
    (lambda: built(BOTH, LSTM(H, go_backwards=True), backward_layer=LSTM(H)), "go_backwards=True"),
    (lambda: built(RNN, [CELL(H), CELL(H, use_bias=False)]), r"same use_bias in all cells, got \[True, False\]"),
    (lambda: built(RNN, Cell(H)), "LSTMCell or GRUCell, got Cell"), (lambda: built(Layer, H), "got Layer"),
    (lambda: built(keras.layers.SimpleRNN, H), "got SimpleRNN"),
    (lambda: built(BOTH, RNN([CELL(H)])), "got StackedRNNCells"),
    (lambda: built(BOTH, LSTM(H), **OTHER_KIND), r"same type in all cells, got \['LSTMCell', 'GRUCell'\]"),
    *((partial(KINDS[kind], {"dtype": "float32"}), "build it first") for kind in ("LSTM", "cells GRU"))]  # fmt: skip
MODULES = [
    *((gpu_lstm.LSTM(I, H, num_layers=2, **{name: value}), f"{name}={value}") for name, value in dict(
        proj_size=2, dropout=0.5, bidirectional=True, recurrent_dropout=0.3, zoneout=0.1, peepholes=True).items()),
    *((gpu_lstm.StackedGRU(I, [H, H], **{name: value}), f"{name}={value}") for name, value in dict(
        dropout=0.5, residual=True, weight_drop=0.5, bidirectional=True).items()),
    (gpu_lstm.StackedLSTM(I, [H], layer_norm=True), "layer_norm=True")]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [*LAYERS, *((lambda m=module: m, text) for module, text in MODULES)],
                         ids=lambda each: each[:30] if isinstance(each, str) else "")  # fmt: skip
def test_what_has_no_counterpart_is_refused(make, message):
    """wrong_calls.py has the calls that are wrong whether Keras is installed or not."""
    given = make()
    with pytest.raises(TypeError if re.search(r"got \w", message) else ValueError, match=message):
        (from_keras if isinstance(given, keras.Layer) else to_keras)(given)


@pytest.mark.parametrize(("make", "got"), [
    (partial(built, LSTM, H), "LSTM of Keras: convert it first by gpu_lstm.keras.from_keras"),
    (lambda: BOTH(GRU(H)), "Bidirectional of Keras: convert it first by gpu_lstm.keras.from_keras"),
    (lambda: keras.Sequential([keras.Input((T, I)), LSTM(H)]),
     "Sequential of Keras: convert each recurrent layer in it first by gpu_lstm.keras.from_keras"),
    (partial(keras.layers.Dense, H), "Dense"),
], ids=["layer", "bidirectional", "model", "no RNN"])  # fmt: skip
def test_functions_for_modules_of_torch_say_how_to_convert_what_keras_has(make, got):
    for function in (gpu_lstm.trace, gpu_lstm.explain):
        with pytest.raises(TypeError, match=rf"^{function.__name__} accepts an LSTM, .*, got {re.escape(got)}$"):
            function(make(), torch.zeros(T, N, I))


def ours_of(kind):
    layer, stack = (getattr(gpu_lstm, f"{of}{kind}") for of in ("", "Stacked"))
    return {
        "three layers": layer(I, H, num_layers=3), "bidirectional": layer(I, H, bidirectional=True),
        "compat": getattr(gpu_lstm.compat, kind)(I, H), "torch": getattr(nn, kind)(I, H, num_layers=2),
        "stack, no bias": stack(I, [H, H + 1], bias=False),
        "stack of one, bidirectional": stack(I, [H], bidirectional=True),
        "backwards": GoBackwards(layer(I, H, num_layers=2, batch_first=True)),
        "stack backwards": GoBackwards(stack(I, [H, H + 1], batch_first=True)),
    }  # fmt: skip


OURS = {f"{name} {kind}": module for kind in ("LSTM", "GRU") for name, module in ours_of(kind).items()}


@pytest.mark.parametrize("module", OURS.values(), ids=OURS)
def test_to_keras_and_back(module):
    module = module.double()
    layer, x, time_first = to_keras(module), torch.randn(N, T, I).double(), not getattr(module, "batch_first", True)
    output, states = module(x.transpose(0, 1) if time_first else x)
    found = in_keras_order(output.transpose(0, 1) if time_first else output, states)
    assert_equal(found, keras.tree.flatten(layer(x)))
    back = from_keras(layer)
    assert isinstance(back, GoBackwards) == isinstance(module, GoBackwards)
    assert all(map(np.array_equal, to_keras(back).get_weights(), layer.get_weights()))


INITIALIZED = {
    "LSTM": gpu_lstm.LSTM(24, 64, num_layers=2, bidirectional=True), "torch LSTMCell": nn.LSTMCell(24, 64),
    "projected, no bias": gpu_lstm.LSTM(24, 64, proj_size=32, bias=False),
    "stacks": nn.Sequential(nn.Linear(24, 24), gpu_lstm.StackedLSTM(24, [64, 32]), gpu_lstm.StackedGRU(24, [64, 32])),
    "GRU and cells": nn.ModuleList([nn.GRU(24, 64), gpu_lstm.GRUCell(24, 64), gpu_lstm.LSTMCell(24, 64)]),
    "variants": gpu_lstm.LSTM(24, 64, peepholes=True, layer_norm=True)}  # fmt: skip


def assert_uniform(values, limit):
    """Check that values are within the limit, and have the moments of a uniform distribution. A false alarm has odds
    below 1e-6."""
    n = values.numel()
    assert limit * (1 - 20 / n) < values.abs().max() <= limit
    assert abs(values.mean()) < 5 * limit / (3 * n) ** 0.5
    assert abs(values.square().mean() / (limit**2 / 3) - 1) < 5 * (4 / 5 / n) ** 0.5


@pytest.mark.parametrize("name", INITIALIZED)
def test_keras_init_and_forget_bias(name):
    module = copy.deepcopy(INITIALIZED[name]).double()
    before, values = dict(module.named_parameters()), copy.deepcopy(module.state_dict())
    assert keras_init(module) is module
    forgets = [path for path in before if "LSTM" in str(module.get_submodule(path.rpartition(".")[0]))]
    for path, parameter in module.named_parameters():
        assert parameter is before[path]
        kind, rows = path.split(".")[-1][:9], len(parameter)
        if kind == "weight_hh":
            assert_equal([parameter.T @ parameter], [torch.eye(parameter.shape[1], dtype=torch.float64)], 1e-12)
        elif kind in ("weight_ih", "weight_hr"):
            assert_uniform(parameter.detach(), (6 / (rows + parameter.shape[1])) ** 0.5)
        elif kind.startswith("bias_"):
            expected = torch.zeros_like(parameter) if kind[5] != "c" else values[path]
            expected[rows // 4 : rows // 2] += float(kind.startswith("bias_ih") and path in forgets)
            assert torch.equal(parameter, expected)
        else:  # Keras does not have this weight
            assert torch.equal(parameter, values[path])
    values = copy.deepcopy(module.state_dict())
    if "no bias" not in name:
        assert forget_bias(module, 2.5) is module
        for path, parameter in module.named_parameters():
            if "bias_ih" in path and path in forgets:
                values[path][len(parameter) // 4 : len(parameter) // 2] = 2.5
            assert torch.equal(parameter, values[path])


@pytest.mark.parametrize(("layer", "ours"), [(LSTM, gpu_lstm.LSTM), (GRU, gpu_lstm.GRU)])
def test_keras_init_is_keras_own(layer, ours):
    """Keras's initial weights pass the same test, and its biases are the same. Our modules may be in half precision,
    too."""
    keras.utils.set_random_seed(0)
    kernel, recurrent, bias = (torch.from_numpy(w) for w in built(layer, 64, dtype="float64").get_weights())
    assert_uniform(kernel, (6 / sum(kernel.shape)) ** 0.5)
    torch.testing.assert_close(recurrent @ recurrent.T, torch.eye(64, dtype=torch.float64))
    for row, name in zip(bias.reshape(-1, kernel.shape[1]), ("bias_ih_l0", "bias_hh_l0")):
        assert torch.equal(row, getattr(keras_init(ours(I, 64)), name).double())
    weight_hh = keras_init(ours(24, 64, dtype=torch.bfloat16)).weight_hh_l0.float()
    torch.testing.assert_close(weight_hh.T @ weight_hh, torch.eye(64), rtol=0, atol=2e-2)


@pytest.mark.parametrize("function", [from_keras, to_keras, lambda _: gpu_lstm.keras.LSTM])
def test_without_keras(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[keras\]".*KERAS_BACKEND=torch'):
        function(gpu_lstm.LSTM(I, H))
