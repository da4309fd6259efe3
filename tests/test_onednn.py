"""LSTMs under autocast on a CPU, which torch gives to oneDNN, where oneDNN has no LSTM in half precision, or is off.

On most CPUs without AVX-512 it has none, and torch's own LSTM raises. Here oneDNN is stubbed to say so. `make
test-cpus` runs the tests as on such CPUs.
"""

import copy
import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import FORMS
from pairs import LENGTHS, RESETS, B, H, I, T, assert_identical, pair, random_inputs, results
from test_settings import SETTINGS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import BaseTorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from watching import Watched

import gpu_lstm
from gpu_lstm.backends import torch_rnn
from gpu_lstm.call import onednn

halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
switched = torch.backends.mkldnn.flags  # a block
BY_NAME = "torch", "reference", "numba", "triton"


@pytest.fixture(params=[True, False], ids=["on", "off"])
def on_or_off(request):
    """A block with oneDNN on or off, as a user sets it."""
    with switched(enabled=request.param and torch.backends.mkldnn.enabled):
        yield


@pytest.fixture
def lacking(with_onednn, monkeypatch):
    """Stub oneDNN as on a CPU without AVX-512."""
    monkeypatch.setattr(onednn, "has_lstm", lambda *_: False)


def autocast(half, call, *given, **options):
    with torch.autocast("cpu", half):
        return call(*given, **options)


SOME = torch.tensor([2, 1, 4])  # of a PackedSequence, which has no empty sequence
WIDE = dict(hidden_size=4 * torch_rnn.LEAST_HEAD, heads=4)  # so many units that each head is a call
CALLS = {  # a kind, the arguments of its module, the arguments of a call, and the function that makes the call
    "plain": ("LSTM", {}, {}, None), "no bias": ("LSTM", dict(bias=False), {}, None),
    "dropout": ("LSTM", dict(num_layers=2, bidirectional=True, dropout=0.5), {}, None),
    "stack": ("StackedLSTM", {}, {}, None),
    "packed, heads": ("LSTM", dict(heads=2), dict(lengths=SOME), FORMS["packed"]),
    "lengths": ("LSTM", dict(bidirectional=True), dict(lengths=LENGTHS), None),
    "resets": ("LSTM", {}, dict(resets=RESETS), None),
    "both": ("LSTM", dict(num_layers=2, bidirectional=True), dict(lengths=LENGTHS, resets=RESETS), None),
    "heads": ("LSTM", dict(heads=2, num_layers=2), {}, None), "wide heads": ("LSTM", WIDE, dict(resets=RESETS), None),
    "function": ("LSTM", {}, dict(lengths=LENGTHS), FORMS["layer"]),
}  # fmt: skip


@pytest.mark.usefixtures("lacking")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", CALLS)
@halves
def test_what_onednn_lacks_is_computed_as_by_a_module_in_half_precision(half, name, training):
    """Results and gradients equal, to the bit, those of a module in half precision: torch's own where it accepts the
    call, else ours."""
    kind, arguments, ragged, way = CALLS[name]
    if ragged or "heads" in arguments:
        ours = getattr(gpu_lstm, kind)(**dict(input_size=I, hidden_size=H) | arguments, backend="torch")
        twin = copy.deepcopy(ours)
    else:
        twin, ours = pair(kind, "torch", **arguments)
    ours, twin = ours.to(half).float().train(training), twin.to(half).train(training)
    x, hx = tree_map(lambda t: t.to(half), random_inputs(ours, B))
    with torch.set_grad_enabled(training):
        call, twins = (module if way is None else partial(way, module) for module in (ours, twin))
        found = results(ours, x, hx, call=partial(autocast, half, call), **ragged)
        expected = results(twin, x, hx, call=twins, **ragged)
    assert found["output"].dtype is half
    assert all(t.dtype is torch.float32 for key, t in found.items() if key.startswith("d"))
    expected = dict(zip(found, expected.values(), strict=True))  # in a chain parameters have other names
    if training:  # dx is a sum over directions, in float32 or in half precision
        dx = found.pop("dx"), expected.pop("dx").float()
        torch.testing.assert_close(*dx, rtol=0, atol=torch.finfo(half).eps * float(dx[1].abs().max()))
    assert_identical(found, {key: t.to(found[key].dtype) for key, t in expected.items()})


@pytest.mark.usefixtures("lacking")
@pytest.mark.parametrize(("kind", "arguments", "way"), [
    ("LSTM", dict(proj_size=2), nn.Module.__call__), ("GRU", {}, nn.Module.__call__),
    ("LSTM", dict(num_layers=2), partial(FORMS["packed"], lengths=SOME)), ("LSTMCell", {}, nn.Module.__call__),
], ids=["projected", "GRU", "packed", "cell"])  # fmt: skip
@halves
def test_what_onednn_is_not_asked_for_stays_torchs_own(half, kind, arguments, way):
    theirs, ours = (module.float() for module in pair(kind, "torch", **arguments))
    x, hx = random_inputs(ours, B)
    calls = [partial(autocast, half, way, module) for module in (ours, theirs)]
    assert_identical(*(results(module, x, hx, call=call) for module, call in zip((ours, theirs), calls)))


@pytest.mark.usefixtures("lacking")
@halves
def test_in_traces_graphs_modes_and_transforms(half):
    lstm, x = gpu_lstm.LSTM(I, H, backend="torch").requires_grad_(False), torch.randn(T, B, I)

    def run(x):
        return autocast(half, lstm, x)[0]

    y, (h_n, c_n) = autocast(half, lstm, x)
    assert {t.dtype for t in (y, h_n, c_n)} == {half}
    torch._dynamo.reset()
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    traced = torch.jit.trace(run, (x,), check_trace=False)
    program = autocast(half, torch.export.export, lstm, (x,))
    found = [torch.inference_mode()(run)(x), autocast(half, compiled, x)[0], traced(x), program.module()(x)[0]]
    with BaseTorchDispatchMode():
        found.append(run(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run(mode.from_tensor(x)).dtype is half
    for t in found:  # a CPU that computes in float16 may round otherwise in inference than in training
        torch.testing.assert_close(t, y, rtol=0, atol=torch.finfo(half).eps)

    def loss(x):
        return run(x).float().square().sum()

    gradients = grad(loss)(x), torch.autograd.functional.vjp(loss, x)[1]
    torch.testing.assert_close(*gradients, rtol=0, atol=torch.finfo(half).eps)
    by_reference = vmap(run, 1, 1)(x[:, :, None])[:, :, 0], jvp(run, (x,), (x,))[0]
    assert all(t.dtype is half for t in by_reference)
    for t in by_reference:
        torch.testing.assert_close(t, y, rtol=0, atol=8 * torch.finfo(half).eps)


def runs(half):
    """Return whether torch's own LSTM runs under autocast on this CPU."""
    module = nn.LSTM(I, H)
    try:
        y, _ = autocast(half, module, torch.zeros(T, B, I))
    except RuntimeError:
        return False
    y.float().sum().backward()
    return True


PLACES = {
    "nowhere": nullcontext, "inference mode": torch.inference_mode, "fake tensors": FakeTensorMode,
    "a mode": partial(Watched, lambda *_: True),
    "another device": partial(torch.device, "meta"), "float64": SETTINGS["default dtype float64"],
}  # fmt: skip


@pytest.fixture
def asked(with_onednn, spy):
    """A function that returns the dtypes that oneDNN was asked for."""
    onednn.has_lstm.cache_clear()
    calls = spy(onednn, "_runs_under_autocast")
    return lambda: [each.args[0] for each in calls.call_args_list]


@pytest.mark.parametrize("place", PLACES)
@halves
def test_onednn_is_asked_apart_from_what_its_caller_does(asked, half, place):
    expected, before = runs(half), torch.get_rng_state()
    with PLACES[place]() as block:
        assert onednn.has_lstm(half, True) is expected
    assert asked() == [half]
    assert torch.equal(torch.get_rng_state(), before)
    assert place != "a mode" or block.count == 0


@halves
def test_casts_that_a_block_keeps_outlast_that_onednn_is_asked(asked, half):
    x, linear = torch.ones(2, 2), nn.Linear(2, 2, bias=False)
    with torch.autocast("cpu", half), Watched(lambda operator, *_: "_to_copy" in str(operator)) as casts:
        linear(x)
        onednn.has_lstm(half, True)
        linear(x)
    assert casts.count == 3, "x each time, the weight once"
    assert asked() == [half]


def test_onednn_is_asked_once_a_dtype_and_only_if_that_matters(asked):
    x, lstm = torch.zeros(T, B, I), gpu_lstm.LSTM(I, H, num_layers=2)
    for half in (torch.bfloat16, torch.float16):
        for other in (gpu_lstm.GRU(I, H), gpu_lstm.LSTM(I, H, proj_size=2), gpu_lstm.LSTM(I, H, backend="reference")):
            autocast(half, other, x)
        autocast(half, gpu_lstm.LSTMCell(I, H), x[0])
        autocast(half, copy.deepcopy(lstm).double(), x.double())
        copy.deepcopy(lstm).to(half)(x.to(half))
    lstm(x)
    assert asked() == []
    for half in (torch.bfloat16, torch.float16) * 2:
        autocast(half, lstm, x, lengths=LENGTHS)
        autocast(half, lstm.eval(), x)
    assert asked() == [torch.bfloat16, torch.float16]


@halves
@pytest.mark.filterwarnings("error:gpu_lstm")  # a warning would mean that a right kernel is refused
@pytest.mark.parametrize(("kind", "way"), [
    (kind, way) for kind in ("LSTM", "projected", "GRU", "LSTMCell", "GRUCell", "StackedLSTM", "StackedGRU")
    for way in (*BY_NAME, "vmap", *("lengths", "one step", "zoneout") * ("Cell" not in kind))
    if way != "triton" or kind != "projected"  # whose c is as on a card
])  # fmt: skip
@pytest.mark.parametrize("grad", [True, False])
def test_on_a_cpu_results_have_the_dtypes_of_torchs(on_or_off, kind, way, half, grad):
    """oneDNN casts a whole LSTM. In other modules torch casts only products, so the dtype of states counts.

    oneDNN has an LSTM in bfloat16 on some CPUs. It has one in float16 on fewer CPUs, and there without gradients.
    Elsewhere torch's own module raises, whereas ours is cast all the same. If the input is in half precision, torch
    casts only products there.
    """
    if way == "triton" and (torch.cuda.is_available() or half is torch.bfloat16):
        pytest.skip("the interpreter's are right in float16")
    lacks = kind in ("LSTM", "StackedLSTM") and onednn.is_on() and not onednn.has_lstm(half, grad)
    options = {} if "Cell" in kind else dict(num_layers=2)
    options |= dict(proj_size=2) if kind == "projected" else {}
    backend = way if way in BY_NAME else "torch" if way in ("lengths", "one step") else None
    name, is_stack = kind.replace("projected", "LSTM"), "Stacked" in kind
    ours = getattr(gpu_lstm, name)
    ours = ours(I, [H, H], backend=backend) if is_stack else ours(I, H, backend=backend, **options)
    theirs = getattr(nn, name.removeprefix("Stacked"))(I, H, **options)
    x, hx = random_inputs(ours, B, steps=1 if way == "one step" else T)
    own_hx = tree_map(lambda *t: torch.stack(t), *hx) if is_stack else hx
    call, states = ours, len(tree_leaves(own_hx))
    if way in ("lengths", "one step"):
        call = partial(ours, lengths=torch.full((B,), len(x)))
    elif way == "zoneout":
        ours.zoneout = 0.5
    elif way == "vmap":
        call = vmap(ours, -2)
    for of_x, of_hx in itertools.product([torch.float32, half], repeat=2):
        found = []
        for module, given in (call, hx), (theirs, own_hx):
            if module is theirs and lacks and of_x is not half:
                found.append([half] * (1 + states))
            else:
                with torch.autocast("cpu", half), torch.set_grad_enabled(grad):
                    given = tree_map(lambda t, of_hx=of_hx: t.to(of_hx), given)
                    output, *others = tree_leaves(module(x.to(of_x), given))
                found.append([t.dtype for t in (output, *others[-states:])])
        assert found[0] == found[1], (of_x, of_hx)


@halves
def test_where_onednn_is_off_numbers_are_torchs_in_graphs_too(half):
    """Here autocast casts only products, also where the module was called before with oneDNN on. An SLSTM is cast as a
    whole."""
    (theirs, ours), x = (module.float() for module in pair("LSTM", "torch")), torch.randn(T, B, I)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with switched(enabled=False):
        expected = autocast(half, theirs, x)[0]
    for on in (False, True, False):
        with switched(enabled=on):
            assert autocast(half, gpu_lstm.SLSTM(I, H), x)[0].dtype is half
            for call in [ours] if on else [ours, compiled]:
                y = autocast(half, call, x)[0]
                assert y.dtype is (half if on else torch.float32)
                torch.testing.assert_close(y.float(), expected, rtol=0, atol=16 * torch.finfo(half).eps)
                assert on or call is compiled or torch.equal(y, expected)
