"""LSTM and GRU, their cells and stacks compute what torch's modules compute: results, gradients, dtypes."""

import itertools
from functools import partial

import pytest
import torch
from comparing import PLACES, assert_same, every_backend
from pairs import KINDS, B, H, I, T, assert_alike, pair, random_inputs, results
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map_only

import gpu_lstm
from gpu_lstm.functional import lstm_layer

pytestmark = pytest.mark.usefixtures("exact_float32_products")
every_kind = pytest.mark.parametrize("kind", KINDS)
OFF_ON = (False, True)


def moved(module, *inputs):
    """Inputs where the module is, in its dtype."""
    return tree_map_only(torch.Tensor, lambda t: t.to(next(module.parameters())), inputs)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("lengths", [[4, 2, 1], [2, 1, 4]], ids=["sorted", "not sorted"])
def test_a_packed_sequence_is_packed_as_torchs(backend, kind, lengths):
    """Its numbers, and those of other arguments, are compared in test_layer.py."""
    is_sorted = lengths[0] == 4
    theirs, ours = pair(kind, backend, num_layers=2, bidirectional=True, batch_first=True)
    outputs = []

    def call(module, x):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted)
        outputs.append(module(packed))
        return outputs[-1]

    x = random_inputs(theirs, B)[0]
    assert_same(*(results(module, x, call=partial(call, module)) for module in (ours, theirs)))
    for our, their in zip(*(output[1:] for output, _ in outputs)):
        assert their is our is None or torch.equal(our.cpu(), their)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
@every_backend
@every_kind
def test_nan_and_inf_appear_where_torch_has_them(backend, kind):
    theirs, ours = pair(kind, backend)
    x, hx = random_inputs(ours, B)
    leaves, (nan, inf) = tree_leaves(hx), map(float, ("nan", "inf"))
    h, c = leaves[:2] if "LSTM" in kind else leaves[:1] * 2
    x.view(-1)[1], x.view(-1)[-1], c[..., 1, 2], c[..., 1, 3], h[..., 2, 0] = nan, inf, inf, -inf, inf
    got, true = (tree_leaves(module(*moved(module, x, hx))) for module in (ours, theirs))
    assert true[0].isnan().any()
    assert "GRU" in kind or any(t.isinf().any() for t in true)  # there an infinite h makes NaN of z = 0
    atol, got = 16 * torch.finfo(got[0].dtype).eps, [our.double().cpu() for our in got]
    torch.testing.assert_close(got, true, rtol=0, atol=atol, equal_nan=True)


@every_backend
def test_states_in_lists_and_those_of_a_cell_in_one_tensor(backend):
    for kind, form, batch in (
        ("LSTMCell", list, [B]), ("StackedLSTM", lambda hx: tuple(map(list, hx)), [B]), ("LSTMCell", torch.stack, []),
    ):  # fmt: skip
        _, ours = pair(kind, backend)
        x, hx = moved(ours, *random_inputs(ours, *batch))
        assert all(map(torch.equal, tree_leaves(ours(x, form(hx))), tree_leaves(ours(x, hx))))


@every_backend
def test_a_cell_has_no_units_and_ignores_states_where_torchs_does(backend):
    theirs, ours = pair("LSTMCell", backend, hidden_size=0)
    assert_alike(ours, theirs, B)
    theirs, ours = pair("LSTMCell", backend)
    x, hx = random_inputs(ours)
    got, true = (module(*moved(module, x, (*hx, hx[0]))) for module in (ours, theirs))
    assert_same(*(dict(h=h.detach(), c=c.detach()) for h, c in (got, true)))


@every_backend
def test_gradients_of_one_result_alone_twice_from_one_graph(backend):
    def gradients(module):
        for loss in tree_leaves(module(*moved(module, random_inputs(module, B)[0]))):
            first, again = (
                torch.autograd.grad(loss.sum(), list(module.parameters()), retain_graph=True) for _ in range(2)
            )
            assert all(map(torch.equal, first, again))
            yield from first

    for theirs, ours in (pair("LSTM", backend, proj_size=2), pair("GRU", backend)):
        assert_same(dict(enumerate(gradients(ours))), dict(enumerate(gradients(theirs))))


@every_backend
def test_gradients_of_tensors_that_are_one_or_depend_on_each_other(backend):
    """Once, and under create_graph, where they are computed another way."""
    (theirs, ours), cells = pair("LSTM", backend), pair("LSTMCell", backend)
    for create_graph in OFF_ON:
        got = []
        for lstm, cell in ((ours, cells[1]), (theirs, cells[0])):
            lstm.bias_hh_l0 = lstm.bias_ih_l0  # one parameter
            x, (h0, c0) = moved(lstm, *random_inputs(lstm, B))
            h0.requires_grad_()
            of_lstm = lstm(x + h0[..., :I].tanh(), (h0, c0 + h0))[0].square().sum()
            of_cell = cell(x[0], (h0[0], h0[0]))[0].square().sum()
            weights, h = list(lstm.parameters()), h0[0]
            found = torch.autograd.grad(of_lstm + of_cell, [h0, *weights], create_graph=create_graph)
            ours_alone = partial(lstm_layer, x, [*weights, lstm.bias_ih_l0], (h, h), backend=backend)
            output, _ = ours_alone() if lstm is ours else lstm(x, (h0, h0))
            found += torch.autograd.grad(output.square().sum(), [h0], create_graph=create_graph)
            got.append({str(k): t.detach() for k, t in enumerate(found)})
        assert_same(*got)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dropout_with_the_same_seed_gives_the_numbers_of_torch(kind):
    theirs, ours = pair(kind, "torch", num_layers=3, dropout=0.4)
    stack = getattr(gpu_lstm, f"Stacked{kind}")(I, [H] * 3, dropout=0.4, backend="torch").double()
    stack.load_state_dict(dict(zip(stack.state_dict(), ours.state_dict().values(), strict=True)))
    x = random_inputs(ours, B)[0].double()
    packed = pack_padded_sequence(x, [2, 1, 4], enforce_sorted=False)

    def output(module, given, training, seed=5):
        torch.manual_seed(seed)
        found = module.train(training)(given)[0]
        return found if given is x else found.data

    for training, (module, given) in itertools.product(OFF_ON, ((ours, x), (stack, x), (ours, packed))):
        assert torch.equal(output(module, given, training), output(theirs, given, training))
    assert not torch.equal(output(ours, packed, True), output(ours, packed, True, seed=6))


@every_backend
def test_dropout_of_everything_leaves_the_second_layer_without_input(backend):
    """Also with a residual connection: what it adds is dropped with the rest."""
    chain, stack = pair("StackedLSTM", backend, hidden_sizes=[3, 3])
    residual = gpu_lstm.StackedLSTM(3, [3, 3], residual=True, backend=backend, **PLACES[backend])
    residual.load_state_dict(stack.state_dict())
    x, _ = random_inputs(chain, B)
    h = chain.layers[0](x.double())[0][-1]
    expected = dict(output=chain.layers[1](torch.zeros(T, B, 3).double())[0].detach(), h=h.detach())
    for module in (stack, residual):
        module.dropout = 1.0
        output, states = module(*moved(module, x))
        assert_same(dict(output=output.detach(), h=states[0][0].detach()), expected)
    # As good as everything: what is dropped is drawn, for features of the projection.
    theirs, projected = pair("LSTM", backend, num_layers=2, proj_size=2, dropout=1 - 2**-30)
    found, wanted = (module(*moved(module, x))[0].detach() for module in (projected, theirs))
    assert_same(dict(output=found), dict(output=wanted))


def test_under_autocast_without_gradients_dtypes_may_differ():
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer = lstm_layer(torch.ones(T, B, I).bfloat16(), [torch.ones(4 * H, n) for n in (I, H)])
    assert {t.dtype for t in tree_leaves(layer)} == {torch.bfloat16}
