"""The memory of kernels that were tried: which kernels a verdict is for, and trials that ended a process or a device.

`auto` verifies, races and uses the kernels that are right. The CPU counts as a card, and the clock of a race is a stub.
"""

import dataclasses
import multiprocessing
import os
import signal
from unittest.mock import Mock

import pytest
import torch
from places import by_interpreter
from standing_in import as_another_process
from test_verify import CPU, FORWARD, PLAIN, _verify

import gpu_lstm
from gpu_lstm.__main__ import main
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans.choose import always
from gpu_lstm.kernels.triton_rnn.plans.planning import INTERPRETER, Held, Step
from gpu_lstm.verification import verify

pytestmark = [
    by_interpreter,
    pytest.mark.usefixtures("nothing_cached"),
]


def test_a_verdict_is_cached_for_one_kernel_only(monkeypatch):
    """Any other value of a field is another kernel, and 9 stands for it."""
    verdicts, plan = Mock(return_value="right"), always(PLAIN, INTERPRETER, False)
    monkeypatch.setattr(verify, "_verdict", verdicts)
    for _ in range(2):
        _verify(PLAIN, plan=plan)
        cache._read.cache_clear()  # as another process
    assert verdicts.call_count == 1

    def is_known(problem=PLAIN, pass_=FORWARD, plan=plan):
        return verify.cached_verdict(plan, problem, pass_, CPU) == "right"

    more_tiles = dataclasses.replace(plan, tiles_per_program=99)
    assert is_known(PLAIN._replace(batch=999, side_by_side=2), plan=more_tiles), "what is launched is the same"
    for name in {*Problem._fields} - {"batch", "side_by_side"}:
        assert not is_known(PLAIN._replace(**{name: 9})), name
    for name in Pass._fields:
        assert not is_known(pass_=FORWARD._replace(**{name: 9})), name
    families = [dict(family=family) for family in (Step(7), Held(7), Held(7, ahead=True))]
    sizes = [{name: 99} for name in ("rows", "units", "programs", "num_warps", "groups")]
    for change in (*families, *sizes, dict(tiles_per_program=1)):
        assert not is_known(plan=dataclasses.replace(plan, **change)), change
    machine = cache.machine(CPU) | {"card": "another"}
    monkeypatch.setattr(cache, "machine", lambda _: machine)
    assert not is_known()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("planted"), KeyboardInterrupt("planted"),
    torch.AcceleratorError("planted: operation not permitted when stream is capturing"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_what_says_nothing_about_the_kernel_is_not_cached(monkeypatch, error):
    """The caller gets the error as it is."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch_kernel", Mock(side_effect=error))
        with pytest.raises(type(error), match="planted") as raised:
            _verify(PLAIN)
        assert raised.value is error
    assert list(cache.entries(cache.CHECKS)) == []
    assert _verify(PLAIN) is None


@pytest.mark.filterwarnings("ignore:gpu_lstm")
def test_an_error_of_the_device_names_the_kernel_that_was_tried_which_the_next_process_does_without(card, monkeypatch):
    """The launch returns, and the next synchronisation raises. Without a verdict every start of the program would end
    so."""
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nFor debugging")
    fault.error_code, layer, x, launched = 700, gpu_lstm.GRU(3, 8), torch.randn(4, 2, 3), []

    def wait_and_check(device):
        if launched:
            raise fault

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(launch, "launch_kernel", lambda *_, **__: launched.append(1))
        patch.setattr(verify, "wait_and_check", wait_and_check)
        with pytest.raises(torch.AcceleratorError, match=r"^CUDA error: an illegal memory access") as raised:
            layer(x)
        text = str(raised.value)
        for part in ("step_forward_kernel", "Plan(family=Step", "hidden=8", "cell='gru'"):
            assert part in text
        assert "`python -m gpu_lstm races --clear` forgets that" in text
        assert (raised.value.__cause__, raised.value.error_code) == (fault, 700)

        as_another_process()
        torch.testing.assert_close(layer(x)[0], gpu_lstm.backend("reference")(layer)(x)[0])
        layer.backend = "triton"
        with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access was encountered; `python -m"):
            layer(x)
        assert launched == [1], "nothing was tried again"
    assert main(["races", "--clear"]) == 0
    as_another_process()
    with torch.no_grad():
        layer(x)


@pytest.fixture
def trying():
    """trying(problem, during) starts a process that tries a kernel, and returns it at its launch, where the process
    calls during()."""
    fork, started = multiprocessing.get_context("fork"), []

    def trying(problem, during):
        begun = fork.Event()

        def launched(*_, **__):
            begun.set()
            during()
            os._exit(0)

        def tries():
            launch.launch_kernel = launched
            _verify(problem)

        started.append(fork.Process(target=tries))
        started[-1].start()
        assert begun.wait(600)
        return started[-1]

    yield trying
    for process in started:
        process.kill()
        process.join()


@pytest.mark.filterwarnings("ignore:gpu_lstm. a kernel failed")
def test_a_kernel_during_whose_trial_a_process_was_killed_is_refused_until_that_is_forgotten(trying):
    trying(PLAIN, lambda: os.kill(os.getpid(), signal.SIGKILL)).join()
    assert _verify(PLAIN) == verify.ENDED
    assert "`python -m gpu_lstm races --clear` forgets that" in verify.ENDED
    assert _verify(PLAIN, Pass(True)) is None, "another kernel"
    assert main(["races", "--clear"]) == 0
    assert _verify(PLAIN) is None


def test_processes_that_try_a_kernel_at_once_do_not_refuse_it(trying, tmp_path):
    """The verdict of one process is not undone when the other ends."""
    other = trying(PLAIN, signal.pause)
    assert verify.cached_verdict(always(PLAIN, INTERPRETER, False), PLAIN, FORWARD, CPU) is None
    assert list(cache.entries(cache.CHECKS)) == []
    cache._read.cache_clear()
    assert _verify(PLAIN) is None
    other.kill()
    other.join()
    cache._read.cache_clear()
    assert [verdict for *_, verdict in cache.entries(cache.CHECKS)] == ["right"]
