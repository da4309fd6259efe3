"""convert: torch's LSTMs inside a model become ours, and nothing else about the model changes. to_torch: and back."""

import copy
import pickle

import numpy as np
import onnx.reference
import pytest
import torch
from torch import nn

import gpu_lstm
from gpu_lstm.convert import from_haste, to_torch


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


# to_torch


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def test_to_torch_undoes_convert(x):
    model = gpu_lstm.convert(tagger())
    parameters, before = dict(model.named_parameters()), run(model, x)
    assert to_torch(model) is model
    assert kinds(model) == kinds(tagger())
    assert repr(model) == repr(tagger())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(run(model, x), before)


def test_what_comes_back_needs_no_gpu_lstm_to_be_loaded():
    assert b"gpu_lstm" in pickle.dumps(gpu_lstm.convert(tagger()))
    assert b"gpu_lstm" not in pickle.dumps(to_torch(gpu_lstm.convert(tagger())))


@pytest.mark.parametrize(("ours", "theirs"), [
    (gpu_lstm.LSTM(3, 4, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, proj_size=2, recompute=True,
                   backend="reference"),
     nn.LSTM(3, 4, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, proj_size=2)),
    (gpu_lstm.compat.LSTM(3, 4, backend="torch"), nn.LSTM(3, 4)),
    (gpu_lstm.LSTMCell(3, 4, bias=False, backend="reference"), nn.LSTMCell(3, 4, bias=False)),
], ids=["LSTM", "compat", "LSTMCell"])  # fmt: skip
def test_every_class_of_ours_becomes_what_it_stands_in_for(ours, theirs):
    got = to_torch(ours)
    assert type(got) is type(theirs)
    assert repr(got) == repr(theirs)
    assert got.__dict__.keys() == theirs.__dict__.keys()
    assert all(a is b for a, b in zip(got.parameters(), ours.parameters(), strict=True))
    x = torch.randn(5, 3)
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(0)
    result = got(x)[0]
    torch.manual_seed(0)
    assert torch.equal(result, theirs(x)[0])


def test_hooks_flags_and_sharing_stay_on_the_way_back():
    lstm, cell = gpu_lstm.LSTM(3, 4).eval(), gpu_lstm.LSTMCell(3, 4)
    lstm.note = "mine"
    calls = []
    handle = lstm.register_forward_hook(lambda module, args, result: calls.append(type(module)))
    model = to_torch(nn.ModuleDict(dict(a=lstm, b=nn.Sequential(lstm), c=cell, d=nn.ModuleList([cell]))))
    assert model["a"] is model["b"][0]
    assert model["c"] is model["d"][0]
    assert (model["a"].training, model["c"].training, model["a"].note) == (False, True, "mine")
    model["a"](torch.zeros(5, 2, 3))
    handle.remove()
    model["a"](torch.zeros(5, 2, 3))
    assert calls == [nn.LSTM]


def test_an_optimizer_built_before_keeps_working_on_the_way_back(x):
    model = gpu_lstm.convert(tagger())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = run(to_torch(model), x)
    before.square().sum().backward()
    optimizer.step()
    after = run(model, x)
    assert not torch.equal(after, before)
    assert torch.equal(run(gpu_lstm.convert(model), x), after)


class Ours(gpu_lstm.LSTM):
    pass


def test_subclasses_of_ours_are_left_alone():
    mine = [Ours(3, 4), nn.GRU(3, 4), nn.LSTM(3, 4), nn.LSTMCell(3, 4)]
    mine.append(nn.utils.parametrizations.weight_norm(gpu_lstm.LSTM(3, 4), "weight_hh_l0"))
    assert all(a is b for a, b in zip(to_torch(nn.ModuleList(mine)), mine, strict=True))


def nested(module: nn.Module) -> nn.Module:
    """A model that has an LSTM before `module`."""
    return nn.ModuleDict(dict(first=gpu_lstm.LSTM(3, 4), second=nn.Sequential(module)))


def test_a_stack_of_several_sizes_is_refused_and_nothing_is_swapped():
    model = nested(gpu_lstm.StackedLSTM(3, [4, 5]))
    before = list(model.modules())
    with pytest.raises(
        TypeError, match=r"'second\.0' is a StackedLSTM of sizes \[4, 5\], with a pair of states a layer"
    ):
        to_torch(model)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    with pytest.raises(TypeError, match="the model itself is a StackedLSTM"):
        to_torch(model["second"][0])


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout", "weight_drop"])
def test_what_torch_cannot_regularize_is_refused_and_nothing_is_swapped(name):
    model = nested(gpu_lstm.LSTM(3, 4))
    setattr(model["second"][0], name, 0.25)
    before = list(model.modules())
    with pytest.raises(ValueError, match=rf"'second\.0' has {name}=0\.25, which torch\.nn\.LSTM has not"):
        to_torch(model)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    setattr(model["second"][0], name, 0.0)
    assert kinds(to_torch(model)).count(nn.LSTM) == 2


# ONNX, quantization, TorchScript


class Reader(nn.Module):
    """Characters to scores, with an LSTM of ours and at the end a cell."""

    def __init__(self, kind: type[nn.Module] = gpu_lstm.LSTM, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 3)
        self.lstm = kind(3, 4, batch_first=True, **options)
        self.cell = gpu_lstm.LSTMCell(4 * (2 if self.lstm.bidirectional else 1), 5)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.embed(text))
        return self.cell(y[:, -1])[0]


OPTIONS = [dict(num_layers=2), dict(bidirectional=True)]
TEXTS = [torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[8, 1], [1, 8], [0, 0]])]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_computes_the_same_for_any_size(tmp_path):
    model = Reader(num_layers=2, bidirectional=True).eval()
    expected = [model(text).detach().numpy() for text in TEXTS]
    sizes = {"text": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}}
    torch.onnx.export(to_torch(model), (TEXTS[0],), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=sizes)
    exported = onnx.load(tmp_path / "model.onnx")
    assert [node.op_type for node in exported.graph.node].count("LSTM") == 2
    session = onnx.reference.ReferenceEvaluator(exported)
    for text, true in zip(TEXTS, expected, strict=True):
        (found,) = session.run(None, {"text": text.numpy()})
        np.testing.assert_allclose(found, true, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dynamic_quantization_finds_the_lstm(options):
    model = Reader(**options).eval()
    expected = model(TEXTS[0])
    quantized = torch.ao.quantization.quantize_dynamic(to_torch(model), {nn.LSTM, nn.LSTMCell})
    assert isinstance(quantized.lstm, torch.ao.nn.quantized.dynamic.LSTM)
    assert isinstance(quantized.cell, torch.ao.nn.quantized.dynamic.LSTMCell)
    error = (quantized(TEXTS[0]) - expected).abs().max()
    assert 0 < error < 0.02


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", [gpu_lstm.LSTM, gpu_lstm.compat.LSTM])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_nested_model_is_scripted_as_it_is(tmp_path, kind, options):
    model = Reader(kind, **options)
    expected = [model(text) for text in TEXTS]
    torch.jit.script(copy.deepcopy(model)).save(tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    assert all(torch.equal(scripted(text), true) for text, true in zip(TEXTS, expected, strict=True))
    assert not any("gpu_lstm" in module.code for module in scripted.modules() if hasattr(module, "code"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_is_traced_as_it_is(options):
    model = Reader(**options)
    traced = torch.jit.trace(model, (TEXTS[0],))
    assert all(torch.equal(traced(text), model(text)) for text in TEXTS)


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = gpu_lstm.LSTM(3, 4)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.lstm(x, lengths=lengths)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_lengths_are_traced_but_not_scripted():
    model = Ragged()
    traced = torch.jit.trace(model, (torch.randn(5, 3, 3), torch.tensor([5, 2, 0])))
    x, lengths = torch.randn(7, 2, 3), torch.tensor([3, 7])
    assert torch.equal(traced(x, lengths), model(x, lengths))
    with pytest.raises(RuntimeError, match="Keyword argument lengths unknown"):
        torch.jit.script(model)


# from_haste


class Haste(nn.Module):
    """What haste_pytorch.LSTM has of parameters and settings."""

    def __init__(self, inputs: int, hidden: int, batch_first=False, forget_bias=1.0, dropout=0.0, zoneout=0.0) -> None:
        super().__init__()
        self.batch_first, self.forget_bias, self.dropout, self.zoneout = batch_first, forget_bias, dropout, zoneout
        self.kernel = nn.Parameter(torch.randn(inputs, 4 * hidden))
        self.recurrent_kernel = nn.Parameter(torch.randn(hidden, 4 * hidden))
        self.bias = nn.Parameter(torch.randn(4 * hidden))


def haste(x, h, c, kernel, recurrent_kernel, bias):
    """Outputs and last states by Haste's formulas, in NumPy: gates i, g, f, o, products from the right."""
    H, outputs = h.shape[1], []
    for x_t in x:
        z = x_t @ kernel + h @ recurrent_kernel + bias
        i, f, o = (1 / (1 + np.exp(-z[:, gate * H : (gate + 1) * H])) for gate in (0, 2, 3))
        c = f * c + i * np.tanh(z[:, H : 2 * H])
        h = o * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs), h, c


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    return Haste(3, 4).double()


@pytest.mark.parametrize("of", ["module", "state_dict"])
def test_haste_weights_give_hastes_numbers(theirs, of):
    ours = from_haste(theirs if of == "module" else theirs.state_dict())
    x, h, c = (torch.randn(*size, dtype=torch.float64) for size in ((5, 2, 3), (2, 4), (2, 4)))
    y, (h_n, c_n) = ours(x, (h[None], c[None]))
    expected = haste(*(t.detach().numpy() for t in (x, h, c, theirs.kernel, theirs.recurrent_kernel, theirs.bias)))
    for found, true in zip((y, h_n[0], c_n[0]), expected, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), true, rtol=0, atol=1e-14)


def test_from_haste_takes_the_modules_settings_and_leaves_the_module(theirs):
    before = copy.deepcopy(theirs.state_dict())
    theirs.batch_first = True
    ours = from_haste(theirs.eval())
    assert (ours.batch_first, ours.training, ours.weight_ih_l0.dtype) == (True, False, torch.float64)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in ours.parameters())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())
    ours = from_haste(before)
    assert (ours.batch_first, ours.training) == (False, True)


@pytest.mark.parametrize("name", ["zoneout", "dropout"])
def test_a_regularized_haste_module_is_refused(name):
    with pytest.raises(ValueError, match=f"the module has {name}=0.1"):
        from_haste(Haste(3, 4, **{name: 0.1}))


def test_other_weights_than_hastes_are_refused(theirs):
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"expected the parameters .*recurrent_kernel.* got \['bias', 'kernel'\]"):
        from_haste({name: state[name] for name in ("kernel", "bias")})
    with pytest.raises(ValueError, match=r"got .*weight_ih_l0"):
        from_haste(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match=r"expected sizes \[I, 4H\].* got \[\[16, 3\], \[4, 16\], \[16\]\]"):
        from_haste({**state, "kernel": state["kernel"].T})
