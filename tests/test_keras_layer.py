"""gpu_lstm.keras.LSTM and GRU against keras.layers.LSTM and GRU: results, gradients, states, files and training."""

import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
from comparing import KERNELS_HERE
from test_keras import on_the_cpu  # noqa: F401  # each test

import gpu_lstm
from gpu_lstm.keras import GRU, LSTM, from_keras, layer

B, T, I, H = 4, 6, 5, 3
BOTH = keras.layers.Bidirectional
ALL = {"return_sequences": True, "return_state": True}
BACK, ZERO = {"go_backwards": True}, {"zero_output_for_mask": True}
FUSED = hasattr(BOTH, "_can_attempt_fused_lstm")  # Keras 3.12 has only the loop of cells, whose products are in float32


def draw(*shape, dtype="float32", seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(dtype))


RIGHT = torch.arange(T) < torch.tensor([3, T, 0, 1])[:, None]
MASKS = {"right": RIGHT, "left": RIGHT.flip(1), "gaps": draw(B, T, seed=2) > 0}
MASKED = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
MASKED_OR_NOT = pytest.mark.parametrize("mask", [None, MASKS["gaps"]], ids=["all", "gaps"])


@pytest.fixture(params=[LSTM, GRU])
def kinds(request):
    """Our class of layer and Keras's."""
    return request.param, getattr(keras.layers, request.param.__name__)


@pytest.fixture
def calls(spy, kinds):
    """A Mock that makes and counts the calls of lstm_layer or gru_layer."""
    return spy(layer, f"{kinds[0].__name__.lower()}_layer")


def states(one, **how):
    return [draw(B, H, seed=k, **how) for k, _ in enumerate(keras.tree.flatten(one.cell.state_size), 1)]


def pair(kinds, wrap=lambda one: one, **options):
    """Build our layer and Keras's, with the same random weights."""
    both = [wrap(kind(H, **options)) for kind in kinds]
    for one in both:
        one.build((B, T, I))
        one.set_weights([draw(*w.shape, seed=k).numpy() / 2 for k, w in enumerate(one.get_weights())])
    return both


def close(actual, expected, tolerance):
    for a, e in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance)


def run(one, x, initial=(), **arguments):
    """Return the results of a call, and the gradients of a random sum of them: of the weights, x and the initial
    states."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *initial)]
    results = keras.tree.flatten(one(leaves[0], initial_state=leaves[1:] or None, **arguments))
    loss = sum((r * draw(*r.shape, seed=9 + k).to(r)).sum() for k, r in enumerate(results))
    wanted = [*(weight.value for weight in one.trainable_weights), *leaves]
    return results, torch.autograd.grad(loss, wanted, materialize_grads=True)


def compare(layers, x, tolerances, **arguments):
    (y, gradients), (expected, expected_gradients) = (run(one, x, **arguments) for one in layers)
    close(y, expected, tolerances[0])
    close(gradients, expected_gradients, tolerances[1])
    return y, gradients


@pytest.mark.parametrize("options", [
    {}, {"return_sequences": True}, BACK | ALL, {"use_bias": False, "unroll": True, **ALL}, BACK | {"use_cudnn": True},
], ids=str)  # fmt: skip
def test_results_and_gradients(options, kinds, calls):
    layers = pair(kinds, dtype="float64", **options)
    layers[1].use_cudnn = "auto"  # "auto" keeps Keras from asking for a GPU
    for initial in ((), states(layers[0], dtype="float64")):
        compare(layers, draw(B, T, I, dtype="float64"), (1e-10, 1e-10) if FUSED else (1e-6, 1e-5), initial=initial)
    assert calls.call_count == 2


@MASKED
@pytest.mark.parametrize("options", [{}, BACK | ALL, ZERO | ALL], ids=str)
def test_masks(mask, options, kinds, calls):
    layers, x = pair(kinds, **options), draw(B, T, I)
    initial = states(layers[0])
    results = compare(layers, x, (1e-6, 1e-5), initial=initial, mask=mask)
    dirty = x.masked_fill(~mask[:, :, None], torch.nan)
    for given, form in ((dirty, mask), (x, mask.int().numpy()), (x, mask[:, :, None])):
        close(run(layers[0], given, initial, mask=form), results, 0)
    assert calls.call_count == 4


@MASKED_OR_NOT
def test_on_the_kernels(mask, kinds, device, exact_float32_products):
    with gpu_lstm.backend(KERNELS_HERE), keras.device(device):
        compare(pair(kinds, **ALL), draw(B, T, I).to(device), (1e-6, 1e-5), mask=mask)


@pytest.mark.parametrize(("options", "looped"), [
    ({"dropout": 0.4}, False), ({"dropout": 0.3, "recurrent_dropout": 0.4}, True)], ids=str)  # fmt: skip
@MASKED_OR_NOT
def test_dropout_draws_what_keras_draws(options, looped, mask, kinds, calls):
    layers, x = pair(kinds, seed=7, **options, **ALL), draw(B, T, I)
    first, second = ([one(x, mask=mask, training=True) for one in layers] for _ in range(2))
    close(first[0], first[1], 1e-6)
    close(second[0], second[1], 1e-6)
    assert (first[0][0] - second[0][0]).abs().max() > 1e-2
    assert calls.call_count == (0 if looped else 2)
    close(*(one(x, mask=mask) for one in layers), 1e-6)
    assert calls.call_count == (1 if looped else 3)


@MASKED_OR_NOT
def test_stateful(mask, kinds):
    """Keras's stateful layer cannot train on torch, so gradients are compared with those of a layer that is given the
    states."""
    (ours, theirs), (_, plain) = pair(kinds, stateful=True, **ALL), pair(kinds, **ALL)
    for step in range(4):
        if step == 2:
            ours.reset_state(), theirs.reset_state()
        x, initial = draw(B, T, I, seed=step), [state.value.clone() for state in ours.states]
        results = ours(x, mask=mask)
        close(results, theirs(x, mask=mask), 1e-6)
        close([state.value for state in ours.states], list(results[1:]), 0)
    results, expected = results[0].sum(), plain(x, mask=mask, initial_state=initial)[0].sum()
    gradients = [torch.autograd.grad(y, [w.value for w in of.trainable_weights])
                 for y, of in ((results, ours), (expected, plain))]  # fmt: skip
    close(*gradients, 1e-5)


@MASKED_OR_NOT
@pytest.mark.parametrize(("merge", "options", "use_cudnn"), [("concat", {}, True), ("sum", ALL, "auto")], ids=str)
def test_bidirectional_whatever_use_cudnn_is_which_reads_back_as_given(
    merge, options, use_cudnn, mask, kinds, calls, monkeypatch
):
    """This holds even where Keras would call cuDNN instead of the layers."""
    name, fused = kinds[0].__name__.lower(), Mock(side_effect=AssertionError("cuDNN instead of the layers"))
    monkeypatch.setattr(keras.src.backend, f"bidirectional_{name}", fused, raising=FUSED)
    ours, theirs = pair(kinds, lambda one: BOTH(one, merge_mode=merge), use_cudnn=use_cudnn, **options)
    assert [one.use_cudnn for one in (ours.forward_layer, ours.backward_layer)] == [use_cudnn] * 2
    theirs.forward_layer.use_cudnn = theirs.backward_layer.use_cudnn = False  # Keras runs its loop
    compare((ours, theirs), draw(B, T, I), (1e-6, 1e-5), mask=mask)
    assert calls.call_count == 2
    if FUSED:
        asks = [getattr(one, f"_can_attempt_fused_{name}")(None) for one in (ours, pair(kinds, BOTH)[1])]
        assert asks == [False, True], "on a GPU cuDNN would run in our place"


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
@MASKED_OR_NOT
def test_dtype_policies(policy, mask, kinds):
    # torch has no QR in half precision.
    layers = pair(kinds, dtype=policy, recurrent_initializer="glorot_uniform", **ALL)
    compare(layers, draw(B, T, I), (2e-2, 0.1), mask=mask)


def test_fit_gives_the_same_weights(kinds):
    """docs/keras.md tests files, and models that are cloned."""
    options = ZERO | dict(
        kernel_regularizer="l2", bias_constraint="non_neg", recurrent_constraint="max_norm", activity_regularizer="l1",
        bias_initializer="ones") | (dict(unit_forget_bias=False) if kinds[0] is LSTM else {})  # fmt: skip
    x, y = draw(2 * B, T, I).numpy(), draw(2 * B, 1, seed=1).numpy()
    x[1, 3:] = x[2, :2] = 0  # the layer Masking masks these steps
    of_both = []
    for kind in kinds:
        keras.utils.set_random_seed(1)
        first, second = kind(H, name="a", return_sequences=True, **options), kind(H)
        model = keras.Sequential([keras.Input((T, I)), keras.layers.Masking(), first, second, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.5), "mse")
        before = model.get_weights()
        losses = model.fit(x, y, batch_size=B, shuffle=False, verbose=0).history["loss"]
        assert not any(map(np.array_equal, before, model.get_weights()))
        of_both.append((first.get_config(), before, losses, model.get_weights()))
    (config, *ours), (expected_config, *theirs) = of_both
    assert config == expected_config
    # Weights from the same seed, then the losses and the weights after training.
    for found, expected, tolerance in zip(ours, theirs, (0, 1e-6, 1e-6)):
        for a, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance)


def test_a_symbolic_call_and_a_module_with_its_weights(kinds):
    one = pair(kinds, **ALL)[0]
    output, states = from_keras(one)(draw(B, T, I))
    close((output, *(state[0] for state in keras.tree.flatten(states))), one(draw(B, T, I)), 1e-6)
    assert keras.layers.Lambda(lambda x: one(x)[0])(keras.Input((T, I))).shape == (None, T, H)


def test_what_is_refused(monkeypatch, kinds):
    ours, name = kinds[0], kinds[0].__name__
    refused = [({"activation": "relu"}, "activation='relu' has no counterpart; expected 'tanh'"),
               ({"recurrent_activation": None}, "recurrent_activation='linear'")]  # fmt: skip
    if ours is GRU:
        refused.append(({"reset_after": False}, "reset_after=False has no counterpart; expected True"))
    for options, text in refused:
        with pytest.raises(ValueError, match=text):
            ours(H, **options)
    with pytest.raises(AttributeError, match=r"gpu_lstm\.keras.*no attribute 'SimpleRNN'"):
        gpu_lstm.keras.SimpleRNN  # noqa: B018
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=f"{name} needs Keras on torch, not on jax: set KERAS_BACKEND=torch"):
        ours(H)
