"""The compiled loops for CPUs: races, calls, threads, half precision. test_layer.py and test_slstm.py have others."""

import copy
import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from cases import built, check, drawn
from pairs import assert_identical, pair, random_inputs, results
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.call import choices
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available, race, route
from gpu_lstm.kernels import cache, numba_rnn
from gpu_lstm.kernels.numba_rnn import build, equations, launch, product

pytest.importorskip("numba")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SLSTM"])
def test_an_empty_batch_is_raced_too(nothing_cached, kind):
    """The loops are compiled by then, so auto races every kind of call."""
    module, x = getattr(gpu_lstm, kind)(3, 6), torch.zeros(20, 0, 3)
    with gpu_lstm.backend("numba"):
        module(x)
    y, _ = module(x)
    assert y.shape == (20, 0, 6)
    y.sum().backward()


@pytest.mark.parametrize("winner", ["numba", "torch"])
@pytest.mark.parametrize("training", [False, True])
def test_a_kind_of_call_is_raced_once(monkeypatch, nothing_cached, winner, training):
    """A plain LSTM and a short call are raced only where the loops are compiled already. Calls in half precision are
    raced, too."""
    seconds = {"numba": 2e-3, "torch": 2e-3} | {winner: 1e-3}
    raced = Mock(
        side_effect=lambda rivals, now: {name: (run(), [seconds[name]] * 3)[1] for name, run in rivals.items()}
    )
    monkeypatch.setattr(race, "times_of", raced)
    gru, lstm, x = gpu_lstm.GRU(3, 6), gpu_lstm.LSTM(3, 6), torch.randn(20, 2, 3)
    with torch.set_grad_enabled(training):
        for given in (x, x[:18], x.repeat(1, 1, 1), x[:8]):
            gru(given)
            assert gpu_lstm.explain(gru, given).backend == winner
        lstm(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert gru(x.bfloat16())[0].dtype is torch.bfloat16
        with monkeypatch.context() as patch:
            patch.setattr(numba_rnn, "is_compiled", lambda *_: False)
            gpu_lstm.LSTM(3, 7)(x)
            gpu_lstm.GRU(3, 7)(x[:8])
    assert raced.call_count == len([*cache.entries(cache.RACES)]) == 4


def run(module, x, **rest):
    x = x.clone().requires_grad_()
    y, _ = module(x, **rest)
    return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


@pytest.fixture
def module_and_call(monkeypatch):
    """A GRU of which each four sequences pay for a thread, and a call with lengths and resets."""
    monkeypatch.setattr(launch, "LEAST", 1)
    module, x = gpu_lstm.GRU(3, 20, bidirectional=True, backend="numba"), torch.randn(6, 14, 3)
    yield module, x, dict(lengths=torch.arange(14) % 7, resets=torch.rand(6, 14) < 0.3)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.mark.parametrize("way", ["OpenMP", "pool"])
def test_threads_compute_the_same_numbers(way, module_and_call, monkeypatch, calls):
    module, x, rest = module_and_call
    alone = run(module, x, **rest)
    if way == "pool":
        monkeypatch.setattr(build, "parallel", lambda: None)
    elif build.parallel() is None:
        pytest.skip("torch does not use GNU's OpenMP here")
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        calls.reset_mock()
        for ours, expected in zip(run(module, x, **rest), alone):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)  # torch's own products may differ
        # One thread makes the panels of a weight.
        assert {each.args[2] for each in calls.call_args_list} == {1, min(count, 14 // 4)}


def test_calls_in_threads_at_once(module_and_call):
    module, x, rest = module_and_call
    expected = run(module, x, **rest)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run(module, x, **rest), range(16)):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.GRU, gpu_lstm.SLSTM])
def test_bits_depend_on_neither_batch_nor_threads(module_and_call, cls, heads):
    """Sizes fill no vector, one panel, and several. Some sums are divided. One step, without panels, is tested, too."""
    for inputs, hidden in ((3, 6), (17, 34), (150, 66)):
        for steps_, rest in ((1, {}), (11, {}), (11, dict(lengths=torch.arange(9) + 3))):
            module, x = cls(inputs, hidden, heads=heads, backend="numba"), torch.randn(steps_, 9, inputs)
            with torch.no_grad():
                torch.set_num_threads(1)
                whole = module(x, **rest)[0]
                for count in (1, 2):
                    torch.set_num_threads(count)
                    assert torch.equal(module(x, **rest)[0], whole)
                for b in range(9):
                    alone = module(x[:, b : b + 1], **{name: t[b : b + 1] for name, t in rest.items()})[0]
                    assert torch.equal(alone, whole[:, b : b + 1])


@pytest.fixture
def calls(spy):
    """A Mock that makes and records the calls of compiled functions."""
    return spy(build, "run")


@pytest.mark.parametrize(("kind", "options", "layers"), [
    ("LSTM", dict(num_layers=2), 2), ("GRU", dict(input_size=17, num_layers=2, bias=False, batch_first=True), 2),
    ("LSTMCell", {}, 1), ("GRUCell", {}, 1), ("SLSTM heads", {}, 1), ("StackedGRU", {}, 2),
    ("LSTM", dict(bidirectional=True), 2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("steps", [1, 5])
def test_few_steps_are_one_call_of_a_compiled_function_a_layer(calls, kind, options, layers, steps):
    theirs, ours = pair(kind, "numba", **options)
    x, _ = random_inputs(ours, 2, steps=steps)
    with torch.no_grad():
        ours(x)  # which may compile
        calls.reset_mock()
        states = [None, None]
        for _ in range(3):
            found = [module(given, hx) for module, given, hx in zip((ours, theirs), (x, x.double()), states)]
            states = found if "Cell" in kind else [hx for _, hx in found]
            for our, their in zip(*map(tree_leaves, found)):
                torch.testing.assert_close(our, their.float())
            if "Cell" not in kind:
                found[0][0].fill_(torch.nan)  # which changes no state
    assert calls.call_count == 3 * layers


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these registers are of x86-64")
def test_the_cells_divide_in_the_widest_registers():
    """LLVM prefers half of them for Intel's CPUs."""
    equations.forward.compile("void(intp, intp, intp, boolean)")
    (code,) = equations.forward.inspect_asm().values()
    widest = {16: "z", 8: "y", 4: "x"}[product.LANES]
    assert set(re.findall(r"divps\t.*%([xyz])mm", code)) == {widest}


@gpu_lstm.racing("off")
@pytest.mark.parametrize("training", [False, True])
def test_calls_that_started_no_compilation_run_the_loops_once_these_are_compiled(
    monkeypatch, nothing_cached, calls, training
):
    compiled = []
    for name in ("was_compiled", "is_compiled"):
        monkeypatch.setattr(numba_rnn, name, lambda *_: bool(compiled))
    gru = gpu_lstm.GRU(3, 4, zoneout=0.1).train(training).requires_grad_(training)
    short, long = torch.randn(1, 2, 3), torch.randn(40, 2, 3)
    before = gru(short)[0]
    assert not calls.called
    gru(long)
    assert calls.called
    compiled.append(True)
    calls.reset_mock()
    after = gru(short)[0]
    assert calls.called
    assert gpu_lstm.explain(gru, short).backend == "numba"
    if not training:
        torch.testing.assert_close(after, before)
    kept = len(route._routes)
    gru(torch.randn(90, 2, 3))  # another kind, which clears no route a second time
    assert len(route._routes) == kept + 1


@pytest.mark.parametrize("name", [choices.BACKEND_VARIABLE, choices.RACE_VARIABLE])
def test_a_variable_that_is_wrong_raises_where_it_decides_nothing(monkeypatch, nothing_cached, name):
    """Such as for float64, which one backend alone runs on a CPU."""
    monkeypatch.setenv(name, "nonsense")
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(
            ValueError, match=f"unknown .* 'nonsense' in the environment variable {name}; expected one of"
        ):
            gpu_lstm.LSTM(3, 4, dtype=dtype)(torch.zeros(1, 2, 3, dtype=dtype))


def test_the_error_of_a_long_sum_is_at_most_twice_the_error_of_the_reference():
    """A call of one sequence, for which torch's own products have their smallest errors."""
    module, x, y = gpu_lstm.SLSTM(512, 512, heads=4), torch.randn(16, 1, 512), {}
    with torch.no_grad():
        true = copy.deepcopy(module).double()(x.double())[0]
        for module.backend in ("numba", "reference"):
            y[module.backend] = (module(x)[0] - true).norm()
    assert y["numba"] <= 2 * y["reference"]


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("steps_", [2, launch.FEW_STEPS, launch.FEW_STEPS + 1, launch.CHUNK + 6])
@pytest.mark.parametrize(("words", "layers"), [
    ("", 1), ("gru deep", 2), ("slstm heads", 1), ("four-heads batch-first", 1), ("no-bias no-hx", 1),
    ("gru both deep", 4), ("ragged resets both", 2), ("slstm ragged resets", 1), ("gru ragged three-heads deep", 2),
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 9])  # 9 sequences are shared out to two threads
def test_an_inference_is_one_call_of_a_loop_for_each_layer(calls, monkeypatch, steps_, words, layers, batch):
    """One more call copies the weights into panels, if there are more than a few steps."""
    monkeypatch.setattr(launch, "LEAST", 1)
    size, words = (steps_, batch, 17, 24), f"{words} no-grad"
    for _ in range(2):  # the first call prepares the layers
        check(size, words, "numba", torch.float32, seeds=1)
    module, (x, hx, rest) = drawn(size, words, backend="numba")
    calls.reset_mock()
    with torch.no_grad():
        module(x, hx, **rest)
    assert calls.call_count == layers * (1 if steps_ <= launch.FEW_STEPS else 2)


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("words", ["both", "gru both", "slstm heads", "ragged resets both"])
@pytest.mark.parametrize("batch", [1, 9])  # 9 sequences are shared out to two threads
def test_gates_that_are_saved_in_chunks_give_the_gradients_of_the_oracle(monkeypatch, words, batch):
    monkeypatch.setattr(launch, "LEAST", 1)
    check((launch.CHUNK + 6, batch, 17, 24), words, "numba", torch.float32, seeds=1)


def test_torch_profiler_names_the_layers_of_an_inference():
    lstm, x = gpu_lstm.LSTM(3, 4, 2, backend="numba"), torch.randn(2, 3, 3)
    with torch.no_grad(), torch.profiler.profile() as profiler:
        lstm(x)
    names = {event.name for event in profiler.events() if event.name.startswith("gpu_lstm ")}
    assert names == {"gpu_lstm layer 0 forward, numba", "gpu_lstm layer 1 forward, numba"}


@pytest.mark.parametrize("words", ["norms", "norm-hh", "norm-c", "masks peepholes"])
def test_all_steps_of_a_variant_are_one_call_of_a_loop(calls, words):
    module, x = built((7, 5, 3, 12), {*words.split()}, backend="numba"), torch.randn(7, 5, 3)
    run(module, x)  # which compiles and verifies
    calls.reset_mock()
    run(module, x)
    assert calls.call_count == 3  # the second one copies W_hh into panels for the backward pass


@pytest.mark.parametrize("steps", [1, 5])
def test_an_inference_normalises_the_product_with_x(steps):
    """This layer norm is outside the time loop, so a loop that multiplies x itself would leave it out."""
    ours = gpu_lstm.LSTM(3, 6, layer_norm=("ih",), backend="numba")
    theirs, x = copy.deepcopy(ours), torch.randn(steps, 2, 3)
    theirs.backend = "reference"
    with torch.no_grad():
        for _ in range(2):  # the first call prepares the layer
            torch.testing.assert_close(ours(x), theirs(x))


def test_what_it_does_not_run_is_refused_by_name():
    with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
        gpu_lstm.SLSTM(3, 4, backend="numba").double()(torch.zeros(20, 2, 3, dtype=torch.float64))
    refused = available.why_unavailable(Backend.NUMBA, torch.device("cuda", 0), torch.float32)
    assert str(refused) == "backend 'numba' runs on CPU tensors, got cuda:0"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("words", ["deep", "gru", "slstm", "masks", "norms", "stack", "ragged packed", "projected"])
def test_half_precision_has_the_dtypes_of_the_reference_in_every_kind_of_route(words, autocast):
    """The noise of a seed is the same, too. A graph of torch.compile computes the same bits."""
    dtype, size = torch.bfloat16, (9, 5, 3, 6, *[2] * ("projected" in words))  # T, B, I, H, P
    ours, (x, hx, rest) = drawn(size, words, backend="numba")
    ours.to(torch.float32 if autocast else dtype)
    (theirs := copy.deepcopy(ours)).backend = "reference"

    def results_of(call, module):
        given = partial(results, module, x, hx, call=torch.autocast("cpu", dtype, enabled=autocast)(call), **rest)
        found = given()
        with torch.no_grad():
            return found | {f"{name} alone": t for name, t in given().items()}

    found, expected = results_of(ours, ours), results_of(theirs, theirs)
    assert [t.dtype for t in found.values()] == [t.dtype for t in expected.values()]
    for name, their in expected.items():
        torch.testing.assert_close(found[name].float(), their.float(), rtol=0, atol=0.05 * float(their.abs().max()))
    torch._dynamo.reset()
    assert_identical(results_of(torch.compile(ours, backend="eager"), ours), found)


def test_the_rule_leaves_watched_calls_as_they_were():
    gru, x = gpu_lstm.GRU(3, 4), torch.randn(20, 2, 3)
    assert "gpu_lstm::" not in str(torch.jit.trace(gru.eval(), x).inlined_graph)
