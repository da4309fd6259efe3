"""A route never outlives a fact: whatever changes between two calls, the cached route is that of a fresh decision.

The CPU counts as a card, and a race's winner depends on the kind of call alone, so that `auto` decides differently from
call to call. A kernel in the interpreter takes 50 ms a step; a stand-in for it computes numbers that depend on all that
the kernel is compiled for and given.
"""

import contextlib
import os
import zlib
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import gpu_lstm
from gpu_lstm.backends import kernels, schedule
from gpu_lstm.call.choices import BACKEND_VARIABLE, RACE_VARIABLE, Backend
from gpu_lstm.call.prepare import prepare
from gpu_lstm.dispatch import available, race
from gpu_lstm.dispatch import run as dispatch
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.dispatch.route import Decision
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels.layer import Layer
from gpu_lstm.kernels.problem import problem_of
from gpu_lstm.kernels.triton_lstm import choose, launch

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU stands for a card, by the interpreter"),
    pytest.mark.filterwarnings("ignore"),  # of tracing, and of dropout where there is one layer
]

EXAMPLES = int(os.environ.get("EX", 100))
RESULTS = {
    False: ("h_ptr", "c_ptr", "h_n_ptr", "c_n_ptr"),
    True: ("dgates_ptr", "dc_ptr", "dh_total_ptr", "dh_from_zoneout_ptr", "dreset_h_ptr", "dreset_c_ptr"),
}  # of kernels, forward and backward
PRECISION = torch.backends.cudnn.rnn
SCRATCH = ("m_ptr", "product_ptr", "moments_hh_ptr", "cell_ptr", "moments_c_ptr", "sums_hh_ptr", "sums_c_ptr")


def stand_in(kernel, grid, **arguments):
    """Fill the results of a kernel with a number that depends on all that it is compiled for and given."""
    results = RESULTS["dgates_ptr" in arguments]
    given = {name: value for name, value in arguments.items() if name not in (*results, *SCRATCH)}
    tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
    compiled_for = {name: value for name, value in given.items() if name not in tensors}
    compiled_for |= {name: t.dtype for name, t in tensors.items()}
    number = zlib.crc32(repr((kernel.__name__, grid, sorted(map(str, compiled_for.items())))).encode()) / 2**32
    for t in tensors.values():
        number = number / 2 + t.double().sum().sin().item() / 2
    for name in results:
        if arguments.get(name) is not None:
            arguments[name].fill_(number)


class Races:
    """Who wins a race, and who is expected to: it depends on the kind of call, and they are never the same."""

    def expected(self, kind, able, device):
        other = Backend.REFERENCE if kind.only_ours else Backend.TORCH
        self.winner = (able, other)[zlib.crc32(repr(kind.as_json()).encode()) % 2]
        return Decision(self.winner, "expected")

    def race(self, rivals, now):
        return {name: [2.0 if name == self.winner.value else 1.0] * 4 for name in rivals}


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """The CPU as a card; what runs there: the problem of each layer that is launched."""
    for name in (BACKEND_VARIABLE, RACE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(available, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(launch, "launch_kernel", stand_in)
    monkeypatch.setattr(kernels, "verify", lambda *_: None)
    monkeypatch.setattr(schedule, "WORKSPACE", 960)  # bytes: a few steps, so that long sequences fall into chunks
    found = []

    def recorded(way):
        run = getattr(Layer, way)

        def wrapper(layer, *given):
            gates, r = (given[0], given[1]) if way == "forward" else (given[3], given[5])
            problem = problem_of(gates, r)
            found.append((way, layer.problem, problem))
            # A chunk may have one step of several.
            assert layer.problem == problem._replace(steps=layer.problem.steps), "kernels for other tensors"
            return run(layer, *given)

        return wrapper

    for way in ("forward", "backward"):
        monkeypatch.setattr(Layer, way, recorded(way))
    dispatch.forget()
    launch.forget()
    yield found
    dispatch.forget()


class Function(nn.Module):
    """lstm_layer as a module."""

    def __init__(self, normed):
        super().__init__()
        sizes = [(8, 2), (8, 2), (8,), (8,)]
        self.own = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])
        self.of_c = nn.ParameterList([nn.Parameter(torch.rand(2)) for _ in range(2 * normed)])
        self.backend, self.bias_c, self.reverse = None, True, False

    def forward(self, x, hx=None, **given):
        of_c = [None, None, None, None, self.of_c[0], self.of_c[1] if self.bias_c else None] if len(self.of_c) else []
        return lstm_layer(x, [*self.own, *of_c], hx, reverse=self.reverse, backend=self.backend, **given)


SUBJECTS = {
    "plain": lambda: gpu_lstm.LSTM(2, 2),
    "deep": lambda: gpu_lstm.LSTM(2, 2, 2, bidirectional=True),
    "projected": lambda: gpu_lstm.LSTM(2, 3, proj_size=2),
    "variant": lambda: gpu_lstm.LSTM(2, 2, peepholes=True, layer_norm=True),
    "stack": lambda: gpu_lstm.StackedLSTM(2, [2, 3], residual=True),
    "cell": lambda: gpu_lstm.LSTMCell(2, 2),
    "function": lambda: Function(False),
    "function, normed": lambda: Function(True),
}
ATTRIBUTES = {  # of modules; None, True and the like are set where a module has them
    "training": (True, False), "recompute": (False, True), "batch_first": (False, True), "dropout": (0.0, 0.5),
    "recurrent_dropout": (0.0, 0.5), "zoneout": (0.0, 0.5, (0.0, 0.5)), "weight_drop": (0.0, 0.5),
    "backend": (None, "auto", "triton", "torch", "reference"), "bias_c": (True, False), "reverse": (False, True),
}  # fmt: skip
FACTS = {
    "subject": tuple(SUBJECTS),
    "dtype": (torch.float32, torch.float64, torch.float16), "parameters": (0, 1), "parameters_learn": (True, False),
    "steps": (5, 1, 2, 70, 130), "batch": (2, 0, 1, 3), "form": ("padded", "unbatched", "packed"),
    "lengths": (None, torch.int32, torch.int64), "resets": (None, "zeros", "states"),
    "hx": (None, "given", "learns"), "x_learns": (False, True),
    "grad": (torch.enable_grad, torch.no_grad, torch.inference_mode), "precision": ("tf32", "ieee"),
    "block": (None, "auto", "triton", "torch", "reference"), "racing": (None, "on", "off", "read"),
    BACKEND_VARIABLE: ("", "triton", "torch", "cupy", "nonsense"), RACE_VARIABLE: ("", "off", "nonsense"),
    "autocast": (None, torch.float16, torch.bfloat16), "around": ("nothing", "vmap", "grad", "mode", "trace"),
    **ATTRIBUTES,
}  # fmt: skip


class PassingThrough(TorchDispatchMode):
    """Watches, and changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Traced(nn.Module):
    """A module to be traced: torch.jit.trace has no constants that require gradients."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(x)


def flat(results):
    """The tensors of what a call returns."""
    leaves = tree_leaves(results, is_leaf=lambda t: isinstance(t, PackedSequence))
    return [t.data if isinstance(t, PackedSequence) else t for t in leaves]


def states_for(module, batch, random):
    """Initial states, or states to reset to, one a sequence; `batch` is [] of an unbatched call."""
    if isinstance(module, gpu_lstm.LSTM):
        rows = module.num_layers * (1 + module.bidirectional)
        return random(rows, *batch, module.proj_size or module.hidden_size), random(rows, *batch, module.hidden_size)
    if isinstance(module, gpu_lstm.StackedLSTM):
        return [(random(*batch, size), random(*batch, size)) for size in module.hidden_sizes]
    return random(*batch, 2), random(*batch, 2)


class Routes(RuleBasedStateMachine):
    """One fact after another is given each of its values; each time the cached route is held to a fresh one."""

    launched: list  # of the fixture

    def __init__(self):
        super().__init__()
        dispatch.forget()
        launch.forget()
        self.facts = {name: values[0] for name, values in FACTS.items()}
        self.modules = {}

    @initialize(start=st.fixed_dictionaries({name: st.sampled_from(FACTS[name]) for name in (
        "subject", "parameters_learn", "x_learns", "steps", "batch", "resets", "training",
    )}))  # fmt: skip
    def begin(self, start):
        self.facts |= start

    @rule(name=st.sampled_from(list(FACTS)), first=st.integers(0, 9))
    def change(self, name, first):
        values = FACTS[name]
        for k in range(len(values)):
            self.facts[name] = values[(first + k) % len(values)]
            self.hold_to_a_fresh_decision()

    def hold_to_a_fresh_decision(self):
        note(str({name: value for name, value in self.facts.items() if value is not FACTS[name][0]}))
        module = self.module()
        cached = self.outcome(module)
        knows_nothing = ((dispatch, "_routes"), (race, "_decided"), (launch, "_layers"))
        with contextlib.ExitStack() as stack:
            for place, name in knows_nothing:
                stack.enter_context(patch.object(place, name, {}))
            fresh = self.outcome(module)
        assert cached[0] == fresh[0], "another backend, other kernels or another error"
        for ours, theirs in zip(cached[1], fresh[1], strict=True):
            assert torch.equal(ours, theirs), "other numbers"

    def module(self):
        """The one at hand, with its attributes and parameters as the facts say."""
        facts = self.facts
        torch.default_generator.manual_seed(facts["parameters"])
        name = facts["subject"]
        if name not in self.modules:
            self.modules[name] = SUBJECTS[name]()
        module = self.modules[name]
        for attribute in ATTRIBUTES:
            if hasattr(module, attribute):
                setattr(module, attribute, facts[attribute])
        module.to(facts["dtype"]).requires_grad_(facts["parameters_learn"])
        for owner in module.modules():
            for key, old in list(owner._parameters.items()):
                setattr(owner, key, nn.Parameter(torch.rand_like(old), facts["parameters_learn"]))
        return module

    def outcome(self, module):
        """What ran, or the error; and all numbers: results and gradients."""
        ran, run_by = [], dispatch.run_by

        def recorded(route, call):
            problems = [layer.problem for layer in route.layers]
            ran.append((route.backend, route.dtype, route.as_operators, problems, route.schedule))
            self.launched.clear()  # what a race launched
            return run_by(route, call)

        with patch.object(dispatch, "run_by", recorded):
            try:
                numbers = self.numbers(module)
            except (ValueError, ImportError, RuntimeError, TypeError) as error:
                return (ran, type(error), str(error)), []
        return (ran, list(self.launched)), [t.detach() for t in numbers]

    def numbers(self, module):
        facts = self.facts
        x, given = self.arguments(module)
        leaves = [t for t in (x, *tree_leaves(given), *module.parameters()) if t.requires_grad]

        def call(x):
            return flat(module(self.packed(x) if self.form(module) == "packed" else x, **given))

        def summed(x):
            found = call(x)
            return sum(t.sum() for t in found), found

        torch.default_generator.manual_seed(2)
        with self.process():
            match facts["around"]:
                case "vmap":
                    found = torch.func.vmap(call, randomness="same")(x[None])
                case "grad":
                    gradient, found = torch.func.grad(summed, has_aux=True)(x)
                    found = [gradient, *found]
                case "trace":
                    found = torch.jit.trace(Traced(module, call), (x,), check_trace=False)(x)
                case _:
                    found = call(x)
        if not leaves or not any(t.requires_grad for t in found):
            return found
        ends = [t for t in found if t.requires_grad]
        gradients = torch.autograd.grad(ends, leaves, [torch.ones_like(t) for t in ends], allow_unused=True)
        return [*found, *(t for t in gradients if t is not None)]

    @contextlib.contextmanager
    def process(self):
        """The state of the process."""
        facts, environment = self.facts, {name: self.facts[name] for name in (BACKEND_VARIABLE, RACE_VARIABLE)}
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ, environment))
            stack.callback(setattr, PRECISION, "fp32_precision", PRECISION.fp32_precision)
            PRECISION.fp32_precision = facts["precision"]
            stack.enter_context(facts["grad"]())
            for block, value in ((gpu_lstm.backend, facts["block"]), (gpu_lstm.racing, facts["racing"])):
                if value is not None:
                    stack.enter_context(block(value))
            if facts["autocast"] is not None:
                stack.enter_context(torch.autocast("cpu", facts["autocast"]))
            if facts["around"] == "mode":
                stack.enter_context(PassingThrough())
            yield

    def arguments(self, module):
        """x, of a PackedSequence its data, and all else that a call is given."""
        facts, form = self.facts, self.form(module)
        generator = torch.Generator().manual_seed(1)

        def random(*size):
            return torch.rand(size, generator=generator).to(facts["dtype"])

        steps, batch = facts["steps"], [] if form == "unbatched" else [facts["batch"]]
        if isinstance(module, gpu_lstm.LSTMCell):
            time_and_batch = batch
        else:
            time_and_batch = [*batch, steps] if getattr(module, "batch_first", False) else [steps, *batch]
        x, given = random(*time_and_batch, 2), {}
        if form == "packed":
            x = self.packed(x, of_padded=True).data
        if facts["hx"] is not None:
            hx = states_for(module, batch, random)
            given["hx"] = tree_map(lambda t: t.requires_grad_(facts["hx"] == "learns"), hx)
        if not isinstance(module, gpu_lstm.LSTMCell):
            if facts["lengths"] is not None and form != "packed":
                given["lengths"] = (random(*batch) * (steps + 1)).to(facts["lengths"])
            if facts["resets"] is not None:
                given["resets"] = random(*time_and_batch) < 0.3
            if facts["resets"] == "states":
                given["reset_states"] = states_for(module, batch, random)
        return x.requires_grad_(facts["x_learns"]), given

    def form(self, module):
        """Of x: that of the facts where there is such."""
        form = self.facts["form"]
        if form == "packed" and (self.facts["batch"] == 0 or not isinstance(module, gpu_lstm.LSTM | gpu_lstm.StackedLSTM)):
            return "padded"
        return "padded" if form == "unbatched" and isinstance(module, Function) else form

    def packed(self, x, of_padded=False):
        """A PackedSequence, of padded data or its own [N, I]."""
        steps, batch = self.facts["steps"], self.facts["batch"]
        lengths = [max(1, steps - k) for k in range(batch)]
        if of_padded:
            return pack_padded_sequence(x.reshape(steps, batch, 2), lengths)
        sizes = pack_padded_sequence(torch.zeros(steps, batch, 1), lengths).batch_sizes
        return PackedSequence(x, sizes)


def test_a_cached_route_is_that_of_a_fresh_decision(launched, monkeypatch):
    races = Races()
    monkeypatch.setattr(race, "expected_winner", races.expected)
    monkeypatch.setattr(race, "race", races.race)
    Routes.launched = launched
    run_state_machine_as_test(
        Routes,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=6, derandomize=True, deadline=None, database=None,
            phases=(Phase.generate,), suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        ),
    )
