"""torch.func's transforms, and the same bits every run. Derivatives are held to torch.nn.LSTM's in float64.

gradcheck, gradgradcheck and create_graph are in test_lstm_transforms.py.
"""

import subprocess
import sys

import pytest
import torch
from comparing import BACKENDS, PLACES
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import gpu_lstm
from gpu_lstm import autograd

T, B, I, H = 4, 3, 2, 3


@pytest.fixture(params=BACKENDS)
def pair(request, exact_float32_products):
    """torch.nn.LSTM in float64 and ours on one backend, with the same weights; and what rounding may change."""
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H).double()
    ours = gpu_lstm.LSTM(I, H, backend=request.param, **PLACES[request.param])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module, *shape):
    torch.manual_seed(1)
    return torch.randn(*shape or (T, B, I), dtype=torch.float64).to(next(module.parameters()))


def assert_close(ours, theirs):
    ours, theirs = (torch.utils._pytree.tree_leaves(found) for found in (ours, theirs))
    assert len(ours) == len(theirs) > 0
    for mine, true in zip(ours, theirs):
        accuracy = 32 * torch.finfo(mine.dtype).eps * max(1.0, true.abs().max().item())
        torch.testing.assert_close(mine.double().cpu(), true, rtol=0, atol=accuracy)


def parameters(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def call(module, parameters, x):
    return functional_call(module, parameters, (x,))[0]


def gradients(module, loss):
    return dict(zip(dict(module.named_parameters()), torch.autograd.grad(loss, list(module.parameters()))))


def test_func_grad(pair):
    theirs, ours = pair
    found = grad(lambda p: call(ours, p, inputs(ours)).square().sum())(parameters(ours))
    assert_close(found, gradients(theirs, theirs(inputs(theirs))[0].square().sum()))


def test_vjp(pair):
    theirs, ours = pair
    x, dy = inputs(theirs).requires_grad_(), torch.randn(T, B, H, dtype=torch.float64)
    _, pull = vjp(lambda x: ours(x)[0], inputs(ours))
    assert_close(pull(dy.to(inputs(ours))), torch.autograd.grad(theirs(x)[0], x, dy))


def test_jacobians_both_ways(pair):
    theirs, ours = pair
    true = torch.autograd.functional.jacobian(lambda x: theirs(x)[0][-1], inputs(theirs))
    for way in (jacrev, jacfwd):
        assert_close(way(lambda x: ours(x)[0][-1])(inputs(ours)), true)


def test_forward_mode(pair):
    theirs, ours = pair
    x, direction = inputs(theirs), inputs(theirs, T, B, I).flip(0)
    _, true = torch.autograd.functional.jvp(lambda x: theirs(x)[0], x, direction)
    _, found = jvp(lambda x: ours(x)[0], (inputs(ours),), (direction.to(inputs(ours)),))
    assert_close(found, true)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs(ours), direction.to(inputs(ours)))
        found = torch.autograd.forward_ad.unpack_dual(ours(dual)[0]).tangent
    assert_close(found, true)


def test_second_derivatives(pair):
    theirs, ours = pair
    true = torch.autograd.functional.hessian(lambda x: theirs(x)[0][-1].square().sum(), inputs(theirs, T, 1, I))

    def loss(x):
        return ours(x)[0][-1].square().sum()

    for way in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(grad(f)), lambda f: jacrev(grad(f))):
        assert_close(way(loss)(inputs(ours, T, 1, I)), true)


def test_func_grad_inside_plain_autograd(pair):
    """A gradient penalty with the inner gradient by torch.func, on one level of it only."""
    theirs, ours = pair
    x = inputs(theirs).requires_grad_()
    (dx,) = torch.autograd.grad(theirs(x)[0].square().sum(), x, create_graph=True)
    true = gradients(theirs, dx.square().sum())
    dx = grad(lambda x: ours(x)[0].square().sum())(inputs(ours))
    assert_close(gradients(ours, dx.square().sum()), true)


def test_an_ensemble(pair):
    theirs, ours = pair
    members = [ours]
    for seed in (1, 2):
        torch.manual_seed(seed)
        member = gpu_lstm.LSTM(I, H, backend=ours.backend).to(inputs(ours))
        members.append(member)
    stacked, _ = stack_module_state(members)
    x = inputs(ours)
    outputs, pull = vjp(lambda p: vmap(lambda p: call(ours, p, x))(p), {k: v.detach() for k, v in stacked.items()})
    (found,) = pull(torch.ones_like(outputs))
    for k, member in enumerate(members):
        theirs.load_state_dict(member.state_dict())
        y, _ = theirs(inputs(theirs))
        assert_close(outputs[k], y)
        assert_close({name: g[k] for name, g in found.items()}, gradients(theirs, y.sum()))


@pytest.mark.parametrize("ragged", [False, True])
def test_per_sample_gradients(pair, ragged):
    theirs, ours = pair
    lengths = torch.tensor([4, 1, 3])

    def loss(p, x, length):
        options = {"lengths": length} if ragged else {}
        return functional_call(ours, p, (x,), options)[0].square().sum()

    x = inputs(ours)
    found = vmap(grad(loss), in_dims=(None, 1, 0))(parameters(ours), x, lengths.to(x.device))
    for b in range(B):
        steps = int(lengths[b]) if ragged else T
        y, _ = theirs(inputs(theirs)[:steps, b])
        assert_close({name: g[b] for name, g in found.items()}, gradients(theirs, y.square().sum()))


def test_func_grad_goes_through_the_fused_kernels_and_vmap_does_not(monkeypatch):
    taken = []

    def spy(name):
        original = getattr(autograd, name)
        monkeypatch.setattr(autograd, name, lambda *a: (taken.append(name), original(*a))[1])

    spy("_fused_gradients")
    spy("_differentiable_gradients")
    ours = gpu_lstm.LSTM(I, H, backend="triton", **PLACES["triton"]).requires_grad_(False)
    x = inputs(ours)
    grad(lambda x: ours(x)[0].sum())(x)
    assert taken == ["_fused_gradients"]
    taken.clear()
    grad(lambda x: grad(lambda x: ours(x)[0].sum())(x).square().sum())(x)
    assert taken[0] == "_differentiable_gradients"
    taken.clear()
    vmap(grad(lambda x: ours(x)[0].sum()), in_dims=1)(x)
    assert taken == []


# The same bits.

STEP = """
import torch
import gpu_lstm

def step():
    torch.manual_seed(7)
    lstm = gpu_lstm.LSTM(3, 4, 3, dropout=0.5, bidirectional=True, backend=backend, dtype=dtype)
    x = torch.randn(6, 2, 3, dtype=dtype, requires_grad=True)
    y, (h, c) = lstm(x, lengths=torch.tensor([6, 4]), resets=torch.rand(6, 2) < 0.3)
    loss = y.square().mean() + h.mean() + c.mean()
    return [y, h, c, *torch.autograd.grad(loss, [x, *lstm.parameters()])]

def bits(tensors):
    return b"".join(t.detach().numpy().tobytes() for t in tensors).hex()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_seed_gives_the_same_bits_in_every_process(backend):
    names = {"backend": backend, "dtype": PLACES[backend]["dtype"]}
    exec(STEP, names)
    here = names["bits"](names["step"]())
    assert here == names["bits"](names["step"]())
    settings = f"backend, dtype = {backend!r}, {names['dtype']}; torch.set_num_threads(1)"
    program = STEP.replace("import gpu_lstm", f"import gpu_lstm\n{settings}")
    said = subprocess.run(
        [sys.executable, "-c", program + "\nprint(bits(step()))"], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == here
