"""The compiled loops for CPUs: races, calls, threads, half precision. test_layer.py and test_slstm.py have others."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cases import built, call_of, check, with_random_parameters
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available, race, route
from gpu_lstm.kernels import cache, numba_rnn
from gpu_lstm.kernels.numba_rnn import build, launch
from gpu_lstm.verification import verify

numba = pytest.importorskip("numba")


F32 = np.finfo(np.float32)


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
    """And a plain LSTM only where the loops are compiled already."""
    seconds = {"numba": 2e-3, "torch": 2e-3} | {winner: 1e-3}
    raced = Mock(
        side_effect=lambda rivals, now: {name: (run(), [seconds[name]] * 3)[1] for name, run in rivals.items()}
    )
    monkeypatch.setattr(race, "race", raced)
    gru, lstm, x = gpu_lstm.GRU(3, 6), gpu_lstm.LSTM(3, 6), torch.randn(20, 2, 3)
    with torch.set_grad_enabled(training):
        for given in (x, x[:18], x.repeat(1, 1, 1)):
            gru(given)
            assert gpu_lstm.explain(gru, given).backend == winner
        lstm(x)
        with monkeypatch.context() as patch:
            patch.setattr(numba_rnn, "is_compiled", lambda *_: False)
            gpu_lstm.LSTM(3, 7)(x)
    assert raced.call_count == len([*cache.entries(cache.RACES)]) == 2


def test_a_short_call_does_without_loops_that_are_not_compiled(monkeypatch, nothing_cached):
    raced = Mock(side_effect=race.race)
    monkeypatch.setattr(race, "race", raced)
    gru, x = gpu_lstm.GRU(3, 6), torch.randn(8, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(numba_rnn, "is_compiled", lambda *_: False)
        gru(x)
        assert gpu_lstm.explain(gru, x).others["numba"].startswith("the loops are not compiled yet")
    assert not raced.called
    route.forget()
    run(gpu_lstm.GRU(3, 6, backend="numba"), x)  # which compiles
    gru(x)
    assert raced.called


def run(module, x, **rest):
    x = x.clone().requires_grad_()
    y, _ = module(x, **rest)
    return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


@pytest.fixture
def module_and_call(monkeypatch):
    """A GRU of which each four sequences pay for a thread, and a call with lengths and resets."""
    monkeypatch.setattr(launch, "LEAST", 1)
    torch.manual_seed(0)
    module, x = gpu_lstm.GRU(3, 20, bidirectional=True, backend="numba"), torch.randn(6, 14, 3)
    yield module, x, dict(lengths=torch.arange(14) % 7, resets=torch.rand(6, 14) < 0.3)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.mark.parametrize("way", ["OpenMP", "pool"])
def test_threads_compute_the_same_numbers(way, module_and_call, monkeypatch):
    module, x, rest = module_and_call
    alone, counts = run(module, x, **rest), []
    if way == "pool":
        monkeypatch.setattr(build, "parallel", lambda: None)
    elif build.parallel() is None:
        pytest.skip("torch does not use GNU's OpenMP here")
    run_in = build.run
    monkeypatch.setattr(build, "run", lambda f, a, count: (counts.append(count), run_in(f, a, count)))
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        for ours, expected in zip(run(module, x, **rest), alone):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)  # torch's own products may differ
        assert set(counts) == {1, min(count, 14 // 4)}  # one thread makes the panels of a weight
        counts.clear()


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


def in_float64(module):
    """The same module by the reference in float64."""
    wide = copy.deepcopy(module).double()
    wide.backend = "reference"
    return wide


def run_like(module, x, **rest):
    """`run`, and an inference."""
    with torch.no_grad():
        y = module(x, **rest)[0]
    return y, *run(module, x, **rest)


def test_the_error_of_a_long_sum_is_at_most_twice_the_error_of_the_reference():
    """A call of one sequence, for which torch's own products have their smallest errors."""
    module, x, y = gpu_lstm.SLSTM(512, 512, heads=4), torch.randn(16, 1, 512), {}
    with torch.no_grad():
        true = in_float64(module)(x.double())[0]
        for module.backend in ("numba", "reference"):
            y[module.backend] = (module(x)[0] - true).norm()
    assert y["numba"] <= 2 * y["reference"]


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("lengths", [[6, 6, 5, 2, 0], [0, 3, 6, 1, 0], [0] * 5], ids=["sorted", "unsorted", "empty"])
@pytest.mark.parametrize("words", ["both", "gru both", "slstm heads", "masks both", "norms", "four-heads both"])
def test_past_the_longest_sequence_all_is_zero_and_nothing_is_computed(words, lengths):
    """Results and gradients, also those of padding, are compared with the float64 reference."""
    module = with_random_parameters(built((11, 5, 3, 12), {*words.split()}, backend="numba"), 0)
    x, rest = torch.randn(11, 5, 3), dict(lengths=torch.tensor(lengths))
    if "masks" in words:
        module.eval()  # without noise, which the two dtypes would not draw alike
    expected = run_like(in_float64(module), x.double(), **rest)
    x[6:] = torch.nan  # as padding may be
    for found, true in zip(run_like(module, x, **rest), expected):
        torch.testing.assert_close(found, true.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", ["", "gru"])
def test_an_inference_that_resets_to_given_states(words):
    """The loop multiplies x only where nothing else is in the gates: here W_hh h of the states is."""
    for steps_ in (1, 5):
        check((steps_, 4, 3, 6), f"{words} ragged states no-grad", "numba", torch.float32, seeds=1)


@pytest.mark.parametrize("build_", [
    lambda: (gpu_lstm.LSTM(3, 20, 2), torch.nn.LSTM(3, 20, 2)),
    lambda: (gpu_lstm.GRU(3, 20, 2), torch.nn.GRU(3, 20, 2)),
    lambda: (gpu_lstm.GRU(17, 5, bias=False, batch_first=True), torch.nn.GRU(17, 5, bias=False, batch_first=True)),
    lambda: (gpu_lstm.LSTMCell(3, 20), torch.nn.LSTMCell(3, 20)),
    lambda: (gpu_lstm.GRUCell(3, 20), torch.nn.GRUCell(3, 20)),
    lambda: (gpu_lstm.SLSTM(3, 20, heads=2), gpu_lstm.SLSTM(3, 20, heads=2, backend="reference")),
    lambda: (gpu_lstm.StackedGRU(3, [8, 5]), gpu_lstm.StackedGRU(3, [8, 5], backend="reference")),
])  # fmt: skip
def test_a_step_is_one_call_of_a_compiled_function_a_layer(monkeypatch, build_):
    (ours, theirs), calls = build_(), []
    theirs.load_state_dict(ours.state_dict())
    ours.backend = "numba"
    is_cell = isinstance(ours, torch.nn.RNNCellBase)
    x = (
        torch.randn(2, ours.input_size)
        if is_cell
        else torch.randn(*([2, 1] if ours.batch_first else [1, 2]), ours.input_size)
    )
    with torch.no_grad():
        found = expected = ours(x)  # which may compile
        run_in = build.run
        monkeypatch.setattr(build, "run", lambda *given: (calls.append(given), run_in(*given)))
        for n in range(3):
            states = (None, None) if n == 0 else (found, expected) if is_cell else (found[1], expected[1])
            found, expected = ours(x, states[0]), theirs(x, states[1])
            torch.testing.assert_close(found, expected)
            if not is_cell:
                found[0].fill_(torch.nan)  # which changes no state
    layers = 1 if is_cell else getattr(ours, "num_layers", 2)
    assert len(calls) == 3 * layers


@pytest.mark.parametrize("words", ["norms", "norm-hh", "norm-c", "masks peepholes"])
def test_all_steps_of_a_variant_are_one_call_of_a_loop(monkeypatch, words):
    module, x = built((7, 5, 3, 12), {*words.split()}, backend="numba"), torch.randn(7, 5, 3)
    run(module, x)  # which compiles and verifies
    calls, run_in = [], build.run
    monkeypatch.setattr(build, "run", lambda *given: (calls.append(given), run_in(*given)))
    run(module, x)
    assert len(calls) == 2


@pytest.mark.parametrize("steps", [1, 5])
def test_an_inference_normalises_the_product_with_x(steps):
    """This layer norm is outside the time loop, so a loop that multiplies x itself would leave it out."""
    ours = gpu_lstm.LSTM(3, 6, layer_norm=("ih",), backend="numba")
    theirs, x = copy.deepcopy(ours), torch.randn(steps, 2, 3)
    theirs.backend = "reference"
    with torch.no_grad():
        for _ in range(2):  # the first call prepares the layer
            torch.testing.assert_close(ours(x), theirs(x))


def test_what_it_does_not_run_is_refused_by_name_and_never_chosen():
    lstm, x = gpu_lstm.SLSTM(3, 4, dtype=torch.float64), torch.zeros(20, 2, 3, dtype=torch.float64)
    assert gpu_lstm.explain(lstm, x).backend == "reference"
    lstm.backend = "numba"
    with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
        lstm(x)
    refused = available.why_unavailable(Backend.NUMBA, torch.device("cuda", 0), torch.float32)
    assert str(refused) == "backend 'numba' runs on CPU tensors, got cuda:0"


@pytest.mark.parametrize("words", [
    "", "gru deep both", "ragged resets states", "gru packed", "slstm heads", "norms peepholes", "expected", "no-grad",
    "gru residual", "cell", "recompute four-heads"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(words, dtype):
    """Errors are at most twice those of torch's own, or of the reference, in the same dtype."""
    check((9, 5, 3, 8), words, "numba", dtype)


def bits(t):
    return t.dtype, t.float().tolist()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("words", ["deep", "gru", "slstm", "masks", "norms", "stack", "ragged packed", "projected"])
def test_half_precision_has_the_dtypes_of_the_reference_in_every_kind_of_route(words, autocast):
    """The noise of a seed is the same, too. A graph of torch.compile computes the same bits."""
    dtype, given = torch.bfloat16, {*words.split()}
    size = (9, 5, 3, 6, *[2] * ("projected" in given))  # T, B, I, H, P
    ours = with_random_parameters(built(size, given, backend="numba"), 0)
    if not autocast:
        ours.to(dtype)
    (theirs := copy.deepcopy(ours)).backend = "reference"
    x, hx, rest = call_of(ours, size, given, 0)
    x, hx = x.to(dtype).requires_grad_(), hx if autocast else None

    def results_of(call, module):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=autocast):
            y, states = call(x, hx, **rest)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])
        with torch.autocast("cpu", dtype, enabled=autocast), torch.no_grad():
            return tree_leaves((y, states, gradients, call(x, hx, **rest)))

    found, expected = results_of(ours, ours), results_of(theirs, theirs)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    for our, their in zip(found, expected):
        scale = float(their.abs().max())
        torch.testing.assert_close(our.float(), their.float(), rtol=0, atol=0.05 * scale)
    torch._dynamo.reset()
    compiled = results_of(torch.compile(ours, backend="eager"), ours)
    assert [*map(bits, compiled)] == [*map(bits, found)]


def test_a_float32_c_beside_half_precision_is_not_rounded():
    lstm = gpu_lstm.LSTM(3, 4, backend="numba").bfloat16()
    h, c = torch.zeros(1, 2, 4, dtype=torch.bfloat16), torch.rand(1, 2, 4)
    assert torch.equal(lstm(torch.zeros(9, 2, 3).bfloat16(), (h, c), lengths=torch.tensor([0, 0]))[1][1], c)


def test_auto_races_the_loops_in_half_precision(monkeypatch, nothing_cached):
    raced = Mock(side_effect=race.race)
    monkeypatch.setattr(race, "race", raced)
    gru, x = gpu_lstm.GRU(3, 6), torch.randn(20, 2, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, _ = gru(x.bfloat16())
    assert (raced.call_count, {*raced.call_args[0][0]}, y.dtype) == (1, {"numba", "torch"}, torch.bfloat16)


def test_the_rule_leaves_watched_calls_as_they_were():
    gru, x = gpu_lstm.GRU(3, 4), torch.randn(20, 2, 3)
    assert gpu_lstm.explain(gru, x).backend == "numba"
    assert "gpu_lstm::" not in str(torch.jit.trace(gru.eval(), x).inlined_graph)


def test_a_program_runs_where_there_is_no_numba(monkeypatch):
    gru, x = gpu_lstm.GRU(3, 4), torch.randn(20, 2, 3)
    program, expected = torch.export.export(gru, (x,)).module(), gpu_lstm.GRU(3, 4, backend="torch")
    expected.load_state_dict(gru.state_dict())

    def layer_of(*_):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(verify, "layer_of", layer_of)
    cache.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="without 'numba', for which the program was made: No module named 'numba'"):
        torch.testing.assert_close(program(x), expected(x))
