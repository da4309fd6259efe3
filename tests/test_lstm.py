"""gpu_lstm.LSTM in the place of torch.nn.LSTM: the same results, gradients and weights, whatever is done to the module.

The truth is torch.nn.LSTM in float64 on the CPU, with weights and inputs that are float32 numbers.
"""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gpu_lstm
from gpu_lstm.functional import lstm_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = {
    "torch": dict(dtype=torch.float64),
    "reference": dict(dtype=torch.float64),
    "triton": dict(dtype=torch.float32, device=DEVICE),  # without a GPU in Triton's interpreter
}
BACKENDS = tuple(PLACES)
T, B, I, H = 4, 3, 3, 4


@pytest.fixture(autouse=True)
def exact_float32_products(monkeypatch):
    monkeypatch.setattr("gpu_lstm.precision._cudnn_takes_tf32", lambda: False)


def pair(backend: str, *args, **kwargs) -> tuple[nn.LSTM, gpu_lstm.LSTM]:
    """torch's LSTM in float64, and ours with the same weights."""
    torch.manual_seed(1)
    theirs = nn.LSTM(I, H, *args, **kwargs).double()
    ours = gpu_lstm.LSTM(I, H, *args, **kwargs, backend=backend, **PLACES[backend])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random_inputs(module: nn.Module, batched: bool = True) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x and (h0, c0) for `module`, float32."""
    torch.manual_seed(2)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batch = (B,) if batched else ()
    time_and_batch = (B, T) if batched and module.batch_first else (T, *batch)
    hx = torch.randn(rows, *batch, module.proj_size or H), torch.randn(rows, *batch, H)
    return torch.randn(*time_and_batch, I), hx


def results(module, x: Tensor, hx=None, pack=None, call=None, **ragged) -> dict[str, Tensor]:
    """Output and final states, and the gradients of a random weighing of them by x, h0, c0 and every parameter."""
    parameters = dict(module.named_parameters())
    like = next(iter(parameters.values()))
    inputs = [t.detach().to(like).requires_grad_() for t in (x, *(hx or ()))]
    arguments = [inputs[0] if pack is None else pack(inputs[0])] + ([tuple(inputs[1:])] if hx else [])
    output, (h_n, c_n) = (module if call is None else call)(*arguments, **ragged)
    outputs = [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]
    torch.manual_seed(3)
    weights = [torch.randn(t.shape).to(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, [*inputs, *parameters.values()], weights)
    names = ["output", "h_n", "c_n", "dx", *(["dh0", "dc0"] if hx else []), *(f"d{name}" for name in parameters)]
    return dict(zip(names, (t.detach() for t in (*outputs, *gradients)), strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal but for rounding: a few units in the last place of the larger of 1 and the largest element."""
    assert list(ours) == list(theirs)
    for name, true in theirs.items():
        scale = max(1.0, true.abs().max().item() if true.numel() else 0.0)
        torch.testing.assert_close(
            ours[name].double().cpu(), true.double().cpu(), rtol=0, atol=8 * torch.finfo(ours[name].dtype).eps * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


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


# torch.compile, TorchScript, autocast


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_it_computes_the_same(backend, compiled):
    _, ours = pair(backend, bidirectional=True)
    ours = ours.float()
    x, hx = random_inputs(ours)
    assert_same(results(ours, x, hx, call=compiled(ours)), results(ours, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_an_input_that_needs_no_gradient(backend, compiled):
    _, ours = pair(backend)
    ours = ours.float()
    x = random_inputs(ours)[0].to(ours.weight_ih_l0)
    gradients = []
    for call in (compiled(ours), ours):
        grads = torch.autograd.grad(call(x)[0].square().sum(), list(ours.parameters()))
        gradients.append({name: g for (name, _), g in zip(ours.named_parameters(), grads, strict=True)})
    assert_same(*gradients)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_whole_with_lengths_and_resets(backend, compiled):
    _, ours = pair(backend, bidirectional=True)
    x, hx = random_inputs(ours)
    ragged = dict(
        lengths=torch.tensor([4, 0, 2], device=ours.weight_ih_l0.device),
        resets=torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]], device=ours.weight_ih_l0.device).bool(),
    )
    assert_same(results(ours, x, hx, call=compiled(ours), **ragged), results(ours, x, hx, **ragged))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_scripted_model_computes_the_same_and_shares_the_weights(bidirectional):
    theirs, ours = pair("torch", num_layers=2, bidirectional=bidirectional, batch_first=True)
    model = torch.jit.script(nn.Sequential(ours))
    x = random_inputs(theirs)[0].double()
    assert torch.equal(model(x)[0], theirs(x)[0])
    with torch.no_grad():
        ours.weight_hh_l0.zero_()
        theirs.weight_hh_l0.zero_()
    assert torch.equal(model(x)[0], theirs(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(("backend", "configuration"), [
    ("torch", {}), ("torch", dict(num_layers=2, bidirectional=True)), ("torch", dict(proj_size=2)),
    ("reference", {}), ("reference", dict(num_layers=2, bidirectional=True)),
], ids=str)  # fmt: skip
def test_cpu_autocast_gives_the_dtypes_of_torch(backend, configuration):
    theirs, ours = (module.float() for module in pair(backend, **configuration))
    x, hx = random_inputs(theirs)
    for given in (None, hx):
        got = []
        for module in (ours, theirs):
            with torch.autocast("cpu", torch.bfloat16):
                output, states = module(x, given)
            gradients = torch.autograd.grad(output.float().square().sum(), list(module.parameters()))
            got.append([output, *states, *gradients])
        assert [t.dtype for t in got[0]] == [t.dtype for t in got[1]]
        for our, their in zip(got[0][:3], got[1][:3], strict=True):
            torch.testing.assert_close(our.float(), their.float(), rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


def test_cpu_autocast_of_the_reference_is_its_run_in_bfloat16():
    _, ours = pair("reference", num_layers=2)
    x, hx = random_inputs(ours.float())
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            got = ours(x, hx)
        expected = ours.bfloat16()(x.bfloat16(), tuple(t.bfloat16() for t in hx))
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_cpu_autocast_with_lengths_and_resets_keeps_the_dtypes(backend):
    _, ours = pair(backend, bidirectional=True)
    x, hx = random_inputs(ours.float())
    with torch.autocast("cpu", torch.bfloat16):
        plain = ours(x, hx)
        ragged = ours(x, hx, lengths=torch.full((B,), T), resets=torch.zeros(T, B, dtype=torch.bool))
    for a, b in zip((plain[0], *plain[1]), (ragged[0], *ragged[1]), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


# Gradients of gradients


@pytest.mark.parametrize("configuration", [{}, dict(bidirectional=True), dict(proj_size=1)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradgradcheck(backend, configuration):
    torch.manual_seed(4)
    ours = gpu_lstm.LSTM(2, 2, dtype=torch.float64, backend=backend, **configuration)
    rows = 2 if ours.bidirectional else 1
    inputs = [torch.randn(2, 2, 2), torch.randn(rows, 2, ours.proj_size or 2), torch.randn(rows, 2, 2)]
    inputs = [t.double().requires_grad_() for t in inputs] + list(ours.parameters())
    names = [name for name, _ in ours.named_parameters()]

    def call(x, h0, c0, *weights):
        output, states = torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (x, (h0, c0)))
        return output, *states

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("configuration", [{}, dict(num_layers=2, bidirectional=True), dict(proj_size=2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty(backend, configuration):
    theirs, ours = pair(backend, **configuration)
    x, hx = random_inputs(theirs)
    assert_same(_penalty_gradients(ours, x, hx), _penalty_gradients(theirs, x, hx))


def _penalty_gradients(module, x, hx):
    """Gradients of (|d output / d inputs| - 1)^2."""
    named = dict(module.named_parameters())
    inputs = [t.to(next(module.parameters())).requires_grad_() for t in (x, *hx)]
    output, (h_n, c_n) = module(inputs[0], tuple(inputs[1:]))
    loss = output.square().sum() + h_n.sum() + c_n.square().sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    penalty = (torch.cat([g.flatten() for g in first]).norm() - 1).square()
    second = torch.autograd.grad(penalty, [*inputs, *named.values()])
    names = ["penalty", "x", "h0", "c0", *named]
    return dict(zip(names, (t.detach() for t in (penalty, *second)), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_under_create_graph_where_an_input_depends_on_another(backend):
    theirs, ours = pair(backend)
    x, hx = random_inputs(theirs)
    gradients = []
    for module in (ours, theirs):
        h0, c0 = (t.to(module.weight_ih_l0).requires_grad_() for t in hx)
        output, _ = module(x.to(h0) + h0[..., :I].tanh(), (h0, c0 + h0))
        (first,) = torch.autograd.grad(output.square().sum(), h0, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), h0)
        gradients.append({"first": first.detach(), "second": second})
    assert_same(*gradients)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_tied_biases(backend, create_graph):
    theirs, ours = pair(backend)
    x, _ = random_inputs(theirs)
    gradients = []
    for module in (ours, theirs):
        module.bias_hh_l0 = module.bias_ih_l0
        output, _ = module(x.to(module.bias_ih_l0))
        grads = torch.autograd.grad(output.square().sum(), module.bias_ih_l0, create_graph=create_graph)
        gradients.append({"bias": grads[0].detach()})
    assert_same(*gradients)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_lstm_layer_where_its_inputs_depend_on_each_other(backend, create_graph):
    theirs, ours = pair(backend)
    gradients = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        h = torch.randn(B, H).to(module.weight_ih_l0).requires_grad_()
        x = torch.randn(T, B, I).to(h) + h[:, :I]
        if module is ours:
            output, _ = lstm_layer(x, list(ours.parameters()), (h, h), backend=backend)
        else:
            output, _ = theirs(x, (h[None], h[None]))
        (grad,) = torch.autograd.grad(output.square().sum(), h, create_graph=create_graph)
        gradients.append({"h": grad.detach()})
    assert_same(*gradients)
