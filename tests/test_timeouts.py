"""A kernel that timed out is never silent: the next call, backward, check() and the end of the program report it."""

import os
import subprocess
import sys

import pytest
import torch

import gpu_lstm
from gpu_lstm.kernels import timeouts
from gpu_lstm.kernels.triton_lstm import launch

CPU = torch.device("cpu")
EXPECTED = r"lstm_cooperative_backward_kernel timed out at step 7 on cpu: .* the results of that launch are wrong"
pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="error words of the CPU")


def _time_out(kernel="lstm_cooperative_backward_kernel", step=7) -> None:
    """What a kernel does."""
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


def test_of_two_kernels_that_timed_out_both_are_reported():
    _time_out("lstm_step_forward_kernel", 2)
    _time_out()
    both = "lstm_cooperative_backward_kernel timed out at step 7 and lstm_step_forward_kernel timed out at step 2"
    with pytest.raises(RuntimeError, match=f"{both} on cpu: .* the results of those launches are wrong"):
        gpu_lstm.check()
    gpu_lstm.check()


@pytest.mark.slow
def test_the_end_of_the_program_reports_it_and_nothing_is_imported_in_order_to_check():
    script = """
import sys, gpu_lstm, torch
gpu_lstm.check()
assert "gpu_lstm.kernels.triton_lstm" not in sys.modules
from gpu_lstm.kernels import timeouts
timeouts.error_word(torch.device("cpu"), "lstm_cooperative_backward_kernel")[0] = 8
"""
    environment, run = os.environ | {"TRITON_INTERPRET": "1"}, [sys.executable, "-c", script]
    ended = subprocess.run(run, env=environment, stderr=subprocess.PIPE, text=True, check=True)
    assert "timed out at step 7 on cpu" in ended.stderr


def test_devices_do_not_share_words_and_kernels_stand_16_bytes_apart():
    first, second = (timeouts.error_word(CPU, kernel) for kernel in timeouts.KERNELS[:2])
    assert second.data_ptr() - first.data_ptr() == 16
    other = torch.device("meta", 0)
    assert timeouts.error_word(other, 0).device.type == "meta"
    timeouts.raise_if_timed_out(torch.device("cuda", 5))  # never launched on: nothing to report
    _time_out()
    timeouts.raise_if_timed_out(torch.device("cuda", 5))
    with pytest.raises(RuntimeError, match=EXPECTED):
        timeouts.check()


def test_check_waits_for_every_cuda_device_before_it_looks(monkeypatch):
    """What a launch that still runs writes is detected: the word is read after the device is done."""
    cuda = torch.device("cuda", 1)
    words = timeouts._Words(CPU)
    monkeypatch.setattr(timeouts, "_words", {cuda: words})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: words.tensor[0, 0].fill_(3 if device == cuda else 0))
    with pytest.raises(RuntimeError, match=r"timed out at step 2 on cuda:1"):
        gpu_lstm.check()
