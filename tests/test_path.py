"""What a call goes through, from the module to the launch: a hop more shows here. See dev/path_count.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_lstm

COUNT = Path(__file__).parents[1] / "dev/path_count.py"
PATH = """
gpu_lstm/modules/recurrent.py Recurrent.forward
  gpu_lstm/modules/recurrent.py Recurrent._options
    gpu_lstm/call/options.py options_of
  gpu_lstm/modules/variants.py weights_of
  gpu_lstm/call/prepare.py prepare
    gpu_lstm/call/prepare.py _form_and_input
      gpu_lstm/call/checks.py check_rank_and_layout
        gpu_lstm/call/checks.py check_dense
      gpu_lstm/call/checks.py check_rank_of_states
        gpu_lstm/call/checks.py check_pair
    gpu_lstm/call/prepare.py _states
    gpu_lstm/call/modes.py modes
      gpu_lstm/call/modes.py recurrent_precision
    gpu_lstm/call/prepare.py _check_tensors
  gpu_lstm/dispatch/route.py run
    gpu_lstm/dispatch/route.py route_of
    gpu_lstm/backends/run.py execute
      gpu_lstm/backends/schedule.py by_kernels
        gpu_lstm/backends/layer_loop.py run_layers
          gpu_lstm/backends/layer_loop.py inputs_of
          gpu_lstm/backends/autograd.py layer_by_kernels
            gpu_lstm/backends/fused.py forward
              gpu_lstm/equations/lstm.py input_product
              kernels/layer.py Layer.forward
                kernels/timeouts.py raise_if_timed_out
                kernels/memory.py steps_of
                kernels/layer.py _check_count
                kernels/layer.py Layer.prepared
                kernels/layer.py aligned
                kernels/layer.py Layer._aligned
                kernels/layer.py Launches.forward
                  kernels/memory.py steps_of
                  kernels/memory.py allocate
                  kernels/layer.py Launches._arguments
                  kernels/triton_rnn/launch.py Kernel.__call__
      gpu_lstm/call/prepare.py Call.results
        gpu_lstm/call/forms.py Padded.output
"""
COUNTS = """
T=1, inference: 37 calls, 18 files, 23 changes, 6 returns, 10 frames
T=1, training: 66 calls, 20 files, 37 changes, 18 returns, 11 frames
T=128, inference: 38 calls, 19 files, 24 changes, 6 returns, 11 frames
T=128, training: 69 calls, 21 files, 39 changes, 19 returns, 12 frames
lengths, inference: 44 calls, 19 files, 27 changes, 9 returns, 11 frames
lengths, training: 77 calls, 21 files, 43 changes, 23 returns, 12 frames
resets, inference: 43 calls, 19 files, 27 changes, 9 returns, 11 frames
resets, training: 75 calls, 21 files, 42 changes, 22 returns, 12 frames
two layers, bidirectional, inference: 91 calls, 19 files, 61 changes, 43 returns, 11 frames
two layers, bidirectional, training: 217 calls, 21 files, 121 changes, 101 returns, 12 frames
"""


@pytest.mark.parametrize(("arguments", "expected"), [(["T=1"], PATH), ([], COUNTS)], ids=["functions", "counts"])
def test_the_path_of_a_call(arguments, expected):
    command, without_gpu = [sys.executable, COUNT, *arguments], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=without_gpu, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == expected.strip()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_cell_on_a_cpu_comes_soon_to_torchs_operator(kind):
    x, state, called, cell = torch.zeros(2, 3), torch.zeros(2, 4), [], getattr(gpu_lstm, f"{kind}Cell")(3, 4)

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and "/gpu_lstm/" in code.co_filename and code.co_name[0] != "<":
            called.append(code.co_name)

    cell(x)
    sys.setprofile(profile)
    try:
        cell(x, (state, state) if kind == "LSTM" else state)
    finally:
        sys.setprofile(None)
    way = (
        "_options",
        "options_of",
        "weights_of",
        "fits_torchs_cell",
        "only_torch_on_a_cpu",
        "only_torch_runs",
        "one_step",
    )
    assert called == ["forward", *way]
