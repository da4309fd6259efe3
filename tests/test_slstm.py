"""The sLSTM: against the oracle, which computes with the paper's c, n and m, and against xlstm's own cell."""

import copy
import pickle
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import oracle
import places
import pytest
import torch
from comparing import judge
from pairs import weighing
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gpu_lstm
from gpu_lstm.backends import verify
from gpu_lstm.call.choices import Backend
from gpu_lstm.functional import slstm_layer
from gpu_lstm.kernels.problem import Pass, problem_of
from gpu_lstm.kernels.tensors import Inputs
from gpu_lstm.kernels.triton_rnn import equations

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


def numbers_of(call):
    """Results by name, and gradients of a random sum of them, which are exact in float32; n is 1 in all of them."""
    module, x, hx = call.module, call.x, call.hx
    leaves = [t.detach().requires_grad_() for t in (x, *([] if hx is None else hx))]
    y, (h, c, n, m) = module(leaves[0], tuple(leaves[1:]) or None, **call.ragged)
    assert torch.equal(n, torch.ones_like(n))
    found = [y, h, c, m]
    gradients = torch.autograd.grad(found, [*leaves, *module.parameters()], weighing(found))
    named = [*(f"d{name}" for name in ("x", "h", "c", "n", "m")[: len(leaves)])]
    named += [f"d{name}" for name, _ in module.named_parameters()]
    found = zip(("y", "h", "c", "m", *named), (*found, *gradients), strict=True)
    return {name: t.detach().double().numpy() for name, t in found}


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
    dy, dh, dq, dl = (t.numpy() for t in weighing([torch.from_numpy(np.asarray(t)) for t in found]))
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


def results_of(module, x, hx=None, **ragged):
    y, states = module(x, hx, **ragged)
    return [y, *states]


BY_BOTH = pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("triton", torch.float32)])


@BY_BOTH
def test_states_that_are_equal_give_equal_results_and_none_is_empty(backend, dtype):
    call = made("4 heads, both directions, ragged", backend=backend)
    module, x, (h, c, n, m) = call.module.to(dtype), call.x.to(dtype), [t.to(dtype) for t in call.hx]
    k = torch.rand_like(m)
    expected = results_of(module, x, (h, c, n, m), **call.ragged)
    torch.testing.assert_close(results_of(module, x, (h, c * k, n * k, m - k.log()), **call.ragged), expected)
    torch.testing.assert_close(expected[3], torch.ones_like(n))
    zero = torch.zeros_like(h)
    empty = results_of(module, x)
    assert all(map(torch.equal, results_of(module, x, (zero, c, zero, m)), empty))
    # Without a step a state stays what it was, and one that is empty stays zeros.
    kept = results_of(module, x, (h, c, n, m), lengths=torch.zeros(B, dtype=torch.int64))
    torch.testing.assert_close(kept, [torch.zeros_like(kept[0]), h, c / n, torch.ones_like(n), m + n.log()])
    assert not any(t.any() for t in results_of(module, x, lengths=torch.zeros(B, dtype=torch.int64)))


@BY_BOTH
def test_nothing_overflows_and_padding_does_not_matter(backend, dtype):
    module = made("plain", backend=backend).module.to(dtype)
    with torch.no_grad():
        module.bias_ih_l0[: 2 * H] = torch.tensor([700.0, -700.0]).repeat_interleave(H)
        x = torch.randn(12, B, I).to(dtype)
        y, (_, c, n, m) = module(x)
        assert all(t.isfinite().all() for t in (y, c, n, m))
        # What is new outweighs all before: c is the last step's candidate.
        z = x[-1] @ module.weight_ih_l0.T + y[-2] @ module.weight_hh_l0.T + module.bias_ih_l0 + module.bias_hh_l0
        torch.testing.assert_close(c[0], z[:, 2 * H : 3 * H].tanh())
        for limit in (-1e4, 1e4):
            module.bias_ih_l0[:H] = limit
            assert module(x)[0].isfinite().all()
    x[LENGTHS[1] :, 1] = float("nan")
    given = [results_of(module, t[:T], lengths=LENGTHS.clamp(max=2)) for t in (x, x.nan_to_num())]
    assert all(map(torch.equal, *given))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_in_half_precision_c_n_and_m_are_float32_and_pieces_give_what_the_whole_gives(given):
    torch.manual_seed(0)
    dtype = torch.float16  # Triton's interpreter has no products in bfloat16
    slstm, x = gpu_lstm.SLSTM(I, H, backend="triton", dtype=dtype), torch.randn(T, B, I).to(dtype)
    hx = [torch.rand(1, B, H).to(dtype if k == 0 else given) for k in range(4)]
    y, states = slstm(x, hx)
    assert [t.dtype for t in (y, *states)] == [dtype, dtype, *[torch.float32] * 3]
    first, middle = slstm(x[:1], hx)
    assert all(map(torch.equal, results_of(slstm, x[1:], middle), (y[1:], *states)))
    assert torch.equal(first, y[:1])


def test_under_autocast():
    call = made("2 heads")
    module, x, hx = call.module.float(), call.x.float(), tuple(t.float() for t in call.hx)
    with torch.autocast("cpu", torch.bfloat16):
        found = results_of(module, x, hx)
    assert [t.dtype for t in found] == [*[torch.bfloat16] * 2, *[torch.float32] * 3]
    torch.testing.assert_close([t.float() for t in found], results_of(module, x, hx), rtol=0.05, atol=0.05)


def test_forms_of_the_input():
    call = made("2 layers of 2 heads, from nothing, ragged")
    module, x, hx = call.module, call.x, tuple(torch.rand(2, B, H).double() for _ in range(4))
    y, states = module(x, hx, lengths=LENGTHS)
    packed, of_packed = module(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx)
    torch.testing.assert_close(pad_packed_sequence(packed)[0], y)
    torch.testing.assert_close(of_packed, states)
    module.batch_first = True
    torch.testing.assert_close(results_of(module, x.transpose(0, 1), hx, lengths=LENGTHS), [y.transpose(0, 1), *states])
    one = results_of(module, x[: LENGTHS[1], 1], tuple(t[:, 1] for t in hx))
    torch.testing.assert_close(one, [y[: LENGTHS[1], 1], *(t[:, 1] for t in states)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_runs_it_step_by_step(dtype):
    torch.manual_seed(0)
    slstm = gpu_lstm.SLSTM(I, H, 2, heads=2, backend="reference", dtype=dtype)
    x, hx = torch.randn(T, B, I).to(dtype), tuple(torch.rand(2, B, H).to(dtype) for _ in range(4))
    with torch.no_grad():
        y, states = slstm(x, hx)
        stream = gpu_lstm.Stream(slstm, B, hx)
        limits = dict(rtol=0, atol=8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(torch.stack([stream(step) for step in x]), y, **limits)
        torch.testing.assert_close(stream.state, states, **limits)
        assert [t.dtype for t in stream.state] == [dtype, *[torch.float32] * 3]
        kept = stream.state
        then = stream(x[0], active=torch.tensor([True, False, True]))
        assert torch.equal(stream.state[3][:, 1], kept[3][:, 1])
        stream.state = kept
        torch.testing.assert_close(stream(x[0])[[0, 2]], then[[0, 2]])
        stream.reset(torch.tensor([False, True, False]))
        stream.reorder(torch.tensor([1, 1, 1]))
        torch.testing.assert_close(stream(x[:, :1].expand_as(x)), slstm(x[:, :1].expand_as(x))[0], **limits)


def test_trace_and_explain():
    call = made("2 layers, both directions, ragged")
    call.module.backend = None
    traced = gpu_lstm.trace(call.module, call.x, tuple(call.hx), **call.ragged)
    torch.testing.assert_close(traced.output, call.module(call.x, tuple(call.hx), **call.ragged)[0])
    for gates in (gates for layer in traced.layers for gates in layer):
        torch.testing.assert_close(gates.output * gates.mean, gates.hidden)
        assert not any(t[LENGTHS[1] :, 1].any() or t[LENGTHS[2] :, 2].any() for t in gates)
    plain = gpu_lstm.trace(call.module, call.x).layers[0][0]
    torch.testing.assert_close(plain.mean[0], plain.candidate[0])  # the mean of one
    torch.testing.assert_close(plain.mean[1], torch.lerp(plain.mean[0], plain.candidate[1], plain.share[1]))
    # The share of a new g in a sum of weights: u = i / (f n + i), so that after a step 1 / u = f n / i + 1.
    weight_ih, weight_hh = call.module.weight_ih_l0, call.module.weight_hh_l0
    z = call.x @ weight_ih.T + call.module.bias_ih_l0 + call.module.bias_hh_l0
    z[1:] += plain.hidden[:-1] @ weight_hh.T
    i, f = z[..., :H].exp(), plain.forget
    torch.testing.assert_close(f, z[..., H : 2 * H].sigmoid())
    torch.testing.assert_close(plain.share[1], i[1] / (f[1] * i[0] + i[1]))
    said = str(gpu_lstm.explain(call.module, call.x))
    assert "SLSTM 3 -> 8 -> 8" in said
    assert "torch: it does not support slstm cells" in said


def test_copies_pickles_and_state_dicts():
    call = made("2 heads")
    expected, other = results_of(call.module, call.x), gpu_lstm.SLSTM(I, H, heads=2).double()
    assert {name: tuple(t.shape) for name, t in other.state_dict().items()} == {
        "weight_ih_l0": (4 * H, I), "weight_hh_l0": (4 * H, H // 2), "bias_ih_l0": (4 * H,), "bias_hh_l0": (4 * H,),
    }  # fmt: skip
    other.load_state_dict(call.module.state_dict())
    for twin in (other, copy.deepcopy(call.module), pickle.loads(pickle.dumps(call.module))):
        assert all(map(torch.equal, results_of(twin, call.x), expected))
        assert repr(twin) == "gpu_lstm.SLSTM(3, 8, heads=2)"


@pytest.mark.parametrize(("case", "backend"), [
    ("plain", "triton"), ("4 heads, both directions, ragged", "reference")])  # fmt: skip
def test_in_graphs_of_torch_compile_for_all_sizes(case, backend):
    call = made(case)
    call.module.float()
    call.x, call.hx, call.module.backend = call.x.float(), [t.float() for t in call.hx], backend
    expected = numbers_of(call)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call.module.compile(backend=counter, fullgraph=True)
    found = numbers_of(call)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    call.hx, call.ragged = None, {}
    for steps in (3, 7, 5):
        x = torch.randn(steps, 2, I)
        torch.testing.assert_close(call.module(x)[0], call.module.forward(x)[0])
    assert counter.frame_count <= 3  # with states and without, and of all sizes


def test_exported_programs():
    module = made("2 heads").module.eval()
    x = torch.randn(T, B, I).double()
    sizes = {"input": {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}}
    program = torch.export.export(module, (x,), dynamic_shapes=sizes).module()
    x = torch.randn(7, 2, I).double()
    torch.testing.assert_close(program(x), module(x))


def test_derivatives_of_all_kinds():
    call = made("2 heads")
    module, x = call.module, call.x[:2, :2]
    hx = tuple(t[:, :2].contiguous().requires_grad_() for t in call.hx)

    def run(x, *hx):
        y, (h, c, _, m) = module(x, hx)
        return y, h, c, m

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *hx))
    assert torch.autograd.gradgradcheck(run, (x[:, :1], *(t[:, :1] for t in hx)))
    batch = torch.randn(3, 2, 2, I).double()

    def output(x):
        return module(x)[0]

    torch.testing.assert_close(torch.func.vmap(output)(batch), torch.stack([output(x) for x in batch]))
    v = torch.randn_like(x)
    _, forward = torch.func.jvp(output, (x,), (v,))
    jacobian = torch.func.jacrev(output)(x)
    torch.testing.assert_close(forward, torch.tensordot(jacobian, v, 3))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_regularisers_that_are_set(backend):
    torch.manual_seed(0)
    slstm, x = gpu_lstm.SLSTM(I, H, backend=backend), torch.randn(T, B, I)
    slstm.weight_drop = 1.0
    without = copy.deepcopy(slstm)
    without.weight_drop = 0.0
    torch.nn.init.zeros_(without.weight_hh_l0)
    torch.testing.assert_close(slstm(x)[0], without(x)[0])
    slstm.weight_drop, slstm.recurrent_dropout = 0.0, 1.0
    torch.testing.assert_close(slstm(x)[0], without(x)[0])
    slstm.recurrent_dropout = 0.5
    gradients = []
    for slstm.backend in (backend, "reference"):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(slstm(x)[0].square().sum(), list(slstm.parameters())))
    torch.testing.assert_close(*gradients)


def test_what_torch_lacks_stays():
    model = torch.nn.ModuleList([gpu_lstm.SLSTM(I, H), gpu_lstm.LSTM(I, H)])
    with pytest.warns(
        UserWarning, match=r"swapped 1 .*; left as it is: 0 \(gpu_lstm.SLSTM\), a cell that torch.nn has"
    ):
        gpu_lstm.to_torch(model)
    assert isinstance(model[0], gpu_lstm.SLSTM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu_lstm.convert(model[0])
    with pytest.raises(ValueError, match="SLSTM has a cell of its own, and would be scripted"):
        torch.jit.script(model[0])


def test_dropout_is_between_layers():
    slstm, x = gpu_lstm.SLSTM(I, H, 2, dropout=1.0), torch.randn(T, B, I)
    upper = gpu_lstm.SLSTM(H, H)
    upper.load_state_dict({name.replace("_l1", "_l0"): t for name, t in slstm.state_dict().items() if "_l1" in name})
    torch.testing.assert_close(slstm(x)[0], upper(torch.zeros(T, B, H))[0])


@pytest.mark.parametrize("product", [False, True])
def test_kernels_are_verified_as_on_a_card(product, monkeypatch):
    torch.manual_seed(0)
    weight_ih = None if product else torch.randn(4 * H, I)
    x, weight_hh = torch.randn(T, B, 4 * H if product else I), torch.randn(4 * H, H)
    inputs = Inputs(x, torch.randn(1, B, H), torch.randn(2, B, H), weight_ih, weight_hh)
    layer = verify.layer_of(Backend.TRITON, problem_of(inputs, "slstm", False, "ieee"), x.device)
    for pass_ in (Pass(), Pass(True)):
        assert verify._verdict(layer, pass_, inputs, layer.chosen(pass_).plan) == "right"
    forward, backward = equations.slstm_forward, equations.slstm_backward
    for pass_, name, fault in (
        (Pass(), "slstm_forward", lambda x, z, q, rest: forward(x, z, q, (rest[0] * 0.5,))),
        (Pass(True), "slstm_backward", lambda *given: backward(*given[:4], (given[4][0] * 0.0,))),
    ):
        monkeypatch.setattr(equations, name, fault)
        verdict = verify._verdict(layer, pass_, inputs, layer.chosen(pass_).plan)
        assert verdict.startswith("the RMS error of")


def layer_of(module, x, hx, **options):
    """slstm_layer on the product of a module of one layer and direction."""
    z = x @ module.weight_ih_l0.T
    bias = module.bias_ih_l0 + module.bias_hh_l0 if module.bias else None
    options |= dict(heads=module.heads)
    y, states = slstm_layer(z, module.weight_hh_l0, bias, hx and tuple(t[0] for t in hx), **options)
    return y, tuple(t[None] for t in states)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", ["plain", "2 heads", "no bias", "from nothing"])
def test_slstm_layer_is_the_module_but_for_the_first_product(case, backend):
    call = made(case, backend=backend)
    dtype = torch.float64 if backend == "reference" else torch.float32
    call.module.to(dtype)
    call.x, call.hx, call.ragged = call.x.to(dtype), call.hx and [t.to(dtype) for t in call.hx], RAGGED
    expected = numbers_of(call)
    call.ragged = RAGGED | {"backend": backend}

    class Function:
        parameters, named_parameters = call.module.parameters, call.module.named_parameters
        __call__ = staticmethod(partial(layer_of, call.module))

    found, limit = numbers_of(SimpleNamespace(**vars(call) | {"module": Function()})), 1e4 * torch.finfo(dtype).eps
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=limit, atol=limit, err_msg=name)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_slstm_layer_of_any_strides_in_reverse_in_graphs_and_transforms(backend):
    torch.manual_seed(0)
    z, weight_hh, bias = torch.randn(B, T, 4 * H), torch.randn(4 * H, H), torch.randn(4 * H)
    z = z.transpose(0, 1).requires_grad_()
    run = partial(slstm_layer, lengths=LENGTHS, backend=backend)
    y, states = run(z, weight_hh, bias, reverse=True)
    turned = torch.stack([torch.cat([t[:n].flip(0), t[n:]]) for t, n in zip(z.unbind(1), LENGTHS)], 1)
    y_turned, expected = run(turned, weight_hh, bias)
    torch.testing.assert_close(states, expected)
    for k, n in enumerate(LENGTHS):
        torch.testing.assert_close(y[:n, k], y_turned[:n, k].flip(0))
    before = z.detach().clone()
    dz = torch.autograd.grad(run(z, weight_hh, bias)[0].square().sum(), z)[0]
    assert torch.equal(z, before)
    other = before.contiguous().requires_grad_()
    expected = torch.autograd.grad(run(other, weight_hh, bias, backend="reference")[0].square().sum(), other)[0]
    torch.testing.assert_close(dz, expected)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(z, weight_hh, bias)[0].square().sum(), z)[0], dz)
    grad = torch.func.grad(lambda z: run(z, weight_hh, bias)[0].square().sum())
    torch.testing.assert_close(grad(z), dz)
    pairs = torch.stack([z, 2 * z])
    torch.testing.assert_close(
        torch.func.vmap(lambda z: slstm_layer(z, weight_hh)[0])(pairs),
        torch.stack([slstm_layer(z, weight_hh)[0] for z in pairs]),
    )
