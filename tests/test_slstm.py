"""The sLSTM: against the oracle, which computes with the paper's c, n and m, and against xlstm's own cell."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import oracle
import places
import pytest
import torch
from comparing import judge

import gpu_lstm

T, B, I, H = 4, 3, 3, 8
LENGTHS, RESETS = torch.tensor([4, 2, 3]), torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
RAGGED = dict(lengths=LENGTHS, resets=RESETS)
CASES = {
    "plain": ({}, {}), "from nothing": ({}, {"hx": None}), "2 heads": ({"heads": 2}, {}),
    "no bias": ({"bias": False}, {}),
    "4 heads, both directions, ragged": ({"heads": 4, "bidirectional": True}, RAGGED),
    "2 layers, both directions, ragged": ({"num_layers": 2, "bidirectional": True}, RAGGED),
    "2 layers of 2 heads, from nothing, ragged": ({"num_layers": 2, "heads": 2}, RAGGED | {"hx": None}),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def made(case, seed=0, **options):
    """A module, an input and states of a case: (h, c, n, m), of which n is positive; and lengths and resets."""
    arguments, given = CASES[case]
    torch.manual_seed(seed)
    module = gpu_lstm.SLSTM(I, H, **arguments, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    rows = module.num_layers * (1 + module.bidirectional)
    hx = [torch.randn(rows, B, H).double() for _ in range(4)]
    hx[2] = hx[2].exp()
    ragged = {name: value for name, value in given.items() if name != "hx"}
    return SimpleNamespace(module=module, x=torch.randn(T, B, I).double(), hx=given.get("hx", hx), ragged=ragged)


def numbers_of(call, dtype=None):
    """Results by name, and gradients of a random sum of them, which are exact in float32; n is 1 in all of them."""
    module, x, hx = call.module, call.x, call.hx
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, *([] if hx is None else hx))]
    y, (h, c, n, m) = module(leaves[0], tuple(leaves[1:]) or None, **call.ragged)
    assert torch.equal(n, torch.ones_like(n))
    found = [y, h, c, m]
    gradients = torch.autograd.grad(found, [*leaves, *module.parameters()], weights_for(found))
    named = [*(f"d{name}" for name in ("x", "h", "c", "n", "m")[: len(leaves)])]
    named += [f"d{name}" for name, _ in module.named_parameters()]
    found = zip(("y", "h", "c", "m", *named), (*found, *gradients), strict=True)
    return {name: t.detach().double().numpy() for name, t in found}


def weights_for(found):
    torch.manual_seed(1)
    return [torch.randn(t.shape).to(t) for t in found]


def truth_of(call, kind=np.ndarray):
    """The same by the oracle. c / n and m + log(n) are what its c, n and m have in common with any equal state."""
    module, ends = call.module, ("", "_reverse")[: 1 + call.module.bidirectional]
    named = {name: p.detach().double().numpy().view(kind) for name, p in module.named_parameters()}
    letters = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    names = [[[f"{name}_l{k}{end}" for name in letters] for end in ends] for k in range(module.num_layers)]
    rows = len(ends) * module.num_layers
    given = [np.zeros((rows, B, H))] * 4 if call.hx is None else [t.detach().double().numpy() for t in call.hx]
    states = [(h.view(kind), np.stack(cnm).view(kind)) for h, *cnm in zip(*given)]
    layers = [[[named.get(name) for name in direction] for direction in layer] for layer in names]
    by_layer = [states[k : k + len(ends)] for k in range(0, rows, len(ends))]
    y, finals, tapes = oracle.stack(call.x.double().numpy().view(kind), by_layer, layers, **call.ragged)
    h, cnm = (np.stack(each).view(kind) for each in zip(*(final for layer in finals for final in layer)))
    c, n, m = cnm.swapaxes(0, 1)
    found = [y, h, c / n, m + np.log(n)]
    dy, dh, dq, dl = (t.numpy() for t in weights_for([torch.from_numpy(np.asarray(t)) for t in found]))
    dc = [np.stack(each) for each in zip(*(dq / n, dl / n - dq * c / n**2, dl))]  # [3, B, H] each
    dfinals = [[*zip(dh, dc)][k : k + len(ends)] for k in range(0, rows, len(ends))]
    dx, dstates, dweights, _ = oracle.stack_gradients(tapes, dy, dfinals)
    dh, dcnm = (np.stack(each) for each in zip(*(state for layer in dstates for state in layer)))
    results = dict(zip(("y", "h", "c", "m", "dx"), (*found, dx)))
    results |= {} if call.hx is None else dict(zip(("dh", "dc", "dn", "dm"), (dh, *dcnm.swapaxes(0, 1))))
    pairs = (each for layer in zip(names, dweights) for direction in zip(*layer) for each in zip(*direction))
    of_weights = dict(pairs)
    return results | {f"d{name}": of_weights[name] for name in named}


@every_case
def test_the_reference_is_the_paper_in_float64(case):
    call = made(case, backend="reference")
    found, true = numbers_of(call), truth_of(call)
    assert found.keys() == true.keys()
    for name, value in true.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("family", ["triton", "resident"])
@every_case
def test_kernels_are_as_right_as_the_reference_in_float32(case, family, monkeypatch):
    places.KERNELS[family].force(monkeypatch)
    places.forget()
    errors, truths = {}, []
    for seed in range(2):
        call = made(case, seed)
        call.module.float()
        call.x = call.x.float()
        call.hx = call.hx and [t.float() for t in call.hx]
        true = truth_of(call)
        truths.append(partial(truth_of, call))
        found = []
        for backend in ("triton", "reference"):
            call.module.backend = backend
            found.append(numbers_of(call))
        for name, value in true.items():
            errors.setdefault(name, []).append((*(each[name] - value for each in found), value))
    judge(errors, torch.float32, "reference", truths, T)
    places.forget()
