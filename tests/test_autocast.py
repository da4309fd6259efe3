"""Autocast: each weight is cast once in a block, as torch does, also over a training loop with gradients."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from comparing import DEVICE, both_classes, both_kinds
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map
from watching import Watched

import gpu_lstm
from gpu_lstm.backends import torch_rnn

# Without it torch's own LSTM stays in float32 on a CPU, see test_onednn.py.
pytestmark = pytest.mark.usefixtures("with_onednn")
T, B, I, H = 6, 3, 4, 5
DTYPE = torch.float16  # the interpreter's bfloat16 products are wrong
autocast = partial(torch.autocast, DEVICE, DTYPE)


by_ours = pytest.mark.parametrize("backend", ["reference", "triton"])


def is_cast(function, given, result):
    """Return whether an operator casts a tensor with as many rows as the weights to DTYPE. In inference mode the
    operator is `to`."""
    if function.overloadpacket not in (torch.ops.aten._to_copy, torch.ops.aten.to):
        return False
    return result.dtype is DTYPE is not given[0][0].dtype and result.shape[0] in (3 * H, 4 * H)


# torch's autocast casts these as a whole, and they need no cuDNN.
KINDS = ["LSTM"] if DEVICE == "cpu" else ["LSTMCell", "GRUCell"]


def modules(backend, kind=KINDS[0], device=DEVICE):
    torch.manual_seed(0)
    theirs, ours = getattr(nn, kind)(I, H).to(device), getattr(gpu_lstm, kind)(I, H, backend=backend, device=device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def loop(module, x):
    """Return h of all steps, with one call for each step."""
    state, hs = None, []
    for x_t in x:
        state = module(x_t[None], state)[1] if isinstance(module, nn.RNNBase) else module(x_t, state)
        hs.append(state if isinstance(state, Tensor) else state[0])
    return torch.stack(hs)


def without_onednn(module=None):
    """A block without oneDNN for torch's own modules, since oneDNN has no LSTM in float16 on most CPUs. For our modules
    it does nothing."""
    is_ours = module is not None and module.__module__.startswith("gpu_lstm")
    return nullcontext() if is_ours else torch.backends.mkldnn.flags(enabled=False)


def inputs(seed=1):
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rms(error):
    return error.double().square().mean().sqrt().item()


@pytest.mark.parametrize("kind", KINDS)
@by_ours
def test_a_loop_casts_each_weight_once_a_block_as_torch_does(backend, kind):
    found = []
    for each, half in (*((each, True) for each in modules(backend, kind)), (modules(backend, kind)[0].double(), False)):
        with without_onednn(each), Watched(is_cast) as casts:
            for _ in range(2):
                with autocast(enabled=half):
                    autocast(enabled=False)(each.eval)()  # an inner block does not end the outer one's casts
                    h = loop(each, inputs().to(next(each.parameters())))
        assert casts.count == 8 * half, each
        h = h.float() if half else h
        found.append([h, *torch.autograd.grad(h.square().sum(), list(each.parameters()))])
    for their, our, true in zip(*found, strict=True):
        assert rms(our - true) <= 2 * max(rms(their - true), torch.finfo(DTYPE).eps * true.abs().max().item())


@pytest.mark.parametrize(("learns", "options"), [(True, dict(cache_enabled=False)), (False, {})], ids=str)
def test_where_torch_casts_at_every_call_so_do_we(learns, options):
    for module in modules("reference"):
        with without_onednn(module), Watched(is_cast) as casts, autocast(**options):
            loop(module.requires_grad_(learns), inputs())
        assert casts.count == 4 * T


FIRST = [{}, dict(lengths=torch.full((B,), T)), dict(resets=torch.eye(T, B) > 0)]


@pytest.mark.parametrize(("backend", "kind", "first"), [
    *(("torch", kind, first) for kind in ("LSTM", "GRU") for first in FIRST), ("reference", "LSTM", {}),
    ("triton", "LSTM", {})], ids=str)  # fmt: skip
def test_a_weight_that_changes_within_a_block_stays_as_torch_cast_it(backend, kind, first):
    """The casts of a block are the same whichever call was the first in it."""
    device, dtype = ("cpu", torch.bfloat16) if backend == "torch" else (DEVICE, DTYPE)  # cuDNN keeps no cast
    (_, module), x = modules(backend, kind, device), inputs().to(device)
    block = partial(torch.autocast, device, dtype)
    given = [tree_map(lambda t: t.to(device), options) for options in ({}, dict(lengths=torch.full((B,), T)), first)]
    before = [block()(module)(x, **options)[0] for options in given]
    with block():
        module(x, **given[2])
        with torch.no_grad():
            torch._foreach_mul_(list(module.parameters()), 2)
        within = [module(x, **options)[0] for options in given]
    after = [block()(module)(x, **options)[0] for options in given]
    assert all(map(torch.equal, before, within))
    assert not any(map(torch.equal, before, after))


def test_a_block_within_another_has_its_own_casts():
    (_, module), x = modules("reference", "LSTM"), inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        outer = module(x)[0]
        with autocast():
            inner = module(x)[0]
    assert torch.equal(inner, autocast()(module)(x)[0])
    assert (outer.dtype, inner.dtype) == (torch.bfloat16, DTYPE)


@by_ours
@pytest.mark.parametrize("projected", [False, True])
def test_a_call_is_cast_as_by_hand(backend, projected):
    """A residual connection is cast, too. c of states to reset to is not rounded. On a CPU, beside a projection, the
    initial c is not rounded either."""
    how, lead = dict(backend=backend, device=DEVICE), (1, B) if projected else (B,)
    torch.manual_seed(0)
    lstm, stack = gpu_lstm.LSTM(I, H, proj_size=I, **how), gpu_lstm.StackedLSTM(I, [I], residual=True, **how)
    module, x, resets = lstm if projected else stack, inputs(), torch.eye(T, B, device=DEVICE) > 0
    h, c, reset_h, reset_c = (torch.randn(*lead, n, device=DEVICE) for n in (I, H if projected else I) * 2)

    def call(x, *states):
        pairs = states[:2], states[2:]
        hx, reset_states = pairs if projected else ([pair] for pair in pairs)
        y, final = module(x, hx, resets=resets, reset_states=reset_states)
        return [y, *(final if projected else final[0])]

    with autocast():
        found = call(x, h, c, reset_h, reset_c)
    module.to(DTYPE)
    c = c if projected and DEVICE == "cpu" else c.to(DTYPE)
    by_hand = call(x.to(DTYPE), h.to(DTYPE), c, reset_h.to(DTYPE), reset_c)
    assert [t.dtype for t in found] == [t.dtype for t in by_hand]
    assert all(map(torch.equal, found, by_hand))


@by_ours
@both_kinds
def test_a_loss_that_is_scaled_too_far_has_gradients_that_are_not_finite(backend, kind):
    """A GradScaler expects them."""
    _, module = modules(backend, kind)
    with autocast():
        loss = module(inputs())[0].float().sum() * 2.0**127 * 4
    assert not any(t.isfinite().all() for t in torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_call_without_autograd_leaves_the_next_its_gradient(without):
    (_, module), x = modules("reference", "LSTM"), inputs()
    with Watched(is_cast) as casts, autocast():
        first, second = ([call(x)[0] for _ in range(2)] for call in (without()(module), module))
    assert casts.count == 4
    assert torch.equal(first[1], second[1])
    (gradient,) = torch.autograd.grad(second[1].float().sum(), [module.weight_hh_l0], retain_graph=True)
    assert gradient.dtype is torch.float32
    assert torch.autograd.grad(second[0].float().sum(), [module.weight_ih_l0])[0].any()


def test_nothing_is_kept_past_the_block():
    _, module = modules("reference", "LSTM")
    weight = weakref.ref(module.weight_hh_l0)
    with autocast(), torch.no_grad():
        module(inputs())
        del module
        gc.collect()
        assert weight() is not None  # kept by its cast
    gc.collect()
    assert weight() is None


def test_per_sample_gradients_under_autocast():
    """torch.func's tensors live as long as the transform, and are not kept."""
    (_, module), x = modules("reference", "LSTM"), inputs()
    parameters = module.state_dict()
    gradients = grad(lambda parameters, x: functional_call(module, parameters, (x,))[0].float().sum())
    with autocast():
        whole, each = gradients(parameters, x), vmap(gradients, (None, 1))(parameters, x)
    total = {name: gradient.sum(0) for name, gradient in each.items()}
    torch.testing.assert_close(total, whole, rtol=1e-2, atol=1e-2)


@both_classes
def test_shut_gates_are_of_a_size_that_float16_holds(monkeypatch, cls):
    """oneDNN has no LSTM in float16. cuDNN has one, which must not be passed infinite values."""
    stack = Mock(side_effect=lambda cell, x, state, layers, **_: (x.new_zeros(*x.shape[:2], 4), state))
    monkeypatch.setattr(torch_rnn, "stack", stack)
    with torch.autocast("cpu", torch.float16):
        cls(3, 4, backend="torch")(torch.randn(5, 2, 3), lengths=torch.tensor([5, 2]))
    given = stack.call_args[0][3][0][0].weight_ih
    assert given.dtype is torch.float16
    assert given.isfinite().all()
