"""The sLSTM where gates are shut, or open, by any amount: beside the paper's c, n and m in float64, by the oracle."""

import numpy as np
import oracle
import pytest
import torch
from comparing import assert_same
from pairs import weighing
from places import cuda

from gpu_lstm.functional import slstm_layer

T, B, H, INF = 6, 3, 4, float("inf")
RAGGED = dict(lengths=torch.tensor([6, 4, 6]), resets=torch.arange(T * B).view(T, B) % 7 == 5)
NAMES = "y", "h", "c", "m", "dz", "dweight", "dh", "dc", "dn", "dm"
BY_ALL = pytest.mark.parametrize(("backend", "dtype"), [
    ("reference", torch.float64), ("triton", torch.float32), ("cupy", torch.float32),
    ("numba", torch.float32),
])  # fmt: skip


@pytest.fixture(autouse=True)
def in_cuda(monkeypatch):
    cuda(monkeypatch)


def drawn():
    """z [T, B, 4H], W_hh, and (h, c, n, m), of which n >= 1; input gates are shut at every other step or so, and where
    they are not, some forget gates; others are wide open."""
    torch.manual_seed(0)
    z, (i_shut, f_shut, f_open) = torch.randn(T, B, 4 * H), torch.rand(3, T, B, H) < 0.4
    far = torch.tensor([1e4, 1e6, 1e9, 1e30])[torch.randint(4, (3, T, B, H))]
    z[..., :H] = torch.where(i_shut, -far[0], z[..., :H])
    z[..., H : 2 * H] = torch.where(f_open, far[1], torch.where(f_shut & ~i_shut, -far[2], z[..., H : 2 * H]))
    hx = torch.randn(4, B, H)
    hx[2] = hx[2].abs() + 1
    return z, torch.randn(4 * H, H) / 2, hx


def numbers_of(backend, dtype, z, weight, hx, **ragged):
    """Results, of which n is constant, and gradients of a random sum of them."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (z, weight, *hx)]
    y, (h, c, _, m) = slstm_layer(*leaves[:2], None, tuple(leaves[2:]), backend=backend, **ragged)
    found = [y, h, c, m]
    gradients = torch.autograd.grad(found, leaves, weighing(found))
    return dict(zip(NAMES, (t.detach() for t in (*found, *gradients)), strict=True))


def truth_of(z, weight, hx, **ragged):
    """The same by the oracle."""
    z, weight, h, *cnm = (t.double().numpy() for t in (z, weight, *hx))
    inputs = z, h, np.stack(cnm), np.eye(4 * H), weight
    y, h, (c, _, m), tape = oracle.layer(*inputs, **ragged)
    found = [*map(torch.from_numpy, (y, h, c, m))]
    dy, dh, dc, dm = (t.numpy() for t in weighing(found))
    gradients = dict(dh=dy, dh_n=dh, dc_n=np.stack([dc, 0 * dc, dm]))
    dz, dh, dcnm, _, dweight, *_ = oracle.layer_gradients(*inputs, tape=tape, **gradients)
    found += map(torch.from_numpy, (dz, dweight, dh, *dcnm))
    return dict(zip(NAMES, found, strict=True))


@BY_ALL
@pytest.mark.parametrize("ragged", [{}, RAGGED], ids=["plain", "ragged"])
def test_a_state_behind_a_shut_gate_is_kept(backend, dtype, ragged):
    given = drawn()
    found = numbers_of(backend, dtype, *given, **ragged)
    assert_same(found, truth_of(*given, **ragged))
    z = torch.where(given[0].abs() > 1e29, given[0] * INF, given[0])
    assert all(map(torch.equal, numbers_of(backend, dtype, z, *given[1:], **ragged).values(), found.values()))


@BY_ALL
def test_where_nothing_comes_a_mean_stays_though_its_weight_is_zero_and_what_is_empty_stays_so(backend, dtype):
    """z_i = -inf at three steps, z_f at two of them; from states of which the first sequence's is empty."""
    _, weight, hx = drawn()
    z, weight = torch.randn(T, B, 4 * H), 0 * weight
    z[:3, :, :H] = z[1:3, :, H : 2 * H] = -INF
    hx[2, 0] = 0
    found = numbers_of(backend, dtype, z, weight, hx)
    assert_same(found, numbers_of("reference", torch.float64, z, weight, hx))
    assert all(t.isfinite().all() for t in found.values())
    g, o = z[..., 2 * H : 3 * H].tanh().to(dtype), z[..., 3 * H :].sigmoid().to(dtype)
    mean = torch.where(hx[2] == 0, 0, hx[1] / hx[2]).to(dtype)
    torch.testing.assert_close(found["y"][:4], o[:4] * torch.stack([mean, mean, mean, g[3]]))
    z, weight, *hx = (t.to(dtype) for t in (z, weight, *hx))
    for k in range(1, T):
        first, states = slstm_layer(z[:k], weight, None, tuple(hx), backend=backend)
        second, (_, c, *_) = slstm_layer(z[k:], weight, None, states, backend=backend)
        assert torch.equal(torch.cat([first, second]), found["y"])
        assert torch.equal(c, found["c"])
        assert k > 3 or not any(t[0].any() for t in states)


@BY_ALL
def test_nan_is_no_empty_state(backend, dtype):
    torch.manual_seed(0)
    z, weight = torch.randn(T, B, 4 * H).to(dtype), torch.zeros(4 * H, H).to(dtype)
    z[1, 0, H] = torch.nan
    _, (_, c, n, m) = slstm_layer(z[:2], weight, backend=backend)
    assert n.eq(1).all()
    y, states = slstm_layer(z[2:3], weight, None, (torch.zeros_like(c), c, n, m), backend=backend)
    for t in (c, m, y[0], *states[:2], states[3]):
        assert t.isnan().nonzero().tolist() == [[0, 0]]
    given, no_steps = (c[1:], 0 * c[1:], n[1:], torch.nan * c[1:]), torch.zeros(B - 1, dtype=torch.int64)
    _, (*_, m) = slstm_layer(z[:, 1:], weight, None, given, lengths=no_steps, backend=backend)
    assert m.isnan().all()


def test_gradients_of_gates_that_are_nearly_shut_have_small_errors_for_their_size():
    """The input gates': about e^-12 of the others."""
    _, weight, hx = drawn()
    z = torch.randn(T, B, 4 * H)
    z[..., : 2 * H] += torch.tensor([-12.0, 4.0]).repeat_interleave(H)
    true = truth_of(z, weight, hx)["dz"][..., :H]
    assert true.abs().max() < 1e-3
    *ours, theirs = (
        (numbers_of(backend, torch.float32, z, weight, hx)["dz"][..., :H] - true).norm()
        for backend in ("triton", "numba", "reference")
    )
    assert max(ours) <= 2 * theirs


def test_derivatives_of_all_kinds_where_both_weights_are_equal_and_where_a_gate_is_shut():
    torch.manual_seed(0)
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
