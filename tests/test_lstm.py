"""gpu_lstm.LSTM in the place of torch.nn.LSTM: the same results and gradients."""

import itertools

import pytest
import torch
from comparing import BACKENDS, PLACES, assert_same
from lstm_pair import B, H, T, pair, random_inputs, results
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

pytestmark = pytest.mark.usefixtures("exact_float32_products")


# Numbers

FACTORS = ("num_layers", "bidirectional", "no_bias", "batch_first", "proj_size", "unbatched", "hx")
EVERY = list(itertools.product((False, True), repeat=7))
# The interpreter is slow: of the 128, eight in which any two factors take all four values.
PAIRWISE = [(a, b, a ^ b, c, a ^ c, b ^ c, a ^ b ^ c) for a, b, c in itertools.product((False, True), repeat=3)]


def _cases():
    for backend in BACKENDS:
        for case in PAIRWISE if backend == "triton" else EVERY:
            name = ", ".join(factor for factor, on in zip(FACTORS, case, strict=True) if on) or "plain"
            yield pytest.param(backend, *case, id=f"{backend}: {name}")


@pytest.mark.parametrize(
    ("backend", "deep", "bidirectional", "no_bias", "batch_first", "project", "unbatched", "given"), list(_cases())
)
def test_results_and_gradients(backend, deep, bidirectional, no_bias, batch_first, project, unbatched, given):
    theirs, ours = pair(
        backend, num_layers=1 + deep, bidirectional=bidirectional, bias=not no_bias, batch_first=batch_first,
        proj_size=2 if project else 0, dropout=0.0,
    )  # fmt: skip
    x, hx = random_inputs(theirs, batched=not unbatched)
    hx = hx if given else None
    assert_same(results(ours, x, hx), results(theirs, x, hx))


def _packed_cases():
    for backend in BACKENDS:
        for a, b, c, d, e in itertools.product((False, True), repeat=5):
            if backend != "triton" or (d == a ^ b and e == a ^ c):
                yield backend, a, b, c, d, e


@pytest.mark.parametrize(("backend", "is_sorted", "given", "deep", "project", "batch_first"), list(_packed_cases()))
def test_packed_sequence(backend, is_sorted, given, deep, project, batch_first):
    theirs, ours = pair(
        backend, num_layers=1 + deep, bidirectional=deep, proj_size=2 if project else 0, batch_first=batch_first
    )
    x, hx = random_inputs(theirs)
    hx = hx if given else None
    lengths = [4, 2, 1] if is_sorted else [2, 1, 4]  # sorting and its inverse differ

    def pack(x):
        return pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=is_sorted)

    assert_same(results(ours, x, hx, pack), results(theirs, x, hx, pack))


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_output_keeps_batch_sizes_and_indices(backend, is_sorted):
    theirs, ours = pair(backend)
    x, _ = random_inputs(theirs)
    packed = pack_padded_sequence(x, [4, 2, 1] if is_sorted else [2, 1, 4], enforce_sorted=is_sorted)
    output, _ = ours(packed.to(**PLACES[backend]))
    expected, _ = theirs(packed.double())
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, expected.batch_sizes)
    if is_sorted:
        assert output.sorted_indices is None
        assert output.unsorted_indices is None
    else:
        assert torch.equal(output.sorted_indices.cpu(), expected.sorted_indices)
        assert torch.equal(output.unsorted_indices.cpu(), expected.unsorted_indices)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, given):
    theirs, ours = pair(backend, num_layers=2, bidirectional=True)
    x, hx = random_inputs(theirs)
    x, hx = x[:, :0], tuple(t[:, :0] for t in hx) if given else None
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_appear_where_torch_has_them(backend):
    theirs, ours = pair(backend, bidirectional=True)
    x, (h0, c0) = random_inputs(theirs)
    x[1, 0, 0], x[3, 1, 1], x[0, 1, 2] = float("nan"), float("inf"), float("-inf")
    c0[0, 2, 3], c0[0, 2, 0], h0[1, 2, 1] = float("inf"), float("-inf"), float("nan")
    with torch.no_grad():
        y, states = ours(x.to(**PLACES[backend]), tuple(t.to(**PLACES[backend]) for t in (h0, c0)))
        y_true, states_true = theirs(x.double(), (h0.double(), c0.double()))
    for name, our, true in zip(("output", "h_n", "c_n"), (y, *states), (y_true, *states_true), strict=True):
        assert true.isnan().any(), name
        atol = 16 * torch.finfo(our.dtype).eps
        torch.testing.assert_close(our.double().cpu(), true, rtol=0, atol=atol, equal_nan=True)
    assert states_true[1].isinf().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend):
    _, ours = pair(backend, num_layers=2, bidirectional=True)
    x, hx = random_inputs(ours)
    first, second = results(ours, x, hx), results(ours, x, hx)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_works_in_eval(backend):
    theirs, ours = pair(backend, num_layers=2)
    x, hx = random_inputs(theirs)
    assert_same(results(ours.eval(), x, hx), results(theirs.eval(), x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_retained_gives_the_same_gradients_twice(backend):
    _, ours = pair(backend, num_layers=2, proj_size=2)
    x, _ = random_inputs(ours)
    x = x.to(**PLACES[backend]).requires_grad_()
    loss = ours(x)[0].square().sum()
    wanted = [x, *ours.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_gradients_of_one_result_alone(backend, used):
    theirs, ours = pair(backend)
    x, _ = random_inputs(theirs)
    gradients = []
    for module in (ours, theirs):
        output, (h_n, c_n) = module(x.to(next(module.parameters())))
        {"output": output, "h_n": h_n, "c_n": c_n}[used].sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert_same(*gradients)


# Dropout


def test_dropout_with_the_same_seed_gives_the_numbers_of_torch():
    theirs, ours = pair("torch", num_layers=3, bidirectional=True, dropout=0.4)
    x, hx = (t.double() if isinstance(t, Tensor) else tuple(s.double() for s in t) for t in random_inputs(theirs))
    outputs = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(module(x, hx)[0])
    assert torch.equal(*outputs)
    torch.manual_seed(6)
    assert not torch.equal(outputs[0], ours(x, hx)[0])


def test_dropout_in_a_packed_sequence_gives_the_numbers_of_torch():
    theirs, ours = pair("torch", num_layers=2, dropout=0.4)
    x, _ = random_inputs(theirs)
    packed = pack_padded_sequence(x.double(), [2, 1, 4], enforce_sorted=False)
    for training in (True, False):
        outputs = []
        for module in (ours.train(training), theirs.train(training)):
            torch.manual_seed(5)
            outputs.append(module(packed)[0].data)
        assert torch.equal(*outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_everything_leaves_the_second_layer_without_input(backend):
    theirs, ours = pair(backend, num_layers=2, dropout=1.0)
    x, _ = random_inputs(theirs)
    second = nn.LSTM(H, H).double()
    second.load_state_dict({name[:-1] + "0": w for name, w in theirs.state_dict().items() if name.endswith("1")})
    expected, _ = second(torch.zeros(T, B, H, dtype=torch.float64))
    output, _ = ours(x.to(**PLACES[backend]))
    assert_same({"output": output.detach()}, {"output": expected.detach()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_off_in_eval(backend):
    theirs, ours = pair(backend, num_layers=2, dropout=0.9)
    x, hx = random_inputs(theirs)
    assert_same(results(ours.eval(), x, hx), results(theirs.eval(), x, hx))
