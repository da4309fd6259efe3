"""LSTM and GRU, their cells and stacks compute the results, gradients and dtypes of torch's modules, also with dropout
and in half precision. test_layer.py compares them with the NumPy oracle."""

import itertools

import pytest
import torch
from comparing import assert_same, both_kinds, every_backend
from pairs import RAGGED, B, H, I, T, assert_alike, pair, random_inputs, results, truth
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import gpu_lstm
from gpu_lstm.functional import lstm_layer

pytestmark = pytest.mark.usefixtures("exact_float32_products")
OFF_ON = (False, True)


def moved(module, *inputs):
    """Return inputs where the module is, in its dtype."""
    return tree_map_only(torch.Tensor, lambda t: t.to(next(module.parameters())), inputs)


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
    """Gradients are computed once, and under create_graph, where they are computed another way."""
    for create_graph in OFF_ON:
        got = []
        for lstm in pair("LSTM", backend):
            lstm.bias_hh_l0 = lstm.bias_ih_l0  # both names have one parameter
            x, (h, _) = moved(lstm, *random_inputs(lstm, B))
            y, (_, c) = lstm(x + h.requires_grad_()[..., :I].tanh(), (h, h))
            wanted = [h, *lstm.parameters()]
            found = torch.autograd.grad((y.square() + c.sum()).sum(), wanted, create_graph=create_graph)
            got.append({str(k): t.detach() for k, t in enumerate(found)})
        assert_same(*got[::-1])


@both_kinds
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

    for training, (module, x_or_packed) in itertools.product(OFF_ON, ((ours, x), (stack, x), (ours, packed))):
        assert torch.equal(output(module, x_or_packed, training), output(theirs, x_or_packed, training))
    assert not torch.equal(output(ours, packed, True), output(ours, packed, True, seed=6))


def test_under_autocast_without_gradients_dtypes_may_differ():
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer = lstm_layer(torch.ones(T, B, I).bfloat16(), [torch.ones(4 * H, n) for n in (I, H)])
    assert {t.dtype for t in tree_leaves(layer)} == {torch.bfloat16}


def test_auto_gives_torchs_own_no_projection_to_as_many_features_as_units():
    """torch.lstm sees a projection only if h and c differ in width. Without a race it gets short calls on a CPU."""
    weights = [torch.randn(4 * H, I), torch.randn(4 * H, H), None, None, torch.randn(H, H)]
    with gpu_lstm.racing("off"):
        got, expected = (lstm_layer(torch.ones(T, B, I), weights, backend=each)[0] for each in ("auto", "reference"))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [["lengths"], ["resets"], ["lengths", "resets"]], ids=" and ".join)
@pytest.mark.parametrize(("kind", "value"), [("LSTM", 20.0), ("GRU", 20.0), ("GRU", -20.0)])
def test_half_precision_holds_and_clears_whatever_the_gates_would(ragged, dtype, kind, value):
    """On torch's own modules padding and resets shut gates that the biases open wide, or open gates that they shut."""
    _, ours = pair(kind, "torch", bidirectional=True)
    x, hx = random_inputs(ours, B)
    for name, parameter in ours.named_parameters():
        if "bias" in name:
            parameter.data[: 2 * ours.hidden_size] = value  # the gates i and f, or r and z
        if name.startswith("bias_ih") and kind == "GRU":
            parameter.data[2 * ours.hidden_size :] = 3.7  # the candidate n
    (x, hx), ragged = tree_map(lambda t: t.to(dtype), (x, hx)), {name: RAGGED[name] for name in ragged}
    found = truth(ours.to(dtype), x, hx, **ragged), results(ours, x, hx, **ragged)
    expected, got = ({name: t for name, t in each.items() if not name.startswith(("dw", "db"))} for each in found)
    assert_same(got, expected)


def test_resets_are_dones_a_step_later():
    """Two rollouts, one after the other, are split where the episodes end."""
    lstm, x = gpu_lstm.LSTM(3, 4), torch.randn(8, 1, 3)
    dones = torch.zeros(8, 1, dtype=torch.bool)
    dones[[2, 3, 6]] = True  # episodes: 0 to 2, 3, 4 to 6, 7
    expected = torch.cat([lstm(episode)[0] for episode in x.split([3, 1, 3, 1])])
    y, state = lstm(x[:4], resets=gpu_lstm.resets_from_dones(dones[:4]))
    rest, _ = lstm(x[4:], state, resets=gpu_lstm.resets_from_dones(dones[4:], first=dones[3]))
    torch.testing.assert_close(torch.cat([y, rest]), expected)
