"""Settings of the whole process do not change a call: it computes the same numbers as without them."""

import contextlib
from functools import cache, partial

import pytest
import torch
from cases import FORMS, drawn
from comparing import BACKENDS, PLACES
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import BaseTorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gpu_lstm

LENGTHS, RESETS = torch.tensor([1, 3]), torch.tensor([[1, 0], [0, 1], [0, 0]]).bool()
SIZE = T, B, I, H = 3, 2, 3, 4
CALLS = [  # sizes, and words of cases.py
    *((SIZE, words) for words in (
        "deep both no-hx", "residual batch-first both ragged", "deep both packed no-hx", "packed resets",
        "deep both ragged resets", "state", "masks norms peepholes packed", "cell", "cell no-hx", "layer resets")),
    ((1, B, I, H), "deep both ragged resets"), ((T, 1, I, H), "unbatched resets"),
]  # fmt: skip


def calls_of(backend):
    """Return calls of every kind, on modules and tensors that are made here. Each returns its results."""
    torch.manual_seed(0)
    calls, place = {}, PLACES[backend]
    for size, words in CALLS:
        named = {*words.split()}
        how = dict(dropout=0.5) if "deep" in named else dict(weight_drop=0.5) if "masks" in named else {}
        by = "reference" if backend == "torch" and named & {"state", "masks"} else backend  # torch's own lacks them
        module, call = drawn(size, words, backend=by, **how)
        x, hx, rest = tree_map_only(torch.Tensor, partial(to_place, place), call)
        form = next((partial(FORMS[word], module) for word in named if word in FORMS), module)
        calls[f"{size[0]}, {words}"] = module.to(**place), partial(form, x, *([] if hx is None else [hx]), **rest)
    lstm, deep = (gpu_lstm.LSTM(I, H, **how, backend=backend, **place) for how in ({}, dict(num_layers=2, dropout=0.5)))
    sliding = [gpu_lstm.Stream(each, B) for each in (lstm, gpu_lstm.StackedLSTM(I, [H], backend=backend, **place))]
    x, (resets, lengths) = torch.randn(T, B, I).to(**place), (t.to(place["device"]) for t in (RESETS, LENGTHS))
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

    return calls | {
        "Stream": (lstm, streamed),
        "trace": (deep, lambda: [(t.output, *t.layers) for t in map(partial(gpu_lstm.trace, deep), (packed, x))]),
        "resets_from_dones": (lstm, lambda: gpu_lstm.resets_from_dones(resets)),
        "lengths_of": (lstm, lambda: gpu_lstm.keras.lengths_of(resets.T.cumsum(1) == 0)),
    }


def to_place(place, t):
    return t.to(**place) if t.is_floating_point() else t.to(place["device"])


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
    for name, tensors in expected(backend).items():
        ours = got[name]
        assert len(ours) == len(tensors) or setting == "inference"
        assert [(t.dtype, t.device) for t in ours] == [(t.dtype, t.device) for t in tensors[: len(ours)]], name
        assert all(map(torch.equal, ours, tensors)), name
