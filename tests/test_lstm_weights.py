"""gpu_lstm.LSTM in the place of torch.nn.LSTM: the same weights, whatever is done to the module."""

import copy
import io
import pickle

import pytest
import torch
from comparing import BACKENDS, PLACES, assert_same
from lstm_pair import B, H, I, T, pair, random_inputs, results
from torch import nn
from torch.nn.utils import prune

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products")


# Weights

CONFIGURATIONS = [
    {},
    dict(num_layers=2, bidirectional=True),
    dict(bias=False, batch_first=True),
    dict(num_layers=2, bidirectional=True, proj_size=2, dropout=0.3),
    dict(bias=False, proj_size=1),
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_same_seed_gives_the_same_names_and_initial_weights(configuration):
    modules = []
    for cls in (gpu_lstm.LSTM, gpu_lstm.compat.LSTM, nn.LSTM):
        torch.manual_seed(7)
        modules.append(cls(I, H, **configuration))
    expected = dict(modules[2].named_parameters())
    for module in modules[:2]:
        parameters = dict(module.named_parameters())
        assert list(parameters) == list(expected)
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_state_dicts_load_both_ways(configuration):
    theirs, ours = nn.LSTM(I, H, **configuration), gpu_lstm.LSTM(I, H, **configuration)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    fresh = gpu_lstm.LSTM(I, H, **configuration)
    theirs.load_state_dict(fresh.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_all_weights_and_flat_weights_are_the_parameters(configuration):
    theirs, ours = nn.LSTM(I, H, **configuration), gpu_lstm.LSTM(I, H, **configuration)
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in theirs.all_weights
    ]
    flat = [w for layer in ours.all_weights for w in layer]
    assert len(flat) == len(ours._flat_weights) == len(theirs._flat_weights)
    assert all(a is b is c for a, b, c in zip(flat, ours._flat_weights, ours.parameters(), strict=True))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_repr_is_that_of_torch(configuration):
    assert gpu_lstm.LSTM(I, H, **configuration).extra_repr() == nn.LSTM(I, H, **configuration).extra_repr()
    assert repr(gpu_lstm.LSTM(I, H, **configuration)) == repr(nn.LSTM(I, H, **configuration))


def test_repr_names_a_chosen_backend():
    assert repr(gpu_lstm.LSTM(I, H, 2, backend="reference")) == "LSTM(3, 4, num_layers=2, backend='reference')"


def test_reset_parameters_draws_what_torch_draws():
    theirs, ours = pair("torch", num_layers=2)
    for module in (theirs, ours):
        torch.manual_seed(8)
        module.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("replaced", [False, True])
def test_flatten_parameters_is_harmless(backend, replaced):
    theirs, ours = pair(backend, num_layers=2)
    x, hx = random_inputs(theirs)
    if replaced:
        ours.flatten_parameters = lambda *args, **kwargs: None
        ours = ours.to(**PLACES[backend])
    assert ours.flatten_parameters() is None
    assert_same(results(ours, x, hx), results(theirs, x, hx))


def test_flat_weights_may_be_assigned_to():
    theirs, ours = pair("torch")
    ours._flat_weights = [torch.zeros_like(w) for w in ours._flat_weights]
    x, hx = random_inputs(theirs)
    assert_same(results(ours, x, hx), results(theirs, x, hx))


# Copies, pickles, moves


def _through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def _through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = dict(pickle=_through_pickle, deepcopy=copy.deepcopy, torch_save=_through_torch_save)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_compute_the_same_with_weights_of_their_own(backend, copied):
    _, ours = pair(backend, bidirectional=True, proj_size=2)
    x, hx = random_inputs(ours)
    before = results(ours, x, hx)
    twin = COPIES[copied](ours)
    assert type(twin) is gpu_lstm.LSTM
    assert repr(twin) == repr(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], t) for name, t in results(twin, x, hx).items())


@pytest.mark.parametrize("cls", [gpu_lstm.compat.LSTM, nn.LSTM], ids=["compat", "torch"])
def test_copies_of_the_classes_around_are_still_of_them(cls):
    assert type(copy.deepcopy(cls(I, H))) is cls
    assert type(_through_pickle(cls(I, H))) is cls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("age", ["of today", "without proj_size", "all_weights of parameters"])
def test_state_of_a_pickled_torch_lstm(age, bias):
    theirs = nn.LSTM(I, H, num_layers=2, bidirectional=True, bias=bias)
    state = theirs.__getstate__()
    if age != "of today":
        del state["proj_size"]
    if age == "all_weights of parameters":
        del state["_flat_weights"], state["_flat_weights_names"], state["_all_weights"]
        state["all_weights"] = theirs.all_weights
    assert_restored(state, nn.LSTM)  # it is a state that torch itself takes
    restored = assert_restored(state, gpu_lstm.LSTM)
    x, hx = random_inputs(theirs)
    assert_same(results(restored, x, hx), results(theirs, x, hx))
    assert_same(results(_through_pickle(restored), x, hx), results(theirs, x, hx))


def assert_restored(state, cls):
    module = cls.__new__(cls)
    module.__setstate__(state.copy())
    assert module.proj_size == 0
    assert module._flat_weights_names == list(state["_parameters"])
    assert all(a is b for a, b in zip(module._flat_weights, state["_parameters"].values(), strict=True))
    return module


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float32), ("reference", torch.float32),
                                                ("reference", torch.float16), ("triton", torch.float16)])  # fmt: skip
def test_to_another_dtype(backend, dtype):
    theirs, ours = pair(backend, num_layers=2)
    ours, theirs = ours.to(dtype), theirs.to(dtype).double()
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    x, hx = random_inputs(theirs)
    x, hx = x.to(dtype), tuple(t.to(dtype) for t in hx)
    got = results(ours, x, hx)
    assert {t.dtype for t in got.values()} == {dtype}
    assert_same(got, results(theirs, x, hx))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_computes_half_precision_in_float32_and_rounds_once(dtype):
    _, ours = pair("reference", bidirectional=True, proj_size=2)
    x, hx = random_inputs(ours)
    with torch.no_grad():
        rounded = ours.to(dtype)(x.to(dtype), tuple(t.to(dtype) for t in hx))
        exact = ours.float()(x.to(dtype).float(), tuple(t.to(dtype).float() for t in hx))
    for a, b in zip((rounded[0], *rounded[1]), (exact[0], *exact[1]), strict=True):
        assert torch.equal(a, b.to(dtype))


def test_meta_device():
    theirs, _ = pair("torch", num_layers=2)
    ours = gpu_lstm.LSTM(I, H, 2, device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in ours.parameters())
    assigned = copy.deepcopy(ours)
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    x, hx = random_inputs(theirs)
    assert_same(results(ours, x, hx), results(theirs, x, hx))
    assert_same(results(assigned, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_meta_tensors_have_their_shapes_computed(backend):
    arguments = dict(num_layers=2, bidirectional=True, proj_size=2, device="meta")
    x = torch.empty(T, B, I, device="meta")
    y, states = gpu_lstm.LSTM(I, H, backend=backend, **arguments)(x)
    y_true, states_true = nn.LSTM(I, H, **arguments)(x)
    assert [t.shape for t in (y, *states)] == [t.shape for t in (y_true, *states_true)]
    assert all(t.is_meta for t in (y, *states))


# Weights that come from elsewhere


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call(backend):
    theirs, ours = pair(backend, num_layers=2)
    x, _ = random_inputs(theirs)
    before = results(ours, x)
    gradients = []
    for module in (ours, theirs):
        torch.manual_seed(9)
        others = {
            name: torch.randn(p.shape).to(p).requires_grad_() for name, p in module.named_parameters() if "hh" in name
        }
        output, _ = torch.func.functional_call(module, others, (x.to(next(module.parameters())),))
        grads = torch.autograd.grad(output.square().sum(), list(others.values()))
        gradients.append({"output": output.detach(), **dict(zip(others, grads, strict=True))})
    assert_same(*gradients)
    after = results(ours, x)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_torch_func(backend):
    theirs, ours = pair(backend, bidirectional=True)
    x, _ = random_inputs(theirs)
    gradients = []
    for module in (ours, theirs):

        def loss(parameters, module=module):
            return torch.func.functional_call(module, parameters, (x.to(next(module.parameters())),))[0].square().sum()

        gradients.append(torch.func.grad(loss)({name: p.detach() for name, p in module.named_parameters()}))
    assert_same(*gradients)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm],
                         ids=["old", "parametrization"])  # fmt: skip
def test_weight_norm(backend, weight_norm):
    theirs, ours = pair(backend, num_layers=2)
    x, hx = random_inputs(theirs)
    for module in (theirs, ours):
        for name in ("weight_hh_l0", "weight_ih_l1"):
            weight_norm(module, name)
    assert_same(results(ours, x, hx), results(theirs, x, hx))
    for module in (theirs, ours):  # the weights move with their parameters
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruning(backend):
    theirs, ours = pair(backend)
    x, hx = random_inputs(theirs)
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
        prune.l1_unstructured(module, "bias_ih_l0", amount=3)
    got = results(ours, x, hx)
    assert (got["dweight_hh_l0_orig"] == 0).sum() == 2 * H * H
    assert_same(got, results(theirs, x, hx))
    for module in (theirs, ours):
        prune.remove(module, "weight_hh_l0")
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_deleted_and_registered_again(backend):
    theirs, ours = pair(backend)
    x, hx = random_inputs(theirs)
    new = torch.randn(4 * H, H)
    for module in (theirs, ours):
        del module.weight_hh_l0
        module.register_parameter("weight_hh_l0", nn.Parameter(new.to(module.weight_ih_l0)))
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_assigned_or_changed_through_data(backend):
    theirs, ours = pair(backend)
    x, hx = random_inputs(theirs)
    new = torch.randn(4 * H, H)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(new.to(module.weight_ih_l0))
        module.bias_hh_l0.data = torch.ones_like(module.bias_hh_l0)
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_drop(backend):
    """As in fastai: the raw weight is a parameter, and a plain tensor made from it is set before each call."""
    theirs, ours = pair(backend)
    x, hx = random_inputs(theirs)
    gradients = []
    for module in (ours, theirs):
        raw = nn.Parameter(module.weight_hh_l0.detach())
        del module.weight_hh_l0
        module.flatten_parameters = lambda *args, **kwargs: None
        for seed in (1, 2):
            torch.manual_seed(seed)
            mask = (torch.rand(4 * H, H) < 0.5).to(raw)
            module.weight_hh_l0 = raw * mask
            output, _ = module(x.to(raw), tuple(t.to(raw) for t in hx))
            output.square().sum().backward()
        gradients.append({"raw": raw.grad, **{name: p.grad for name, p in module.named_parameters()}})
    assert gradients[0]["raw"].count_nonzero() > 0
    assert_same(*gradients)


def test_a_missing_weight_is_named():
    ours = gpu_lstm.LSTM(I, H)
    del ours.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        ours(torch.zeros(T, B, I))


# Classes


def test_what_is_an_instance_of_what():
    ours, compatible = gpu_lstm.LSTM(I, H), gpu_lstm.compat.LSTM(I, H)
    assert isinstance(ours, nn.RNNBase)
    assert not isinstance(ours, nn.LSTM)
    assert isinstance(compatible, nn.LSTM)
    assert isinstance(compatible, gpu_lstm.LSTM)
    assert type(compatible).__name__ == type(ours).__name__ == "LSTM"


@pytest.mark.parametrize("backend", BACKENDS)
def test_compat_computes_the_same(backend):
    theirs, ours = pair(backend, num_layers=2, bidirectional=True, proj_size=2)
    compatible = gpu_lstm.compat.LSTM(
        I, H, num_layers=2, bidirectional=True, proj_size=2, backend=backend, **PLACES[backend]
    )
    compatible.load_state_dict(ours.state_dict())
    x, hx = random_inputs(theirs)
    assert_same(results(compatible, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subclass_with_a_forward_of_its_own(backend):
    def subclass_of(base):
        def __init__(self, scale, *args, **kwargs):
            base.__init__(self, *args, **kwargs)
            self.scale = scale

        def forward(self, input, hx=None):
            output, states = base.forward(self, input * self.scale, hx)
            return output + 1, states

        return type("Scaled", (base,), dict(__init__=__init__, forward=forward))

    theirs = subclass_of(nn.LSTM)(2.0, I, H, num_layers=2, dtype=torch.float64)
    theirs.load_state_dict(pair("torch", num_layers=2)[0].state_dict())
    ours = subclass_of(gpu_lstm.LSTM)(2.0, I, H, num_layers=2, backend=backend, **PLACES[backend])
    ours.load_state_dict(theirs.state_dict())
    x, hx = random_inputs(theirs)
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_torch_nn_lstm_replaced_before_a_model_is_built(monkeypatch):
    theirs = nn.LSTM(I, H, num_layers=2, batch_first=True).double()
    x, hx = random_inputs(theirs)
    expected = results(theirs, x, hx)
    monkeypatch.setattr(torch.nn, "LSTM", gpu_lstm.LSTM)
    model = nn.Sequential(torch.nn.LSTM(I, H, num_layers=2, batch_first=True)).double()
    assert type(model[0]) is gpu_lstm.LSTM
    assert isinstance(model[0], torch.nn.LSTM)
    model[0].load_state_dict(theirs.state_dict())
    assert_same(results(copy.deepcopy(model)[0], x, hx), expected)
    assert isinstance(gpu_lstm.compat.LSTM(I, H), type(theirs))
    assert type(gpu_lstm.convert(nn.Sequential(copy.deepcopy(theirs)))[0]) is gpu_lstm.LSTM
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x.double())[0], theirs(x.double())[0])
