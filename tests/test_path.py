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
  gpu_lstm/modules/arguments.py weights_of
  gpu_lstm/call/prepare.py prepare
    gpu_lstm/call/roles.py Role.input
      gpu_lstm/call/roles.py Role.rank_of
    gpu_lstm/call/roles.py Role.states_in
      gpu_lstm/call/roles.py Module.blocks_of
    gpu_lstm/call/modes.py modes
      gpu_lstm/call/modes.py recurrent_precision
    gpu_lstm/call/prepare.py _check_tensors
  gpu_lstm/dispatch/route.py run
    gpu_lstm/dispatch/route.py route_of
    gpu_lstm/backends/run.py execute
      gpu_lstm/call/roles.py Role.call
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
      gpu_lstm/call/request.py Form.output
      gpu_lstm/call/roles.py Role.states_out
"""
COUNTS = """
T=1, inference: 36 calls, 18 files, 23 changes, 6 returns, 10 frames
T=1, training: 65 calls, 20 files, 37 changes, 18 returns, 11 frames
T=128, inference: 37 calls, 19 files, 24 changes, 6 returns, 11 frames
T=128, training: 68 calls, 21 files, 39 changes, 19 returns, 12 frames
lengths, inference: 42 calls, 20 files, 25 changes, 6 returns, 11 frames
lengths, training: 75 calls, 22 files, 41 changes, 20 returns, 12 frames
resets, inference: 41 calls, 20 files, 26 changes, 7 returns, 11 frames
resets, training: 73 calls, 22 files, 41 changes, 20 returns, 12 frames
two layers, bidirectional, inference: 90 calls, 20 files, 59 changes, 40 returns, 11 frames
two layers, bidirectional, training: 216 calls, 21 files, 119 changes, 99 returns, 12 frames
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
