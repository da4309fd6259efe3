"""The sLSTM: its states, gates that are shut, exported programs, and slstm_layer. test_layer.py compares its numbers
with the oracle."""

import numpy as np
import oracle
import pytest
import torch
from cases import built, with_random_parameters
from comparing import KERNELS_HERE, PLACES, assert_same
from pairs import LENGTHS, B, I, T, random_inputs, weighing
from places import cuda
from torch.utils._pytree import tree_leaves, tree_map

from gpu_lstm.functional import slstm_layer

H = 8
by_both = pytest.mark.parametrize("backend", ["reference", KERNELS_HERE])
close = torch.testing.assert_close


def made(words="", backend="reference", dtype=None, steps=T):
    """Return a module, and x and (h, c, n, m) for it, all in the dtype of the backend's place, or in `dtype`."""
    dtype = dtype or PLACES[backend]["dtype"]
    module = built((steps, B, I, H), {"slstm", *words.split()}, backend=backend)
    module = with_random_parameters(module, 0).to(dtype)
    return module, *tree_map(lambda t: t.to(dtype), random_inputs(module, B, steps=steps))


def same(found, expected):
    return all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))


@by_both
def test_nothing_overflows_and_padding_does_not_matter(backend):
    module, x, _ = made("", backend, steps=12)
    with torch.no_grad():
        module.bias_ih_l0[: 2 * H] = torch.tensor([700.0, -700.0]).repeat_interleave(H)
        y, (_, c, n, m) = module(x)
        assert all(t.isfinite().all() for t in (y, c, n, m))
        # The new input outweighs the state before it, so c is the last step's candidate.
        z = x[-1] @ module.weight_ih_l0.T + y[-2] @ module.weight_hh_l0.T + module.bias_ih_l0 + module.bias_hh_l0
        close(c[0], z[:, 2 * H : 3 * H].tanh())
        for limit in (-1e4, 1e4):
            module.bias_ih_l0[:H] = limit
            assert module(x)[0].isfinite().all()
    x[LENGTHS[0] :, 0] = float("nan")
    assert same(*(module(t[:T], lengths=LENGTHS.clamp(max=2)) for t in (x, x.nan_to_num())))


@by_both
def test_only_a_sequence_without_steps_returns_an_empty_state(backend):
    module, x, _ = made("heads", backend)
    _, (h, c, n, m) = module(x, lengths=LENGTHS)
    assert not torch.stack([h, c, n, m])[:, :, LENGTHS == 0].any()
    assert n[:, LENGTHS > 0].eq(1).all()
    assert all(t.dtype is torch.promote_types(x.dtype, torch.float32) for t in (c, n, m))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_in_half_precision_c_n_and_m_are_float32_and_pieces_give_what_the_whole_gives(given):
    dtype = torch.float16  # Triton's interpreter has no products in bfloat16
    slstm, x, hx = made("", "triton", dtype)
    hx = [t.to(given) if k else t for k, t in enumerate(hx)]
    y, states = slstm(x, hx)
    assert [t.dtype for t in (y, *states)] == [dtype, dtype, *[torch.float32] * 3]
    first, middle = slstm(x[:1], hx)
    assert same(slstm(x[1:], middle), (y[1:], states))
    assert torch.equal(first, y[:1])


def test_exported_programs():
    module, x, _ = made("heads")
    sizes = {"input": {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}}
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=sizes).module()
    x = torch.randn(7, 2, I).double()
    close(program(x), module(x))


@by_both
def test_slstm_layer_of_any_strides_leaves_z_as_it_is(backend):
    z, weight_hh, bias = torch.randn(B, T, 4 * H).transpose(0, 1), torch.randn(4 * H, H), torch.randn(4 * H)
    before, found = z.clone(), []
    for given, by in ((z, backend), (before.contiguous(), "reference")):
        leaf = given.detach().requires_grad_()
        y, _ = slstm_layer(leaf, weight_hh, bias, lengths=LENGTHS, reverse=True, backend=by)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
    close(*found)
    assert torch.equal(z, before)


# Gates that are shut, or open, by any amount, beside the paper's c, n and m in float64, by the oracle

INF, UNITS, STEPS = float("inf"), 4, 6
SHUT_RAGGED = dict(lengths=torch.tensor([6, 4, 6]), resets=torch.arange(STEPS * B).view(STEPS, B) % 7 == 5)
NAMES = "y", "h", "c", "m", "dz", "dweight", "dh", "dc", "dn", "dm"
BY_ALL = lambda test: pytest.mark.parametrize(("backend", "dtype"), [  # noqa: E731
    ("reference", torch.float64), ("triton", torch.float32), ("cupy", torch.float32),
    ("numba", torch.float32),
])(pytest.mark.usefixtures("in_cuda")(test))  # fmt: skip


@pytest.fixture
def in_cuda(monkeypatch):
    cuda(monkeypatch)


def drawn():
    """Draw z [T, B, 4H], W_hh, and (h, c, n, m) with n >= 1.

    Input gates are shut at about every other step. Where they are not, some forget gates are shut. Other forget gates
    are wide open.
    """
    torch.manual_seed(0)
    z, (i_shut, f_shut, f_open) = torch.randn(STEPS, B, 4 * UNITS), torch.rand(3, STEPS, B, UNITS) < 0.4
    far = torch.tensor([1e4, 1e6, 1e9, 1e30])[torch.randint(4, (3, STEPS, B, UNITS))]
    z[..., :UNITS] = torch.where(i_shut, -far[0], z[..., :UNITS])
    z[..., UNITS : 2 * UNITS] = torch.where(
        f_open, far[1], torch.where(f_shut & ~i_shut, -far[2], z[..., UNITS : 2 * UNITS])
    )
    hx = torch.randn(4, B, UNITS)
    hx[2] = hx[2].abs() + 1
    return z, torch.randn(4 * UNITS, UNITS) / 2, hx


def numbers_of(backend, dtype, z, weight, hx, **ragged):
    """Return the results without n, which is constant, and the gradients of a random sum of them."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (z, weight, *hx)]
    y, (h, c, _, m) = slstm_layer(*leaves[:2], None, tuple(leaves[2:]), backend=backend, **ragged)
    found = [y, h, c, m]
    gradients = torch.autograd.grad(found, leaves, weighing(found))
    return dict(zip(NAMES, (t.detach() for t in (*found, *gradients)), strict=True))


def truth_of(z, weight, hx, **ragged):
    """Return the same numbers by the oracle."""
    z, weight, h, *cnm = (t.double().numpy() for t in (z, weight, *hx))
    inputs = z, h, np.stack(cnm), np.eye(4 * UNITS), weight
    y, h, (c, _, m), tape = oracle.layer(*inputs, **ragged)
    found = [*map(torch.from_numpy, (y, h, c, m))]
    dy, dh, dc, dm = (t.numpy() for t in weighing(found))
    gradients = dict(dh=dy, dh_n=dh, dc_n=np.stack([dc, 0 * dc, dm]))
    dz, dh, dcnm, _, dweight, *_ = oracle.layer_gradients(*inputs, tape=tape, **gradients)
    found += map(torch.from_numpy, (dz, dweight, dh, *dcnm))
    return dict(zip(NAMES, found, strict=True))


@BY_ALL
@pytest.mark.parametrize("ragged", [{}, SHUT_RAGGED], ids=["plain", "ragged"])
def test_a_state_behind_a_shut_gate_is_kept(backend, dtype, ragged):
    given = drawn()
    found = numbers_of(backend, dtype, *given, **ragged)
    assert_same(found, truth_of(*given, **ragged))
    z = torch.where(given[0].abs() > 1e29, given[0] * INF, given[0])
    assert all(map(torch.equal, numbers_of(backend, dtype, z, *given[1:], **ragged).values(), found.values()))


@BY_ALL
def test_where_nothing_comes_a_mean_stays_though_its_weight_is_zero_and_what_is_empty_stays_so(backend, dtype):
    """z_i = -inf at three steps, and z_f at two of them. The first sequence begins with an empty state."""
    _, weight, hx = drawn()
    z, weight = torch.randn(STEPS, B, 4 * UNITS), 0 * weight
    z[:3, :, :UNITS] = z[1:3, :, UNITS : 2 * UNITS] = -INF
    hx[2, 0] = 0
    found = numbers_of(backend, dtype, z, weight, hx)
    assert_same(found, numbers_of("reference", torch.float64, z, weight, hx))
    assert all(t.isfinite().all() for t in found.values())
    g, o = z[..., 2 * UNITS : 3 * UNITS].tanh().to(dtype), z[..., 3 * UNITS :].sigmoid().to(dtype)
    mean = torch.where(hx[2] == 0, 0, hx[1] / hx[2]).to(dtype)
    torch.testing.assert_close(found["y"][:4], o[:4] * torch.stack([mean, mean, mean, g[3]]))
    z, weight, *hx = (t.to(dtype) for t in (z, weight, *hx))
    for k in range(1, STEPS):
        first, states = slstm_layer(z[:k], weight, None, tuple(hx), backend=backend)
        second, (_, c, *_) = slstm_layer(z[k:], weight, None, states, backend=backend)
        assert torch.equal(torch.cat([first, second]), found["y"])
        assert torch.equal(c, found["c"])
        assert k > 3 or not any(t[0].any() for t in states)


@BY_ALL
def test_nan_is_no_empty_state(backend, dtype):
    z, weight = torch.randn(STEPS, B, 4 * UNITS).to(dtype), torch.zeros(4 * UNITS, UNITS).to(dtype)
    z[1, 0, UNITS] = torch.nan
    _, (_, c, n, m) = slstm_layer(z[:2], weight, backend=backend)
    assert n.eq(1).all()
    y, states = slstm_layer(z[2:3], weight, None, (torch.zeros_like(c), c, n, m), backend=backend)
    for t in (c, m, y[0], *states[:2], states[3]):
        assert t.isnan().nonzero().tolist() == [[0, 0]]
    given, no_steps = (c[1:], 0 * c[1:], n[1:], torch.nan * c[1:]), torch.zeros(B - 1, dtype=torch.int64)
    _, (*_, m) = slstm_layer(z[:, 1:], weight, None, given, lengths=no_steps, backend=backend)
    assert m.isnan().all()


def test_gradients_of_gates_that_are_nearly_shut_have_small_errors_for_their_size():
    """The gradients of the input gates are about e^-12 of the others."""
    _, weight, hx = drawn()
    z = torch.randn(STEPS, B, 4 * UNITS)
    z[..., : 2 * UNITS] += torch.tensor([-12.0, 4.0]).repeat_interleave(UNITS)
    true = truth_of(z, weight, hx)["dz"][..., :UNITS]
    assert true.abs().max() < 1e-3
    *ours, theirs = (
        (numbers_of(backend, torch.float32, z, weight, hx)["dz"][..., :UNITS] - true).norm()
        for backend in ("triton", "numba", "reference")
    )
    assert max(ours) <= 2 * theirs


def test_derivatives_of_all_kinds_where_both_weights_are_equal_and_where_a_gate_is_shut():
    z, weight, c = torch.randn(2, 3, 8).double(), torch.randn(8, 2).double() / 2, torch.randn(3, 2).double()
    m = torch.zeros_like(c)
    z[0, 0, :2], z[0, 0, 2:4], weight[:4] = 0, 800, 0  # sigmoid(800) = 1, so that l + log f = z_i
    z[1, 1, :2] = -1e30
    z[1, 2, 2:4] = -1e30

    def run(z, c, m):
        y, (_, c, _, m) = slstm_layer(z, weight, None, (torch.zeros_like(c), c, torch.ones_like(c), m))
        return y, c, m

    leaves = tuple(t.requires_grad_() for t in (z, c, m))
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves, check_fwd_over_rev=True)
