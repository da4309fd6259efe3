"""Autocast: each weight is cast once in a block, as torch does, and a whole training loop with a GradScaler."""

import gc
import weakref
from collections.abc import Sequence
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from comparing import DEVICE
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_lstm
from gpu_lstm.backends import torch_rnn

T, B, I, H = 6, 3, 4, 5
DTYPE = torch.float16  # the interpreter's bfloat16 products are wrong
autocast = partial(torch.autocast, DEVICE, DTYPE)


class Casts(TorchDispatchMode):
    """Counts the casts to DTYPE of tensors that have as many rows as the weights."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to):  # the latter in inference mode
            self.count += result.dtype is DTYPE is not args[0].dtype and result.shape[0] in (3 * H, 4 * H)
        return result


def cells(backend: str, kind: str = "LSTMCell") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs, ours = getattr(nn, kind)(I, H).to(DEVICE), getattr(gpu_lstm, kind)(I, H, backend=backend, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def loop(cell: nn.Module, x: Tensor) -> Tensor:
    """h of all steps, [T, B, H]."""
    states = [None]
    for x_t in x:
        states.append(cell(x_t, states[-1]))
    return torch.stack([state if isinstance(state, Tensor) else state[0] for state in states[1:]])


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_loop_over_a_cell_casts_each_weight_once_a_block_as_torch_does(backend, kind):
    found = []
    for cell, half in (*((cell, True) for cell in cells(backend, kind)), (cells(backend, kind)[0].double(), False)):
        with Casts() as casts:
            for _ in range(2):
                with autocast(enabled=half):
                    autocast(enabled=False)(cell.eval)()  # an inner block ends nothing
                    h = loop(cell, inputs().to(cell.weight_ih))
        assert casts.count == 8 * half, cell
        h = h.float() if half else h
        found.append([h, *torch.autograd.grad(h.square().sum(), list(cell.parameters()))])
    for their, our, true in zip(*found, strict=True):
        assert rms(our - true) <= 2 * max(rms(their - true), torch.finfo(DTYPE).eps * true.abs().max().item())


@pytest.mark.parametrize(("learns", "options"), [(True, dict(cache_enabled=False)), (False, {})], ids=str)
def test_where_torch_casts_at_every_call_so_do_we(learns, options):
    """With autocast's cache off, and weights that do not learn."""
    for cell in cells("reference"):
        with Casts() as casts, autocast(**options):
            loop(cell.requires_grad_(learns), inputs())
        assert casts.count == 4 * T


def test_a_weight_that_changes_within_a_block_is_cast_again():
    """And a block within another has its own casts, of its own dtype."""
    (_, cell), x = cells("reference"), inputs()[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        outer = cell(x)[0]
        with autocast():
            before = cell(x)[0]
            with torch.no_grad():
                cell.weight_ih.mul_(2)
            within = cell(x)[0]
    assert torch.equal(within, autocast()(cell)(x)[0])
    assert not torch.equal(before, within)
    assert (outer.dtype, before.dtype) == (torch.bfloat16, DTYPE)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_call_without_autograd_leaves_the_next_its_gradient(without):
    (_, cell), x = cells("reference"), inputs()[0]
    with Casts() as casts, autocast():
        first, second = ([call(x)[0] for _ in range(2)] for call in (without()(cell), cell))
    assert casts.count == 8
    assert torch.equal(first[1], second[1])
    (gradient,) = torch.autograd.grad(second[1].float().sum(), [cell.weight_hh], retain_graph=True)
    assert gradient.dtype is torch.float32
    assert torch.autograd.grad(second[0].float().sum(), [cell.weight_ih])[0].any()


def test_nothing_is_kept_past_the_block():
    _, cell = cells("reference")
    weight = weakref.ref(cell.weight_hh)
    with autocast(), torch.no_grad():
        cell(inputs()[0])
        del cell
        gc.collect()
        assert weight() is not None  # kept by its cast
    gc.collect()
    assert weight() is None


def test_per_sample_gradients_under_autocast():
    """torch.func's tensors live as long as the transform, and are not kept."""
    _, cell = cells("reference")
    parameters = cell.state_dict()
    gradients = grad(lambda parameters, x: functional_call(cell, parameters, (x,))[0].float().sum())
    with autocast():
        whole, each = gradients(parameters, inputs()[0]), vmap(gradients, (None, 0))(parameters, inputs()[0])
    total = {name: gradient.sum(0) for name, gradient in each.items()}
    torch.testing.assert_close(total, whole, rtol=1e-2, atol=1e-2)


@pytest.mark.deep
def test_compiled_whole_each_weight_is_cast_once_as_torch_does():
    counts = []

    def count(graph, _):
        values = [n.meta["val"] for n in graph.graph.nodes if n.target is torch.ops.aten._to_copy.default]
        counts.append(sum(value.dtype is DTYPE and value.shape[0] == 4 * H for value in values))
        return make_boxed_func(graph.forward)

    as_inductor = aot_autograd(fw_compiler=count, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
                               partition_fn=min_cut_rematerialization_partition)  # fmt: skip
    for cell in cells("triton"):
        torch._dynamo.reset()
        compiled = torch.compile(loop, fullgraph=True, backend=as_inductor)
        with autocast():
            found, expected = (call(cell, inputs()[:2]) for call in (compiled, loop))  # every step is traced
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(h.float().sum(), list(cell.parameters())) for h in (found, expected))
        torch.testing.assert_close(*gradients, rtol=2e-3, atol=2e-3)
    assert counts == [4, 4]


def train(lstm: nn.Module, exact: bool = False, skipped: Sequence[int] = ()) -> tuple[Tensor, list[int]]:
    """All parameters after 12 steps with autocast and a GradScaler, or in float64 without, and the steps skipped."""
    torch.manual_seed(0)
    dtype = torch.float64 if exact else torch.float32
    for parameter in lstm.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    model, too_large = nn.ModuleList([lstm, nn.Linear(H, 1)]).to(DEVICE, dtype), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**18, growth_interval=4, enabled=not exact)
    for step in sorted({*range(12)} - {*skipped}):
        x = inputs(step).to(dtype)
        with autocast(enabled=not exact):
            loss = (model[1](lstm(x)[0]).to(dtype) - x.cumsum(0).mean(2, keepdim=True).tanh()).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        too_large += [step] * (scaler.get_scale() < before)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), too_large


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=pytest.mark.deep)])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_training_with_a_grad_scaler_is_as_exact_as_with_torchs(backend, kind):
    of_torch = getattr(nn, kind)
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN has no LSTM in float16 on every CPU
        theirs, skipped = train(of_torch(I, H))
        ours, skipped_by_ours = train(getattr(gpu_lstm, kind)(I, H, backend=backend))
        truth, _ = train(of_torch(I, H), exact=True, skipped=skipped)
    assert skipped == skipped_by_ours
    assert 0 < len(skipped) < 6
    assert 1e-6 < rms(theirs - truth) < 1e-2
    assert rms(ours - truth) <= 2 * rms(theirs - truth)


@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.GRU])
def test_shut_gates_are_of_a_size_that_float16_holds(monkeypatch, cls):
    """oneDNN has no LSTM in float16, but cuDNN has one, which must not be passed infinite values."""
    stack = Mock(side_effect=lambda cell, x, state, layers, **_: (x.new_zeros(*x.shape[:2], 4), state))
    monkeypatch.setattr(torch_rnn, "stack", stack)
    with torch.autocast("cpu", torch.float16):
        cls(3, 4, backend="torch")(torch.randn(5, 2, 3), lengths=torch.tensor([5, 2]))
    given = stack.call_args[0][3][0][0].weight_ih
    assert given.dtype is torch.float16
    assert given.isfinite().all()
