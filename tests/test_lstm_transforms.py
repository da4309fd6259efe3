"""gpu_lstm.LSTM in the place of torch.nn.LSTM: compiled, scripted, under autocast, differentiated twice."""

import pytest
import torch
from comparing import BACKENDS, assert_same
from lstm_pair import B, H, I, T, pair, random_inputs, results
from torch import nn

import gpu_lstm
from gpu_lstm.functional import lstm_layer

pytestmark = pytest.mark.usefixtures("exact_float32_products")


# torch.compile, TorchScript, autocast


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_it_computes_the_same(backend, compiled):
    _, ours = pair(backend, bidirectional=True)
    ours = ours.float()
    x, hx = random_inputs(ours)
    assert_same(results(ours, x, hx, call=compiled(ours)), results(ours, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_an_input_that_needs_no_gradient(backend, compiled):
    _, ours = pair(backend)
    ours = ours.float()
    x = random_inputs(ours)[0].to(ours.weight_ih_l0)
    gradients = []
    for call in (compiled(ours), ours):
        grads = torch.autograd.grad(call(x)[0].square().sum(), list(ours.parameters()))
        gradients.append({name: g for (name, _), g in zip(ours.named_parameters(), grads, strict=True)})
    assert_same(*gradients)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_whole_with_lengths_and_resets(backend, compiled):
    _, ours = pair(backend, bidirectional=True)
    x, hx = random_inputs(ours)
    ragged = dict(
        lengths=torch.tensor([4, 0, 2], device=ours.weight_ih_l0.device),
        resets=torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]], device=ours.weight_ih_l0.device).bool(),
    )
    assert_same(results(ours, x, hx, call=compiled(ours), **ragged), results(ours, x, hx, **ragged))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_scripted_model_computes_the_same_and_shares_the_weights(bidirectional):
    theirs, ours = pair("torch", num_layers=2, bidirectional=bidirectional, batch_first=True)
    model = torch.jit.script(nn.Sequential(ours))
    x = random_inputs(theirs)[0].double()
    assert torch.equal(model(x)[0], theirs(x)[0])
    with torch.no_grad():
        ours.weight_hh_l0.zero_()
        theirs.weight_hh_l0.zero_()
    assert torch.equal(model(x)[0], theirs(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(("backend", "configuration"), [
    ("torch", {}), ("torch", dict(num_layers=2, bidirectional=True)), ("torch", dict(proj_size=2)),
    ("reference", {}), ("reference", dict(num_layers=2, bidirectional=True)),
], ids=str)  # fmt: skip
def test_cpu_autocast_gives_the_dtypes_of_torch(backend, configuration):
    theirs, ours = (module.float() for module in pair(backend, **configuration))
    x, hx = random_inputs(theirs)
    for given in (None, hx):
        got = []
        for module in (ours, theirs):
            with torch.autocast("cpu", torch.bfloat16):
                output, states = module(x, given)
            gradients = torch.autograd.grad(output.float().square().sum(), list(module.parameters()))
            got.append([output, *states, *gradients])
        assert [t.dtype for t in got[0]] == [t.dtype for t in got[1]]
        for our, their in zip(got[0][:3], got[1][:3], strict=True):
            torch.testing.assert_close(our.float(), their.float(), rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


def test_cpu_autocast_of_the_reference_is_its_run_in_bfloat16():
    _, ours = pair("reference", num_layers=2)
    x, hx = random_inputs(ours.float())
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            got = ours(x, hx)
        expected = ours.bfloat16()(x.bfloat16(), tuple(t.bfloat16() for t in hx))
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_cpu_autocast_with_lengths_and_resets_keeps_the_dtypes(backend):
    _, ours = pair(backend, bidirectional=True)
    x, hx = random_inputs(ours.float())
    with torch.autocast("cpu", torch.bfloat16):
        plain = ours(x, hx)
        ragged = ours(x, hx, lengths=torch.full((B,), T), resets=torch.zeros(T, B, dtype=torch.bool))
    for a, b in zip((plain[0], *plain[1]), (ragged[0], *ragged[1]), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


# Gradients of gradients


@pytest.mark.parametrize("configuration", [{}, dict(bidirectional=True), dict(proj_size=1)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradgradcheck(backend, configuration):
    torch.manual_seed(4)
    ours = gpu_lstm.LSTM(2, 2, dtype=torch.float64, backend=backend, **configuration)
    rows = 2 if ours.bidirectional else 1
    inputs = [torch.randn(2, 2, 2), torch.randn(rows, 2, ours.proj_size or 2), torch.randn(rows, 2, 2)]
    inputs = [t.double().requires_grad_() for t in inputs] + list(ours.parameters())
    names = [name for name, _ in ours.named_parameters()]

    def call(x, h0, c0, *weights):
        output, states = torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (x, (h0, c0)))
        return output, *states

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("configuration", [{}, dict(num_layers=2, bidirectional=True), dict(proj_size=2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty(backend, configuration):
    theirs, ours = pair(backend, **configuration)
    x, hx = random_inputs(theirs)
    assert_same(_penalty_gradients(ours, x, hx), _penalty_gradients(theirs, x, hx))


def _penalty_gradients(module, x, hx):
    """Gradients of (|d output / d inputs| - 1)^2."""
    named = dict(module.named_parameters())
    inputs = [t.to(next(module.parameters())).requires_grad_() for t in (x, *hx)]
    output, (h_n, c_n) = module(inputs[0], tuple(inputs[1:]))
    loss = output.square().sum() + h_n.sum() + c_n.square().sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    penalty = (torch.cat([g.flatten() for g in first]).norm() - 1).square()
    second = torch.autograd.grad(penalty, [*inputs, *named.values()])
    names = ["penalty", "x", "h0", "c0", *named]
    return dict(zip(names, (t.detach() for t in (penalty, *second)), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_under_create_graph_where_an_input_depends_on_another(backend):
    theirs, ours = pair(backend)
    x, hx = random_inputs(theirs)
    gradients = []
    for module in (ours, theirs):
        h0, c0 = (t.to(module.weight_ih_l0).requires_grad_() for t in hx)
        output, _ = module(x.to(h0) + h0[..., :I].tanh(), (h0, c0 + h0))
        (first,) = torch.autograd.grad(output.square().sum(), h0, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), h0)
        gradients.append({"first": first.detach(), "second": second})
    assert_same(*gradients)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_tied_biases(backend, create_graph):
    theirs, ours = pair(backend)
    x, _ = random_inputs(theirs)
    gradients = []
    for module in (ours, theirs):
        module.bias_hh_l0 = module.bias_ih_l0
        output, _ = module(x.to(module.bias_ih_l0))
        grads = torch.autograd.grad(output.square().sum(), module.bias_ih_l0, create_graph=create_graph)
        gradients.append({"bias": grads[0].detach()})
    assert_same(*gradients)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_lstm_layer_where_its_inputs_depend_on_each_other(backend, create_graph):
    theirs, ours = pair(backend)
    gradients = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        h = torch.randn(B, H).to(module.weight_ih_l0).requires_grad_()
        x = torch.randn(T, B, I).to(h) + h[:, :I]
        if module is ours:
            output, _ = lstm_layer(x, list(ours.parameters()), (h, h), backend=backend)
        else:
            output, _ = theirs(x, (h[None], h[None]))
        (grad,) = torch.autograd.grad(output.square().sum(), h, create_graph=create_graph)
        gradients.append({"h": grad.detach()})
    assert_same(*gradients)
