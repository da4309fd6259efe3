"""The modules as holders of weights: torch's names and initial values, copies, weights made by other tools, and weights
that are subclasses of Tensor without memory of their own, such as torchao's quantised ones."""

import copy
import io
import pickle

import pytest
import torch
from comparing import KERNELS_HERE, PLACES, both_kinds
from pairs import B, H, I, assert_alike, assert_identical, pair, random_inputs, results, seeded
from subjects import SUBJECTS
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves, tree_map_only

import gpu_lstm
from gpu_lstm.dispatch import route as dispatch

pytestmark = pytest.mark.usefixtures("exact_float32_products")


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("cls", "arguments"), [
    (nn.LSTM, dict(bias=False, batch_first=True)), (nn.LSTMCell, {}), (nn.LSTMCell, dict(bias=False)),
    (nn.LSTM, dict(num_layers=2, bidirectional=True, proj_size=2, dropout=0.3)), (nn.GRUCell, {}),
    (nn.GRU, dict(bias=False, batch_first=True)), (nn.GRU, dict(num_layers=2, bidirectional=True, dropout=0.3)),
], ids=str)  # fmt: skip
def test_names_values_and_repr_are_those_of_torch(cls, arguments):
    theirs = seeded(cls, I, H, **arguments)
    for ours in (getattr(of, cls.__name__) for of in (gpu_lstm, gpu_lstm.compat) if hasattr(of, cls.__name__)):
        module = seeded(ours, I, H, **arguments)
        assert list(module.state_dict()) == list(theirs.state_dict())
        assert sorted(module.__constants__) == sorted(theirs.__constants__)
        assert same_weights(module, theirs)
        assert repr(module) == f"gpu_lstm.{theirs!r}"
        module.load_state_dict(cls(I, H, **arguments).state_dict())
        assert not same_weights(module, theirs)
        seeded(module.reset_parameters)
        assert same_weights(module, theirs)
        if issubclass(cls, nn.RNNBase):
            shapes, of_torch = ([[w.shape for w in layer] for layer in m.all_weights] for m in (module, theirs))
            assert shapes == of_torch
            flat = [w for layer in module.all_weights for w in layer]
            assert all(a is b is c for a, b, c in zip(flat, module._flat_weights, module.parameters(), strict=True))
        created = ours(I, H, **arguments, dtype=torch.float16, device="meta").parameters()
        assert {(p.dtype, p.device.type) for p in created} == {(torch.float16, "meta")}


@pytest.mark.parametrize("options", [dict(heads=2), dict(peepholes=True, layer_norm=("c",))], ids=str)
@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.LSTMCell])
def test_a_subclass_may_draw_all_parameters_itself(cls, options):
    class Mine(cls):
        def reset_parameters(self):
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.25)

    mine, shapes = Mine(I, H, **options), {name: p.shape for name, p in cls(I, H, **options).named_parameters()}
    assert {name: p.shape for name, p in mine.named_parameters()} == shapes
    assert all((p == 0.25).all() for p in mine.parameters())
    assert "reset_parameters" not in vars(mine)


@pytest.mark.parametrize("cls", [gpu_lstm.StackedLSTM, gpu_lstm.StackedGRU])
def test_a_stack_has_the_initial_values_of_a_deep_module_and_takes_device_and_dtype(cls):
    assert not hasattr(cls(I, [H]), "reset_parameters")  # tools call it on any module that has it
    deep = seeded(getattr(nn, cls.__name__.removeprefix("Stacked")), I, H, num_layers=3, bidirectional=True)
    assert same_weights(seeded(cls, I, [H, H, H], bidirectional=True), deep)
    stack = cls(I, [4, 2], device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in stack.parameters()} == {("meta", torch.float64)}


NOISE = "recurrent_dropout=0.3, zoneout=(0.2, 0.4), weight_drop=0.25"


@pytest.mark.parametrize("shown", [
    "LSTM(3, 4)", f"LSTM(3, 4, num_layers=2, backend='reference', recompute=True, {NOISE})",
    "LSTMCell(3, 4, bias=False, backend='torch')", "StackedLSTM(3, [4, 2])",
    "StackedLSTM(8, [4, 2, 2], bias=False, batch_first=True, dropout=0.5, bidirectional=True, residual=True, "
    f"backend='reference', recompute=True, {NOISE})", "GRUCell(3, 4, backend='torch')",
    "GRU(3, 4, num_layers=2, backend='torch', recompute=True, recurrent_dropout=0.3, zoneout=0.2)",
    "StackedGRU(8, [4, 2], zoneout=0.2)", "LSTM(3, 4, peepholes=True, layer_norm=True)",
    "LSTMCell(3, 4, bias=False, peepholes=True, layer_norm=('hh', 'c'))",
    "SLSTM(3, 8, heads=2, backend='reference')"])  # fmt: skip
def test_what_is_not_default_is_shown(shown):
    module = eval(shown, vars(gpu_lstm))
    assert f"{type(module).__name__}({module.extra_repr()})" == shown
    assert isinstance(module, gpu_lstm.StackedLSTM | gpu_lstm.StackedGRU) or repr(module) == f"gpu_lstm.{shown}"
    assert repr(gpu_lstm.LSTM(3, 4, zoneout=(0.0, 0.0))) == "gpu_lstm.LSTM(3, 4)"
    assert repr(type("Mine", (gpu_lstm.LSTM,), {"__module__": "mine"})(3, 4)) == "Mine(3, 4)"


def test_flat_weights_are_harmless():
    theirs, ours = pair("LSTM", "reference", num_layers=2)
    assert ours.flatten_parameters() is None
    ours.flatten_parameters = lambda *args, **kwargs: None  # fastai does so
    ours._flat_weights = [torch.zeros_like(w) for w in ours._flat_weights]
    assert_alike(ours, theirs, B)


def copies(module):
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    return pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(file, weights_only=False)


@pytest.mark.parametrize(("kind", "backend", "arguments"), [
    ("LSTM", "torch", dict(bidirectional=True, proj_size=2)), ("StackedLSTM", "reference", dict(bias=False)),
    ("LSTMCell", KERNELS_HERE, {}), ("GRU", KERNELS_HERE, dict(num_layers=2)), ("StackedGRU", "torch", {}),
    ("SLSTM heads", KERNELS_HERE, {}), ("GRUCell", "reference", dict(bias=False))], ids=str)  # fmt: skip
def test_copies_and_moves_compute_the_same_and_copies_have_weights_of_their_own(kind, backend, arguments):
    _, ours = pair(kind, backend, **arguments)
    x, hx = random_inputs(ours, B)
    before = results(ours, x, hx)
    ours = ours.to(torch.float64).to(memory_format=torch.channels_last).cpu().to(**PLACES[backend])
    assert_identical(results(ours, x, hx), before)
    from_meta = copy.deepcopy(ours).to("meta")
    from_meta.load_state_dict(copy.deepcopy(ours.state_dict()), assign=True)
    twins = *copies(ours), from_meta
    for parameter in ours.parameters():
        parameter.data.zero_()
    for twin in twins:
        assert (type(twin), repr(twin)) == (type(ours), repr(ours))
        assert_identical(results(twin, x, hx), before)
    for cls in (gpu_lstm.compat.LSTM, gpu_lstm.compat.GRU):
        assert {type(twin) for twin in copies(cls(I, H))} == {cls}


@both_kinds
@pytest.mark.parametrize("age", ["of today", "without proj_size", "all_weights of parameters"])
def test_states_of_pickled_torch_modules(age, kind):
    of_torch, of_ours = ((getattr(of, kind), getattr(of, f"{kind}Cell")) for of in (nn, gpu_lstm))
    theirs, cell = of_torch[0](I, H, num_layers=2, bidirectional=True), of_ours[1].__new__(of_ours[1])
    state = theirs.__getstate__()
    if age != "of today":
        del state["proj_size"]
    if age == "all_weights of parameters":
        del state["_flat_weights"], state["_flat_weights_names"], state["_all_weights"]
        state["all_weights"] = theirs.all_weights
    for cls in (of_torch[0], of_ours[0]):  # torch itself takes this state
        restored = cls.__new__(cls)
        restored.__setstate__(state.copy())
        assert restored.proj_size == 0
        assert restored._flat_weights_names == list(state["_parameters"])
        assert all(a is b for a, b in zip(restored._flat_weights, state["_parameters"].values(), strict=True))
    assert_alike(restored, theirs, B)
    assert_alike(pickle.loads(pickle.dumps(restored)), theirs, B)
    cell.__setstate__(of_torch[1](I, H).__getstate__())
    cell(torch.zeros(B, I))


# Weights made by other tools. The same is done to our module and to torch's.
def weight_norm(put_on):
    def change(module):
        for name in ("weight_hh_l0", "weight_ih_l1"):
            put_on(module, name)
        yield
        for parameter in module.parameters():  # the weights move with their parameters
            parameter.data.mul_(1.5)
        yield

    return change


def pruning(module):
    prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
    yield prune.l1_unstructured(module, "bias_ih_l0", amount=3)
    yield prune.remove(module, "weight_hh_l0")


def replaced(module):
    old = module.weight_hh_l0
    new = torch.linspace(-1, 1, old.numel()).view_as(old).to(old)
    module.weight_hh_l0 = nn.Parameter(new)
    module.bias_hh_l0.data = torch.ones_like(module.bias_hh_l0)
    yield
    del module.weight_hh_l0
    module.register_parameter("weight_hh_l0", nn.Parameter(-new))
    yield


@pytest.mark.parametrize(("kind", "backend", "change"), [
    ("LSTM", "torch", weight_norm(nn.utils.weight_norm)), ("LSTM", "reference", pruning), ("LSTM", "torch", replaced),
    ("LSTM", KERNELS_HERE, weight_norm(nn.utils.parametrizations.weight_norm)), ("LSTM", KERNELS_HERE, replaced),
    ("GRU", "torch", pruning), ("GRU", KERNELS_HERE, replaced),
])  # fmt: skip
def test_weights_are_read_at_every_call(kind, backend, change):
    theirs, ours = pair(kind, backend, num_layers=2)
    x = random_inputs(theirs, B)[0].double()
    before = theirs(x)[0]
    for _ in zip(change(ours), change(theirs), strict=True):
        assert_alike(ours, theirs, B)
    assert not torch.equal(theirs(x)[0], before)


@both_kinds
def test_torchs_class_replaced_before_a_model_is_built(monkeypatch, kind):
    theirs, ours = getattr(nn, kind)(I, H, batch_first=True), getattr(gpu_lstm, kind)
    monkeypatch.setattr(torch.nn, kind, ours)
    assert isinstance(getattr(gpu_lstm.compat, kind)(I, H), type(theirs))
    model, x = gpu_lstm.convert(nn.Sequential(theirs)), torch.randn(B, 4, I)
    assert type(model[0]) is ours
    scripted = torch.jit.script(model)
    theirs.weight_hh_l0.data.mul_(0.5)  # the scripted module has the same parameters
    assert torch.equal(scripted(x)[0], theirs(x)[0])


STEPS, BATCH = 3, 2
RESETS = torch.tensor([[0, 1], [1, 0], [0, 0]]).bool()


def apart(t):
    """Return a tensor without memory of its own: torch's subclass of a pair, whose operators compute with both."""
    return TwoTensor(t.detach(), t.detach())


KINDS = ("plain", "cell", "stack", "GRU", "GRUCell", "StackedGRU")


def made(kind, backend, weight_hh=lambda weight: weight):
    """Build a module that learns nothing, with weight_hh(W_hh) in the place of each W_hh."""
    torch.manual_seed(0)
    lstm = SUBJECTS[kind](backend=backend)
    for owner in lstm.modules():
        for name, weight in list(owner._parameters.items()):
            new = weight_hh(weight) if name.startswith("weight_hh") else weight
            setattr(owner, name, nn.Parameter(new.detach(), requires_grad=False))
    return lstm


def given(kind):
    return random_inputs(SUBJECTS[kind](), BATCH, steps=STEPS)


def assert_close(ours, theirs):
    for part in ("a", "b"):
        found = [getattr(t, part, t) for t in tree_leaves(ours)]
        torch.testing.assert_close(found, tree_leaves(theirs), rtol=1e-5, atol=1e-5)


@pytest.fixture
def routes(spy):
    """A Mock that runs calls by their routes."""
    return spy(dispatch, "execute")


@pytest.mark.parametrize(("backend", "kind"), [
    *(("reference", kind) for kind in KINDS), *((KERNELS_HERE, kind) for kind in ("plain", "cell", "GRU")),
    *(("torch", kind) for kind in ("plain", "stack", "GRU", "GRUCell"))])  # fmt: skip
def test_weights_and_states(routes, backend, kind):
    """Plain calls of the same kind before and after go to the kernels as usual."""
    x, hx = given(kind)
    plain, expected = made(kind, backend), made(kind, "reference")(x, hx)
    routes.reset_mock()
    for lstm, states in 2 * [(plain, hx), (made(kind, backend, apart), hx), (plain, tree_map_only(Tensor, apart, hx))]:
        assert_close(lstm(x, states), expected)
    plain = [] if backend == "torch" and "ell" in kind else [(backend, False)]  # a cell of torch needs no route
    found = [(route.backend.value, route.operators is not None) for (route, _), _ in routes.call_args_list]
    assert found == 2 * [*plain, *[(backend, backend == KERNELS_HERE)] * 2], "the backend, and whether by operators"


@pytest.mark.parametrize("kind", ["plain", "GRU"])
@pytest.mark.parametrize("backend", ["reference", KERNELS_HERE])
def test_states_to_reset_to(backend, kind):
    x, hx = given(kind)
    assert_close(*(made(kind, name)(x, resets=RESETS, reset_states=tree_map_only(Tensor, how, hx))
                   for name, how in ((backend, apart), ("reference", Tensor.clone))))  # fmt: skip
