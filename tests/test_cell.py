"""gpu_lstm.LSTMCell in the place of torch.nn.LSTMCell: the same results, gradients, weights and errors."""

import copy
import itertools
import pickle

import pytest
import torch
from comparing import BACKENDS, DEVICE, PLACES, assert_same
from torch import Tensor, nn

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products")
B, I, H = 3, 3, 4


def pair(backend: str, bias: bool = True) -> tuple[nn.LSTMCell, gpu_lstm.LSTMCell]:
    """torch's cell in float64, and ours with the same weights."""
    torch.manual_seed(1)
    theirs = nn.LSTMCell(I, H, bias=bias).double()
    ours = gpu_lstm.LSTMCell(I, H, bias=bias, backend=backend, **PLACES[backend])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random_inputs(*batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return torch.randn(*batch, I), (torch.randn(*batch, H), torch.randn(*batch, H))


def results(cell, x, hx=None, call=None) -> dict[str, Tensor]:
    """h', c', and the gradients of a random weighing of them by x, h, c and every parameter."""
    parameters = dict(cell.named_parameters())
    inputs = [t.detach().to(cell.weight_ih).requires_grad_() for t in (x, *(hx or ()))]
    states = (cell if call is None else call)(inputs[0], *([tuple(inputs[1:])] if hx else []))
    assert isinstance(states, tuple)
    torch.manual_seed(3)
    weights = [torch.randn(t.shape).to(t) for t in states]
    gradients = torch.autograd.grad(states, [*inputs, *parameters.values()], weights)
    names = ["h", "c", "dx", *(["dh0", "dc0"] if hx else []), *(f"d{name}" for name in parameters)]
    return dict(zip(names, (t.detach() for t in (*states, *gradients)), strict=True))


# Numbers


@pytest.mark.parametrize(("bias", "batch", "given"), list(itertools.product([True, False], [(B,), ()], [True, False])))
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients(backend, bias, batch, given):
    theirs, ours = pair(backend, bias)
    x, hx = random_inputs(*batch)
    hx = hx if given else None
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    theirs, ours = pair(backend)
    x, hx = random_inputs(0)
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_by_step_it_is_a_layer(backend):
    layer = nn.LSTM(I, H).double()
    cell = gpu_lstm.LSTMCell(I, H, backend=backend, **PLACES[backend])
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.state_dict().items()})
    torch.manual_seed(2)
    x = torch.randn(5, B, I)
    states, outputs = None, []
    for t in range(5):
        states = cell(x[t].to(cell.weight_ih), states)
        outputs.append(states[0])
    output, (h_n, c_n) = torch.stack(outputs), states
    output_true, (h_n_true, c_n_true) = layer(x.double())
    gradients = torch.autograd.grad(output.square().sum(), list(cell.parameters()))
    gradients_true = torch.autograd.grad(output_true.square().sum(), list(layer.parameters()))
    ours, theirs = (output, h_n, c_n, *gradients), (output_true, h_n_true[0], c_n_true[0], *gradients_true)
    assert_same(dict(enumerate(t.detach() for t in ours)), dict(enumerate(t.detach() for t in theirs)))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_appear_where_torch_has_them(backend):
    theirs, ours = pair(backend)
    x, (h, c) = random_inputs(B)
    x[0, 1], c[1, 2], c[1, 3], x[2, 0] = float("nan"), float("inf"), float("-inf"), float("inf")
    with torch.no_grad():
        got = ours(x.to(ours.weight_ih), tuple(t.to(ours.weight_ih) for t in (h, c)))
        true = theirs(x.double(), (h.double(), c.double()))
    assert true[0].isnan().any()
    assert true[1].isinf().any()
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=16 * torch.finfo(a.dtype).eps, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_of_states_will_do(backend):
    theirs, ours = pair(backend)
    x, hx = random_inputs(B)
    h, c = ours(x.to(ours.weight_ih), [t.to(ours.weight_ih) for t in hx])
    h_true, c_true = theirs(x.double(), [t.double() for t in hx])
    assert_same({"h": h.detach(), "c": c.detach()}, {"h": h_true.detach(), "c": c_true.detach()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_states_in_one_tensor_will_do(backend):
    theirs, ours = pair(backend)
    x, hx = random_inputs()
    h, c = ours(x.to(ours.weight_ih), torch.stack(hx).to(ours.weight_ih))
    h_true, c_true = theirs(x.double(), torch.stack(hx).double())
    assert_same({"h": h.detach(), "c": c.detach()}, {"h": h_true.detach(), "c": c_true.detach()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty(backend):
    theirs, ours = pair(backend)
    gradients = []
    for cell in (ours, theirs):
        x, hx = random_inputs(B)
        x, h, c = (t.to(cell.weight_ih).requires_grad_() for t in (x, *hx))
        first = torch.autograd.grad(cell(x, (h, c))[0].square().sum(), (x, h, c), create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, [x, h, c, *cell.parameters()])
        gradients.append(dict(enumerate(second)))
    assert_same(*gradients)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_tensor_given_as_both_states(backend, create_graph):
    theirs, ours = pair(backend)
    gradients = []
    for cell in (ours, theirs):
        x, (h, _) = random_inputs(B)
        h = h.to(cell.weight_ih).requires_grad_()
        (grad,) = torch.autograd.grad(cell(x.to(h), (h, h))[0].square().sum(), h, create_graph=create_graph)
        gradients.append({"h": grad.detach()})
    assert_same(*gradients)


def test_cpu_autocast_gives_the_dtypes_of_torch():
    theirs, ours = (cell.float() for cell in pair("torch"))
    x, hx = random_inputs(B)
    for given in (None, hx):
        with torch.autocast("cpu", torch.bfloat16):
            got, true = ours(x, given), theirs(x, given)
        assert [t.dtype for t in got] == [t.dtype for t in true]
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


# The module


@pytest.mark.parametrize("bias", [True, False])
def test_same_seed_gives_the_same_names_and_initial_weights(bias):
    cells = []
    for cls in (gpu_lstm.LSTMCell, nn.LSTMCell):
        torch.manual_seed(7)
        cells.append(cls(I, H, bias=bias))
    ours, theirs = (dict(cell.named_parameters()) for cell in cells)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert repr(cells[0]) == repr(cells[1])
    assert cells[0].bias_hh is None or bias


def test_repr_names_a_chosen_backend():
    assert repr(gpu_lstm.LSTMCell(3, 4, bias=False, backend="torch")) == "LSTMCell(3, 4, bias=False, backend='torch')"


def test_state_dicts_load_both_ways():
    theirs, ours = nn.LSTMCell(I, H), gpu_lstm.LSTMCell(I, H)
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    theirs.reset_parameters()
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cell: pickle.loads(pickle.dumps(cell))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_compute_the_same(backend, copied):
    _, ours = pair(backend)
    x, hx = random_inputs(B)
    twin = copied(ours)
    assert repr(twin) == repr(ours)
    before, after = results(ours, x, hx), results(twin, x, hx)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_state_of_a_pickled_torch_cell():
    theirs = nn.LSTMCell(I, H)
    restored = gpu_lstm.LSTMCell.__new__(gpu_lstm.LSTMCell)
    restored.__setstate__(theirs.__getstate__())
    x, hx = random_inputs(B)
    assert_same(results(restored, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call(backend):
    theirs, ours = pair(backend)
    x, _ = random_inputs(B)
    outputs = []
    for cell in (ours, theirs):
        torch.manual_seed(9)
        others = {name: torch.randn(p.shape).to(p) for name, p in cell.named_parameters()}
        h, c = torch.func.functional_call(cell, others, (x.to(cell.weight_ih),))
        outputs.append({"h": h, "c": c})
    assert_same(*outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_it_computes_the_same(backend):
    _, ours = pair(backend)
    ours = ours.float()
    x, hx = random_inputs(B)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(results(ours, x, hx, call=compiled), results(ours, x, hx))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_it_computes_the_same():
    theirs, ours = pair("torch")
    x = random_inputs(B)[0].double()
    assert all(torch.equal(a, b) for a, b in zip(torch.jit.script(nn.Sequential(ours))(x), theirs(x), strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_meta_tensors_have_their_shapes_computed(backend):
    x = torch.empty(B, I, device="meta")
    got = gpu_lstm.LSTMCell(I, H, device="meta", backend=backend)(x)
    assert [t.shape for t in got] == [t.shape for t in nn.LSTMCell(I, H, device="meta")(x)]
    assert all(t.is_meta for t in got)


# Errors: input (B, 3), 4 hidden units


def zeros(*size, **kwargs):
    return torch.zeros(*size, **{"device": DEVICE} | kwargs)


BAD_CALLS = {
    "input 3-D": lambda: (zeros(2, 1, 3),),
    "input 0-D": lambda: (zeros(()),),
    "input None": lambda: (None,),
    "features": lambda: (zeros(2, 5),),
    "features unbatched": lambda: (zeros(5),),
    "h 3-D": lambda: (zeros(2, 3), (zeros(1, 2, 4), zeros(2, 4))),
    "c 0-D": lambda: (zeros(2, 3), (zeros(2, 4), zeros(()))),
    "h batch": lambda: (zeros(2, 3), (zeros(3, 4), zeros(2, 4))),
    "c batch": lambda: (zeros(2, 3), (zeros(2, 4), zeros(3, 4))),
    "h width": lambda: (zeros(2, 3), (zeros(2, 5), zeros(2, 4))),
    "c width": lambda: (zeros(2, 3), (zeros(2, 4), zeros(2, 5))),
    "hx width unbatched": lambda: (zeros(3), (zeros(5), zeros(5))),
    "hx batched, input not": lambda: (zeros(3), (zeros(2, 4), zeros(2, 4))),
    "hx unbatched, input batched": lambda: (zeros(2, 3), (zeros(4), zeros(4))),
    "c unbatched, input batched": lambda: (zeros(2, 3), (zeros(2, 4), zeros(4))),
    "hx empty": lambda: (zeros(2, 3), ()),
    "hx of one tensor": lambda: (zeros(2, 3), (zeros(2, 4),)),
    "hx of three tensors": lambda: (zeros(2, 3), (zeros(2, 4), zeros(2, 4), zeros(2, 4))),
}
# For these torch's text is that of a product deep inside.
BADLY_WORDED_CALLS = {
    "float64": lambda: (zeros(2, 3).double(),),
    "int64": lambda: (zeros(2, 3).long(),),
    "hx float64": lambda: (zeros(2, 3), (zeros(2, 4).double(), zeros(2, 4).double())),
    "meta input": lambda: (zeros(2, 3, device="meta"),),
    "meta hx": lambda: (zeros(2, 3), (zeros(2, 4, device="meta"), zeros(2, 4, device="meta"))),
}


def error_of(call, *args, **kwargs) -> tuple[type, str] | None:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_calls_raise_what_torch_raises(backend, bad):
    theirs = error_of(nn.LSTMCell(3, 4, device=DEVICE), *BAD_CALLS[bad]())
    assert theirs is not None
    assert error_of(gpu_lstm.LSTMCell(3, 4, device=DEVICE, backend=backend), *BAD_CALLS[bad]()) == theirs


@pytest.mark.parametrize("bad", BADLY_WORDED_CALLS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_bad_calls_raise_an_error_of_the_same_type(backend, bad):
    theirs = error_of(nn.LSTMCell(3, 4, device=DEVICE), *BADLY_WORDED_CALLS[bad]())
    ours = error_of(gpu_lstm.LSTMCell(3, 4, device=DEVICE, backend=backend), *BADLY_WORDED_CALLS[bad]())
    assert theirs is not None
    assert ours[0] is theirs[0]
    assert ours == theirs or backend == "reference"


@pytest.mark.parametrize("bad", [
    dict(input_size=3.0), dict(input_size=-1), dict(hidden_size="4"), dict(hidden_size=-4), dict(dtype=torch.int64),
    dict(units=4),
], ids=str)  # fmt: skip
def test_bad_arguments_raise_what_torch_raises(bad):
    arguments = dict(input_size=3, hidden_size=4) | bad
    theirs = error_of(nn.LSTMCell, **arguments)
    assert theirs is not None
    assert error_of(gpu_lstm.LSTMCell, **arguments) == theirs
