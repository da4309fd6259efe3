"""A cached route is always right. Whatever changes between two calls, it equals a fresh decision, and its kernels are
those for the tensors of the call.

The CPU counts as a card, and kernels are stubbed. The winner of a race depends only on the kind of call.
"""

import contextlib
import dataclasses
import gc
import os
import zlib
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from pairs import flat, random_inputs
from places import by_interpreter
from standing_in import as_a_card
from subjects import SUBJECTS, Function
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import BaseTorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import gpu_lstm
from gpu_lstm.call.choices import BACKEND_VARIABLE, RACE_VARIABLE, Backend
from gpu_lstm.call.options import Options
from gpu_lstm.dispatch import race
from gpu_lstm.dispatch import route as dispatch
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.dispatch.race import Decision
from gpu_lstm.execution import schedule
from gpu_lstm.kernels import layer as layers
from gpu_lstm.kernels.triton_rnn.plans import tiles as step_plans

pytestmark = [
    by_interpreter,
    pytest.mark.usefixtures("nothing_cached"),
    pytest.mark.filterwarnings("ignore"),  # warnings of tracing, and of dropout where there is one layer
]


class Races:
    """Stubs of a race and of the expected winner. Both depend on the kind of call, and always differ."""

    def expected(self, kind, able, device):
        self.winner = (able, kind.fallback)[zlib.crc32(repr(kind.as_json()).encode()) % 2]
        return Decision(self.winner, "expected")

    def times_of(self, rivals, now):
        return {name: [2.0 if name == self.winner.value else 1.0] * 4 for name in rivals}


ATTRIBUTES = {  # set on modules that have them
    "training": (True, False), "recompute": (False, True), "batch_first": (False, True), "dropout": (0.0, 0.5),
    "recurrent_dropout": (0.0, 0.5), "zoneout": (0.0, 0.5, (0.0, 0.5)), "weight_drop": (0.0, 0.5),
    "backend": (None, "auto", "triton", "torch", "reference"), "bias_c": (True, False), "reverse": (False, True),
}  # fmt: skip
FACTS = ATTRIBUTES | {
    "subject": tuple(SUBJECTS), "dtype": (torch.float32, torch.float64, torch.float16),
    "parameters": (0, 1), "parameters_learn": (True, False), "x_learns": (False, True), "hx": (None, "given", "learns"),
    "steps": (5, 1, 2, 70, 130), "batch": (2, 0, 1, 3), "form": ("padded", "unbatched", "packed"),
    "lengths": (None, torch.int32, torch.int64), "resets": (None, "zeros", "states"),
    "grad": (torch.enable_grad, torch.no_grad, torch.inference_mode), "precision": ("tf32", "ieee"),
    "block": (None, "auto", "triton", "torch", "reference"), "racing": (None, "on", "off", "read"),
    BACKEND_VARIABLE: ("", "triton", "torch", "cupy", "nonsense"), RACE_VARIABLE: ("", "off"),
    "autocast": (None, torch.float16, torch.bfloat16), "onednn": (True, False),
    "around": ("nothing", "vmap", "grad", "mode", "trace"),
}  # fmt: skip
BLOCKS = dict(block=gpu_lstm.backend, racing=gpu_lstm.racing, autocast=lambda dtype: torch.autocast("cpu", dtype))
OF_A_CALL = ("steps", "batch", "form", "lengths", "resets", "hx", "x_learns")
# Facts that an example begins with.
DRAWN = ("subject", "parameters_learn", "x_learns", "steps", "batch", "resets", "training")


class Routes:
    """One fact after another gets each of its values. Each time the cached route is compared with a fresh one."""

    def __init__(self, launched, start):
        dispatch.forget()
        self.launched, self.modules = launched, {}
        self.facts = {name: values[0] for name, values in FACTS.items()} | start

    def change(self, name, first):
        """Give a fact all of its values in turn, unless it is an attribute that the module lacks."""
        values, lacks = FACTS[name], name in ATTRIBUTES and not hasattr(self.module(), name)
        for k in range(0 if lacks else len(values)):
            self.facts[name] = values[(first + k) % len(values)]
            self.hold_to_a_fresh_decision()

    def hold_to_a_fresh_decision(self):
        note(str({name: value for name, value in self.facts.items() if value is not FACTS[name][0]}))
        module = self.module()
        cached = self.outcome(module)
        with contextlib.ExitStack() as stack:
            for place, name in (dispatch, "_routes"), (race, "decided"), (layers, "_layers"):
                stack.enter_context(patch.object(place, name, {}))
            fresh = self.outcome(module)
        assert cached[0] == fresh[0], "another backend, other kernels or another error"
        for ours, theirs in zip(cached[1], fresh[1], strict=True):
            assert torch.equal(ours, theirs), "other numbers"

    def module(self):
        facts, name = self.facts, self.facts["subject"]
        torch.default_generator.manual_seed(facts["parameters"])
        if name not in self.modules:
            self.modules[name] = SUBJECTS[name]()
        module = self.modules[name].to(facts["dtype"])
        for attribute in ATTRIBUTES:
            if hasattr(module, attribute):
                value = facts[attribute]
                setattr(module, attribute, max(value) if isinstance(value, tuple) and "GRU" in name else value)
        for owner in module.modules():
            for key, old in list(owner._parameters.items()):
                setattr(owner, key, nn.Parameter(torch.rand_like(old), facts["parameters_learn"]))
        return module

    def outcome(self, module):
        ran, execute = [], dispatch.execute

        def recorded(route, call):
            ran.append(route._replace(layers=[layer.problem for layer in route.layers]))
            self.launched.clear()  # launches of a race
            return execute(route, call)

        with patch.object(dispatch, "execute", recorded):
            try:
                numbers = self.numbers(module)
            except (ValueError, ImportError, RuntimeError, TypeError) as error:
                return (ran, type(error), str(error)), []
        return (ran, list(self.launched)), [t.detach() for t in numbers]

    def numbers(self, module):
        x, given = self.arguments(module)
        leaves = [t for t in (x, *tree_leaves(given), *module.parameters()) if t.requires_grad]

        def call(x):
            return flat(module(self.packed(x) if self.form(module) == "packed" else x, **given))

        def summed(x):
            found = call(x)
            return sum(t.sum() for t in found), found

        torch.default_generator.manual_seed(2)
        with self.process():
            match self.facts["around"]:
                case "vmap":
                    found = torch.func.vmap(call, randomness="same")(x[None])
                case "grad":
                    gradient, found = torch.func.grad(summed, has_aux=True)(x)
                    found = [gradient, *found]
                case "trace":
                    traced = nn.ModuleList([module])  # torch.jit.trace has no constants that require gradients
                    traced.forward = call
                    found = torch.jit.trace(traced, (x,), check_trace=False)(x)
                case _:
                    found = call(x)
        ends = [t.sum() for t in found if t.requires_grad]
        gradients = torch.autograd.grad(sum(ends), leaves, allow_unused=True) if ends and leaves else []
        return [*found, *(t for t in gradients if t is not None)]

    @contextlib.contextmanager
    def process(self):
        facts, rnn = self.facts, torch.backends.cudnn.rnn
        variables = {name: facts[name] for name in (BACKEND_VARIABLE, RACE_VARIABLE)}
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ, variables))
            stack.callback(setattr, rnn, "fp32_precision", rnn.fp32_precision)
            rnn.fp32_precision = facts["precision"]
            stack.enter_context(torch.backends.mkldnn.flags(enabled=facts["onednn"]))
            stack.enter_context(facts["grad"]())
            for name, enter in BLOCKS.items():
                if facts[name] is not None:
                    stack.enter_context(enter(facts[name]))
            if facts["around"] == "mode":
                stack.enter_context(BaseTorchDispatchMode())
            yield

    def arguments(self, module):
        """Return x, or the data of a PackedSequence, and the other arguments of a call."""
        facts, form, steps = self.facts, self.form(module), self.facts["steps"]
        generator = torch.Generator().manual_seed(1)

        def random(*size):
            return torch.rand(size, generator=generator).to(facts["dtype"])

        batch = [] if form == "unbatched" else [facts["batch"]]
        time_and_batch = [*batch, steps] if getattr(module, "batch_first", False) else [steps, *batch]
        x, given = random(*time_and_batch, 2), {}
        if facts["hx"] is not None:
            given["hx"] = tree_map(lambda t: t.requires_grad_(facts["hx"] == "learns"), self.states(module, batch))
        if isinstance(module, nn.RNNCellBase):
            return random(*batch, 2).requires_grad_(facts["x_learns"]), given
        if form == "packed":
            x = self.packed(x.reshape(steps, *batch, 2)).data
        elif facts["lengths"] is not None:
            given["lengths"] = (random(*batch) * (steps + 1)).to(facts["lengths"])
        if facts["resets"] is not None:
            given["resets"] = random(*time_and_batch) < 0.3
        if facts["resets"] == "states":
            given["reset_states"] = self.states(module, batch)
        return x.requires_grad_(facts["x_learns"]), given

    def states(self, module, batch):
        """Return initial states, or states to reset to, one per sequence. `batch` is [] for an unbatched call."""
        torch.default_generator.manual_seed(3)
        of_function = isinstance(module, Function)
        states = tuple(torch.rand(2, *batch, 2)) if of_function else random_inputs(module, *batch)[1]
        return tree_map(lambda t: t.to(self.facts["dtype"]), states)

    def form(self, module):
        """Return the form of x: that in the facts if the module accepts it, else "padded"."""
        cells = nn.RNNCellBase, Function
        packs = not isinstance(module, cells) and self.facts["batch"] > 0
        is_there = packs if self.facts["form"] == "packed" else not isinstance(module, Function)
        return self.facts["form"] if is_there else "padded"

    def packed(self, x):
        """Return a PackedSequence from padded data [T, B, I], or from its own data [N, I]."""
        lengths = [max(1, self.facts["steps"] - k) for k in range(self.facts["batch"])]
        if x.dim() == 3:
            return pack_padded_sequence(x, lengths)
        return PackedSequence(x, torch.tensor([sum(t < length for length in lengths) for t in range(lengths[0])]))


@pytest.mark.parametrize("examples", [8, pytest.param(40, marks=pytest.mark.deep)])
def test_a_cached_route_is_that_of_a_fresh_decision(monkeypatch, examples):
    races, launched = Races(), as_a_card(monkeypatch)
    monkeypatch.setattr(race, "expected_winner", races.expected)
    monkeypatch.setattr(race, "times_of", races.times_of)
    monkeypatch.setattr(schedule, "WORKSPACE", 960)  # bytes, so few that long sequences are cut into chunks
    of_a_call, others = st.permutations(OF_A_CALL), st.lists(st.sampled_from([*FACTS]), min_size=3, max_size=3)
    start = st.fixed_dictionaries({name: st.sampled_from(FACTS[name]) for name in DRAWN})

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck), report_multiple_bugs=False)  # fmt: skip
    @given(start=start, of_a_call=of_a_call, others=others, first=st.integers(0, 9))
    def checked(start, of_a_call, others, first):
        routes = Routes(launched, start)
        for number, name in enumerate((*of_a_call, *others), first):
            routes.change(name, number)

    checked()


INPUT = torch.rand(5, 2, 2)


@pytest.mark.parametrize(("arguments", "given"), [
    (dict(bidirectional=True, num_layers=2, zoneout=(0.5, 0)), dict(lengths=torch.tensor([5, 2]))),
    (dict(num_layers=2, proj_size=1), {}),
], ids=["training", "inference"])  # fmt: skip
def test_explain_names_the_kernels_that_run(monkeypatch, arguments, given):
    """They are in the order of their launches, both before and after the call. The `why` of each plan is changed to
    name its problem."""
    launched, real, whys = as_a_card(monkeypatch), step_plans.step_plan, []
    told_of = lambda *given: dataclasses.replace(real(*given), why=f"{given[0]}, {given[2]}")  # noqa: E731
    monkeypatch.setattr(step_plans, "step_plan", told_of)
    for way in ("forward", "backward"):
        run = getattr(layers.Layer, f"_{way}")
        recorded = lambda layer, found, *given, run=run: whys.append(found.plan.why) or run(layer, found, *given)  # noqa: E731
        monkeypatch.setattr(layers.Layer, f"_{way}", recorded)
    lstm, training = gpu_lstm.LSTM(2, 2, backend="triton", **arguments), "zoneout" in arguments
    with torch.set_grad_enabled(training):
        before = gpu_lstm.explain(lstm, INPUT, **given)
        y, _ = lstm(INPUT, **given)
        if training:
            y.sum().backward()
        after = gpu_lstm.explain(lstm, INPUT, **given)
    for told in (before, after):
        passes = [[d.passes[k].why for d in told.layers][:: 1 - 2 * k] for k in range(1 + training)]
        assert whys == [why for each in passes for why in each]
        assert told.launches == len(launched) == len(whys)


def test_what_a_race_is_about_is_in_its_key(monkeypatch):
    """Two kinds of calls that differ in one of these facts are raced apart."""

    def key(given=None, steps=4, batch=3, cls=gpu_lstm.LSTM, hidden=2, **arguments):
        lstm = cls(2, hidden, **arguments)
        x = torch.zeros(steps, batch, 2, dtype=arguments.get("dtype"))
        call = lstm._request(x, **given or {})
        return str(kind_of(call).as_json())

    ragged: dict = dict(lengths=torch.tensor([3, 1, 2]), resets=torch.ones(4, 3, dtype=torch.bool))
    states = ragged | dict(reset_states=(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)))
    options = dict(zoneout=0.5, peepholes=True, recompute=True, bidirectional=True, proj_size=1, num_layers=2, hidden=3,
                   dtype=torch.float64, steps=5, batch=5)  # fmt: skip
    keys = [key(), key(ragged), key(states), *(key(**dict([option])) for option in options.items())]
    keys.append(key(cls=gpu_lstm.StackedLSTM, hidden=[2, 3]))
    with torch.no_grad():
        keys.append(key())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(steps=3, batch=4) == keys[-1], "sizes of the same classes"


def test_the_bias_of_a_layer_norm_is_in_a_route(monkeypatch):
    """bias_c is the only tensor of lstm_layer that the options do not describe."""
    launched, layer = as_a_card(monkeypatch), Function(normed=True)
    layer.backend = "triton"
    for layer.bias_c in (True, False):
        layer(INPUT)
    assert [(problem.gain_hh, problem.gain_c, problem.bias_c) for _, problem in launched] == [
        (False, True, True), (False, True, False)]  # fmt: skip


def test_kernels_under_autocast_are_those_of_a_module_in_half_precision(monkeypatch):
    """This holds whatever the precision of float32 products is. Results that were measured and verified for one of them
    are found for the other."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    lstm = gpu_lstm.LSTM(2, 2).requires_grad_(False)

    def facts(x):
        call = lstm._request(x)
        return kind_of(call), race.build(call, kind_of(call), Backend.TRITON).schedule

    with torch.autocast("cpu", torch.float16):
        found = facts(INPUT)
    lstm.half()
    assert found == facts(INPUT.half())


def test_what_is_decided_in_a_capture_or_forgotten_is_decided_again(monkeypatch):
    """In a capture nothing is verified and raced. After `forget` new results are used."""
    monkeypatch.setattr(dispatch, "_routes", {})
    lstm = gpu_lstm.LSTM(2, 2)
    call = lstm._request(INPUT)
    captured = call._replace(modes=call.modes._replace(capturing=True))
    first, second = dispatch.route_of(captured), dispatch.route_of(captured)
    assert first is not second
    route = dispatch.route_of(call)
    assert dispatch.route_of(call) is route
    dispatch.forget()
    assert dispatch.route_of(call) is not route


@pytest.mark.deep
def test_rates_that_are_annealed_leave_little_behind(monkeypatch):
    """A rate that comes back after everything was forgotten gives the same numbers as before."""
    monkeypatch.setattr(dispatch, "MOST_ROUTES", 100)
    dispatch.forget()
    lstm = gpu_lstm.LSTM(2, 2, 2, dropout=0.5, backend="torch")

    def alive():
        gc.collect()
        return sum(type(each) is Options for each in gc.get_objects())

    def output(lstm_dropout):
        lstm.dropout = lstm_dropout
        torch.manual_seed(0)
        return lstm(INPUT[:1])[0]

    first, before = output(0.5), alive()
    for k in range(1500):
        output(k / 1500)
    assert alive() - before <= 1024 + 100
    assert len(dispatch._routes) <= 100
    assert torch.equal(output(0.5), first)
