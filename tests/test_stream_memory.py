"""No memory is given away while a stream reads it: a training step on several streams, forward and backward."""

import contextlib

import pytest
import torch
from standing_in import as_a_card
from stream_memory import Model

import gpu_lstm
from gpu_lstm.backends import autograd, schedule
from gpu_lstm.kernels import timeouts

T, B, I, H = 8, 2, 8, 8
KINDS = {"layers": dict(num_layers=3), "directions": dict(num_layers=2, bidirectional=True)}
every_kind = pytest.mark.parametrize("kind", ["directions", pytest.param("layers", marks=pytest.mark.deep)])


def states(lstm, *lead):
    rows = lstm.num_layers * (1 + lstm.bidirectional)
    return torch.randn(rows, *lead, B, lstm.proj_size or H), torch.randn(rows, *lead, B, H)


# Of each: options of the LSTM, and the further arguments of a call, which nobody else keeps.
CASES = {
    "plain": ({}, lambda lstm: {}),
    "autocast": ({}, lambda lstm: {}),
    "weights of the caller": ({}, lambda lstm: {}),
    "weight_drop": (dict(weight_drop=0.3), lambda lstm: {}),
    "dropout": (dict(dropout=0.3), lambda lstm: {}),
    "noise": (dict(recurrent_dropout=0.3, zoneout=0.3), lambda lstm: {}),
    "projection": (dict(proj_size=4), lambda lstm: dict(hx=states(lstm))),
    "recompute": (dict(recompute=True), lambda lstm: dict(lengths=torch.tensor([T, 5]))),
    "variant": (dict(peepholes=True), lambda lstm: {}),
    "norms": (dict(layer_norm=True), lambda lstm: {}),
    "ragged": ({}, lambda lstm: dict(lengths=torch.tensor([T, 5]), resets=torch.rand(T, B) < 0.3, hx=states(lstm))),
    "reset_states": ({}, lambda lstm: dict(resets=torch.rand(T, B) < 0.3, reset_states=states(lstm, T))),
}


@pytest.fixture
def faults(monkeypatch):
    """Of a case: a step of training, inference, or inference in which a chunk raises."""

    def faults(kind, case, way="training"):
        as_a_card(monkeypatch)
        timeouts.error_word(torch.device("cpu"), timeouts.KERNELS[0])  # host memory, made once in a process
        options, further = CASES[case]
        lstm = gpu_lstm.LSTM(I, H, backend="triton", **KINDS[kind], **options)
        learns = way == "training"
        model = Model(monkeypatch, 3 if kind == "layers" else 2)
        contexts = torch.autograd.set_detect_anomaly(True, check_nan=False), torch.set_grad_enabled(learns)
        autocast = torch.autocast("cpu", torch.float16, enabled=case == "autocast")
        if way == "raises":
            layers = iter([autograd.run_layer] * 5)  # of the second layer or, of one layer, the third chunk
            monkeypatch.setattr(autograd, "run_layer", lambda *given: next(layers)(*given))
        with model, contexts[0], contexts[1], autocast, contextlib.suppress(StopIteration):
            # Nobody but the call keeps what it is given.
            if case == "weights of the caller":
                own = {name: p * 1 for name, p in lstm.named_parameters()}
                y, _ = torch.func.functional_call(lstm, own, (torch.randn(T, B, I),))
                del own
            else:
                y, _ = lstm(torch.randn(T, B, I), **further(lstm))
            loss = y.float().square().mean()
            del y
        with model:
            if learns:
                model.backward(loss)
        assert all(stream.clock[stream] for stream in model.streams), "each has work"
        return model.faults

    return faults


@pytest.mark.parametrize("way", ["training", "inference", "raises"])
@pytest.mark.parametrize("case", CASES)
@every_kind
def test_whatever_a_stream_reads_is_waited_for_and_held(faults, kind, case, way):
    assert faults(kind, case, way) == []


@pytest.mark.parametrize("case", CASES)
@every_kind
def test_what_is_not_held_shows(faults, monkeypatch, kind, case):
    monkeypatch.setattr(schedule, "hold", lambda stream, tensors: None)
    assert any("given away" in fault for fault in faults(kind, case))


@every_kind
def test_a_stream_that_does_not_wait_shows(faults, monkeypatch, kind):
    monkeypatch.setattr(schedule, "on", lambda stream, after: torch.cuda.stream(stream))
    assert any("does not wait" in fault for fault in faults(kind, "plain"))
