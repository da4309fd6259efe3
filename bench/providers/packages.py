"""The LSTMs of other packages: flashrnn, haste_pytorch, TorchRL and Keras, each imported when it runs."""

import os
import sys
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs import WEIGHTS, Inputs
from .engine import Engine, Provider, Unable, absence, expect, module_like_torchs


def flashrnn(backend: str, inputs: Inputs) -> Engine:
    """The input's matmul, then one call of flashrnn's fused CUDA or Triton kernels. Written against flashrnn 1.0.8.

    It expects pre-activations Wx [B, T, 4, heads, H], R [4, heads, H, H], one bias [4, heads, H] and states
    [2, B, 1, heads, H], gates in torch's order; all with one head here.
    """
    expect(inputs.case)
    case, H = inputs.case, inputs.case.hidden_size
    if case.dtype == "fp32":
        raise Unable("takes products of float32 tensors in TF32")
    if backend == "cuda_fused" and H % 16:
        raise Unable("H is no multiple of 16, the units of a tile of the CUDA kernels")
    if backend == "triton_fused" and H not in (16, 32, 64):
        raise Unable("H is not 16, 32 or 64, as the documentation of the Triton kernels says")
    function = import_module("flashrnn").flashrnn
    gates = int(backend == "cuda_fused")  # whose kernels store the four gates of a unit together, [H, 4]: no copies

    def leaf(parameter: Tensor) -> Tensor:  # [4H, *] to [4, H, *] or [H, 4, *]
        moved = parameter.detach().unflatten(0, (4, H)).movedim(0, gates)
        return moved.clone(memory_format=torch.contiguous_format).requires_grad_(case.training)

    weight_ih, weight_hh, bias_ih, bias_hh = inputs.weights.values()
    W, R, b = map(leaf, (weight_ih, weight_hh, bias_ih + bias_hh))

    def call(x, state):
        gates_x = F.linear(x, W.flatten(0, 1)).unflatten(2, W.shape[:2])  # [T, B, *gates and units]
        states, last = function(
            gates_x.movedim(2 + gates, 2).transpose(0, 1)[:, :, :, None], R.movedim(gates, 0)[:, None],
            b.movedim(gates, 0)[:, None], states=torch.cat(state)[:, :, None, None], function="lstm", backend=backend,
            dtype=str(case.torch_dtype).removeprefix("torch."),
        )  # fmt: skip
        return states[0, :, :, 0].transpose(0, 1), tuple(last[:, :, :, 0].transpose(1, 2))

    def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:  # [4H, *] again
        return {name: gradient.movedim(gates, 0).flatten(0, 1) for name, gradient in gradients.items()}

    return Engine(call, {"weight_ih_l0": W, "weight_hh_l0": R, "bias_l0": b}, to_torch)


def haste(inputs: Inputs) -> Engine:
    """haste_pytorch.LSTM, written against haste_pytorch 0.5.0rc0.

    It multiplies from the right, kernel [I, 4H] and recurrent_kernel [H, 4H], with one bias [4H], and has the gates in
    the order i, g, f, o. Its lengths only choose the final states; they do not mask the output.
    """
    expect(inputs.case)
    case = inputs.case
    if case.torch_dtype != torch.float32:
        raise Unable("float32 only")
    lstm = import_module("haste_pytorch").LSTM(case.input_size, case.hidden_size)
    lstm.from_native_weights(*inputs.weights.values())  # which makes new parameters, on the weights' device
    names = {"weight_ih_l0": "kernel", "weight_hh_l0": "recurrent_kernel", "bias_l0": "bias"}

    def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:  # transposed, gates in the order i, f, g, o
        gates = {name: gradients[theirs].movedim(-1, 0).unflatten(0, (4, -1)) for name, theirs in names.items()}
        return {name: gradient[[0, 2, 1, 3]].flatten(0, 1) for name, gradient in gates.items()}

    return Engine.of(lstm.train(case.training).requires_grad_(case.training), to_torch)


def torchrl(backend: str, inputs: Inputs) -> Engine:
    """TorchRL's LSTMModule in recurrent mode, which supports resets. Written against torchrl 0.14.

    Its "pad" backend cuts sequences at the resets, pads the pieces and passes them to torch.nn.LSTM. Its "triton"
    backend resets within kernels, whose tensors must be float32; only the recurrent product can be in bfloat16. The
    module has the batch first, and states for every step: sequences start from those at resets and at the first step.
    """
    expect(inputs.case, "layers", "resets", "reset_states")
    case = inputs.case
    if backend == "triton" and case.dtype == "fp16":
        raise Unable("its Triton kernels take float32, and bfloat16 in the recurrent product")
    tensordict = import_module("tensordict")
    dtype = torch.float32 if backend == "triton" else case.torch_dtype
    lstm = module_like_torchs(nn.LSTM, inputs, batch_first=True, dtype=dtype)
    module = import_module("torchrl.modules").LSTMModule(
        lstm=lstm, in_keys=["x", "h", "c"], out_keys=["y", ("next", "h"), ("next", "c")], default_recurrent_mode=True,
        recurrent_backend=backend,
        recurrent_compute_dtype=torch.bfloat16 if case.dtype == "bf16" else torch.float32,
        recurrent_matmul_precision="ieee" if case.dtype == "fp32" else "tf32",
    )  # fmt: skip
    # [B, T, L, H], for every step: zeros, if nothing else was stored
    zeros = torch.zeros(case.batch, case.steps, case.layers, case.hidden_size, dtype=dtype, device=inputs.h0.device)
    resets = zeros[:, :, 0, 0].T.bool() if inputs.resets is None else inputs.resets
    is_init = resets.T[:, :, None].contiguous()  # [B, T, 1]
    stored = [each.movedim(0, 2).transpose(0, 1).to(dtype) for each in inputs.reset_states or ()] or [zeros, zeros]

    def for_every_step(state: Tensor, stored: Tensor) -> Tensor:
        """[L, B, H] to [B, T, L, H]: the state itself at first, unless there is a reset, and else what was stored."""
        first = torch.where(is_init[:, 0, :, None], stored[:, 0], state.transpose(0, 1).to(dtype))
        return torch.cat([first[:, None], stored[:, 1:]], dim=1)

    def call(x, state):
        given = {"x": x.transpose(0, 1).to(dtype)} | dict(zip("hc", map(for_every_step, state, stored)))
        done = module(tensordict.TensorDict({**given, "is_init": is_init}, [case.batch, case.steps]))
        finals = tuple(done["next", name][:, -1].transpose(0, 1) for name in "hc")
        return done["y"].transpose(0, 1).to(case.torch_dtype), finals

    return Engine(call, dict(lstm.named_parameters()))


def keras_absent(device: str) -> str | None:
    """Another of Keras's backends is chosen, or Keras 3 is not installed."""
    backend = sys.modules["keras"].backend.backend() if "keras" in sys.modules else os.environ.get("KERAS_BACKEND")
    if backend not in (None, "torch"):
        return f"keras's backend is {backend}: set KERAS_BACKEND=torch"
    os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it once, when it is first imported
    return absence("keras", "pip install 'keras>=3'", device, cuda=False)


def keras(inputs: Inputs) -> Engine:
    """keras.layers.LSTM and Bidirectional on Keras's torch backend, a layer for each. Written against Keras 3.15.

    Keras has the batch first, one bias where torch has two, and lengths as a mask.
    """
    expect(inputs.case, "layers", "directions", "ragged")
    case, device, keras = inputs.case, str(inputs.h0.device), import_module("keras")
    suffixes = ("", "_reverse")[: case.directions]
    layers, parameters = [], {}
    with keras.device(device):
        for number in range(case.layers):
            # Without zero_output_for_mask, steps beyond the length repeat the last output.
            layer = keras.layers.LSTM(
                case.hidden_size, return_sequences=True, return_state=True, zero_output_for_mask=True,
                dtype=str(case.torch_dtype).removeprefix("torch."),
            )  # fmt: skip
            if case.directions == 2:
                layer = keras.layers.Bidirectional(layer)
            layer.build((case.batch, case.steps, case.hidden_size * case.directions if number else case.input_size))
            layers.append(layer)
            variables = iter(layer.trainable_variables)  # kernel, recurrent_kernel, bias; of the other direction
            for place in (f"l{number}{suffix}" for suffix in suffixes):
                weight_ih, weight_hh, bias_ih, bias_hh = (inputs.weights[f"{kind}_{place}"] for kind in WEIGHTS)
                values = {"weight_ih": weight_ih.T, "weight_hh": weight_hh.T, "bias": bias_ih + bias_hh}
                for (kind, value), variable in zip(values.items(), variables):
                    variable.assign(value)
                    parameters[f"{kind}_{place}"] = variable.value

    lengths = inputs.lengths
    mask = None if lengths is None else torch.arange(case.steps, device=device) < lengths[:, None]  # [B, T]

    def call(x, state):
        y, finals, rows = x.transpose(0, 1), [], iter(zip(*state))
        for layer in layers:
            y, *last = layer(y, initial_state=[each for _ in suffixes for each in next(rows)], mask=mask)
            finals += last
        return y.transpose(0, 1), (torch.stack(finals[::2]), torch.stack(finals[1::2]))

    def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: gradient.T if gradient.dim() == 2 else gradient for name, gradient in gradients.items()}

    return Engine(call, parameters, to_torch, within=lambda: keras.device(device))


# flashrnn compiles its CUDA kernels at the first call, by nvcc and ninja; its Triton kernels need triton<3.9.
needs_flashrnn = partial(absence, "flashrnn", "pip install flashrnn")
needs_haste = partial(absence, "haste_pytorch", "pip install --no-build-isolation haste_pytorch, with nvcc")
needs_torchrl = partial(absence, "torchrl", "pip install 'torchrl>=0.13'")  # the first with backends to choose from
PROVIDERS = {
    "flashrnn-cuda": Provider(partial(flashrnn, "cuda_fused"), needs_flashrnn),
    "flashrnn-triton": Provider(partial(flashrnn, "triton_fused"), needs_flashrnn),
    "haste": Provider(haste, needs_haste),
    "torchrl-pad": Provider(partial(torchrl, "pad"), partial(needs_torchrl, cuda=False), everywhere=True),
    "torchrl-triton": Provider(partial(torchrl, "triton"), needs_torchrl, everywhere=True),
    "keras": Provider(keras, keras_absent),
}
