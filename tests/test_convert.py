"""convert: torch's LSTMs inside a model become ours, and nothing else about the model changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import gpu_lstm


def tagger() -> nn.Module:
    """A model with LSTMs at several depths, float64."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        dict(
            embed=nn.Linear(3, 5),
            encoders=nn.ModuleList([nn.LSTM(5, 4, batch_first=True), nn.Sequential(nn.LSTM(4, 6, proj_size=2))]),
            cell=nn.LSTMCell(2, 4),
            out=nn.Linear(4, 1),
        )
    )
    return model.double()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y, _ = model["encoders"][0](model["embed"](x).tanh())
    y, _ = model["encoders"][1](y)
    h = None
    for t in range(y.shape[1]):
        h = model["cell"](y[:, t], h)
    return model["out"](h[0])


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, dtype=torch.float64)


def test_lstms_and_cells_are_swapped_in_place_at_any_depth():
    model = tagger()
    assert gpu_lstm.convert(model) is model
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["encoders.0"] is kinds["encoders.1.0"] is gpu_lstm.LSTM
    assert kinds["cell"] is gpu_lstm.LSTMCell
    assert kinds["embed"] is kinds["out"] is nn.Linear
    assert list(kinds) == [name for name, _ in tagger().named_modules()]


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_stay_the_same(x, training):
    model = tagger().train(training)
    before = run(model, x)
    before_gradients = torch.autograd.grad(before.square().sum(), list(model.parameters()))
    gpu_lstm.convert(model)
    after = run(model, x)
    assert torch.equal(before, after)
    after_gradients = torch.autograd.grad(after.square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before_gradients, after_gradients, strict=True))


def test_the_chosen_backend_runs_what_was_converted(x):
    model = tagger()
    before = run(model, x)
    gpu_lstm.convert(model)
    with gpu_lstm.backend("triton"), pytest.raises(TypeError, match="backend 'triton' takes"):
        run(model, x)
    with gpu_lstm.backend("reference"):
        torch.testing.assert_close(run(model, x), before, rtol=0, atol=1e-14)


def test_parameters_are_the_very_same_objects_under_the_same_names():
    model = tagger()
    before = dict(model.named_parameters())
    gpu_lstm.convert(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert list(model.state_dict()) == list(tagger().state_dict())
    model.load_state_dict(tagger().state_dict())
    lstm = model["encoders"][0]
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))


def test_an_optimizer_built_before_keeps_working(x):
    plain, model = tagger(), tagger()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (plain, model)]
    for step in range(4):
        if step == 1:
            gpu_lstm.convert(model)
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            run(m, x).square().sum().backward()
            optimizer.step()
    assert not torch.equal(run(model, x), run(tagger(), x))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_frozen_parameters_stay_frozen():
    model = tagger()
    model["encoders"][0].weight_hh_l0.requires_grad_(False)
    gpu_lstm.convert(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["encoders.0.weight_hh_l0"]


def test_hooks_stay_and_can_still_be_removed():
    lstm = nn.LSTM(3, 4)
    calls = []
    handles = [
        lstm.register_forward_pre_hook(lambda module, args: calls.append("before")),
        lstm.register_forward_hook(lambda module, args, kwargs, result: calls.append("after"), with_kwargs=True),
        lstm.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward")),
        lstm.register_state_dict_post_hook(lambda module, state, prefix, metadata: calls.append("state_dict")),
    ]
    model = gpu_lstm.convert(nn.Sequential(lstm))
    x = torch.randn(5, 2, 3, requires_grad=True)
    model(x)[0].sum().backward()
    model.state_dict()
    assert calls == ["before", "after", "backward", "state_dict"]
    for handle in handles:
        handle.remove()
    model(x)[0].sum().backward()
    model.state_dict()
    assert len(calls) == 4


def test_a_hook_added_afterwards_is_removed_by_its_own_handle():
    model = gpu_lstm.convert(nn.Sequential(nn.LSTM(3, 4)))
    calls = []
    handle = model[0].register_forward_hook(lambda module, args, result: calls.append(type(module)))
    model(torch.zeros(5, 2, 3))
    handle.remove()
    model(torch.zeros(5, 2, 3))
    assert calls == [gpu_lstm.LSTM]


def test_training_flags_and_configuration_stay():
    model = nn.ModuleList([
        nn.LSTM(3, 4, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, proj_size=2).eval(),
        nn.LSTM(3, 4), nn.LSTMCell(3, 4, bias=False).eval(), nn.LSTMCell(3, 4),
    ])  # fmt: skip
    text = repr(model)
    gpu_lstm.convert(model)
    assert [module.training for module in model] == [False, True, False, True]
    assert repr(model) == text


def test_what_a_user_put_on_a_module_stays():
    lstm = nn.LSTM(3, 4)
    lstm.note = "mine"
    lstm.register_buffer("mask", torch.ones(4))
    lstm.head = nn.LSTM(4, 2)
    model = gpu_lstm.convert(nn.Sequential(lstm))
    assert model[0].note == "mine"
    assert model[0].mask is lstm.mask
    assert type(model[0].head) is gpu_lstm.LSTM


class MyLSTM(nn.LSTM):
    pass


class MyCell(nn.LSTMCell):
    pass


def test_subclasses_and_other_modules_are_left_alone():
    mine = [MyLSTM(3, 4), MyCell(3, 4), nn.GRU(3, 4), nn.RNN(3, 4), nn.GRUCell(3, 4), gpu_lstm.LSTM(3, 4),
            gpu_lstm.compat.LSTM(3, 4), gpu_lstm.StackedLSTM(3, [4])]  # fmt: skip
    model = gpu_lstm.convert(nn.ModuleList(mine))
    assert all(a is b for a, b in zip(model, mine, strict=True))
    assert gpu_lstm.convert(mine[0]) is mine[0]


def test_an_lstm_inside_a_subclass_of_lstm_is_swapped():
    mine = MyLSTM(3, 4)
    mine.inner = nn.LSTM(3, 4)
    model = gpu_lstm.convert(nn.Sequential(mine))
    assert model[0] is mine
    assert type(mine.inner) is gpu_lstm.LSTM


def test_a_module_used_at_several_places_stays_one_module():
    lstm, cell = nn.LSTM(4, 4), nn.LSTMCell(4, 4)
    model = nn.ModuleDict(dict(a=lstm, b=nn.Sequential(lstm), c=nn.ModuleDict(dict(d=lstm, e=lstm, f=cell)), g=cell))
    gpu_lstm.convert(model)
    assert type(model["a"]) is gpu_lstm.LSTM
    assert model["a"] is model["b"][0] is model["c"]["d"] is model["c"]["e"]
    assert type(model["g"]) is gpu_lstm.LSTMCell
    assert model["g"] is model["c"]["f"]


def test_an_lstm_inside_an_lstm_that_is_used_at_two_places_is_swapped():
    lstm = nn.LSTM(3, 4)
    lstm.head = nn.LSTM(4, 2)
    model = gpu_lstm.convert(nn.Sequential(nn.Sequential(lstm), nn.Sequential(lstm)))
    assert model[0][0] is model[1][0]
    assert type(model[0][0].head) is gpu_lstm.LSTM
    assert type(gpu_lstm.convert(lstm).head) is gpu_lstm.LSTM


def test_modules_that_share_a_weight_still_do():
    first, second = nn.LSTM(4, 4), nn.LSTM(4, 4)
    second.weight_hh_l0 = first.weight_hh_l0
    model = gpu_lstm.convert(nn.Sequential(first, second))
    assert model[0].weight_hh_l0 is model[1].weight_hh_l0
    assert len(list(model.parameters())) == 7


@pytest.mark.parametrize(("theirs", "ours"), [(nn.LSTM, gpu_lstm.LSTM), (nn.LSTMCell, gpu_lstm.LSTMCell)])
def test_a_model_that_is_itself_one_gives_a_new_module_with_its_parameters(theirs, ours):
    model = theirs(3, 4)
    converted = gpu_lstm.convert(model)
    assert type(model) is theirs
    assert type(converted) is ours
    assert all(a is b for a, b in zip(converted.parameters(), model.parameters(), strict=True))
    x = torch.randn(2, 3)
    assert torch.equal(converted(x)[0], model(x)[0])


def test_the_old_module_is_not_touched_by_what_happens_to_the_new():
    old = nn.LSTM(3, 4)
    new = gpu_lstm.convert(old)
    x = torch.randn(5, 2, 3)
    before = old(x)[0]
    new.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    new.head = nn.Linear(4, 1)
    del new.bias_ih_l0
    assert torch.equal(old(x)[0], before)
    assert list(old.state_dict()) == list(nn.LSTM(3, 4).state_dict())


def test_converting_twice_is_converting_once():
    model = gpu_lstm.convert(tagger())
    modules = list(model.modules())
    gpu_lstm.convert(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_converted_model_can_be_copied(x, copied):
    model = gpu_lstm.convert(tagger())
    twin = copied(model)
    assert type(twin["encoders"][0]) is gpu_lstm.LSTM
    assert torch.equal(run(twin, x), run(model, x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_a_model_loaded_from_a_pickle_of_torch_can_be_converted(x):
    model = pickle.loads(pickle.dumps(tagger()))
    before = run(model, x)
    assert torch.equal(run(gpu_lstm.convert(model), x), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_put_on_before(x):
    models = [tagger(), gpu_lstm.convert(tagger())]
    for i, model in enumerate(models):
        nn.utils.weight_norm(model["encoders"][0], "weight_hh_l0")
        if i == 0:
            gpu_lstm.convert(model)
        with torch.no_grad():
            model["encoders"][0].weight_hh_l0_g.mul_(2)
    assert torch.equal(run(models[0], x), run(models[1], x))
    assert not torch.equal(run(models[0], x), run(tagger(), x))
    nn.utils.remove_weight_norm(models[0]["encoders"][0], "weight_hh_l0")
    assert torch.equal(run(models[0], x), run(models[1], x))


def test_a_parametrized_lstm_is_a_class_of_its_own_and_left_alone(x):
    model = tagger()
    nn.utils.parametrizations.weight_norm(model["encoders"][0], "weight_hh_l0")
    before, kind = run(model, x), type(model["encoders"][0])
    gpu_lstm.convert(model)
    assert type(model["encoders"][0]) is kind
    assert torch.equal(run(model, x), before)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_moves_after_conversion_reach_the_weights(x):
    model = gpu_lstm.convert(tagger()).float()
    assert run(model, x.float()).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_lstm_that_was_compiled_in_place_does_not_go_on_calling_the_old_one():
    lstm = nn.LSTM(3, 4)
    lstm.compile(backend="eager")
    converted = gpu_lstm.convert(nn.Sequential(lstm))[0]
    output, _ = converted(torch.ones(5, 2, 3), lengths=torch.tensor([5, 3]))
    assert (output[3:, 1] == 0).all()
