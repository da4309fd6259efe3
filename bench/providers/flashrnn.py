"""The function of the flashrnn package, written against flashrnn 1.0.8: its fused CUDA and its fused Triton kernels.

It expects pre-activations Wx [B, T, 4, heads, H], R [4, heads, H, H], one bias [4, heads, H] and states
[2, B, 1, heads, H], gates in torch's order; all with one head here. It leaves the input's product to its caller.
"""

import importlib
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..inputs import Inputs
from .engine import Engine, Provider, Unable, absence, expect


def build(backend: str, inputs: Inputs) -> Engine:
    """The input's product, then one call of flashrnn for all steps."""
    expect(inputs.case)
    case, H = inputs.case, inputs.case.hidden_size
    if case.dtype == "fp32":
        raise Unable("takes products of float32 tensors in TF32")
    if backend == "cuda_fused" and H % 16:
        raise Unable("H is no multiple of 16, the units of a tile of the CUDA kernels")
    if backend == "triton_fused" and H not in (16, 32, 64):
        raise Unable("H is not 16, 32 or 64, as the documentation of the Triton kernels says")
    flashrnn = importlib.import_module("flashrnn").flashrnn
    gates = int(backend == "cuda_fused")  # whose kernels store the four gates of a unit together, [H, 4]: no copies

    def leaf(parameter: Tensor) -> Tensor:  # [4H, *] to [4, H, *] or [H, 4, *]
        moved = parameter.detach().unflatten(0, (4, H)).movedim(0, gates)
        return moved.clone(memory_format=torch.contiguous_format).requires_grad_(case.training)

    weight_ih, weight_hh, bias_ih, bias_hh = inputs.weights.values()
    W, R, b = map(leaf, (weight_ih, weight_hh, bias_ih + bias_hh))

    def call(x, state):
        gates_x = F.linear(x, W.flatten(0, 1)).unflatten(2, W.shape[:2])  # [T, B, *gates and units]
        states, last = flashrnn(
            gates_x.movedim(2 + gates, 2).transpose(0, 1)[:, :, :, None], R.movedim(gates, 0)[:, None],
            b.movedim(gates, 0)[:, None], states=torch.cat(state)[:, :, None, None], function="lstm", backend=backend,
            dtype=str(case.torch_dtype).removeprefix("torch."),
        )  # fmt: skip
        return states[0, :, :, 0].transpose(0, 1), tuple(last[:, :, :, 0].transpose(1, 2))

    def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:  # [4H, *] again
        return {name: gradient.movedim(gates, 0).flatten(0, 1) for name, gradient in gradients.items()}

    return Engine(call, {"weight_ih_l0": W, "weight_hh_l0": R, "bias_l0": b}, to_torch)


# The CUDA kernels are compiled when they are first called, by nvcc and ninja; the Triton kernels need triton<3.9.
absent = partial(absence, "flashrnn", "pip install flashrnn")
PROVIDERS = {
    "flashrnn-cuda": Provider(partial(build, "cuda_fused"), absent),
    "flashrnn-triton": Provider(partial(build, "triton_fused"), absent),
}
