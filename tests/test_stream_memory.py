"""No memory is given away while a stream reads it: two directions on streams of their own.

A model on the CPU replaces streams and torch's caching allocator:

- A stream is a queue with a vector clock, which says how far it has seen itself and the other streams.
- Memory belongs to the stream on which it was allocated. Another stream that reads it has to wait for its contents, and
  the memory has to be held for that stream before (Tensor.record_stream), since autograd may release it at any time.
- Autograd runs a layer's backward on the stream of its forward, waits for the gradients that it passes on, and holds
  their memory.
"""

import contextlib
from collections import Counter

import pytest
import torch
from cases import built, call_of
from standing_in import as_a_card
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_lstm.call import modes
from gpu_lstm.dispatch import race
from gpu_lstm.execution import schedule
from gpu_lstm.execution.autograd import RecurrentLayer
from gpu_lstm.kernels.triton_rnn import launch


class Stream:
    """How many operations of each stream are over when the next one of this stream begins."""

    def __init__(self, name):
        self.name, self.clock, self.device = name, Counter(), torch.device("cpu")

    def wait_stream(self, other):
        self.clock |= other.clock  # the larger of each


class Model(TorchDispatchMode):
    """The operators of this block, on the streams of a schedule. `faults` gets a line for each fault."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.main = self.current = Stream("main")
        self.streams = Stream("forward"), Stream("reverse")
        self.alive, self.made, self.held, self.faults = [], {}, set(), set()
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: self.held.add((self.place(t), stream)))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.using)
        monkeypatch.setattr(modes, "_dispatch_modes", lambda: 0)  # the library does not see this mode
        scheduled = lambda call, _: schedule.Schedule(T if call.learns else 3, self.streams, 2)  # noqa: E731
        monkeypatch.setattr(race, "schedule_of", scheduled)
        forward, backward = RecurrentLayer.forward, RecurrentLayer.backward

        def noted_forward(ctx, *given):
            ctx.stream = self.current
            return forward(ctx, *given)

        def backward_on_its_stream(ctx, *gradients):
            self.pass_on(ctx.stream, self.main, gradients)
            with self.using(ctx.stream):
                found = backward(ctx, *gradients)
            self.pass_on(self.main, ctx.stream, found)
            return found

        monkeypatch.setattr(RecurrentLayer, "forward", noted_forward)
        monkeypatch.setattr(RecurrentLayer, "backward", backward_on_its_stream)

    @contextlib.contextmanager
    def using(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def pass_on(self, to, by, gradients):
        to.clock |= by.clock
        self.held |= {(self.place(t), to) for t in gradients if t is not None}

    def place(self, t):
        """Return the number of a tensor's memory, which is never used again."""
        self.alive.append(t)
        return t.untyped_storage()._cdata

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given, results = (args, kwargs), function(*args, **(kwargs or {}))
        here, of = self.current, lambda tree: [self.place(t) for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        here.clock[here] += 1
        for place in of(given):
            owner, at, made_by = self.made.setdefault(place, (self.main, 0, "the caller"))
            if here.clock[owner] < at:
                self.faults.add(f"{here.name} does not wait for {made_by} of {owner.name}")
            if owner is not here and (place, here) not in self.held:
                self.faults.add(f"{made_by} of {owner.name}: given away while {here.name} may still read it")
        for place in of(results):
            self.made.setdefault(place, (here, here.clock[here], str(function)))
        return results


SIZE = T, B, I, H = 8, 2, 8, 8
# Words of cases.py. Two more are "autocast" and "projection".
CASES = (
    "no-hx", "no-hx autocast", "no-hx weight_drop", "no-hx dropout", "no-hx masks", "projection",
    "no-hx ragged recompute", "no-hx peepholes", "no-hx norms", "ragged resets", "gru ragged resets", "states",
)  # fmt: skip


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_whatever_a_stream_reads_is_waited_for_and_held(monkeypatch, case, learns):
    """The calls are of training, or of inference in chunks of three steps."""
    as_a_card(monkeypatch)
    monkeypatch.setattr(launch, "error_word", lambda *_: None)  # host memory, which is never given away
    words = {"deep", "both", *case.split()}
    size = (*SIZE, *[4] * ("projection" in words))
    lstm = built(size, words, backend="triton")
    (x, hx, rest), model = call_of(lstm, size, words, 0), Model(monkeypatch)
    autocast = torch.autocast("cpu", torch.float16, enabled="autocast" in words)
    with model, torch.set_grad_enabled(learns), autocast:
        y, _ = lstm(x, hx, **rest)
        loss = y.float().square().mean()
    with model:
        if learns:
            loss.backward()
    assert all(stream.clock[stream] for stream in model.streams), "each has work"
    assert model.faults == set()
