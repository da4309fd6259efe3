"""convert, by which torch's LSTMs and GRUs inside a model become ours while nothing else changes, and to_torch, which
reverses it."""

import copy
import io
import pickle
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from pairs import seeded
from torch import nn
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.tools.convert import to_torch

KINDS = ("LSTM", "LSTMCell", "GRU", "GRUCell")
SWAPS = {gpu_lstm.convert: {getattr(nn, kind): getattr(gpu_lstm, kind) for kind in KINDS}}
SWAPS[to_torch] = {ours: theirs for theirs, ours in SWAPS[gpu_lstm.convert].items()}
both_ways = pytest.mark.parametrize("swap", SWAPS)
# The place of a module in SWAPS; its cell follows.
both_cells = pytest.mark.parametrize("first", [0, 2], ids=["LSTM", "GRU"])


def tagger():
    torch.manual_seed(0)
    encoders = nn.ModuleList([nn.LSTM(5, 4, batch_first=True), nn.Sequential(nn.LSTM(4, 6, proj_size=2))])
    cells = dict(cell=nn.LSTMCell(2, 4, bias=False), gru=nn.GRU(4, 3, 2), gru_cell=nn.GRUCell(3, 4))
    model = nn.ModuleDict(dict(embed=nn.Linear(3, 5), encoders=encoders, **cells, out=nn.Linear(4, 1)))
    model["encoders"][1].eval()
    model["encoders"][0].weight_hh_l0.requires_grad_(False)
    return model.double()


def run(model, x):
    y, _ = model["encoders"][0](model["embed"](x).tanh())
    (y, _), h = model["encoders"][1](y), None
    for t in range(y.shape[1]):
        h = model["cell"](y[:, t], h)
    y, _ = model["gru"](h[0][None])
    return model["out"](model["gru_cell"](y[0]))


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_there_and_back_in_place_nothing_else_changes():
    """The parameters stay the same objects, so that an optimizer built before keeps working. Copies are converted,
    too."""
    model, x = tagger(), torch.randn(2, 4, 3, dtype=torch.float64)
    text, before, classes = repr(model), dict(model.named_parameters()), kinds(model)
    flags = [module.training for module in model.modules()]

    def outputs():
        output = run(model, x)
        return output, *torch.autograd.grad(output.square().sum(), [p for p in before.values() if p.requires_grad])

    expected = outputs()
    for swap, ours in ((gpu_lstm.convert, True), (to_torch, False)):
        assert swap(model) is model
        modules = list(model.modules())
        swap(model)  # a second conversion changes nothing
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert kinds(model) == {name: SWAPS[swap].get(kind, kind) if ours else kind for name, kind in classes.items()}
        assert repr(model).replace("gpu_lstm.", "") == text  # the repr names the library of a module
        assert [module.training for module in model.modules()] == flags
        assert list(model.state_dict()) == list(before)
        assert all(p is before[name] for name, p in model.named_parameters())
        assert all(map(torch.equal, outputs(), expected))
        assert ours is (b"gpu_lstm" in pickle.dumps(model))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert kinds(twin) == kinds(model)
            assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
            assert torch.equal(run(gpu_lstm.convert(twin), x), expected[0])


@both_ways
@both_cells
def test_hooks_and_what_a_user_put_on_a_module_stay(swap, first):
    source, goal = list(SWAPS[swap].items())[first]
    lstm, calls = source(3, 4), []
    lstm.register_forward_pre_hook(lambda *_: calls.append("before"))
    lstm.register_forward_hook(lambda *_: calls.append("after"), with_kwargs=True)
    handle = lstm.register_full_backward_hook(lambda *_: calls.append("backward"))
    lstm.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    lstm.note, lstm.head = "mine", source(4, 2)
    lstm.register_buffer("mask", torch.ones(4))
    model = swap(nn.Sequential(lstm))
    assert (model[0].note, model[0].mask is lstm.mask, type(model[0].head)) == ("mine", True, goal)
    for _ in range(2):
        model(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
        handle.remove()
    model.state_dict()
    assert calls == ["before", "after", "backward", "before", "after", "state_dict"]


MyLSTM, MyCell, Ours = (type(name, (base,), {"__module__": __name__}) for name, base in (
    ("MyLSTM", nn.LSTM), ("MyCell", nn.GRUCell), ("Ours", gpu_lstm.LSTM)))  # fmt: skip
NONE = "there is no torch.nn.LSTM or torch.nn.LSTMCell or torch.nn.GRU or torch.nn.GRUCell in the"
NONE_OF_OURS = ("there is no gpu_lstm.LSTM or gpu_lstm.LSTMCell or gpu_lstm.GRU or gpu_lstm.GRUCell or "
                "gpu_lstm.compat.LSTM or gpu_lstm.compat.GRU in the")  # fmt: skip
LEFT = f"left as it is: {{}} ({__name__}.{{}}), a subclass, which may do anything in its forward"


def normed(module):
    return nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")  # which gives it a class of its own


@pytest.mark.filterwarnings("ignore:gpu_lstm.* swapped nothing:UserWarning")
@both_ways
def test_subclasses_and_other_modules_are_left_alone_but_what_is_inside_them_is_swapped(swap):
    source, goal = next(iter(SWAPS[swap].items()))
    others = [gpu_lstm.compat.GRU, gpu_lstm.LSTM] if swap is gpu_lstm.convert else [nn.LSTM, nn.GRUCell]
    mine = [*(cls(3, 4) for cls in (MyLSTM, MyCell, Ours, nn.RNN, *others)), normed(source(3, 4))]
    for module in mine[:4]:
        module.inner = source(3, 4)
    model = swap(nn.ModuleList(mine))
    assert all(a is b for a, b in zip(model, mine, strict=True))
    assert all(swap(module) is module for module in mine)
    assert {type(module.inner) for module in mine[:4]} == {goal}


@both_cells
def test_compat_also_swaps_what_was_converted_before_and_keeps_our_arguments(first):
    ours = list(SWAPS[gpu_lstm.convert].values())[first]
    own = dict(backend="reference", recompute=True, zoneout=0.25) | (dict(peepholes=True) if first == 0 else {})
    model = nn.Sequential(ours(3, 4, **own))
    before, text, x = dict(model.named_parameters()), repr(model), torch.randn(5, 2, 3)
    expected = model.eval()(x)
    gpu_lstm.convert(model, compat=True)
    assert type(model[0]) is getattr(gpu_lstm.compat, ours.__name__)
    assert repr(model) == text
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    module = model[0]
    assert gpu_lstm.convert(model, compat=True)[0] is gpu_lstm.convert(model)[0] is module


def test_what_was_swapped_and_what_was_left_is_logged(caplog):
    model = nn.ModuleDict(dict(encoder=nn.LSTM(3, 4), mine=MyLSTM(3, 4), step=nn.LSTMCell(3, 4), gru=nn.GRU(3, 4)))
    with caplog.at_level("INFO", "gpu_lstm"):
        for given in (model, model, nn.LSTM(3, 4), gpu_lstm.SLSTM(3, 4)):  # nothing is left to convert in the second
            gpu_lstm.convert(given)
        gpu_lstm.to_torch(model)
    assert caplog.messages == [
        "convert swapped encoder (torch.nn.LSTM), step (torch.nn.LSTMCell), gru (torch.nn.GRU); "
        + LEFT.format("mine", "MyLSTM"),
        f"convert swapped nothing: {NONE} torch.nn.ModuleDict; {LEFT.format('mine', 'MyLSTM')}",
        "convert swapped the model itself (torch.nn.LSTM), which cannot be swapped in place: the one that is returned "
        "is new",
        f"convert swapped nothing: {NONE} gpu_lstm.SLSTM",
        "to_torch swapped encoder (gpu_lstm.LSTM), step (gpu_lstm.LSTMCell), gru (gpu_lstm.GRU)",
    ]


@pytest.mark.parametrize(("swap", "model", "text"), [
    (gpu_lstm.convert, nn.ModuleList([MyLSTM(3, 4)]),
     f"swapped nothing: {NONE} torch.nn.ModuleList; {LEFT.format('0', 'MyLSTM')}"),
    (to_torch, Ours(3, 4),
     f"swapped nothing: {NONE_OF_OURS} {__name__}.Ours; {LEFT.format('the model itself', 'Ours')}"),
    (to_torch, nn.Sequential(gpu_lstm.GRU(3, 4), nn.Sequential(normed(gpu_lstm.compat.LSTM(3, 4)))),
     "swapped 0 (gpu_lstm.GRU); left as it is: 1.0 (torch.nn.utils.parametrize.ParametrizedLSTM), a subclass, "
     "which may do anything in its forward"),
    (to_torch, nn.Sequential(gpu_lstm.SLSTM(3, 4), gpu_lstm.LSTM(4, 4)),
     "swapped 1 (gpu_lstm.LSTM); left as it is: 0 (gpu_lstm.SLSTM), a cell that torch.nn has not"),
], ids=lambda each: getattr(each, "__name__", ""))  # fmt: skip
def test_a_warning_says_what_was_not_swapped_and_why(swap, model, text):
    with pytest.warns(UserWarning, match="^gpu_lstm: ") as told:
        assert swap(model) is model
    assert [str(warning.message) for warning in told] == [f"gpu_lstm: {swap.__name__} {text}"]
    assert told[0].filename == __file__


@both_ways
@both_cells
def test_what_is_shared_stays_shared(swap, first):
    (source, goal), (cell, cell_goal) = list(SWAPS[swap].items())[first : first + 2]
    lstm, step, twin = source(4, 4), cell(4, 4), source(4, 4)
    twin.weight_hh_l0 = lstm.weight_hh_l0
    inner = nn.ModuleDict(dict(a=lstm, step=step))
    model = swap(nn.ModuleDict(dict(a=lstm, b=nn.Sequential(lstm), inner=inner, step=step, twin=twin)))
    assert (type(model["a"]), type(model["step"]), type(model["twin"])) == (goal, cell_goal, goal)
    assert model["a"] is model["b"][0] is inner["a"]
    assert model["step"] is inner["step"]
    assert model["twin"].weight_hh_l0 is model["a"].weight_hh_l0


EVERY = dict(num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, proj_size=2)


@pytest.mark.parametrize(("swap", "old", "expected"), [
    (gpu_lstm.convert, nn.GRU(3, 4, 2, dropout=0.5, bidirectional=True),
     gpu_lstm.GRU(3, 4, 2, dropout=0.5, bidirectional=True)),
    (to_torch, gpu_lstm.LSTM(3, 4, **EVERY, recompute=True, backend="reference"), nn.LSTM(3, 4, **EVERY)),
    (to_torch, gpu_lstm.LSTMCell(3, 4, bias=False, backend="reference"), nn.LSTMCell(3, 4, bias=False)),
    (to_torch, gpu_lstm.compat.GRU(3, 4, recompute=True, backend="torch"), nn.GRU(3, 4)),
], ids=lambda module: f"{type(module).__module__}.{type(module).__name__}")  # fmt: skip
def test_a_model_that_is_itself_one_gives_a_new_module_with_its_parameters(swap, old, expected):
    new, kind, x = swap(old), type(old), torch.randn(5, 3)
    assert (type(old), type(new), repr(new)) == (kind, type(expected), repr(expected))
    assert swap is gpu_lstm.convert or new.__dict__.keys() == expected.__dict__.keys()
    assert all(a is b for a, b in zip(new.parameters(), old.parameters(), strict=True))
    expected.load_state_dict(old.state_dict())
    assert torch.equal(*(seeded(module, x)[0] for module in (new, expected)))
    names = list(old.state_dict())
    new.head = nn.Linear(4, 1)  # this does not change the old module
    delattr(new, names[0])
    assert list(old.state_dict()) == names


def test_a_compiled_module_does_not_call_the_one_before():
    lstm = nn.LSTM(3, 4)
    lstm.compile(backend="eager")
    output, _ = gpu_lstm.convert(nn.Sequential(lstm))[0](torch.ones(5, 2, 3), lengths=torch.tensor([5, 3]))
    assert (output[3:, 1] == 0).all()


@pytest.mark.parametrize(("module", "name", "value"), [
    *((gpu_lstm.LSTM(3, 4, **{name: 0.25}), name, 0.25) for name in ("recurrent_dropout", "zoneout", "weight_drop")),
    (gpu_lstm.LSTM(3, 4, peepholes=True), "peepholes", True), (gpu_lstm.GRU(3, 4, zoneout=0.5), "zoneout", 0.5),
    (gpu_lstm.LSTMCell(3, 4, layer_norm=True), "layer_norm", True)], ids=str)  # fmt: skip
def test_what_torch_has_not_is_refused_and_nothing_is_swapped(module, name, value):
    model = nn.ModuleDict(dict(first=gpu_lstm.LSTM(3, 4), second=nn.Sequential(module)))
    before, text = list(model.modules()), f"has {name}={value}, which torch.nn.{type(module).__name__} has not"
    with pytest.raises(ValueError, match=rf" has {name}=.* scripted as a torch\.nn\.{type(module).__name__}"):
        torch.jit.script(model["second"])
    for given, path in ((model, "'second.0'"), (module, "the model itself")):
        with pytest.raises(ValueError, match=f"^{path} {text}$"):
            to_torch(given)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


OF_ONNX = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning",
                                     "ignore::torch.jit.TracerWarning")  # fmt: skip


class Episodes(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = getattr(gpu_lstm, kind)(3, 4, bidirectional=True)

    def forward(self, x, resets):
        return self.rnn(x, resets=resets)


class States(nn.Module):
    """An SLSTM with its states, resets and lengths, and slstm_layer, which is given the input product."""

    def __init__(self):
        super().__init__()
        self.slstm = gpu_lstm.SLSTM(3, 4, bidirectional=True, heads=2)

    def forward(self, x, h, c, n, m, resets, lengths):
        y, states = self.slstm(x, (h, c, n, m), resets=resets, lengths=lengths)
        return y, *states, gpu_lstm.functional.slstm_layer(torch.cat([y, y], 2), self.slstm.weight_hh_l0, heads=2)[0]


def inputs_with_resets():
    """Return x and resets, some of which end a NaN."""
    x = torch.randn(6, 3, 3)
    x[2, 0] = torch.nan
    return x, torch.rand(6, 3) < 0.3


def inputs_with_states():
    state = torch.randn(4, 2, 2, 4)
    state[2] = state[2].clamp(min=0)
    return torch.randn(3, 2, 3), *state, torch.rand(3, 2) < 0.3, torch.randint(4, (2,))


@OF_ONNX
@pytest.mark.parametrize(("make", "given", "dynamo"), [
    # The older exporter passes all arguments by position, even keyword-only ones.
    *((make, lambda: [torch.randn(5, 2, 3)], False) for make in (
        *(partial(getattr(of, kind), 3, 4) for of in (gpu_lstm, gpu_lstm.compat) for kind in ("LSTM", "GRU")),
        partial(gpu_lstm.StackedGRU, 3, [4]), partial(gpu_lstm.LSTM, 3, 4, 2, bidirectional=True, heads=2))),
    (partial(Episodes, "LSTM"), inputs_with_resets, False), (partial(Episodes, "GRU"), inputs_with_resets, False),
    (States, inputs_with_states, False),
    *(pytest.param(*row, True, marks=pytest.mark.deep) for row in (
        (partial(Episodes, "LSTM"), inputs_with_resets), (States, inputs_with_states))),
])  # fmt: skip
def test_a_file_of_onnx_computes_the_same(make, given, dynamo):
    model, file = make().eval(), io.BytesIO()
    torch.onnx.export(model, tuple(given()), file, dynamo=dynamo)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [each.name for each in session.get_inputs()]
    for _ in range(3):
        inputs = given()
        found = session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
        expected = [t.detach().numpy() for t in tree_leaves(model(*inputs))]
        for y, true in zip(found, expected, strict=True):
            np.testing.assert_allclose(y, true, rtol=0, atol=1e-6)
        assert given is not inputs_with_resets or np.isnan(expected[0]).any()


@pytest.mark.deep
@OF_ONNX
def test_a_module_of_ours_with_a_free_number_of_steps_is_refused():
    """torch's exporter would fix the number of steps inside the file, whereas the file's input says that it is free."""
    free = dict(dynamo=True, dynamic_shapes=({0: torch.export.Dim("time")},))
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"gpu_lstm\.layer"):
        torch.onnx.export(gpu_lstm.LSTM(3, 4).eval(), (torch.randn(5, 2, 3),), **free)
