"""No memory is given away while a stream reads it: two directions on streams of their own, forward and backward.

Streams, torch's caching allocator and autograd are modelled on the CPU:

- A stream is a queue with a vector clock, which says how far it has seen itself and the other streams.
- In the allocator memory belongs to the stream that it was allocated on. Once its last owner is gone, that stream may
  get it again at once. A recorded stream prevents this while it reads the memory (Tensor.record_stream).
- In autograd a node runs on the stream that was current when it was made, and waits for the nodes whose gradients it
  gets. The streams that read its results are recorded. Its saved tensors are released once it is queued. Sums of
  gradients are torch's own, and are not checked.
"""

import contextlib
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
import torch
from cases import built, call_of
from standing_in import as_a_card
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_lstm.call import modes
from gpu_lstm.dispatch import race
from gpu_lstm.execution import autograd, schedule
from gpu_lstm.kernels import timeouts


class Stream:
    """How many operations of each stream are over when the next one of this stream begins."""

    def __init__(self, name):
        self.name, self.clock, self.device = name, Counter(), torch.device("cpu")

    def wait_stream(self, other):
        self.clock |= other.clock  # the larger of each


@dataclass
class Block:
    made_by: str
    owner: Stream
    made_at: int  # by the owner's clock
    uses: dict[Stream, int] = field(default_factory=dict)  # the latest use by each stream
    held_for: set[Stream] = field(default_factory=set)  # or "every stream"


class Model(TorchDispatchMode):
    """The operators of this block, on the streams of a schedule. `faults` gets a line for each fault."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.main = self.current = Stream("main")
        self.streams = Stream("forward"), Stream("reverse")
        self.blocks, self.faults = {}, []
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: self.of(t).held_for.add(stream))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.using)
        monkeypatch.setattr(modes, "_dispatch_modes", lambda: 0)  # the library does not see this mode
        scheduled = lambda call, _: schedule.Schedule(T if call.learns else 3, self.streams, 2)  # noqa: E731
        monkeypatch.setattr(race, "schedule_of", scheduled)
        # Anomaly detection asks for a stack as a node is made.
        monkeypatch.setattr(torch.fx.traceback, "format_stack", lambda: [self.current.name])

    @contextlib.contextmanager
    def using(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def of(self, t, made_by="the caller", owner=None):
        """Return the block of a tensor, a new one if it has none."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.blocks:
            self.blocks[key] = Block(made_by, owner or self.main, owner.clock[owner] if owner else 0)
            weakref.finalize(storage, self.released, key)
        return self.blocks[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        blocks = [self.of(t) for t in given]
        results = function(*args, **(kwargs or {}))
        here = self.current
        if here is None:  # autograd itself adds gradients
            for t in tree_leaves(results):
                self.of(t).held_for.add("every stream")
            return results
        here.clock[here] += 1
        for block in blocks:
            if here.clock[block.owner] < block.made_at:
                self.faults.append(f"{here.name} does not wait for {block.made_by} of {block.owner.name}")
        for t in tree_leaves(results):
            if isinstance(t, torch.Tensor):
                blocks.append(self.of(t, str(function), here))
        for block in blocks:
            block.uses[here] = here.clock[here]
        return results

    def released(self, key):
        block = self.blocks.pop(key)
        for stream, last in block.uses.items():
            known = stream in block.held_for or "every stream" in block.held_for
            if not known and block.owner.clock[stream] < last:
                owner = block.owner.name
                self.faults.append(f"{block.made_by} of {owner}: given away while {stream.name} may still read it")

    def backward(self, loss):
        """Run loss.backward(), of a graph that was made within anomaly detection."""
        named = {stream.name: stream for stream in (self.main, *self.streams)}
        ended, producers, todo, nodes = {}, defaultdict(list), [loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node not in nodes:
                nodes.add(node)
                following = [each for each, _ in node.next_functions if each is not None]
                for each in following:
                    producers[each].append(node)
                todo += following

        def hooks(node):
            stream = named[node.metadata["traceback_"][0]]

            def before(gradients):
                self.current = stream
                for producer in producers[node]:
                    stream.clock |= ended.get(producer, Counter())

            def after(gradients, _):
                ended[node], self.current = Counter(stream.clock), None
                for t in gradients:
                    if t is not None:
                        self.of(t, node.name(), stream).held_for.add("every stream")

            node.register_prehook(before)
            node.register_hook(after)

        for node in nodes:
            hooks(node)
        leaves = [named[node.metadata["traceback_"][0]] for node in nodes if not node.next_functions]
        del node, nodes, todo, following, each  # no name here may keep tensors that the graph releases
        loss.backward()
        self.current = self.main
        for stream in leaves:
            self.main.wait_stream(stream)


SIZE = T, B, I, H = 8, 2, 8, 8
# The words of cases.py, and options of the module, by case.
CASES = {
    "plain": ("no-hx", {}), "autocast": ("no-hx", {}), "weights of the caller": ("no-hx", {}),
    "weight_drop": ("no-hx", dict(weight_drop=0.3)), "dropout": ("no-hx", dict(dropout=0.3)),
    "noise": ("no-hx masks", {}), "projection": ("projected", {}), "recompute": ("no-hx ragged recompute", {}),
    "variant": ("no-hx peepholes", {}), "norms": ("no-hx norms", {}), "ragged": ("ragged resets", {}),
    "GRU": ("gru ragged resets", {}), "reset_states": ("states", {}),
}  # fmt: skip


@pytest.fixture
def faults(monkeypatch):
    """faults(case, way) runs a step of training, inference in chunks of three steps, or one in which a chunk raises. It
    returns the faults."""

    def faults(case, way="training"):
        as_a_card(monkeypatch)
        timeouts.error_word(torch.device("cpu"), "step_forward_kernel")  # host memory, made once in a process
        words, options = CASES[case]
        named, size = {*words.split()}, (*SIZE, *([4] if case == "projection" else []))
        lstm = built(size, named, backend="triton", num_layers=2, bidirectional=True, **options)
        learns = way == "training"
        model = Model(monkeypatch)
        contexts = torch.autograd.set_detect_anomaly(True, check_nan=False), torch.set_grad_enabled(learns)
        autocast = torch.autocast("cpu", torch.float16, enabled=case == "autocast")
        if way == "raises":
            # Three chunks of the forward direction and two of the reverse one run.
            chunks = iter([autograd.layer_by_kernels] * 5)
            monkeypatch.setattr(autograd, "layer_by_kernels", lambda *given: next(chunks)(*given))
        with model, contexts[0], contexts[1], autocast, contextlib.suppress(StopIteration):
            # Only the call keeps its arguments.
            if case == "weights of the caller":
                own = {name: p * 1 for name, p in lstm.named_parameters()}
                y, _ = torch.func.functional_call(lstm, own, (torch.randn(T, B, I),))
                del own
            else:
                x, hx, rest = call_of(lstm, size, named, 0)
                y, _ = lstm(x, hx, **rest)
                del x, hx, rest
            loss = y.float().square().mean()
            del y
        with model:
            if learns:
                model.backward(loss)
        assert all(stream.clock[stream] for stream in model.streams), "each has work"
        return model.faults

    return faults


@pytest.mark.parametrize(("case", "way"), [
    *((case, "training") for case in CASES),
    *((case, "inference") for case in ("plain", "autocast", "weights of the caller", "projection", "ragged", "GRU")),
    *((case, "raises") for case in ("plain", "norms", "reset_states")),
])  # fmt: skip
def test_whatever_a_stream_reads_is_waited_for_and_held(faults, case, way):
    assert faults(case, way) == []


@pytest.mark.parametrize(("case", "way", "of_results"), [
    *((case, "training", False) for case in ("plain", "weight_drop", "projection", "norms", "reset_states")),
    ("plain", "inference", True),
])  # fmt: skip
@pytest.mark.parametrize(("place", "name", "said"), [
    (schedule, "hold_memory", "given away"), (Stream, "wait_stream", "does not wait"),
])  # fmt: skip
def test_what_is_not_held_or_waited_for_shows(faults, monkeypatch, case, way, of_results, place, name, said):
    """The fault concerns either the tensors that the streams of the directions read, or their results."""
    real = getattr(place, name)
    here = lambda stream, given: None if (stream.name == "main") == of_results else real(stream, given)  # noqa: E731
    monkeypatch.setattr(place, name, here)
    assert any(said in found for found in faults(case, way))
