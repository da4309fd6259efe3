"""Lengths and resets through the modules, against the NumPy oracle and against torch.nn.LSTM without either.

All numbers are float32 ones, so that every backend, and the oracle in float64, start from the same.
"""

import itertools

import numpy as np
import oracle
import pytest
import torch
from comparing import BACKENDS, PLACES, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products")
NAN, INF = float("nan"), float("inf")


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape).double()


def ours(backend: str, *args, **kwargs) -> gpu_lstm.LSTM:
    torch.manual_seed(0)
    return gpu_lstm.LSTM(*args, **kwargs, backend=backend).to(**PLACES[backend])


def theirs(module: gpu_lstm.LSTM) -> nn.LSTM:
    """torch.nn.LSTM in float64 with the same weights."""
    twin = nn.LSTM(
        module.input_size, module.hidden_size, module.num_layers, module.bias, module.batch_first,
        bidirectional=module.bidirectional, proj_size=module.proj_size, dtype=torch.float64,
    )  # fmt: skip
    twin.load_state_dict(module.state_dict())
    return twin


def random_states(module: nn.Module, *batch: int) -> tuple[Tensor, Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    return numbers(rows, *batch, module.proj_size or module.hidden_size), numbers(rows, *batch, module.hidden_size)


def output_gradients(module: nn.Module, x: Tensor, states: tuple[Tensor, Tensor]) -> list[Tensor]:
    width = (2 if module.bidirectional else 1) * (module.proj_size or module.hidden_size)
    return [numbers(*x.shape[:-1], width), *(numbers(*s.shape) for s in states)]


def results(module, x, hx, gradients, call=None, **ragged) -> dict[str, Tensor]:
    """Output, final states, and what backward makes of `gradients` of these, float64."""
    parameters = dict(module.named_parameters())
    like = next(iter(parameters.values()))
    inputs = [t.detach().to(like).requires_grad_() for t in (x, *(hx or ()))]
    ragged = {name: value.to(like.device) for name, value in ragged.items() if value is not None}
    output, (h_n, c_n) = (module if call is None else call)(inputs[0], tuple(inputs[1:]) or None, **ragged)
    found = torch.autograd.grad([output, h_n, c_n], [*inputs, *parameters.values()], [g.to(like) for g in gradients])
    names = ["output", "h_n", "c_n", "dx", *(["dh0", "dc0"] if hx else []), *(f"d{name}" for name in parameters)]
    return dict(zip(names, (t.detach().cpu().double() for t in (output, h_n, c_n, *found)), strict=True))


def truth(module, x, hx, gradients, lengths=None, resets=None) -> dict[str, Tensor]:
    """The same by the oracle, layer upon layer."""

    def turned(t):  # between the user's layout and time-major
        return t.swapaxes(0, 1) if module.batch_first else t

    directions = 2 if module.bidirectional else 1
    h0, c0 = (t.numpy() for t in hx or random_states(module, turned(x).shape[1]))
    if not hx:
        h0, c0 = np.zeros_like(h0), np.zeros_like(c0)
    y, resets = turned(x.numpy()), None if resets is None else turned(resets)
    h_n, c_n, taken = [], [], []
    for row in range(len(h0)):
        if row % directions == 0:
            below, parts = y, []
        names = [f"{name}_l{row // directions}" + "_reverse" * (row % directions) for name in WEIGHT_NAMES]
        weights = [
            w.detach().cpu().double().numpy() if (w := getattr(module, n, None)) is not None else None for n in names
        ]
        inputs = (below, h0[row], c0[row], *weights)
        h, *finals, tape = oracle.layer(*inputs, lengths=lengths, resets=resets, reverse=row % directions == 1)
        h_n, c_n = [*h_n, finals[0]], [*c_n, finals[1]]
        taken.append((names, inputs, tape))
        parts.append(h)
        y = np.concatenate(parts, axis=2)
    found = dict(output=turned(y), h_n=np.stack(h_n), c_n=np.stack(c_n))

    dy, dh_n, dc_n = turned(gradients[0].numpy()), gradients[1].numpy(), gradients[2].numpy()
    dh0, dc0, dweights = np.zeros_like(h0), np.zeros_like(c0), {}
    for row in reversed(range(len(h0))):
        if row % directions == directions - 1:
            from_above, dy = np.split(dy, directions, axis=2), 0.0
        names, inputs, tape = taken[row]
        dx, dh0[row], dc0[row], *rest = oracle.layer_gradients(
            *inputs, tape=tape, dh=from_above[row % directions], dh_n=dh_n[row], dc_n=dc_n[row]
        )
        dweights |= {f"d{name}": g for name, g in zip(names, rest, strict=True) if g is not None}
        dy = dy + dx
    found |= dict(dx=turned(dy)) | (dict(dh0=dh0, dc0=dc0) if hx else {})
    found |= {f"d{name}": dweights[f"d{name}"] for name, _ in module.named_parameters()}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


WEIGHT_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name in got:
        assert torch.equal(got[name], expected[name]), name


# Any problem at all, against the oracle


@st.composite
def problems(draw, longest: int, most: int):
    """(arguments of LSTM, T, B, lengths or None, resets or None, whether hx is given, seed)"""
    hidden = draw(st.integers(1, 4))
    arguments = dict(
        input_size=draw(st.integers(1, 3)), hidden_size=hidden, num_layers=draw(st.integers(1, 2)),
        bias=draw(st.booleans()), batch_first=draw(st.booleans()), bidirectional=draw(st.booleans()),
        proj_size=draw(st.integers(0, hidden - 1)),
    )  # fmt: skip
    steps, batch = draw(st.integers(1, longest)), draw(st.integers(0, most))
    rows = st.lists(st.integers(0, steps), min_size=batch, max_size=batch)
    flags = st.lists(st.lists(st.booleans(), min_size=batch, max_size=batch), min_size=steps, max_size=steps)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    lengths = draw(st.none() | rows.map(lambda values: torch.tensor(values, dtype=dtype)))
    resets = draw(st.none() | flags.map(lambda values: torch.tensor(values, dtype=torch.bool).view(steps, batch)))
    return arguments, steps, batch, lengths, resets, draw(st.booleans()), draw(st.integers(0, 2**16))


def check_against_the_oracle(backend, problem):
    arguments, steps, batch, lengths, resets, has_hx, seed = problem
    module = ours(backend, **arguments)
    torch.manual_seed(seed)
    x = numbers(*((batch, steps) if module.batch_first else (steps, batch)), module.input_size)
    resets = resets.T if resets is not None and module.batch_first else resets
    states = random_states(module, batch)
    gradients = output_gradients(module, x, states)
    hx = states if has_hx else None
    got = results(module, x, hx, gradients, lengths=lengths, resets=resets)
    assert_same(got, truth(module, x, hx, gradients, lengths, resets), backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems(longest=5, most=4))
def test_any_problem_gives_the_numbers_of_the_oracle(backend, problem):
    check_against_the_oracle(backend, problem)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(problem=problems(longest=4, most=3))
def test_any_problem_gives_the_numbers_of_the_oracle_on_triton(problem):
    check_against_the_oracle("triton", problem)


# Problems chosen by hand

LENGTHS = torch.tensor([2, 0, 4, 1])
RESETS = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]]).bool()  # [T, B]
DEEP = dict(num_layers=2, bidirectional=True)


def chosen(backend: str, **kwargs):
    """A module of 3 features and 4 units, x [4, 4, 3], hx, and gradients of its results."""
    module = ours(backend, 3, 4, **kwargs)
    torch.manual_seed(1)
    x, hx = numbers(4, 4, 3), random_states(module, 4)
    return module, x, hx, output_gradients(module, x, hx)


@pytest.mark.parametrize("arguments", [DEEP, dict(bidirectional=True, proj_size=2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_resets_together(backend, arguments):
    module, x, hx, gradients = chosen(backend, **arguments)
    got = results(module, x, hx, gradients, lengths=LENGTHS, resets=RESETS)
    assert_same(got, truth(module, x, hx, gradients, LENGTHS, RESETS), backend)
    assert (got["output"][2:, 0] == 0).all()
    assert (got["output"][:, 1] == 0).all()
    assert torch.equal(got["h_n"][:, 1], hx[0][:, 1])


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_the_padding_reaches_neither_results_nor_gradients(backend, with_resets):
    module, x, hx, gradients = chosen(backend, bidirectional=True, proj_size=2, num_layers=1 + (backend != "triton"))
    padding = torch.arange(4)[:, None] >= LENGTHS
    ragged = dict(lengths=LENGTHS, resets=RESETS if with_resets else None)
    clean = results(module, x, hx, gradients, **ragged)
    assert clean["dx"][padding].count_nonzero() == 0
    for garbage in (NAN, INF):
        dirty_x, dirty_gradient = x.clone(), gradients[0].clone()
        dirty_x[padding], dirty_gradient[padding] = garbage, garbage
        assert_identical(results(module, dirty_x, hx, [dirty_gradient, *gradients[1:]], **ragged), clean)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize("arguments", [dict(bidirectional=True), DEEP, dict(bidirectional=True, proj_size=2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_does_not_pass_a_reset(backend, arguments):
    module, x, (h0, c0), gradients = chosen(backend, **arguments)
    resets = torch.zeros(4, 4, dtype=torch.bool)
    resets[2, :], resets[0, 3] = True, True
    x[0, 0, 0], x[3, 1, 1], c0[:, 2, 0], h0[:, 3, 0] = NAN, NAN, INF, NAN
    got = results(module, x, (h0, c0), gradients, resets=resets)
    assert got["output"].isnan().any(2).T.tolist() == [
        [True, True, False, False], [False, False, True, True], [False] * 4, [False, False, True, True]
    ]  # fmt: skip
    expected = truth(module, x, (h0, c0), gradients, resets=resets)
    for name in ("output", "h_n", "c_n", "dx"):
        assert_same({name: got[name]}, {name: expected[name]}, backend, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_are_what_a_packed_sequence_has(backend):
    module, x, hx, gradients = chosen(backend, **DEEP)
    lengths = torch.tensor([2, 4, 1, 3])
    twin = theirs(module)

    def packed(x, hx):
        output, states = twin(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        return pad_packed_sequence(output, total_length=4)[0], states

    for given_hx in (hx, None):
        got = results(module, x, given_hx, gradients, lengths=lengths)
        assert_same(got, results(twin, x, given_hx, gradients, call=packed), backend)


def in_pieces(twin: nn.LSTM, resets: Tensor):
    """A call of torch.nn.LSTM on the pieces between resets, one sequence and one piece after another."""

    def call(x, hx):
        outputs, finals = [], []
        for b in range(x.shape[1]):
            cuts = [0, *(t for t in range(1, len(x)) if resets[t, b]), len(x)]
            ends = []
            for k, (start, stop) in enumerate(itertools.pairwise(cuts)):
                # The forward direction (even rows) starts in the first piece, the reverse one in the last.
                begins = torch.tensor([k == 0 and not bool(resets[0, b]), stop == len(x)]).repeat(len(hx[0]) // 2)
                initial = tuple(s[:, b] * begins[:, None] for s in hx)
                y, states = twin(x[start:stop, b], initial)
                outputs.append(y)
                ends.append(states)
            finals.append([torch.stack([ends[r % 2 - 1][s][r] for r in range(len(hx[0]))]) for s in range(2)])
        steps = torch.cat(outputs).view(x.shape[1], len(x), -1).transpose(0, 1)
        return steps, tuple(torch.stack(states, dim=1) for states in zip(*finals))

    return call


@pytest.mark.parametrize("backend", BACKENDS)
def test_resets_cut_a_sequence_into_pieces(backend):
    module, x, hx, gradients = chosen(backend, **DEEP)
    twin = theirs(module)
    got = results(module, x, hx, gradients, resets=RESETS)
    assert_same(got, results(twin, x, hx, gradients, call=in_pieces(twin, RESETS)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_all_steps_and_no_resets_change_nothing(backend):
    module, x, hx, gradients = chosen(backend, **DEEP)
    got = results(module, x, hx, gradients, lengths=torch.full((4,), 4), resets=torch.zeros(4, 4, dtype=torch.bool))
    assert_same(got, results(module, x, hx, gradients), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_step_at_all(backend):
    module, x, hx, gradients = chosen(backend, **DEEP)
    got = results(module, x, hx, gradients, lengths=torch.zeros(4, dtype=torch.int64), resets=RESETS)
    expected = dict(output=torch.zeros(4, 4, 8), h_n=hx[0], c_n=hx[1], dx=torch.zeros(4, 4, 3), dh0=gradients[1],
                    dc0=gradients[2])  # fmt: skip
    expected |= {f"d{name}": torch.zeros(p.shape) for name, p in module.named_parameters()}
    assert_identical(got, {name: t.to(PLACES[backend]["dtype"]).double() for name, t in expected.items()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_and_int64_lengths_are_the_same(backend):
    module, x, hx, gradients = chosen(backend, bidirectional=True)
    got = [results(module, x, hx, gradients, lengths=LENGTHS.to(dtype), resets=RESETS)
           for dtype in (torch.int32, torch.int64)]  # fmt: skip
    assert_identical(*got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_first_turns_input_and_resets_but_not_states(backend):
    module, x, hx, gradients = chosen(backend, **DEEP)
    x, lengths, resets = x[:, :3], LENGTHS[:3], RESETS[:, :3]  # T and B differ
    hx, gradients = tuple(s[:, :3] for s in hx), [g[:, :3] for g in gradients]
    got = results(module, x, hx, gradients, lengths=lengths, resets=resets)
    module.batch_first = True
    turned = results(module, x.transpose(0, 1), hx, [gradients[0].transpose(0, 1), *gradients[1:]], lengths=lengths,
                     resets=resets.T)  # fmt: skip
    turned = {name: t.transpose(0, 1) if name in ("output", "dx") else t for name, t in turned.items()}
    assert_same(turned, got, backend)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched(backend, batch_first):
    module, x, hx, gradients = chosen(backend, **DEEP, batch_first=batch_first)
    one = [t[:, 0] for t in (x, *hx, *gradients)]
    got = results(module, one[0], one[1:3], one[3:], lengths=torch.tensor(3), resets=RESETS[:, 0])
    module.batch_first = False
    alone = [t[:, :1] for t in (x, *hx, *gradients)]
    expected = truth(module, alone[0], alone[1:3], alone[3:], torch.tensor([3]), RESETS[:, :1])
    assert_same(got, {n: t.squeeze(1) if t.dim() == 3 else t for n, t in expected.items()}, backend)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resets_of_a_packed_sequence_are_those_of_the_padded_batch(backend, is_sorted, batch_first):
    lengths = torch.tensor([4, 3, 2, 1] if is_sorted else [2, 4, 1, 3])
    module, x, hx, gradients = chosen(backend, bidirectional=True, batch_first=batch_first)
    resets = RESETS.T if batch_first else RESETS

    def packed(x, hx, resets):
        packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=is_sorted)
        output, states = module(packed, hx, resets=resets)
        assert isinstance(output, PackedSequence)
        return pad_packed_sequence(output, batch_first=batch_first)[0], states

    got = results(module, x, hx, gradients, call=packed, resets=resets)
    assert_same(got, truth(module, x, hx, gradients, lengths, resets), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_results_are_the_same(backend):
    module, x, hx, gradients = chosen(backend, **DEEP)
    expected = results(module, x, hx, gradients, lengths=LENGTHS, resets=RESETS)
    like = module.weight_ih_l0
    with torch.no_grad():
        output, (h_n, c_n) = module(
            x.to(like), tuple(s.to(like) for s in hx), lengths=LENGTHS.to(like.device), resets=RESETS.to(like.device)
        )
    assert not output.requires_grad
    for name, t in dict(output=output, h_n=h_n, c_n=c_n).items():
        assert torch.equal(t.cpu().double(), expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_between_layers_is_drawn_anew_and_keeps_padding_empty(backend):
    module, x, hx, gradients = chosen(backend, num_layers=2, dropout=0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(results(module, x, hx, gradients, lengths=LENGTHS, resets=RESETS)["output"])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert outputs[0][torch.arange(4)[:, None] >= LENGTHS].count_nonzero() == 0
    got = results(module.eval(), x, hx, gradients, lengths=LENGTHS, resets=RESETS)
    assert_same(got, truth(module, x, hx, gradients, LENGTHS, RESETS), backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_gradients(backend):
    module = ours(backend, 2, 2, bidirectional=True)
    torch.manual_seed(1)
    inputs = [numbers(3, 2, 2), *random_states(module, 2)]
    inputs = [t.requires_grad_() for t in inputs] + list(module.parameters())
    names = [name for name, _ in module.named_parameters()]
    ragged = dict(lengths=torch.tensor([3, 1]), resets=torch.tensor([[0, 1], [0, 1], [1, 0]]).bool())

    def call(x, h0, c0, *weights):
        weights = dict(zip(names, weights, strict=True))
        output, states = torch.func.functional_call(module, weights, (x, (h0, c0)), ragged)
        return output, *states

    assert torch.autograd.gradgradcheck(call, inputs)


def test_gradient_penalty_on_triton():
    """Its gradients of gradients are those of torch.nn.LSTM on the pieces."""
    module, x, hx, _ = chosen("triton", **DEEP)
    twin = theirs(module)
    got = []
    for m, call, ragged in ((module, module, dict(resets=RESETS)), (twin, in_pieces(twin, RESETS), {})):
        like = m.weight_ih_l0
        inputs = [t.to(like).requires_grad_() for t in (x, *hx)]
        output, (h_n, c_n) = call(inputs[0], tuple(inputs[1:]), **{n: t.to(like.device) for n, t in ragged.items()})
        loss = output.square().sum() + h_n.square().sum() + c_n.square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*inputs, *m.parameters()])
        got.append({str(k): t.cpu().double() for k, t in enumerate(second)})
    assert_same(*got, "triton")
