"""The first call of a kind of layer on a card with a stubbed driver: trials, log lines, and what users get."""

import contextlib
import gc
import math
import random
import threading
import weakref
from types import SimpleNamespace
from unittest.mock import ANY, MagicMock, Mock, call, patch

import pytest
import torch
from comparing import both_ways
from standing_in import CUDA, H100, plan_of, torch_finds

from gpu_lstm import __main__ as doctor
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.dispatch.available import select
from gpu_lstm.dispatch.route import forget
from gpu_lstm.kernels import layer as layers
from gpu_lstm.kernels.layer import MOST_LAYERS, aligned, kept_layer
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.timeouts import DEVICE_ERRORS
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans import choose

PROBLEM = Problem(2, 64, 256, torch.float16)  # it has many plans of the cooperative family
PLANS = choose.plans(PROBLEM, H100, False)
FORWARD = Pass()
CARD_OF = choose.card_of  # tests replace it
GIVEN = launch.call_of(PROBLEM, torch.device("meta"))[1].inputs


def _choose(monkeypatch, load=lambda *_: None, pass_=FORWARD, verify=None):
    """Return the plan, and the columns of the plans tried, which tell them apart. load(kernel, columns) returns the
    spills."""
    tried = []

    def loaded(kernel, grid, arguments):
        tried.append(arguments["S"].UNITS)
        return SimpleNamespace(n_spills=load(kernel, tried[-1]) or 0)

    monkeypatch.setattr(choose, "load", loaded)
    return kept_layer(launch, PROBLEM, CUDA, verify).prepared(pass_, GIVEN).plan, tried


def test_the_first_plan_that_loads_is_chosen_kept_and_logged(an_h100, monkeypatch, caplog):
    assert kept_layer(launch, PROBLEM, CUDA).chosen(Pass())[:2] == (PLANS[0], False), "before there is a choice"
    caplog.set_level("DEBUG", "gpu_lstm")
    assert _choose(monkeypatch) == (PLANS[0], [PLANS[0].units])
    assert _choose(monkeypatch) == (PLANS[0], []), "from the second call on nothing is tried"
    assert caplog.messages == [f"{PROBLEM}, {FORWARD}: {PLANS[0]}"]
    for pass_ in (Pass(save=False), Pass(True), Pass(True, dh=False), Pass(True, dh_n=False)):
        assert len(_choose(monkeypatch, pass_=pass_)[1]) == 1, "but other kernels are"
    forget()
    assert _choose(monkeypatch)[1] == [PLANS[0].units]


def test_two_blocks_of_a_multiprocessor_must_have_room_in_its_shared_memory(monkeypatch):
    """The compiled kernel counts, since other versions of Triton take more than was planned. A multiprocessor of an
    H100 has 228 KB."""
    launches = [(SimpleNamespace(__name__="kernel"), (1,), {})]
    metadata = SimpleNamespace(target=SimpleNamespace(arch=90))
    monkeypatch.setattr(choose, "load", lambda *_: SimpleNamespace(n_spills=0, metadata=metadata))
    for metadata.shared, said in ((113 * 1024, "None"), (114 * 1024, "2 blocks of kernel want 116736 bytes")):
        assert choose.why_it_does_not_fit(launches, 1) is None
        assert said in str(choose.why_it_does_not_fit(launches, 2))


def test_while_a_graph_is_captured_nothing_is_verified_and_nothing_is_kept(an_h100, monkeypatch):
    """A verification would become part of the graph. A plan that was not verified must not count as verified later."""
    verify = Mock(side_effect=lambda *given: "wrong" if given[-1] == PLANS[0] else None)
    torch_finds(monkeypatch, is_current_stream_capturing=True)
    for _ in range(2):
        assert _choose(monkeypatch, verify=verify) == (PLANS[0], [PLANS[0].units])
    assert verify.mock_calls == []
    torch_finds(monkeypatch)
    for _ in range(2):
        assert _choose(monkeypatch, verify=verify)[0] == PLANS[1]
    assert verify.mock_calls == [call(ANY, Pass(), GIVEN, plan) for plan in PLANS[:2]]
    assert {each.args[0].problem for each in verify.call_args_list} == {PROBLEM}
    _choose(monkeypatch, pass_=Pass(True, dh=False, dh_n=False), verify=verify)
    assert verify.call_count == 2, "without a gradient of h there is nothing to verify"
    torch_finds(monkeypatch, is_current_stream_capturing=True)
    for batch in (PROBLEM.batch, PROBLEM.batch - 1):  # a plan that was refused before is not used, nor by another batch
        layers._layers.clear()
        kept = kept_layer(launch, PROBLEM._replace(batch=batch), CUDA, verify).prepared(FORWARD, GIVEN).plan
        assert kept.units == PLANS[1].units != PLANS[0].units


@pytest.mark.filterwarnings("ignore:gpu_lstm")
def test_a_layer_that_has_no_kernel_is_not_asked_again_and_has_none_in_a_capture(an_h100, monkeypatch):
    """A layer for which memory was full is asked again."""
    found, verify = [], Mock(side_effect=[torch.OutOfMemoryError("full"), *["wrong"] * 9])
    layer = kept_layer(launch, PROBLEM, CUDA, verify)
    for capturing in (False, False, False, True):
        torch_finds(monkeypatch, is_current_stream_capturing=capturing)
        found.append((layer.has_kernel(FORWARD, GIVEN), verify.call_count))
    assert found == [(False, 1), *[(False, 1 + choose.MOST + 1)] * 3]
    assert layer.has_kernel(Pass(save=False), GIVEN), "of another pass nothing is known, and nothing is verified now"


@pytest.mark.parametrize("shift", [0, 1, 8])
def test_a_tensor_is_copied_unless_it_is_contiguous_and_aligned(shift):
    storage = torch.arange(200.0).to(torch.float16)
    first = -storage.data_ptr() % 16 // 2 + shift
    t = storage[first : first + 64].view(8, 8)
    assert (aligned(t) is t) == (shift % 8 == 0)
    for each in (t, t.T, t[:, ::2]):
        assert torch.equal(aligned(each), each)
        assert (aligned(each).is_contiguous(), aligned(each).data_ptr() % 16) == (True, 0)


@both_ways
@pytest.mark.parametrize("family", ["resident", "cooperative", "pointwise", "step", "held"])
def test_a_plan_is_launched_as_it_says(family, backward):
    """The launch has the plan's warps, stages, registers and programs. It is cooperative where programs wait for each
    other."""
    batch, hidden, steps = 40, 256 if family in ("cooperative", "held") else 64, 4
    problem = Problem(steps, batch, hidden, torch.float16)
    plan = plan_of(family, problem, backward)
    kernel, grid, arguments = launch.recorded_launches(problem, Pass(backward), plan)[-1]
    assert kernel.__name__ == f"{family}_{'backward' if backward else 'forward'}_kernel"
    assert math.prod(grid) == plan.programs * plan.groups
    options = dict(num_warps=plan.num_warps, maxnreg=min(255, 65536 // (32 * plan.num_warps)), enable_fp_fusion=True)
    options["launch_cooperative_grid"] = family in ("cooperative", "step", "held")
    if family == "step":
        options["num_stages"] = plan.num_stages
    assert {name: arguments.get(name, False) for name in options} == options


@pytest.mark.parametrize(("failure", "said"), [
    (8 // 4, "spills 8 bytes a thread"), *((kind(text), text) for kind, text in (
        (ValueError, "M, N, K >= 16"), (RuntimeError, "PassManager"))),
], ids=str)  # fmt: skip
def test_a_plan_that_does_not_compile_does_not_fit_and_a_log_line_says_why(an_h100, monkeypatch, caplog, failure, said):
    caplog.set_level("INFO", "gpu_lstm")
    found = _choose(monkeypatch, Mock(side_effect=[failure, None]))
    assert found == (PLANS[1], [plan.units for plan in PLANS[:2]])
    assert said in caplog.text


def test_where_no_kernel_compiles_the_error_names_every_reason_but_out_of_memory_is_itself(an_h100, monkeypatch):
    """The error names the plans that are tried: the best ones, and the last resort."""

    def load(kernel, _):
        raise ValueError(f"no {kernel.__name__} today")

    reasons = r"no Triton kernel can run this layer on this card.*no coop.*no step.*today"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=reasons):
            _choose(monkeypatch, load)
    with pytest.raises(RuntimeError, match=r"Read-only file system.*in TRITON_CACHE_DIR\)$"):
        _choose(monkeypatch, Mock(side_effect=OSError(30, "Read-only file system")))
    with pytest.raises(torch.OutOfMemoryError):
        _choose(monkeypatch, Mock(side_effect=torch.OutOfMemoryError("80 GB")))
    assert len(PLANS) > choose.MOST + 1
    plan, tried = _choose(monkeypatch, lambda kernel, _: "step" not in kernel.__name__)
    assert (plan.family.name, len(tried)) == ("step", choose.MOST + 1)


@pytest.fixture
def clock(monkeypatch):
    """The clock of the messages to a user who waits. Each wait takes clock.takes seconds, counted before it begins."""
    clock = SimpleNamespace(now=0.0, takes=0.0)

    class Event:
        def __init__(self):
            self.end = clock.now + clock.takes

        def wait(self, seconds):
            clock.now = min(clock.now + seconds, self.end)
            return clock.now == self.end

        def set(self):
            pass

    def thread(target, daemon):
        return SimpleNamespace(start=target, join=lambda: None)

    monkeypatch.setattr(choose, "threading", SimpleNamespace(Event=Event, Thread=thread))
    monkeypatch.setattr(choose, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_user_who_waits_is_told_what_for_and_how_long_it_has_taken(an_h100, monkeypatch, caplog, clock):
    """The second plan is reported, too, and a trial is not reported as a compilation."""
    clock.takes, refuses = 20.0, Mock(side_effect=["wrong", None])
    assert _choose(monkeypatch, verify=refuses)[0] == PLANS[1]
    layer = "LSTM, H = 256, torch.float16"
    of_plan = (
        f"compiling 1 of at most 4 plans for {layer}; Triton keeps the result",
        f"waiting for the trial of cooperative_forward_kernel for {layer}, plan {{}} of at most 4; if it hangs, end ",
    )
    said = [(text.format(number), seconds) for number in (1, 2) for text in of_plan for seconds in (2, 4, 8, 16)]
    assert len(caplog.messages) == len(said)
    for message, (text, seconds) in zip(caplog.messages, said):
        assert message.startswith(text)
        assert message.endswith(f": {seconds} s so far")


def test_what_is_quick_is_not_mentioned_and_no_thread_stays(an_h100, monkeypatch, caplog, clock):
    clock.takes = choose.SLOW_S
    _choose(monkeypatch, verify=lambda *_: None)
    monkeypatch.undo()
    threads = {*threading.enumerate()}
    with contextlib.suppress(KeyboardInterrupt), choose._logged_if_slow("a trial"):
        assert len({*threading.enumerate()} - threads) == 1
        raise KeyboardInterrupt
    assert {*threading.enumerate()} <= threads
    assert not caplog.messages


# Cards that launch nothing


def selected(asked=None):
    return select(asked, CUDA, doctor.ANY, False)


@pytest.fixture
def card(monkeypatch, nothing_cached):
    """A card that cannot load kernels, for reasons that each test sets."""
    torch_finds(monkeypatch, synchronize=None)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    choose._load_problem.cache_clear()
    with patch.multiple(choose, compile_problem=lambda architecture: None, _context=lambda: 1, _multiprocessors={},
                        in_order=lambda at_once, device, run, *given: run(*given)):  # fmt: skip
        yield
    choose._load_problem.cache_clear()


CAUSES = {  # the error of Triton or of the driver, and a word of the advice to the user
    "no C compiler": (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "gcc"),
    "no Python.h": (RuntimeError("Command '['gcc', 'main.c']' returned non-zero exit status 1."), "python3-dev"),
    "old driver": (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "newer driver"),
    "old driver, PTX": (RuntimeError("the provided PTX was compiled with an unsupported toolchain."), "newer driver"),
    "no room for its launcher": (OSError(28, "No space left on device"), "in TRITON_CACHE_DIR"),
    "no room for kernels": ("PermissionError: [Errno 13] Permission denied: '/.triton'", "in TRITON_CACHE_DIR"),
    "unknown": (OSError("no such thing"), "no such thing"),
    "no library of this name": (FileNotFoundError("Could not find module 'libcuda.so.1'"), "libcuda.so.1"),
    "no cooperative launches": (RuntimeError("Triton Error [CUDA]: operation not supported"), "cooperative launches"),
    "unknown card": ("ptxas fatal: sm_90", "compute capability 9.0: ptxas fatal: sm_90"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_where_nothing_can_be_launched_the_user_is_told_why_and_auto_does_without(card, monkeypatch, recwarn, cause):
    (error, cure), empty = CAUSES[cause], MagicMock()
    monkeypatch.setattr(choose, "load", lambda *_: empty)
    if isinstance(error, str):  # an error of the compiler
        monkeypatch.setattr(choose, "compile_problem", lambda architecture: error)
    elif cause == "no cooperative launches":
        empty.__getitem__.return_value.side_effect = error
    else:
        monkeypatch.setattr(choose, "_context" if "library" in cause else "load", Mock(side_effect=error))
    of_triton = available.import_problem(Backend.TRITON)
    monkeypatch.setattr(available, "import_problem", {Backend.TRITON: of_triton, Backend.CUPY: "not here"}.get)
    with pytest.warns(UserWarning, match="launches nothing on cuda:0.*Backend 'auto' does without it"):
        assert selected() is Backend.TORCH
    with pytest.raises(RuntimeError, match=f"backend 'triton': .*{cure}"):
        selected("triton")
    assert selected() is Backend.TORCH
    assert not recwarn.list, "it is said once"


@pytest.mark.parametrize("error", DEVICE_ERRORS)
def test_an_error_of_the_device_says_nothing_about_kernels_and_is_raised_as_it_is(card, monkeypatch, error):
    """Once the error is over, kernels are launched."""
    monkeypatch.setattr(choose, "load", Mock(side_effect=[error("planted"), MagicMock()]))
    with pytest.raises(error, match="planted"):
        selected("triton")
    assert selected("triton") is Backend.TRITON


def test_an_empty_kernel_is_loaded_once_and_never_into_a_capture(card, monkeypatch):
    loaded = []
    monkeypatch.setattr(choose, "load", lambda kernel, *_: loaded.append(kernel.__name__) or MagicMock())
    for capturing in (True, False, False):
        torch_finds(monkeypatch, is_current_stream_capturing=capturing)
        assert selected("triton") is Backend.TRITON
        assert loaded == ([] if capturing else ["empty_kernel"])


# Batches of many sizes


def _served(monkeypatch, batches, hidden, cell, pass_):
    """Call each batch in this order, as a new process. Return the plan of each, the kernels compiled, and the plans
    verified."""
    forget()
    compiled, verified = set(), []

    def load(kernel, grid, arguments):
        facts = {name: a for name, a in arguments.items() if not isinstance(a, torch.Tensor)} | dict(B=0)
        compiled.add((kernel.__name__, str(facts)))
        return SimpleNamespace(n_spills=0, metadata=SimpleNamespace(shared=0, target=SimpleNamespace(arch=90)))

    monkeypatch.setattr(choose, "load", load)
    problems = [Problem(2, batch, hidden, torch.bfloat16, cell=cell) for batch in batches]
    layers = [kept_layer(launch, problem, CUDA, lambda *given: verified.append(given[-1])) for problem in problems]
    return {layer.problem.batch: layer.prepared(pass_, GIVEN).plan for layer in layers}, compiled, verified


@pytest.mark.parametrize(("cell", "hidden", "backward", "kernels"), [
    ("lstm", 256, False, 8), ("lstm", 768, True, 6), ("gru", 768, True, 5),
])  # fmt: skip
def test_batches_of_any_size_share_kernels_in_any_order(an_h100, monkeypatch, cell, hidden, backward, kernels):
    """They share the kernels of the next power of two of sequences, unless these promise to be much slower."""
    batches = [*range(1, 34), *range(40, 513, 8), 100, 333]
    pass_ = Pass(backward) if backward else Pass(save=False)
    orders = batches, batches[::-1], random.Random(0).sample(batches, len(batches))
    (found, *_), *_ = served = [_served(monkeypatch, order, hidden, cell, pass_) for order in orders]
    for plans, compiled, verified in served:
        assert plans == found, "so that results have the same bits"
        assert len(compiled) == kernels
        assert len({str(plan.identity) for plan in verified}) == len(verified), "each is verified once"
    for batch, plan in found.items():
        problem = Problem(2, batch, hidden, torch.bfloat16, cell=cell)
        alone, of_more = (
            choose._plans(problem._replace(batch=n), H100, backward)[0] for n in (batch, 1 << (batch - 1).bit_length())
        )
        order, best = (choose.rank(problem, H100, each, backward) for each in (plan, alone))
        assert order <= choose.MOST_LONGER * best
        assert plan in (alone, of_more.fitted(problem))


def test_what_cannot_be_loaded_into_a_capture_says_what_to_do(monkeypatch):
    """Triton's errors are all RuntimeErrors."""
    torch_finds(monkeypatch, is_current_stream_capturing=True)
    said = pytest.raises(torch.AcceleratorError, match=r"capturing, while .* call the layer once before the capture")
    with said, choose.errors_as_of_torch():
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")


def test_a_server_with_batches_of_any_size_keeps_some_layers(an_h100):
    first = weakref.ref(kept_layer(launch, PROBLEM, CUDA))
    for batch in range(1, MOST_LAYERS + 1):
        kept_layer(launch, PROBLEM._replace(batch=batch, hidden=8), CUDA)
    gc.collect()
    assert first() is None


def test_an_empty_grid_is_launched_once_in_each_context_and_in_order(an_h100, monkeypatch):
    """The grid is cooperative and has all multiprocessors. Next to another launch whose programs wait, it might wait
    for ever."""
    ordered, launched = [], []

    def in_order(at_once, device, run, *given):
        ordered.append((at_once, device))
        result = run(*given)
        ordered.append(None)
        return result

    class Empty:
        def __getitem__(self, grid):
            assert ordered[-1] == (1, CUDA), "nothing else runs at once"
            launched.append(grid)
            if grid[0] > available_to[0] * 2:
                raise RuntimeError("too many blocks in cooperative launch")
            return lambda: None

    available_to, contexts = [H100.multiprocessors], iter([1, 1, 2, 1, 2, 2, 3])
    monkeypatch.setattr(choose, "load", lambda *_: Empty())
    monkeypatch.setattr(choose, "in_order", in_order)
    monkeypatch.setattr(choose, "_context", lambda: next(contexts))
    monkeypatch.setattr(choose, "_multiprocessors", {})
    torch_finds(monkeypatch, synchronize=None)
    assert [CARD_OF(CUDA).multiprocessors for _ in range(2)] == [132, 132]
    assert launched == [(264, 1, 1)]
    available_to[0] = 66
    with pytest.warns(UserWarning, match="kernels use 66 of the 132 multiprocessors of cuda:0"):
        assert [CARD_OF(CUDA).multiprocessors for _ in range(3)] == [66, 132, 66]
    torch_finds(monkeypatch, is_current_stream_capturing=True)
    assert [CARD_OF(CUDA).multiprocessors for _ in range(2)] == [66, 132], "in a capture, as far as it is known"
    assert ordered == [(1, CUDA), None] * 2
