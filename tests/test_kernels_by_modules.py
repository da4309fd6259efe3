"""Every family of kernels as users call it: through the modules, whose states have other shapes than lstm_layer's."""

import pytest
import torch
from comparing import assert_same
from pairs import assert_alike, pair, random_inputs, results
from places import KERNELS
from torch.utils._pytree import tree_map_only

from gpu_lstm.kernels.triton_lstm import launch

pytestmark = pytest.mark.usefixtures("exact_float32_products", "nan_in_fresh_memory")


@pytest.mark.parametrize("batch", [1, 3, 9])  # fewer than units, and more
@pytest.mark.parametrize(("place", "dtype"), [
    ("kept/4", torch.float16), ("kept/1", torch.float16), ("read/4", torch.float32),
])  # fmt: skip
def test_a_layer_by_cuda_kernels(monkeypatch, place, dtype, batch):
    KERNELS[place].force(monkeypatch)
    theirs, ours = pair("LSTM", "cupy", hidden_size=8)
    ours, theirs = ours.to(dtype), theirs.to(dtype).double()
    x, hx = tree_map_only(torch.Tensor, lambda t: t.to(dtype), random_inputs(ours, batch))
    assert_same(*(results(module, x, hx) for module in (ours, theirs)))


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_partial_sums_of_a_layer_fit_their_buffer(monkeypatch, batch):
    KERNELS["cooperative/4/1/4"].force(monkeypatch)
    run, sizes = launch.launch_kernel, []

    def launch_kernel(kernel, grid, **arguments):
        if "partials_ptr" in arguments:
            sizes.append(tuple(arguments["partials_ptr"].shape))
            assert sizes[-1] == (batch, 4, 8), "the kernel would write past it"
        run(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)
    theirs, ours = pair("LSTM", "triton", hidden_size=8)
    assert_alike(ours, theirs, batch)
    assert sizes
