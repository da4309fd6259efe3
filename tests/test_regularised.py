"""Recurrent dropout, zoneout and weight drop: numbers against the NumPy oracle, noise by its statistics, manners."""

import copy
import dataclasses
import pickle
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import triton
import triton.language as tl
from comparing import NAMES, PLACES, Problem, assert_as_good_as_torch, assert_same, problem
from test_ragged import output_gradients, random_states, results
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gpu_lstm
from gpu_lstm import autograd, functional, ops, pipeline, reference
from gpu_lstm.backends import Backend, select
from gpu_lstm.kernels.cupy_lstm import launch as cupy
from gpu_lstm.kernels.triton_lstm import cell, launch, step, tuning
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Family, plans
from gpu_lstm.noise import NO_NOISE, Noise, draw
from gpu_lstm.weights import Weights

pytestmark = pytest.mark.usefixtures("exact_float32_products")
TAKERS = ("reference", "triton")
RAGGED = dict(ragged=True, resets=0.4)

# One layer in one direction, against the oracle

NOISES = {"masks": (True, True, True), "dropout": (True, False, False), "h": (False, True, False),
          "c": (False, False, True), "expected": None}  # fmt: skip
VARIANTS = {
    "plain": {},
    "reverse": dict(reverse=True),
    "ragged resets": RAGGED,
    "ragged resets reverse": dict(**RAGGED, reverse=True),
    "no bias": dict(bias=False, **RAGGED),
}


def noisy(size, variant, noise, seed=0) -> Problem:
    """A random problem with masks of which each element is a coin toss, or with expectations."""
    given = problem(*size, **VARIANTS[variant], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    steps, (batch, width), hidden = len(given.tensors[0]), given.tensors[1].shape, given.tensors[2].shape[1]

    def tosses(*shape, heads):
        return torch.rand(*shape, generator=generator) < heads

    if NOISES[noise] is None:
        return dataclasses.replace(given, noise=Noise(None, torch.tensor(0.3), torch.tensor(0.45)))
    drawn = tosses(batch, width, heads=0.7).double() / 0.7, tosses(steps, batch, width, heads=0.3)
    drawn = (*drawn, tosses(steps, batch, hidden, heads=0.45))
    return dataclasses.replace(given, noise=Noise(*(t if there else None for t, there in zip(drawn, NOISES[noise]))))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("projected", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_equals_the_oracle(variant, projected, noise):
    given = noisy((6, 4, 3, 5, projected), variant, noise)
    for name, true, our in zip(NAMES, given.truth(), given.run("reference", torch.float64), strict=True):
        if true is not None:
            torch.testing.assert_close(our.detach(), torch.from_numpy(true), rtol=1e-12, atol=1e-12, msg=name)


SIZES = [((5, 17, 6, 33), 1), ((4, 4, 3, 33, 7), 2)]  # T, B, I, H, P; and how many problems


@pytest.mark.parametrize(
    ("variant", "noise"),
    [(v, n) for v in VARIANTS for n in NOISES if n in ("masks", "expected") or v == "ragged resets reverse"],
)
@pytest.mark.parametrize(("size", "seeds"), SIZES, ids=str)
def test_the_kernels_are_as_good_as_the_reference(size, seeds, variant, noise, device):
    make = partial(noisy, size, variant, noise)
    assert_as_good_as_torch(make, "triton", torch.float32, device, seeds, yardstick="reference")


@pytest.mark.parametrize("noise", ["masks", "expected"])
@pytest.mark.parametrize("projected", [0, 7])
def test_the_kernels_in_float16(projected, noise, device):
    make = partial(noisy, (6, 5, 8, 40, projected), "ragged resets reverse", noise)
    assert_as_good_as_torch(make, "triton", torch.float16, device, yardstick="reference")


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("noise", ["masks", "expected"])
@pytest.mark.parametrize("projected", [0, 2])
def test_derivatives_by_finite_differences(check, projected, noise):
    given = noisy((3, 3, 2, 3, projected), "ragged resets reverse", noise)
    present = [t is not None for t in given.tensors]

    def layer(*tensors):
        remaining = iter(tensors)
        arguments = [next(remaining) if there else None for there in present]
        return reference.lstm_layer(*arguments, given.lengths, given.resets, given.reverse, noise=given.noise)

    assert check(layer, [t.requires_grad_() for t in given.tensors if t is not None])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize("backend", TAKERS)
def test_nan_passes_neither_a_reset_nor_out_of_the_padding(backend, device):
    given = noisy((5, 3, 3, 4, 2), "plain", "masks")
    given.tensors[0][:2, 0], given.tensors[1][1] = float("nan"), float("nan")
    given.tensors[0][3:, 2], given.output_gradients[0][3:, 2] = float("nan"), float("nan")
    given.lengths, given.resets = torch.tensor([5, 5, 3]), torch.zeros(5, 3, dtype=torch.bool)
    given.resets[2, 0], given.resets[0, 1] = True, True
    h, h_n, c_n, dx, *_ = given.run(backend, PLACES[backend]["dtype"], PLACES[backend]["device"])
    assert h.isnan().any(2).T.tolist() == [[True, True, False, False, False], [False] * 5, [False] * 5]
    assert not any(t.isnan().any() for t in (h_n, c_n, dx[2:]))
    assert (dx[3:, 2] == 0).all()


# Faults


@triton.jit
def nothing_is_handed_back(zone, d):
    return zone * 0.0, (1.0 - zone) * d


@triton.jit
def the_whole_gradient_goes_on(zone, d):
    return zone * d, d


@triton.jit
def shares_swapped(zone, before, new):
    return cell.zoneout(1.0 - zone, before, new)


@triton.jit
def the_mask_of_the_first_unit(zone_ptr, at, mask):
    return tl.load(zone_ptr + at * 0, mask=mask, other=0).to(tl.float32)


def mask_forgotten(saved, reverse):
    return autograd.states_before(saved.h, saved.h0, saved.lengths, saved.resets, reverse)


def cells_after_zoneout(saved, gates, reverse):
    return saved.c


FAULTS = [
    (step, "zoneout_backward", nothing_is_handed_back, "h"),
    (step, "zoneout_backward", nothing_is_handed_back, "c"),
    (step, "zoneout_backward", the_whole_gradient_goes_on, "c"),
    (step, "zoneout", shares_swapped, "expected"),
    (step, "load_zone", the_mask_of_the_first_unit, "c"),
    (autograd, "_taken_by_weight_hh", mask_forgotten, "dropout"),
    (autograd, "_cells_before_zoneout", cells_after_zoneout, "c"),
]


@pytest.mark.skipif(not launch.INTERPRETED, reason="compiled kernels hold their device functions")
@pytest.mark.parametrize(("module", "name", "fault", "noise"), FAULTS)
def test_a_planted_fault_is_seen(monkeypatch, module, name, fault, noise):
    compare = partial(assert_as_good_as_torch, backend="triton", dtype=torch.float32, yardstick="reference")
    compare(partial(noisy, (5, 4, 3, 6, 3), "ragged resets", noise))
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        compare(partial(noisy, (5, 4, 3, 6, 3), "ragged resets", noise))


# Modules

ALL = dict(recurrent_dropout=0.3, zoneout=(0.2, 0.4), weight_drop=0.25)
LENGTHS = torch.tensor([2, 0, 4, 1])
RESETS = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]]).bool()  # [T, B]
MODULES = {
    "one layer": partial(gpu_lstm.LSTM, 3, 4),
    "deep": partial(gpu_lstm.LSTM, 3, 4, num_layers=2, dropout=0.3),
    "both directions": partial(gpu_lstm.LSTM, 3, 4, num_layers=2, bidirectional=True, dropout=0.3),
    "projection": partial(gpu_lstm.LSTM, 3, 4, proj_size=2, bidirectional=True),
    "recompute": partial(gpu_lstm.LSTM, 3, 4, proj_size=2, recompute=True),
}


def made(make, backend="auto", dtype=torch.float32, device="cpu", **kwargs):
    torch.manual_seed(0)
    return make(**kwargs, backend=backend, dtype=dtype, device=device)


def call_of(module, seed=5, **ragged):
    """Everything that a call gives, drawn from a seed."""
    torch.manual_seed(1)
    x, hx = torch.randn(4, 4, 3).double(), random_states(module, 4)
    gradients = output_gradients(module, x, hx)
    torch.manual_seed(seed)
    return results(module, x, hx, gradients, **ragged)


def assert_close(got, expected):
    assert_same(got, expected, "triton")


def assert_identical(got, expected):
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("ragged", [{}, dict(lengths=LENGTHS, resets=RESETS)], ids=["plain", "ragged"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_seed_means_the_same_on_every_backend(make, ragged, training, device):
    got, expected = (call_of(made(make, b, device=device, **ALL).train(training), **ragged) for b in TAKERS)
    assert_close(got, expected)


@pytest.mark.parametrize("backend", TAKERS)
def test_a_seed_gives_the_same_bits_again_and_another_gives_others(backend, device):
    lstm = made(MODULES["both directions"], backend, device=device, **ALL)
    assert_identical(call_of(lstm), call_of(lstm))
    for name in ALL:
        lstm = made(MODULES["one layer"], backend, device=device, **{name: ALL[name]})
        assert not torch.equal(call_of(lstm)["output"], call_of(lstm, seed=6)["output"]), name


@pytest.fixture
def drawn(monkeypatch) -> list[list[list[Noise]]]:
    """The noise of every call."""
    kept = []
    monkeypatch.setattr(functional, "draw", lambda *args: kept.append(draw(*args)) or kept[-1])
    return kept


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend", TAKERS)
def test_a_deep_module_is_a_chain_of_oracles(backend, training, drawn):
    """Two layers, both directions, a projection, batch first, packed, resets."""
    lstm = made(
        partial(gpu_lstm.LSTM, 3, 4, 2, batch_first=True, bidirectional=True, proj_size=2), backend, **PLACES[backend],
        recurrent_dropout=0.3, zoneout=(0.2, 0.4),
    ).train(training)  # fmt: skip
    torch.manual_seed(1)
    x, lengths = torch.randn(4, 4, 3).to(lstm.weight_ih_l0), torch.tensor([2, 4, 1, 3])
    order = lengths.argsort(descending=True)  # of the packed batch, in which the noise is
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, (h_n, c_n) = lstm(packed, resets=RESETS.T.to(x.device))
    output, _ = pad_packed_sequence(output, batch_first=True)
    ((*noises,),) = drawn
    y = x.double().cpu().transpose(0, 1)[:, order].numpy()
    finals = []
    for k, layer in enumerate(noises):
        parts = []
        for d, noise in enumerate(layer):
            suffix = f"_l{k}" + "_reverse" * d
            names = [f"{n}{suffix}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")]
            weights = [getattr(lstm, name).detach().double().cpu().numpy() for name in names]
            sizes = (4, 2), (4, 4, 2), (4, 4, 4)
            factors = [None if t is None else t.double().cpu().expand(s).numpy() for t, s in zip(noise, sizes)]
            h, *states, _ = oracle.layer(
                y, np.zeros((4, 2)), np.zeros((4, 4)), *weights, lengths=lengths[order], resets=RESETS[:, order],
                reverse=d == 1, **dict(zip(Noise._fields, factors)),
            )  # fmt: skip
            parts.append(h)
            finals.append(states)
        y = np.concatenate(parts, axis=2)
    back = order.argsort()
    expected = [y.swapaxes(0, 1)[back], *(np.stack(states)[:, back] for states in zip(*finals))]
    for got, true in zip((output, h_n, c_n), expected, strict=True):
        tolerance = 8 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double().cpu().detach(), torch.from_numpy(true), rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", TAKERS)
def test_a_stack_with_residual_connections(backend, device):
    """Equal sizes: the numbers of an LSTM of the same seed, plus its layers' inputs."""
    arguments = dict(**ALL, backend=backend, device=device)
    stack = gpu_lstm.StackedLSTM(4, [4, 4], residual=True, **arguments)
    x = torch.randn(5, 3, 4, device=device)
    torch.manual_seed(2)
    output, _ = stack(x)
    torch.manual_seed(2)
    layers = [[Weights(*w)] for w in (list(layer.parameters()) for layer in stack.layers)]
    with torch.no_grad():
        dropped = [nn.functional.dropout(layer[0].weight_hh, 0.25) for layer in layers]
        layers = [[layer[0]._replace(weight_hh=w)] for layer, w in zip(layers, dropped)]
        noises = draw(layers, 5, 3, torch.float32, 0.3, (0.2, 0.4), True)
        y, zeros = x, torch.zeros(3, 4, device=device)
        for (weights,), (noise,) in zip(layers, noises):
            y = y + reference.lstm_layer(y, zeros, zeros, *weights, None, None, False, noise=noise)[0]
    torch.testing.assert_close(output, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("make", [MODULES["projection"], partial(gpu_lstm.LSTM, 3, 4, 2)], ids=["projection", "deep"])
def test_chunks_of_time_get_their_part_of_the_noise(monkeypatch, make, training, device):
    lstm = made(make, "triton", device=device, recompute=True, **ALL).train(training)
    whole = call_of(lstm, lengths=LENGTHS, resets=RESETS)
    monkeypatch.setattr(pipeline, "WORKSPACE", 2 * 4 * 16 * 4)  # two steps
    assert_close(call_of(lstm, lengths=LENGTHS, resets=RESETS), whole)


def test_recompute_gives_the_same_gradients(device):
    for projected in (0, 2):
        make = partial(gpu_lstm.LSTM, 3, 4, proj_size=projected)
        again, kept = (call_of(made(make, "triton", device=device, recompute=r, **ALL)) for r in (True, False))
        assert_close(again, kept)


@pytest.mark.parametrize("make", [MODULES["both directions"], MODULES["projection"]], ids=["deep", "projection"])
def test_a_gradient_penalty_on_triton_is_that_of_the_reference(make, device):
    found = []
    for backend in TAKERS:
        lstm = made(make, backend, device=device, **ALL)
        x = torch.linspace(-1, 1, 48, device=device).reshape(4, 4, 3).requires_grad_()
        torch.manual_seed(3)
        (dx,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
        gradients = torch.autograd.grad(dx.square().sum(), [x, *lstm.parameters()], allow_unused=True)
        found.append({str(k): g.cpu().double() for k, g in enumerate(gradients) if g is not None})
    assert_close(*found)


# What the probabilities mean


@pytest.mark.parametrize("backend", TAKERS)
def test_dropping_all_of_h_is_an_lstm_without_recurrent_weights(backend, device):
    for name in ("recurrent_dropout", "weight_drop"):
        lstm, plain = (made(MODULES["both directions"], b, device=device) for b in (backend, "reference"))
        setattr(lstm, name, 1.0)
        lstm.dropout = plain.dropout = 0.0
        with torch.no_grad():
            for parameter in (p for n, p in plain.named_parameters() if n.startswith("weight_hh")):
                parameter.zero_()
        got, expected = call_of(lstm, lengths=LENGTHS), call_of(plain, lengths=LENGTHS)
        hidden = [n for n in got if not n.startswith("dweight_hh") and n != "dh0"]
        assert_close({n: got[n] for n in hidden}, {n: expected[n] for n in hidden})
        assert all((got[n] == 0).all() for n in got if n.startswith("dweight_hh"))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend", TAKERS)
def test_holding_everything_leaves_the_states_as_they_were(backend, training, device):
    lstm = made(MODULES["one layer"], backend, device=device, zoneout=1.0).train(training)
    h0, c0 = torch.randn(1, 4, 4, device=device), torch.randn(1, 4, 4, device=device)
    output, (h_n, c_n) = lstm(torch.randn(4, 4, 3, device=device), (h0, c0), lengths=LENGTHS.to(device))
    inside = (torch.arange(4)[:, None] < LENGTHS).to(device)
    assert torch.equal(output, torch.where(inside[:, :, None], h0, 0))
    assert torch.equal(h_n, h0)
    assert torch.equal(c_n, c0)


@pytest.mark.parametrize("backend", TAKERS)
def test_zoneout_holds_anew_at_every_step_what_recurrent_dropout_drops_for_a_whole_call(backend, device):
    steps, batch, hidden, rate = 12, 16, 32, 0.3
    lstm = gpu_lstm.LSTM(3, hidden, backend=backend, device=device, zoneout=(rate, 0.0))
    output, _ = lstm(torch.randn(steps, batch, 3, device=device))
    held = output[1:] == output[:-1]  # [T - 1, B, H]
    assert abs(held.float().mean() - rate) < 0.03
    assert abs((held[1:] & held[:-1]).float().mean() - rate**2) < 0.03  # as if tossed twice

    lstm = gpu_lstm.LSTM(1, hidden, backend=backend, device=device, recurrent_dropout=rate, bias=False)
    with torch.no_grad():  # each unit feeds itself alone, and starts from 1
        lstm.weight_ih_l0.zero_()
        lstm.weight_hh_l0.copy_(torch.eye(hidden).repeat(4, 1))
    h0, c0 = torch.ones(1, batch, hidden, device=device), torch.zeros(1, batch, hidden, device=device)
    output, _ = lstm(torch.zeros(steps, batch, 1, device=device), (h0, c0))
    dropped = output == 0
    assert (dropped == dropped[0]).all()  # g = tanh(0) at every step, or at none
    assert abs(dropped[0].float().mean() - rate) < 0.06


def test_the_statistics_of_what_is_drawn():
    torch.manual_seed(0)
    weights = [[Weights(torch.empty(80, 3), torch.empty(80, 10))] * 2] * 3
    noises = draw(weights, 30, 40, torch.float32, 0.2, (0.1, 0.4), True)
    assert [len(layer) for layer in noises] == [2, 2, 2]
    noises = [noise for layer in noises for noise in layer]
    assert noises[0].mask_h.shape == (40, 10)
    assert noises[0].zone_h.shape == (30, 40, 10)
    assert noises[0].zone_c.shape == (30, 40, 20)
    assert noises[0].zone_h.dtype == noises[0].zone_c.dtype == torch.bool
    assert noises[0].mask_h.unique().tolist() == [0, 1.25]
    rates = [(n.mask_h == 0, n.zone_h, n.zone_c) for n in noises]
    for masks, rate in zip(zip(*rates), (0.2, 0.1, 0.4)):
        for mask in masks:
            tosses = mask.numel()
            assert abs(mask.double().mean() - rate) < 4 * (rate * (1 - rate) / tosses) ** 0.5
        assert not torch.equal(masks[0], masks[1]), "directions have masks of their own"
        assert not torch.equal(masks[0], masks[2]), "and so have layers"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_eval_has_only_the_expectation_of_zoneout(dtype):
    weights = [[Weights(torch.empty(80, 3), torch.empty(80, 10))]]
    ((noise,),) = draw(weights, 30, 40, dtype, 0.2, (0.1, 0.0), False)
    assert (noise.mask_h, noise.zone_c) == (None, None)
    assert noise.zone_h == torch.tensor(0.1, dtype=torch.promote_types(dtype, torch.float32))
    assert draw(weights, 30, 40, dtype, 0.2, (0.0, 0.0), False) == [[NO_NOISE]]


@pytest.mark.parametrize("backend", TAKERS)
def test_one_step_in_eval_by_hand(backend, device):
    lstm = gpu_lstm.LSTM(3, 4, zoneout=(0.1, 0.6), backend=backend, device=device).eval()
    plain = copy.deepcopy(lstm)
    plain.zoneout = 0.0
    h, c = torch.randn(1, 2, 4, device=device), torch.randn(1, 2, 4, device=device)
    x = torch.randn(1, 2, 3, device=device)
    _, (h_plain, c_plain) = plain(x, (h, c))
    _, (h_n, c_n) = lstm(x, (h, c))
    torch.testing.assert_close(h_n, 0.1 * h + 0.9 * h_plain)
    torch.testing.assert_close(c_n, 0.6 * c + 0.4 * c_plain)


@pytest.mark.parametrize("backend", ["torch", *TAKERS])
def test_in_eval_dropout_of_any_kind_changes_no_bit(backend, device):
    kinds = dict(recurrent_dropout=0.5, weight_drop=0.5)
    for make in (MODULES["both directions"], MODULES["projection"]):
        lstm, plain = (made(make, backend, device=device, **each).eval() for each in (kinds, {}))
        assert_identical(call_of(lstm), call_of(plain))


@pytest.mark.parametrize("backend", ["torch", *TAKERS])
def test_weight_drop_runs_everywhere(backend, device):
    """As an LSTM whose weight_hh has what a seed leaves of it; gradients pass what was left only."""
    lstm = made(MODULES["one layer"], backend, device=device, weight_drop=0.5)
    plain = made(MODULES["one layer"], "reference", device=device)
    torch.manual_seed(5)
    factors = nn.functional.dropout(torch.ones_like(plain.weight_hh_l0), 0.5)
    with torch.no_grad():
        plain.weight_hh_l0 *= factors
    got, expected = call_of(lstm), call_of(plain)
    expected["dweight_hh_l0"] *= factors.cpu().double()
    assert_close(got, expected)
    packed = pack_padded_sequence(torch.randn(4, 4, 3, device=device), torch.tensor([4, 3, 3, 1]))
    torch.manual_seed(5)
    torch.testing.assert_close(lstm(packed)[0].data, plain(packed)[0].data, rtol=1e-5, atol=1e-6)


# Which backend runs


@pytest.mark.parametrize("backend", ["torch", "cupy"])
@pytest.mark.parametrize("make", [gpu_lstm.LSTM, lambda i, h, **kw: gpu_lstm.StackedLSTM(i, [h], **kw)],
                         ids=["LSTM", "StackedLSTM"])  # fmt: skip
def test_a_backend_that_cannot_says_so(make, backend):
    x = torch.zeros(2, 1, 3)
    for name, value in (("recurrent_dropout", 0.1), ("zoneout", (0.0, 0.1))):
        lstm = make(3, 4, backend=backend, **{name: value})
        with pytest.raises(ValueError, match=f"^backend '{backend}' takes no {name}; use 'triton' or 'reference'$"):
            lstm(x)
    with pytest.raises(ValueError, match="takes no zoneout"):
        lstm.eval()(x)
    with gpu_lstm.backend(backend), pytest.raises(ValueError, match="takes no zoneout"):
        make(3, 4, zoneout=0.1)(x)
    if backend == "torch":
        make(3, 4, backend="torch", recurrent_dropout=0.1).eval()(x)
        with pytest.raises(ValueError, match="takes no zoneout"):
            gpu_lstm.LSTM(3, 4, backend="torch", zoneout=0.1)(pack_padded_sequence(x, torch.tensor([2])))


def test_auto_takes_triton_where_it_can_else_the_reference(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for unable, chosen in ((None, Backend.TRITON), (Backend.TRITON, Backend.REFERENCE)):
        monkeypatch.setattr("gpu_lstm.backends.can_run", lambda b, *_, unable=unable: b is not unable)
        assert select("auto", cuda, torch.float32, "zoneout") is chosen
        assert select("auto", cpu, torch.float32, "zoneout") is Backend.REFERENCE
        assert select("auto", cpu, torch.float32) is Backend.TORCH


def test_the_kernels_of_cupy_refuse():
    gates, h0, weight_hh = torch.zeros(2, 1, 16), torch.zeros(1, 4), torch.zeros(16, 4)
    recurrence = (weight_hh, None, h0, h0, None, None, False, "ieee")
    for noise in ((h0, None, None), (None, torch.tensor(0.1), None), (None, None, torch.tensor(0.1))):
        with pytest.raises(ValueError, match=r"^backend 'cupy' takes neither recurrent dropout nor zoneout$"):
            cupy.layer_forward(gates, *recurrence, *noise, save=True)
        with pytest.raises(ValueError, match=r"^backend 'cupy' takes neither"):
            cupy.layer_backward(None, None, None, gates, gates[..., :4], *recurrence, *noise)


def test_planning_takes_the_step_family():
    plain = launch.Problem(128, 16, 128, torch.bfloat16)
    regularised = dataclasses.replace(plain, regularised=True)
    for backward in (False, True):
        (plan,) = plans(regularised, DEVICES["h100"], backward)
        assert plan.family is Family.STEP
        assert plan.why == "recurrent dropout and zoneout run step by step"
        keys = {tuning._key(p, DEVICES["h100"], backward) for p in (plain, regularised)}
        assert len(keys) == 2, "a measured plan of the one is not taken for the other"


# The operators, torch.compile, autocast, trace


@pytest.mark.parametrize("noise", ["masks", "expected"])
@pytest.mark.parametrize("projected", [0, 2])
def test_the_operators(projected, noise, device):
    given = noisy((3, 2, 3, 5, projected), "ragged resets reverse", noise)
    x, h0, c0, weight_ih, weight_hh, _, _, weight_hr = (
        None if t is None else t.to(device, torch.float32) for t in given.tensors
    )
    given_noise = [t if t is None or t.dtype is torch.bool else t.float() for t in given.noise]
    given_noise = [None if t is None else t.to(device) for t in given_noise]
    gates = x @ weight_ih.T
    rest = (weight_hh, weight_hr, h0, c0, given.lengths.to(device), given.resets.to(device), True)
    for save in (False, True):
        torch.library.opcheck(ops.layer_forward, (gates, *rest, save, "triton", *given_noise))
    h, h_n, c_n, c = ops.layer_forward(gates, *rest, True, "triton", *given_noise)
    torch.library.opcheck(ops.layer_backward, (h, h_n, c_n, gates, c, *rest, "triton", *given_noise))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend", TAKERS)
def test_compiled_whole_it_computes_the_same(backend, training, device):
    torch._dynamo.reset()
    lstm = made(MODULES["both directions"], backend, device=device, **ALL).train(training)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    ragged = dict(lengths=LENGTHS, resets=RESETS)
    torch.manual_seed(1)
    x, hx = torch.randn(4, 4, 3).double(), random_states(lstm, 4)
    found = []
    for call in (compiled, lstm):
        torch.manual_seed(5)
        found.append(results(lstm, x, hx, output_gradients(lstm, x, hx), call=call, **ragged))
    torch._dynamo.reset()
    assert_close(*found)


@pytest.mark.parametrize("backend", TAKERS)
def test_autocast(backend, device):
    lstm = made(MODULES["both directions"], backend, device=device, **ALL)
    x = torch.randn(4, 4, 3, device=device)
    outputs = []
    for dtype in (torch.float16, None):
        torch.manual_seed(5)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            outputs.append(lstm(x)[0])
    assert outputs[0].dtype is torch.float16
    torch.testing.assert_close(outputs[0].float(), outputs[1], rtol=0, atol=5e-3)


def test_per_sample_noise_under_vmap():
    lstm = gpu_lstm.LSTM(3, 4, zoneout=0.5, recurrent_dropout=0.5)
    x = torch.randn(4, 1, 3).expand(5, 4, 1, 3)
    outputs = torch.func.vmap(lambda x: lstm(x)[0], randomness="different")(x)
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 5


def test_a_trace_shows_the_states_after_zoneout():
    lstm = made(MODULES["both directions"], zoneout=(0.2, 0.4))
    traced = gpu_lstm.trace(lstm, torch.randn(4, 4, 3), lengths=LENGTHS)
    top = torch.cat([gates.hidden for gates in traced.layers[1]], dim=2)
    assert torch.equal(top, traced.output)
    h_n, c_n = traced.states
    assert torch.equal(traced.layers[1][0].cell[3, 2], c_n[2, 2])
    assert torch.equal(traced.layers[1][1].hidden[0], torch.where(LENGTHS[:, None] > 0, h_n[3], 0))


# Arguments


ZEROED = "should be a number in range [0, 1] representing the probability of an element being zeroed, got"
HELD = "should be a number in range [0, 1] representing the probability of an element staying as it was, or a pair"


@pytest.mark.parametrize("make", [gpu_lstm.LSTM, lambda i, h, **kw: gpu_lstm.StackedLSTM(i, [h], **kw)],
                         ids=["LSTM", "StackedLSTM"])  # fmt: skip
def test_wrong_probabilities(make):
    for name in ("recurrent_dropout", "weight_drop"):
        for value in (-0.1, 1.5, float("nan"), True, "0.5", None, (0.1, 0.1)):
            with pytest.raises(ValueError) as error:  # noqa: PT011
                make(3, 4, **{name: value})
            assert str(error.value) == f"{name} {ZEROED} {value!r}"
    for value in (-0.1, 1.5, True, "ab", None, (0.1,), (0.1, 0.1, 0.1), (0.1, 2), [0.1, 0.2]):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            make(3, 4, zoneout=value)
        assert str(error.value) == f"zoneout {HELD} of them for h and c, got {value!r}"


def test_what_is_not_default_is_shown():
    assert gpu_lstm.LSTM(3, 4, zoneout=(0.0, 0.0)).extra_repr() == "3, 4"
    shown = "recurrent_dropout=0.3, zoneout=(0.2, 0.4), weight_drop=0.25"
    assert gpu_lstm.LSTM(3, 4, **ALL).extra_repr() == f"3, 4, {shown}"
    assert gpu_lstm.StackedLSTM(3, [4], **ALL).extra_repr() == f"3, [4], {shown}"
    assert gpu_lstm.LSTM(3, 4, zoneout=(0.2, 0.2)).zoneout == 0.2


@pytest.mark.parametrize("make", [gpu_lstm.LSTM, lambda i, h, **kw: gpu_lstm.StackedLSTM(i, [h], **kw)],
                         ids=["LSTM", "StackedLSTM"])  # fmt: skip
def test_pickles(make):
    twin = pickle.loads(pickle.dumps(make(3, 4, **ALL)))
    assert {name: getattr(twin, name) for name in ALL} == ALL
    old = make(3, 4)
    for name in ALL:
        del old.__dict__[name]  # as in a pickle from before there were any
    old = pickle.loads(pickle.dumps(old))
    assert repr(old) == repr(make(3, 4))
    old(torch.zeros(2, 1, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", ALL)
def test_torchscript_cannot_have_them(name):
    lstm = gpu_lstm.LSTM(3, 4, **{name: ALL[name]})
    with pytest.raises(ValueError, match=f"the LSTM has {name}=.*, and would be scripted as a torch.nn.LSTM"):
        torch.jit.script(nn.Sequential(lstm))
    setattr(lstm, name, 0.0)
    torch.jit.script(nn.Sequential(lstm))


def test_conversion_leaves_nothing_of_ours_behind():
    converted = gpu_lstm.modules.recast(gpu_lstm.LSTM(3, 4), nn.LSTM)
    assert not set(ALL) & set(vars(converted))
