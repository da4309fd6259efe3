"""A kernel that timed out is never silent: the next call, backward, check() and the end of the program report it."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import interpreted
import pytest
import torch
from places import by_interpreter, cooperative
from standing_in import CUDA, few_polls, torch_finds

import gpu_lstm
from gpu_lstm.kernels import cache, timeouts
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans import choose
from gpu_lstm.kernels.triton_rnn.threads import cooperative as cooperative_kernels

CPU, HERE = torch.device("cpu"), str(Path(__file__).parent / "support")
EXPECTED = (
    r"cooperative_backward_kernel timed out at step 7 on cpu: .* the results of that launch, and of all launches "
    "since, are wrong"
)
pytestmark = by_interpreter


def _time_out(kernel="cooperative_backward_kernel", step=7):
    timeouts.error_word(CPU, kernel)[0] = step + 1


def test_who_reports_it():
    lstm, x = gpu_lstm.LSTM(3, 4, backend="triton"), torch.zeros(2, 1, 3)
    y, _ = lstm(x)
    stream = gpu_lstm.Stream(gpu_lstm.LSTM(3, 4, backend="triton").eval(), 1)
    for call in (lambda: lstm(x), lambda: y.sum().backward(), gpu_lstm.check, lambda: stream(x[0])):
        _time_out()
        with pytest.raises(RuntimeError, match=EXPECTED):
            call()
        gpu_lstm.check()  # it is reported once
    _time_out("step_forward_kernel", 2)
    _time_out()
    both = "cooperative_backward_kernel timed out at step 7 and step_forward_kernel timed out at step 2"
    with pytest.raises(RuntimeError, match=f"{both} on cpu"):
        gpu_lstm.check()


@pytest.mark.deep
def test_the_end_of_the_program_reports_it_and_nothing_is_imported_before_first_use_and_torchs_compiler_never():
    """Importing torch's compiler takes seconds, in every process. Operators on meta tensors would import it."""
    script = """
import sys, gpu_lstm, torch
import gpu_lstm.kernels.cupy_rnn.launch
gpu_lstm.LSTM(3, 4)(torch.zeros(5, 2, 3))
gpu_lstm.check()
assert not [name for name in sys.modules if "triton_rnn." in name or name.startswith("cupy")]
from gpu_lstm.kernels import cache, timeouts
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn import launch
from standing_in import plan_of
for family, hidden in ("resident", 64), ("cooperative", 768), ("step", 768), ("split", 768), ("pointwise", 64):
    problem = Problem(2, 64, hidden, torch.float16, resets=True, dropout_h=True)
    for backward in (False, True):
        assert launch.recorded_launches(problem, Pass(backward), plan_of(family, problem, backward))
assert "torch._dynamo" not in sys.modules
timeouts.error_word(torch.device("cpu"), "cooperative_backward_kernel")[0] = 8
"""
    environment, run = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": HERE}, [sys.executable, "-c", script]
    ended = subprocess.run(run, env=environment, stderr=subprocess.PIPE, text=True, check=True)
    assert "timed out at step 7 on cpu" in ended.stderr


@pytest.mark.parametrize(("kernel", "trial"), [("step_forward_kernel", True), ("new_kernel", False)])
def test_a_plan_on_trial_and_a_kernel_that_nobody_listed_are_reported_but_not_of_another_device(kernel, trial):
    timeouts.error_word(CPU, kernel, trial=trial)[0] = 3
    timeouts.raise_if_timed_out(torch.device("cuda", 5))  # this device had no launch, so there is nothing to report
    with pytest.raises(RuntimeError, match=f"{kernel} timed out at step 2 on cpu"):
        timeouts.raise_if_timed_out(CPU)
    timeouts.raise_if_timed_out(CPU)  # it is reported once


def test_any_kernel_has_a_word_of_its_own_and_where_there_is_none_left_it_is_no_launch():
    words = timeouts._Words(CPU)
    kernels = [f"kernel_{n}" for n in range(timeouts.MOST_KERNELS)]
    places = {words.of(kernel, tried).data_ptr() for kernel in 2 * kernels for tried in (False, True)}
    assert len(places) == 2 * len(kernels)
    with pytest.raises(IndexError):
        words.of("one more")


def test_check_waits_for_every_cuda_device_before_it_looks(monkeypatch):
    """A launch that still runs may report a timeout, since the word is read after the device is done."""
    cuda = torch.device("cuda", 1)
    words = timeouts._Words(CPU)
    monkeypatch.setattr(timeouts, "_words", {cuda: words})
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: words.of("a_kernel")[0].fill_(3 if device == cuda else 0)
    )
    with pytest.raises(RuntimeError, match=r"timed out at step 2 on cuda:1"):
        gpu_lstm.check()


@pytest.mark.parametrize("variable", [timeouts.TIMEOUT, timeouts.SPARE])
@pytest.mark.parametrize("text", ["-1", "soon", "inf"])
def test_variables_that_are_no_such_numbers_are_refused(monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"in the environment variable {variable}, got '{text}'"):
        timeouts.timeout_seconds() if variable == timeouts.TIMEOUT else timeouts.spare_multiprocessors(132)


def test_the_timeout_is_that_of_the_environment_but_for_plans_that_are_tried(monkeypatch):
    monkeypatch.setattr(timeouts, "_words", {})
    monkeypatch.setenv(timeouts.TIMEOUT, "60")
    with torch.inference_mode():  # words that were made in inference mode can be written to outside
        limits = [int(timeouts.error_word(CPU, "step_forward_kernel", tried)[1]) for tried in (False, True)]
    assert limits == [60 * timeouts.POLLS_A_SECOND, timeouts.POLLS_A_SECOND]
    monkeypatch.setenv(timeouts.TIMEOUT, "1e-9")
    assert timeouts._Words(CPU).of("a_kernel")[1] == 1, "0 polls would count as a timeout that happened"
    monkeypatch.setenv(timeouts.TIMEOUT, "60")
    _time_out()
    with pytest.raises(RuntimeError, match=r"GPU_LSTM_TIMEOUT \(seconds, now 60\)"):
        gpu_lstm.check()


def test_multiprocessors_are_left_where_there_are_several_ranks_or_the_environment_says_so(monkeypatch):
    assert timeouts.spare_multiprocessors(132) == 0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert [timeouts.spare_multiprocessors(count) for count in (132, 40)] == [16, 5]
    monkeypatch.setenv(timeouts.SPARE, "3")
    assert timeouts.spare_multiprocessors(132) == 3
    with pytest.raises(ValueError, match="expected a number below 3 in"):
        timeouts.spare_multiprocessors(3)
    torch_finds(monkeypatch, is_current_stream_capturing=True)  # in a capture the driver launches nothing
    monkeypatch.setattr(choose, "_context", lambda: 1)
    assert choose.card_of(CUDA).multiprocessors == 129


def test_a_plan_for_the_whole_card_that_came_before_several_ranks_is_warned_of_in_the_next_call(monkeypatch, recwarn):
    monkeypatch.setattr(timeouts, "_whole_card", False)
    cache.warn_once.cache_clear()
    ranks = iter([1, 1, 2, 2])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: next(ranks))
    assert timeouts.spare_multiprocessors(0) == 0, "on a CPU nothing is planned"
    timeouts.raise_if_timed_out(CPU)
    ranks = iter([1, 1, 2])
    assert timeouts.spare_multiprocessors(132) == 0
    timeouts.raise_if_timed_out(CPU)
    assert not recwarn
    with pytest.warns(UserWarning, match="call init_process_group before the first call of a layer"):
        timeouts.raise_if_timed_out(CPU)
    timeouts.raise_if_timed_out(CPU)  # it does not ask for the number of ranks again


def test_the_end_of_the_program_waits_for_no_kernel_and_reports_what_has_ended_but_in_no_forked_child(
    monkeypatch, capsys
):
    """A kernel of another package may never end, such as NCCL's, whose peer is gone."""
    words = timeouts._Words(CPU)
    monkeypatch.setattr(timeouts, "_words", {torch.device("cuda", 1): words})
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=AssertionError("the process stays")))
    for ended, of_child in ((False, False), (True, True), (True, False)):
        words.of("a_kernel")[0] = 3 * ended
        words.process += of_child
        timeouts._report_at_exit()
        words.process -= of_child
        said = capsys.readouterr().err
        assert ("timed out at step 2 on cuda:1" in said) if ended and not of_child else said == ""


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_that_timed_out_remember_it_where_nobody_sees_the_error_word(monkeypatch, direction):
    """Another thread may clear the word before the launch ends. Later waits take one look each, not their whole
    limit."""
    cooperative(monkeypatch, units=8, parts=2)
    looks, polls, look, run = [], 20, interpreted.look, launch.launch_kernel

    def cleared(*place):
        looks.append(1)
        timeouts.error_word(torch.device("cpu"), f"cooperative_{direction}_kernel")[0] = 0
        return look(*place)

    def publish_but_for_the_first(at, words, mask):
        if threading.current_thread().index[0] > 0:
            interpreted.publish(at, words, mask)

    def launch_kernel(kernel, grid, **arguments):
        if direction not in kernel.__name__:
            return run(kernel, grid, **arguments)
        with monkeypatch.context() as patch, few_polls(kernel.__name__, polls):
            patch.setattr(interpreted, "look", cleared)
            patch.setattr(cooperative_kernels, "publish", publish_but_for_the_first)
            run(kernel, grid, **arguments)
        return None

    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)
    lstm, steps = gpu_lstm.LSTM(3, 16, backend="triton"), 9
    h, _ = lstm(torch.randn(steps, 3, 3))
    if direction == "backward":
        h.sum().backward()
    programs, waits = 2, 1 + (direction == "backward")  # kinds of waits
    assert polls < len(looks) <= programs * waits * (polls + 2 * steps)
    timeouts.error_word(torch.device("cpu"), f"cooperative_{direction}_kernel")[0] = 0
