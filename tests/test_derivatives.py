"""Gradients of gradients, and torch.func. Torch's own modules in float64 give the true values."""

import pytest
import torch
from comparing import BACKENDS, KERNELS_HERE, SECOND, assert_same
from pairs import B, I, T, pair, random_inputs
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = pytest.mark.usefixtures("exact_float32_products")

PENALISED = [
    ("LSTM", dict(bidirectional=True, proj_size=2)), ("LSTMCell", {}), ("StackedLSTM", {}),
    ("GRU", dict(bidirectional=True, num_layers=2)), ("GRUCell", {}), ("StackedGRU", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "backend", "how"), [
    *((*kind, backend, "eager") for kind in PENALISED[::3] for backend in BACKENDS),
    *((*kind, backend, "eager") for kind, backend in zip(PENALISED[1:3] + PENALISED[4:], 2 * BACKENDS[1:])),
    *(pytest.param(*kind, backend, "compiled", marks=pytest.mark.deep)
      for kind, backend in zip(PENALISED, 2 * BACKENDS)),
], ids=str)  # fmt: skip
def test_gradient_penalty(backend, kind, arguments, how):
    """The penalty is (|d loss / d inputs| - 1)^2."""

    def penalised(module):
        call = module
        if how == "compiled" and type(module).__module__.startswith("gpu_lstm"):
            torch._dynamo.reset()
            call = torch.compile(module, backend="eager", fullgraph=True)
        x, hx = tree_map(lambda t: t.to(next(module.parameters())).requires_grad_(), random_inputs(module, B))
        loss = sum(t.square().sum() for t in tree_leaves(call(x, hx)))
        first = torch.autograd.grad(loss, [x, *tree_leaves(hx)], create_graph=True)
        penalty = (torch.cat([g.flatten() for g in first]).norm() - 1).square()
        return dict(enumerate(torch.autograd.grad(penalty, [x, *tree_leaves(hx), *module.parameters()])))

    assert_same(*(penalised(module) for module in pair(kind, backend, **arguments)[::-1]), condition=SECOND)


@pytest.mark.parametrize(("recompute", "names"), [(False, ()), (True, ("x", "bias_hh_l0"))], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("kind", "arguments"), [("LSTM", dict(proj_size=2)), ("GRU", {})], ids=str)
def test_a_gradient_is_the_same_where_no_other_is_asked_for(recompute, names, kind, arguments):
    """All inputs and parameters but one are frozen. The kernels' backward leaves out the gradients that nobody needs,
    and no others."""
    theirs, ours = pair(kind, KERNELS_HERE, **arguments)
    ours.recompute = recompute

    def gradients_of(module):
        x, hx = tree_map(lambda t: t.to(next(module.parameters())), random_inputs(module, B))
        differentiable = dict(x=x[:2], **dict(zip(("h0", "c0"), tree_leaves(hx))))
        differentiable |= dict(module.requires_grad_(False).named_parameters())
        for name in names or differentiable:
            tensor = differentiable[name].requires_grad_(True)
            loss = sum(t.square().sum() for t in tree_leaves(module(differentiable["x"], hx)))
            yield name, *torch.autograd.grad(loss, [tensor])
            tensor.requires_grad_(False)

    assert_same(*(dict(gradients_of(module)) for module in (ours, theirs)))


# torch.func, on one layer. grad and vjp use the kernels. Every other transform uses the reference, whichever backend
# was chosen.
@pytest.fixture(params=[(kind, by) for kind in ("LSTM", "GRU") for by in ("torch", KERNELS_HERE)], ids=" ".join)
def both(request):
    return pair(*request.param)


@pytest.fixture(params=["LSTM", "GRU", "SLSTM"])
def by_reference(request):
    return pair(request.param, "reference")


def inputs(module, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (T, B, I), dtype=torch.float64, generator=generator).to(next(module.parameters()))


def assert_close(*found):
    ours, theirs = (dict(enumerate(tree_leaves(each))) for each in found)
    assert ours
    assert_same(ours, theirs, condition=SECOND)


def gradients(module, loss):
    return dict(zip(module.state_dict(), torch.autograd.grad(loss, list(module.parameters()))))


def test_grad_and_vjp(both):
    """This includes a gradient penalty, whose inner gradient is by torch.func and whose outer one is by plain
    autograd."""
    theirs, ours = both
    found = grad(lambda p: functional_call(ours, p, (inputs(ours),))[0].square().sum())(ours.state_dict())
    assert_close(found, gradients(theirs, theirs(inputs(theirs))[0].square().sum()))
    x = inputs(theirs).requires_grad_()
    y, _ = theirs(x)
    dy, (_, pull) = inputs(theirs, *y.shape, seed=2), vjp(lambda x: ours(x)[0], inputs(ours))
    (true,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert_close(pull(dy.to(inputs(ours))), true)
    # The parameters learn nothing.
    _, pull = vjp(lambda x: functional_call(ours, ours.state_dict(), (x,))[0], inputs(ours))
    assert_close(vmap(pull, 1)(torch.stack([dy, 2 * dy], 1).to(inputs(ours))), torch.stack([true, 2 * true]))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    found = grad(lambda x: ours(x)[0].square().sum())(inputs(ours))
    assert_close(gradients(ours, found.square().sum()), gradients(theirs, dx.square().sum()))


def test_jacobians_both_ways_and_forward_mode(by_reference):
    theirs, ours = by_reference
    true = torch.autograd.functional.jacobian(lambda x: theirs(x)[0][-1], inputs(theirs))
    for way in (jacrev, jacfwd):
        assert_close(way(lambda x: ours(x)[0][-1])(inputs(ours)), true)
    x, direction = inputs(ours), inputs(ours, seed=2)
    _, true = torch.autograd.functional.jvp(lambda x: theirs(x)[0], inputs(theirs), inputs(theirs, seed=2))
    assert_close(jvp(lambda x: ours(x)[0], (x,), (direction,))[1], true)
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(ours(forward_ad.make_dual(x, direction))[0]).tangent, true)


def test_several_gradients_at_once(both):
    """autograd's own vmap runs over backward, not torch.func's. The gradients are of one result, of all results, and of
    a gradient."""

    def found(module, batched):
        x = inputs(module).requires_grad_()
        every = tree_leaves(module(x))
        wanted, several = [x, *module.parameters()], [inputs(module, 3, *t.shape, seed=2) for t in every]
        for results, ds in ((every[:1], several[:1]), (every, several)):
            if batched:
                yield torch.autograd.grad(results, wanted, ds, is_grads_batched=True, retain_graph=True)
            else:
                each = [torch.autograd.grad(results, wanted, list(d), retain_graph=True) for d in zip(*ds)]
                yield [torch.stack(t) for t in zip(*each)]
        by_x = inputs(module, 2, 1, I)
        yield torch.autograd.functional.hessian(lambda x: module(x)[0][-1].square().sum(), by_x, vectorize=batched)

    theirs, ours = both
    assert_close(list(found(ours, True)), list(found(theirs, False)))


def test_functionalize(by_reference):
    theirs, ours = by_reference
    x, ragged = inputs(ours), dict(lengths=torch.tensor([4, 0, 2]), resets=torch.eye(T, B) > 0)
    assert_close(torch.func.functionalize(lambda x: ours(x)[0])(x), theirs(inputs(theirs))[0])
    assert_close(torch.func.functionalize(lambda x: ours(x, **ragged)[0])(x), ours(x, **ragged)[0])


@pytest.mark.parametrize("outer", ["vjp", "vmap", "dual numbers"])
def test_what_vjp_returned_is_differentiated_inside_another_transform(both, outer):
    def transformed(module):
        x, dx, dy = inputs(module), inputs(module, seed=3), inputs(module, T, B, module.hidden_size, seed=2)
        _, pull = vjp(lambda x: module(x)[0], x)
        if outer == "vjp":
            _, again = vjp(lambda dy: pull(dy)[0], dy)
            return [*again(dx), *vjp(lambda dx: again(dx)[0], dx)[1](dy)]
        if outer == "vmap":
            return vmap(lambda dy: pull(dy)[0])(torch.stack([dy, dy.cos()]))
        if module is both[0]:  # torch has no forward mode there, but gradients are linear in dy
            return pull(dy.cos())
        y, _ = module(x.requires_grad_())
        with forward_ad.dual_level():
            (gradient,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, dy.cos()))
            return forward_ad.unpack_dual(gradient).tangent

    assert_close(*(transformed(module.requires_grad_(False)) for module in both[::-1]))


@pytest.mark.parametrize("ragged", [False, True])
def test_per_sample_gradients(by_reference, ragged):
    theirs, ours = by_reference
    x, lengths = inputs(ours), torch.tensor([4, 1, 3] if ragged else [T] * B)

    def loss(p, x, length):
        return functional_call(ours, p, (x,), {"lengths": length} if ragged else {})[0].square().sum()

    found = vmap(grad(loss), in_dims=(None, 1, 0))(ours.state_dict(), x, lengths)
    for b in range(B):
        y, _ = theirs(inputs(theirs)[: lengths[b], b])
        assert_close({name: g[b] for name, g in found.items()}, gradients(theirs, y.square().sum()))


def test_grad_goes_through_the_kernels_and_what_cannot_does_not():
    ours = pair("LSTM", KERNELS_HERE)[1].requires_grad_(False)
    x = inputs(ours)
    once = grad(lambda x: ours(x)[0].sum())
    for call, backward_kernels in ((once, 1), (grad(lambda x: once(x).square().sum()), 0), (vmap(once, in_dims=1), 0)):
        with torch.profiler.profile() as profile:
            call(x)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts.get("gpu_lstm::layer_backward", 0) == backward_kernels
