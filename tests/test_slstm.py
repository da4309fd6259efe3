"""The sLSTM: its states, and what goes round a call. Its numbers, beside the oracle: test_layer.py."""

from functools import partial

import pytest
import torch
from cases import built, with_random_parameters
from comparing import KERNELS_HERE, PLACES
from pairs import LENGTHS, RAGGED, B, I, T, random_inputs
from torch.utils._pytree import tree_leaves, tree_map

import gpu_lstm
from gpu_lstm.functional import slstm_layer

H = 8
by_both = pytest.mark.parametrize("backend", ["reference", KERNELS_HERE])
close, no_steps = torch.testing.assert_close, torch.zeros(B, dtype=torch.int64)


def made(words="", backend="reference", dtype=None, steps=T):
    """A module, and x and (h, c, n, m) for it, all in the dtype of the backend's place, or in `dtype`."""
    dtype = dtype or PLACES[backend]["dtype"]
    module = built((steps, B, I, H), {"slstm", *words.split()}, backend=backend)
    module = with_random_parameters(module, 0).to(dtype)
    return module, *tree_map(lambda t: t.to(dtype), random_inputs(module, B, steps=steps))


def same(found, expected):
    return all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))


@by_both
def test_states_that_are_equal_give_equal_results_and_none_is_empty(backend):
    module, x, (h, c, n, m) = made("heads deep both", backend)
    k = torch.rand_like(m) + 0.1
    expected = module(x, (h, c, n, m), **RAGGED)
    close(module(x, (h, c * k, n * k, m - k.log()), **RAGGED), expected)
    zero = torch.zeros_like(h)
    assert same(module(x, (zero, c, zero, m)), module(x))
    # Without a step a state stays what it was, and one that is empty stays zeros.
    y, (*kept, n_n, m_n) = module(x, (h, c, n, m), lengths=no_steps)
    close(kept, [h, torch.where(n == 0, 0, c / n)])
    close(m_n, torch.where(n == 0, 0, m + n.log()))
    assert not y.any()
    assert torch.equal(n_n, (n > 0).to(n))
    assert not any(t.any() for t in tree_leaves(module(x, lengths=no_steps)))


@by_both
def test_nothing_overflows_and_padding_does_not_matter(backend):
    module, x, _ = made("", backend, steps=12)
    with torch.no_grad():
        module.bias_ih_l0[: 2 * H] = torch.tensor([700.0, -700.0]).repeat_interleave(H)
        y, (_, c, n, m) = module(x)
        assert all(t.isfinite().all() for t in (y, c, n, m))
        # What is new outweighs all before: c is the last step's candidate.
        z = x[-1] @ module.weight_ih_l0.T + y[-2] @ module.weight_hh_l0.T + module.bias_ih_l0 + module.bias_hh_l0
        close(c[0], z[:, 2 * H : 3 * H].tanh())
        for limit in (-1e4, 1e4):
            module.bias_ih_l0[:H] = limit
            assert module(x)[0].isfinite().all()
    x[LENGTHS[0] :, 0] = float("nan")
    assert same(*(module(t[:T], lengths=LENGTHS.clamp(max=2)) for t in (x, x.nan_to_num())))


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


def test_under_autocast():
    module, x, hx = made("heads", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = tree_leaves(module(x, hx))
    assert [t.dtype for t in found] == [*[torch.bfloat16] * 2, *[torch.float32] * 3]
    close([t.float() for t in found], tree_leaves(module(x, hx)), rtol=0.05, atol=0.05)


def test_trace_and_explain():
    module, x, hx = made("deep both")
    module.backend = None
    traced = gpu_lstm.trace(module, x, hx, **RAGGED)
    close(traced.output, module(x, hx, **RAGGED)[0])
    for gates in (gates for layer in traced.layers for gates in layer):
        close(gates.output * gates.mean, gates.hidden)
        assert not any(t[LENGTHS[0] :, 0].any() or t[:, 1].any() for t in gates)
    plain = gpu_lstm.trace(module, x).layers[0][0]
    close(plain.mean[0], plain.candidate[0])  # the mean of one
    close(plain.mean[1], torch.lerp(plain.mean[0], plain.candidate[1], plain.share[1]))
    # The share of a new g in a sum of weights: u = i / (f n + i), so that after a step 1 / u = f n / i + 1.
    z = x @ module.weight_ih_l0.T + module.bias_ih_l0 + module.bias_hh_l0
    z[1:] += plain.hidden[:-1] @ module.weight_hh_l0.T
    i, f = z[..., :H].exp(), plain.forget
    close(f, z[..., H : 2 * H].sigmoid())
    close(plain.share[1], i[1] / (f[1] * i[0] + i[1]))
    said = str(gpu_lstm.explain(module, x))
    assert "SLSTM 3 -> 8 -> 8" in said
    assert "torch: it does not support slstm cells" in said


def test_exported_programs():
    module, x, _ = made("heads")
    sizes = {"input": {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}}
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=sizes).module()
    x = torch.randn(7, 2, I).double()
    close(program(x), module(x))


@by_both
def test_slstm_layer_of_any_strides_in_graphs_and_transforms(backend):
    torch.manual_seed(0)
    z, weight_hh, bias = torch.randn(B, T, 4 * H), torch.randn(4 * H, H), torch.randn(4 * H)
    z = z.transpose(0, 1).requires_grad_()
    run = partial(slstm_layer, lengths=LENGTHS, reverse=True, backend=backend)
    before = z.detach().clone()
    dz = torch.autograd.grad(run(z, weight_hh, bias)[0].square().sum(), z)[0]
    assert torch.equal(z, before)
    other = before.contiguous().requires_grad_()
    expected = torch.autograd.grad(run(other, weight_hh, bias, backend="reference")[0].square().sum(), other)[0]
    close(dz, expected)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    close(torch.autograd.grad(compiled(z, weight_hh, bias)[0].square().sum(), z)[0], dz)
    close(torch.func.grad(lambda z: run(z, weight_hh, bias)[0].square().sum())(z), dz)
    pairs = torch.stack([z, 2 * z])
    several = torch.func.vmap(lambda z: slstm_layer(z, weight_hh)[0])(pairs)
    close(several, torch.stack([slstm_layer(z, weight_hh)[0] for z in pairs]))
