"""GRU on every backend and family of kernels, through the module, against the float64 oracle: values and gradients."""

import numpy as np
import oracle
import pytest
import torch
from places import KERNELS

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products")


def run(module, x, h, **how):
    given = [t.detach().requires_grad_() for t in (x, h)]
    y, h_n = module(*given, **how)
    torch.manual_seed(1)
    dy, dh = torch.randn(y.shape).to(y), torch.randn(h_n.shape).to(h_n)
    gradients = torch.autograd.grad([y, h_n], [*given, *module.parameters()], [dy, dh])
    return [t.detach().double().numpy() for t in (y, h_n, *gradients)], dy.double().numpy(), dh.double().numpy()


@pytest.mark.parametrize("place", [p for p in KERNELS if "cu" not in p or "coop" in p])
@pytest.mark.parametrize("way", ["plain", "ragged", "both", "recompute"])
def test_kernels(monkeypatch, place, way):
    backend, force = KERNELS[place]
    force(monkeypatch)
    T, B, I, H = 5, 11, 3, 24
    torch.manual_seed(0)
    module = gpu_lstm.GRU(I, H, backend=backend, bidirectional=way == "both", recompute=way == "recompute")
    x, h = torch.randn(T, B, I), torch.randn(1 + module.bidirectional, B, H)
    lengths = torch.randint(0, T + 1, (B,)) if way != "plain" else None
    resets = torch.rand(T, B) < 0.3 if way != "plain" else None
    found, dy, dh = run(module, x, h, lengths=lengths, resets=resets)
    w = [p.detach().double().numpy() for p in module.parameters()]
    D = 1 + module.bidirectional
    dx, dhs, dw, ys, hs = 0, [], [], [], []
    for d in range(D):
        inputs = (x.double().numpy(), h[d].double().numpy(), None, *w[4 * d : 4 * d + 4])
        y, hn, _, tape = oracle.gru_layer(*inputs, lengths=lengths, resets=resets, reverse=d == 1)
        g = oracle.gru_layer_gradients(*inputs, tape=tape, dh=np.split(dy, D, 2)[d], dh_n=dh[d], dc_n=None)
        dx = dx + g[0]
        dhs.append(g[1]); dw += g[3:7]; ys.append(y); hs.append(hn)
    true = [np.concatenate(ys, 2), np.stack(hs), dx, np.stack(dhs), *dw]
    errors = [float(abs(a - b).max()) for a, b in zip(found, true, strict=True)]
    assert max(errors) < 5e-5, errors
