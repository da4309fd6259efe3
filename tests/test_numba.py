"""Tests of the compiled loops for CPUs alone. Others, of place "numba", are in test_layer.py and test_slstm.py."""

import contextlib
import copy
import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cases import built, call_of, check, with_random_parameters
from conftest import ROOT
from pairs import results
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.call import choices
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available, race, route
from gpu_lstm.kernels import cache, numba_rnn
from gpu_lstm.kernels.numba_rnn import build, launch
from gpu_lstm.kernels.numba_rnn.equations import GRU, LSTM
from gpu_lstm.verification import verify

numba = pytest.importorskip("numba")
import llvmlite.binding  # noqa: E402

from gpu_lstm.kernels.numba_rnn import functions, steps  # noqa: E402

F32 = np.finfo(np.float32)


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
    """Sizes fill no vector, one panel, and several. One step has no panels, and is tested, too."""
    for inputs, hidden in ((3, 6), (17, 34), (40, 66)):
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


@pytest.fixture
def nothing_raced(monkeypatch, nothing_cached):
    """Backend 'auto' follows the rule for CPUs."""
    monkeypatch.setenv(choices.RACE_VARIABLE, "off")


FORKED = """
import os, torch, gpu_lstm
from gpu_lstm.kernels.numba_rnn import launch
torch.set_num_threads(2)
launch.LEAST = 1
gru, x = gpu_lstm.GRU(3, 20, backend="numba"), torch.randn(6, 8, 3)
expected, _ = gru(x)
if (child := os.fork()) == 0:
    found, _ = gru(x)
    os._exit(not torch.equal(found, expected))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_computes():
    """OpenMP's threads are gone there."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60, cwd=ROOT)


def test_functions_are_right_to_two_units_in_the_last_place():
    names = "exp", "sigmoid", "tanh", "above"

    @numba.njit
    def each(x, out):
        for j in range(len(x)):
            out[0, j], out[1, j] = functions.exp(x[j]), functions.sigmoid(x[j])
            out[2, j], out[3, j] = functions.tanh(x[j]), functions.above(x[j])

    x = np.concatenate([np.linspace(-80, 80, 20_001), np.logspace(-30, 0, 500), [0, np.inf, -np.inf, np.nan]]).astype(
        "f"
    )
    found, wide = np.empty((4, len(x)), np.float32), x.astype(float)
    each(x, found)
    with np.errstate(over="ignore"):
        exact = np.exp(wide), 1 / (1 + np.exp(-wide)), np.tanh(wide), np.log1p(np.exp(-abs(wide)))
    for name, ours, true in zip(names, found, exact):
        finite = np.isfinite(x)
        unit = F32.eps * np.maximum(abs(true), F32.tiny)
        assert (abs(ours - true) / unit)[finite].max() <= 2, name
        assert np.isnan(ours[-1]), name
    np.testing.assert_allclose(found[1:, -3:-1], [[1, 0], [1, -1], [0, 0]], atol=1e-37)  # of infinities


ONE_LOOP = """
import sys
from gpu_lstm.kernels.numba_rnn import build
build.function(sys.argv[1])
"""
BOTH_LOOPS = """
import torch, gpu_lstm
for kind in gpu_lstm.LSTM, gpu_lstm.GRU, gpu_lstm.SLSTM:
    grads, x = [], torch.randn(6, 3, 4)
    modules = [kind(4, 5, backend=backend) for backend in ("reference", "numba")]
    for module in modules:
        module.load_state_dict(modules[0].state_dict())
        y, _ = module(x)
        grads.append((y, *torch.autograd.grad(y.square().sum(), module.parameters())))
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected)
"""


def test_loops_that_other_processes_have_kept_are_linked_to_their_own_functions(tmp_path):
    """Numba numbers the functions of each process anew, so that names would be the same in the two loops."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c"]
    others = [subprocess.Popen([*command, ONE_LOOP, name], cwd=ROOT, env=environment) for name in launch.LOOPS]
    assert [other.wait(300) for other in others] == [0, 0]
    subprocess.run([*command, BOTH_LOOPS], check=True, timeout=300, cwd=ROOT, env=environment)


def little(address):
    """Compiled in no time."""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No function is compiled yet, and results go to a folder of this test."""
    monkeypatch.setattr(steps, "little", little, raising=False)
    monkeypatch.setattr(build, "function", inspect.unwrap(build.function))
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "cache")
    cache.warn_once.cache_clear()
    return tmp_path / "cache"


def test_a_compiled_function_is_kept_for_those_who_have_all_that_decides_it(fresh, monkeypatch, caplog):
    def said():
        caplog.clear()
        with caplog.at_level("INFO", "gpu_lstm"):
            build.function("little")(0)
        return "compiles" in caplog.text

    assert [said(), said()] == [True, False]
    with monkeypatch.context() as patch:  # of the same package in another place
        code = little.__code__.replace(co_filename=__file__.replace("test_", "oracle_"))
        patch.setattr(steps, "little", type(little)(code, globals()))
        assert not said()
    assert fresh.stat().st_mode & 0o077 == 0
    for owner, name, value in (
        (cache, "sources", lambda *_: "edited"), (numba, "__version__", "0.99"),
        (llvmlite.binding, "get_host_cpu_name", lambda: "another"), (llvmlite, "__version__", "0.99"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert said()
            assert "the loops in the cache are of another version or CPU" in caplog.text


def test_what_calls_compile_is_kept():
    run(gpu_lstm.LSTM(3, 4, layer_norm=True, backend="numba"), torch.randn(9, 2, 3))
    run(gpu_lstm.LSTM(3, 4, backend="numba"), torch.randn(9, 2, 3))
    for name in launch.LOOPS:
        assert build.files_of(build.folder(name), name), name


def test_what_can_only_be_read_is_used_and_what_is_damaged_is_compiled_again(fresh, monkeypatch):
    def hits():
        return build.function("little").compiled.cache_hits

    assert [hits(), hits()] == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert hits() == 1
    with monkeypatch.context() as patch:  # somebody else's
        patch.setenv(cache.SHARED, str(fresh))
        patch.setattr(cache, "folder", lambda: None)
        assert hits() == 1
    for file in fresh.rglob("*.nb[ci]"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="a compiled loop in .* is damaged, and is compiled again: EOFError"):
        assert hits() == 0
    assert [hits(), hits()] == [0, 1]


@pytest.mark.parametrize(("fault", "said"), [
    (lambda *_: False, "the compiled little loop is not kept for .*: PermissionError: .* is read-only; XDG_CACHE"),
    (OSError(28, "No space left on device"), "the compiled little loop is not kept for .*: No space left on device; X"),
])  # fmt: skip
def test_a_folder_that_takes_nothing_is_named_once_with_the_reason(fresh, monkeypatch, fault, said):
    if isinstance(fault, OSError):
        monkeypatch.setattr(build.Path, "touch", Mock(side_effect=fault))
    else:
        monkeypatch.setattr(os, "access", fault)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            build.function("little")(0)
    assert len(caught) == 1
    assert re.search(said, str(caught[0].message))


def test_an_error_of_the_compiler_is_short_and_says_where(fresh, monkeypatch, recwarn):
    def wrong(address):
        address + "no number"

    monkeypatch.setattr(steps, "little", wrong)
    said = (
        r"^Numba .* cannot compile the little loop: No implementation of .* During: .* at .*steps.py \(\d+\) Please rep"
    )
    with pytest.raises(RuntimeError, match=said) as raised:
        build.function("little")
    assert len(str(raised.value)) < 500
    assert not recwarn.list


def test_a_verdict_ends_with_whatever_made_or_runs_the_loop(fresh, monkeypatch):
    """A right loop of another Numba or CPU is verified again, and one that was wrong there is not wrong here."""
    gru, x = gpu_lstm.GRU(3, 4, backend="numba"), torch.randn(9, 2, 3)
    verdicts = Mock(return_value="wrong")
    monkeypatch.setattr(verify, "_verdict", verdicts)

    def call():
        for function in (cache.machine, cache.warn_once):
            function.cache_clear()  # as another process
        route.forget()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            gru(x)

    for number, (owner, name, value) in enumerate([
        (numba, "__version__", numba.__version__), (numba, "__version__", "0.99"), (llvmlite, "__version__", "0.99"),
        (llvmlite.binding, "get_host_cpu_name", lambda: "another"),
        (llvmlite.binding.FeatureMap, "flatten", lambda features: "+sse2"),
    ], start=1):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            verdicts.return_value = "wrong"
            for _ in range(2):
                with pytest.raises(RuntimeError, match="no compiled loop can run this layer on this CPU: wrong"):
                    call()
        assert verdicts.call_count == number
    verdicts.return_value = "right"
    with monkeypatch.context() as patch:
        patch.setattr(numba, "__version__", "1.0")
        call()


def test_without_a_place_to_keep_it_a_function_is_compiled_each_time(fresh, caplog):
    fresh.write_text("a file")
    said = "the compiled little loop is not kept for the next process in .*: File exists"
    with pytest.warns(UserWarning, match=said):
        build.function("little")(0)
    assert not any(fresh.parent.rglob("*.nbi"))


@pytest.mark.parametrize(
    ("version", "error", "said"),
    [("0.60.0", None, "Numba 0.60.0 is too old"), (None, ImportError("No module"), "No module"),
     (None, SystemError("broken"), "SystemError: broken")],
)  # fmt: skip
def test_without_a_numba_that_works_everything_is_as_before(version, error, said, monkeypatch, recwarn):
    def import_packages():
        raise error

    if version:
        monkeypatch.setattr(numba, "__version__", version)
        monkeypatch.setattr(numba, "version_info", numba.version_info._replace(short=(0, 60)))
    else:
        monkeypatch.setattr(numba_rnn, "import_packages", import_packages)
    monkeypatch.setattr(available, "import_problem", inspect.unwrap(available.import_problem))
    route.forget()
    gru, x = gpu_lstm.GRU(3, 4), torch.randn(20, 2, 3)
    explained = gpu_lstm.explain(gru, x)
    assert (explained.backend, said in explained.others["numba"]) == ("torch", True)
    assert 'pip install "numba>=0.61"' in explained.others["numba"]
    gru(x)
    assert len([w for w in recwarn if "numba" in str(w.message)]) == isinstance(error, SystemError)
    with pytest.raises(ImportError, match="backend 'numba' needs Numba"):
        gpu_lstm.GRU(3, 4, backend="numba")(x)
    route.forget()


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
    size = (*SIZE, 2) if "projected" in given else SIZE
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


# Planted faults: a loop is given wrong sizes or addresses. Verification finds each, and `auto` uses another backend.

as_on_a_new_machine = pytest.mark.usefixtures(
    "nothing_cached", "nothing_raced", "exact_float32_products", "nan_in_fresh_memory"
)
SIZE = 9, 5, 3, 6  # T, B, I, H
ALL = "ragged states peepholes"


def told(**changes: Callable[[int], int]) -> Callable:
    """Loops are told other sizes, or addresses of tensors."""

    def plant(monkeypatch):
        put = launch.put

        def changed(call, arguments):
            call = put(call, arguments)
            for name, change in changes.items():
                call[name] = change(int(call[name]))
            return call

        monkeypatch.setattr(launch, "put", changed)

    return plant


def compiled(function: Callable) -> Callable:
    return lambda monkeypatch: monkeypatch.setattr(build, "function", function)


def without(name: str) -> Callable:
    return told(**{name: lambda address: 0})


def one_further(name: str) -> Callable:
    return told(**{name: lambda address: address and address + 4})


@as_on_a_new_machine
@pytest.mark.parametrize(("plant", "words", "said"), [
    (told(B=lambda count: count + 1), "gru ragged", "forward wrote up to .* past the end of"),
    (one_further("h"), ALL, r"forward wrote up to 4 bytes past the end of h \["),
    (one_further("dgates"), ALL, r"backward wrote up to 4 bytes past the end of dgates \["),
    (told(H=lambda count: count - 1), "gru", "RMS"), (told(reverse=lambda was: 1 - was), "gru ragged", "RMS"),
    (told(cell=lambda was: LSTM if was == GRU else GRU), ALL, "RMS"), (without("resets"), "gru resets", "RMS"),
    (told(from_x=lambda count: count - 1), ALL, "RMS"), (without("lengths"), "gru ragged", "RMS"),
    (without("weight_peephole"), ALL, "RMS"), (without("reset_c"), ALL, "RMS"), (without("bias_hh"), "gru", "RMS"),
    (without("h0"), "zoneout", "RMS"), (without("dreset_c"), ALL, "the RMS error of the gradient of reset_c"),
    (told(cell=lambda was: LSTM), "slstm resets", "RMS"), (told(T=lambda steps: steps - 1), "slstm", "RMS"),
    (without("gain_hh"), "norms", "RMS"), (without("gain_c"), "norms", "RMS"), (without("bias_c"), "norms", "RMS"),
    (one_further("v_hh"), "norms", "RMS"), (one_further("scale_c"), "norms", "RMS"),
    (compiled(lambda name: lambda address: None), "gru", "RMS"),  # computes nothing
    (compiled(Mock(side_effect=RuntimeError("no compiler"))), "gru", "no compiler"),
])  # fmt: skip
def test_a_loop_that_is_wrong_runs_nothing(monkeypatch, plant, words, said):
    """One warning says so, and there is no second trial; asked for by name it raises."""
    plant(monkeypatch)
    verdicts = Mock(side_effect=verify._verdict)
    monkeypatch.setattr(verify, "_verdict", verdicts)
    with pytest.warns(UserWarning, match=f"'auto' uses '(torch|reference)' for .*: .*{said}") as warned:
        check(SIZE, words, None, torch.float32, seeds=1)
    assert len([each for each in warned if "'auto' uses" in str(each.message)]) == 1
    asked = verdicts.call_count
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gpu_lstm")
        check(SIZE, words, None, torch.float32, seeds=1)
    module = with_random_parameters(built(SIZE, {*words.split()}), 0)
    x, hx, rest = call_of(module, SIZE, {*words.split()}, 0)
    assert gpu_lstm.explain(module, x, **rest).others["numba"].startswith("the kernels fail: ")
    assert verdicts.call_count == asked
    module.backend = "numba"
    with pytest.raises(RuntimeError, match=said):
        results(module, x, hx, **rest)


@as_on_a_new_machine
@pytest.mark.filterwarnings("error:gpu_lstm")
@pytest.mark.parametrize("hidden", [1, 2])
@pytest.mark.parametrize("words", ["norms", "norms expected", "norms masks ragged resets", "norm-c zoneout"])
def test_a_right_loop_of_few_units_is_not_refused_where_terms_cancel(words, hidden):
    """The gradient of LN(c) of one unit is rounding alone."""
    module, x = built((4, 3, 3, hidden), {*words.split()}, backend="numba"), torch.randn(4, 3, 3, requires_grad=True)
    call = call_of(
        with_random_parameters(module.train("expected" not in words), 0), (4, 3, 3, hidden), {*words.split()}, 0
    )
    output, (h, _) = module(x, call.hx, **call.rest)
    for given in ((output,), (h,), (output, h)):
        torch.autograd.grad(given, x, [torch.ones_like(t) for t in given], retain_graph=True)
    assert {verdict for *_, verdict in cache.entries(cache.CHECKS)} == {"right"}


@as_on_a_new_machine
@pytest.mark.parametrize("hidden", [1, 2, 3])
@pytest.mark.parametrize(("plant", "words"), [
    (told(reverse=lambda was: 1 - was), "ragged"), (without("resets"), "norms resets"), (without("bias_hh"), "gru"),
    (without("lengths"), "norms ragged"), (without("weight_peephole"), "norms peepholes"), (without("dh"), "norm-c"),
    (told(cell=lambda was: LSTM), "slstm"), (without("zoneout_c"), "norm-hh zoneout"), (without("c0"), "norm-hh"),
])  # fmt: skip
def test_a_fault_in_few_units_is_found(monkeypatch, plant, words, hidden):
    plant(monkeypatch)
    size = 4, 3, 3, hidden
    module = with_random_parameters(built(size, {*words.split()}, backend="numba"), 0)
    x, hx, rest = call_of(module, size, {*words.split()}, 0)
    with pytest.warns(UserWarning, match="failed its verification"), pytest.raises(RuntimeError, match="RMS"):
        results(module, x, hx, **rest)


@as_on_a_new_machine
@pytest.mark.parametrize("words", ["", "gru"])
@pytest.mark.parametrize("given", [(1,), (0, 1)], ids=["h_n", "output and h_n"])
def test_a_backward_pass_whose_loop_is_refused_runs_by_the_reference(monkeypatch, given, words):
    """The pass is met first in a user's backward(): one warning says so; asked for by name it raises."""
    real = verify._verdict
    verdicts = Mock(side_effect=lambda *a: "planted" if a[1].backward and a[1].dh_n else real(*a))
    monkeypatch.setattr(verify, "_verdict", verdicts)
    module = with_random_parameters(built(SIZE, {*words.split()} or {"norms"}), 0)
    expected = copy.deepcopy(module)
    expected.backend, x = "reference", call_of(module, SIZE, {"no-hx"}, 0).x.requires_grad_()

    def gradients(module):
        output, states = module(x)
        found = output, states if words else states[0]
        return torch.autograd.grad([found[k].square().sum() for k in given], [x, *module.parameters()])

    with pytest.warns(UserWarning, match="'auto' does without the kernels of 'numba' for .*: planted") as warned:
        found = [gradients(module) for _ in range(2)]
    for each in found:
        torch.testing.assert_close(each, gradients(expected), rtol=2e-4, atol=2e-5)
    assert len([each for each in warned if "does without" in str(each.message)]) == 1
    assert len({str(call.args[1:2]) for call in verdicts.call_args_list}) == verdicts.call_count
    module.backend = "numba"
    with pytest.raises(RuntimeError, match="no compiled loop can run this layer on this CPU: planted"):
        gradients(module)


@as_on_a_new_machine
def test_a_call_in_a_transform_that_needs_no_gradient_falls_back_as_well(monkeypatch):
    monkeypatch.setattr(verify, "_verdict", lambda *_: "planted")
    gru, x = gpu_lstm.GRU(3, 6).requires_grad_(False), torch.randn(9, 5, 3)
    with pytest.warns(UserWarning, match="does without the kernels of 'numba'"):
        found = torch.func.grad(lambda w: (w * gru(x)[0]).sum())(torch.ones(()))
    gru.backend = "reference"
    torch.testing.assert_close(found, gru(x)[0].sum())


@as_on_a_new_machine
@pytest.mark.parametrize("plant", [None, without("lengths")], ids=["right", "wrong"])
def test_a_loop_is_verified_before_a_graph_runs_it(monkeypatch, plant):
    """And its verdict is kept on disk."""
    torch._dynamo.reset()
    if plant is not None:
        plant(monkeypatch)
    gru, x, lengths = gpu_lstm.GRU(3, 6), torch.randn(9, 5, 3), torch.tensor([9, 4, 0, 2, 7])
    with pytest.warns(UserWarning, match="does without the kernels of 'numba'") if plant else contextlib.nullcontext():
        found = torch.compile(gru, backend="eager", fullgraph=True)(x, lengths=lengths)
    assert [verdict == "right" for *_, verdict in cache.entries(cache.CHECKS)] == [plant is None]
    gru.backend = "reference"
    torch.testing.assert_close(found, gru(x, lengths=lengths))


@as_on_a_new_machine
@pytest.mark.filterwarnings("error:gpu_lstm")
@pytest.mark.parametrize(("cls", "hidden"), [(gpu_lstm.GRU, 260), (gpu_lstm.LSTM, 384)])
def test_errors_of_torchs_products_are_no_fault_of_a_loop(cls, hidden):
    """Those with few columns, here of the gradient of x."""
    x, resets = torch.randn(3, 3, 3, requires_grad=True), torch.eye(3).bool()
    cls(3, hidden, backend="numba")(x, resets=resets)[0].sum().backward()
    assert [verdict for *_, verdict in cache.entries(cache.CHECKS)] == ["right"] * 2
