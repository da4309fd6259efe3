"""Settings of the whole process do not change a call: it computes the same numbers as without them."""

import contextlib
from functools import cache, partial

import pytest
import torch
from comparing import BACKENDS, PLACES
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import BaseTorchFunctionMode
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.functional import lstm_layer

T, B, I, H = 3, 2, 3, 4
LENGTHS = torch.tensor([1, 3])
RESETS = torch.tensor([[1, 0], [0, 1], [0, 0]]).bool()


def calls_of(backend):
    """Return calls of every kind, on modules and tensors that are made here. Each returns its results."""
    torch.manual_seed(0)
    place = PLACES[backend]
    by, device = dict(backend=backend, **place), place["device"]
    variants = by if backend != "torch" else by | dict(backend="reference")  # for features that torch's own LSTM lacks
    lstm, deep = gpu_lstm.LSTM(I, H, **by), gpu_lstm.LSTM(I, H, num_layers=2, bidirectional=True, dropout=0.5, **by)
    noisy = gpu_lstm.LSTM(
        I, H, recurrent_dropout=0.5, zoneout=(0.5, 0.2), weight_drop=0.5, peepholes=True, layer_norm=True, **variants
    )
    stack = gpu_lstm.StackedLSTM(I, [H, H], residual=True, bidirectional=True, batch_first=True, **by)
    cell, other = gpu_lstm.LSTMCell(I, H, **by), gpu_lstm.LSTM(I, H, **variants)
    sliding = [gpu_lstm.Stream(module, B) for module in (lstm, gpu_lstm.StackedLSTM(I, [H], **by))]
    x = torch.randn(T, B, I).to(**place)
    h, c, *_ = hx = torch.randn(2, 1, B, H).to(**place)
    lengths, resets = LENGTHS.to(device), RESETS.to(device)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)

    def streamed():
        found = []
        for stream in sliding:
            stream.reset()
            found += [stream(x), stream(x[0], active=resets[1])]
            stream.reorder(lengths // 2)
            stream.reset(resets[0])
            found += [stream(x[1]), stream.state]
        return found

    return {
        "LSTM": (deep, lambda: deep(x)),
        "unbatched": (lstm, lambda: lstm(x[:, 0], resets=resets[:, 0])),
        "batch first": (stack, lambda: stack(x.transpose(0, 1), lengths=lengths)),
        "packed": (deep, lambda: deep(packed)),
        "hx, packed, resets": (lstm, lambda: lstm(packed, tuple(hx), resets=resets)),
        "both": (deep, lambda: deep(x, lengths=lengths, resets=resets)),
        "one step": (deep, lambda: deep(x[:1], lengths=lengths // 2, resets=resets[:1])),
        "reset_states": (other, lambda: other(x, resets=resets, reset_states=tuple(hx))),
        "noise": (noisy, lambda: noisy(packed)),
        "cell": (cell, lambda: [cell(x[0], (h[0], c[0])), cell(x[0])]),
        "lstm_layer": (lstm, lambda: lstm_layer(x, lstm._request(x).weights[0][0], resets=resets, backend=backend)),
        "Stream": (lstm, streamed),
        "trace": (deep, lambda: [(t.output, *t.layers) for t in map(partial(gpu_lstm.trace, deep), (packed, x))]),
        "resets_from_dones": (lstm, lambda: gpu_lstm.resets_from_dones(resets)),
        "lengths_of": (lstm, lambda: gpu_lstm.keras.lengths_of(resets.T.cumsum(1) == 0)),
    }


def results(backend, around=contextlib.nullcontext):
    found = {}
    for name, (module, call) in calls_of(backend).items():
        torch.manual_seed(5)
        with around():
            leaves = [t for t in tree_leaves(call()) if isinstance(t, torch.Tensor)]
            learns = [t for t in leaves if t.requires_grad]
            if learns:
                wanted = list(module.parameters())
                leaves += torch.autograd.grad([t.square().sum() for t in learns], wanted, allow_unused=True)
        found[name] = [t for t in leaves if t is not None]
    return found


expected = cache(results)


@contextlib.contextmanager
def switched(switch, inside, outside):
    switch(inside)
    try:
        yield
    finally:
        switch(outside)


ALONE = {
    "default device": partial(torch.device, "meta"),
    "default dtype float64": partial(switched, torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": partial(switched, torch.use_deterministic_algorithms, True, False),
    "flush denormal": partial(switched, torch.set_flush_denormal, True, False),
    "matmul precision": partial(switched, torch.set_float32_matmul_precision, "high", "highest"),
    "function mode": BaseTorchFunctionMode, "inference": torch.inference_mode, "anomaly": torch.autograd.detect_anomaly,
    "saved tensors": partial(torch.autograd.graph.saved_tensors_hooks, torch.clone, torch.clone),
}  # fmt: skip


@contextlib.contextmanager
def together():
    with contextlib.ExitStack() as stack:
        for name, setting in ALONE.items():
            if name != "inference":
                stack.enter_context(setting())
        yield


SETTINGS = ALONE | {"together": together}


@pytest.mark.parametrize(("backend", "setting"), [
    pytest.param(backend, setting, marks=[pytest.mark.deep] * (setting == "anomaly"))
    for backend in BACKENDS for setting in (ALONE if backend == "torch" else ["together", "inference"])])  # fmt: skip
def test_a_setting_changes_no_number(backend, setting):
    got = results(backend, SETTINGS[setting])
    # Without gradients the loops for CPUs multiply x themselves, and round differently.
    around = torch.no_grad if setting == "inference" else contextlib.nullcontext
    for name, tensors in expected(backend, around).items():
        ours = got[name]
        assert len(ours) == len(tensors) or setting == "inference"
        assert [(t.dtype, t.device) for t in ours] == [(t.dtype, t.device) for t in tensors[: len(ours)]], name
        assert all(map(torch.equal, ours, tensors)), name
