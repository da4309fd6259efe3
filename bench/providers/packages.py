"""The LSTMs of other packages: flashrnn, xlstm and TorchRL. A package is imported when its LSTM runs."""

from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs import Inputs
from .engine import Engine, Provider, Unable, absence, expect, module_like_torchs


def flashrnn(inputs: Inputs) -> Engine:
    """Return the input's matmul, then one call of flashrnn's fused CUDA kernels. Written for 1.0.8.

    Sizes are Wx [B, T, 4, heads, D], R [4, heads, D, D], bias [4, heads, D] and states [2 or 4, B, 1, heads, D]. The
    gates are in torch's order. The kernels store the four gates of a unit together, [H, 4]. The leaves have the same
    layout, so that nothing is copied.
    """
    case, H = expect(inputs.case, "heads", "slstm"), inputs.case.hidden_size
    D = H // case.heads
    if case.dtype == "fp32":
        raise Unable("takes products of float32 tensors in TF32")
    if D % 16:
        raise Unable("a head's units are no multiple of 16, as many as a tile of the CUDA kernels has")
    function = import_module("flashrnn").flashrnn
    weight_ih, weight_hh, bias_ih, bias_hh = inputs.weights.values()
    W, R, b = (
        t.unflatten(0, (4, H)).transpose(0, 1).contiguous().requires_grad_(case.training)
        for t in (weight_ih, weight_hh, bias_ih + bias_hh)
    )

    def call(x, state):
        gates_x = F.linear(x, W.flatten(0, 1)).unflatten(2, (H, 4))  # [T, B, H, 4]
        states, last = function(
            gates_x.transpose(2, 3).transpose(0, 1).unflatten(3, (-1, D)), R.transpose(0, 1).unflatten(1, (-1, D)),
            b.T.unflatten(1, (-1, D)), states=torch.cat(state)[:, :, None].unflatten(3, (-1, D)), function=case.cell,
            backend="cuda_fused", dtype=str(case.torch_dtype).removeprefix("torch."),
        )  # fmt: skip
        return states[0].flatten(2).transpose(0, 1), tuple(last.flatten(3).transpose(1, 2))

    def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:  # [4H, *] again
        return {name: gradient.transpose(0, 1).flatten(0, 1) for name, gradient in gradients.items()}

    return Engine(call, {"weight_ih_l0": W, "weight_hh_l0": R, "bias_l0": b}, to_torch)


def xlstm(inputs: Inputs) -> Engine:
    """Return the input's matmul, then xlstm's own cell in torch's operators, step by step. Written for 2.0.6.

    The gates are in torch's order. Sizes are R [heads, 4 * D, D] and states [4, B, H]. There is one bias.
    """
    if (case := expect(inputs.case, "heads", "slstm")).cell != "slstm":
        raise Unable("only for an sLSTM")
    module, dtype = import_module("xlstm.blocks.slstm.cell"), str(case.torch_dtype).removeprefix("torch.")
    cell = module.sLSTMCell(module.sLSTMCellConfig(
        hidden_size=case.hidden_size, num_heads=case.heads, backend="vanilla", dtype=dtype, dtype_b=dtype,
        input_shape="SBGNH", output_shape="SBH",
    ))  # fmt: skip
    weight_ih, weight_hh, bias_ih, bias_hh = inputs.weights.values()
    R = weight_hh.unflatten(0, (4, case.heads, -1)).transpose(0, 1).flatten(1, 2)
    leaves = [nn.Parameter(t.clone(), case.training) for t in (weight_ih, R, bias_ih + bias_hh)]
    W, cell._recurrent_kernel_, cell._bias_ = leaves

    def call(x, state):
        y, last = cell(F.linear(x, W), torch.cat(state))
        return y, tuple(last[:, None])

    def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        dR = gradients["weight_hh_l0"].unflatten(1, (4, -1)).transpose(0, 1).flatten(0, 2)
        return gradients | {"weight_hh_l0": dR}

    return Engine(call, dict(zip(("weight_ih_l0", "weight_hh_l0", "bias_l0"), leaves)), to_torch)


def torchrl(backend: str, inputs: Inputs) -> Engine:
    """Return TorchRL's LSTMModule in recurrent mode, which supports resets. Written for torchrl 0.14.

    Its backend "pad" cuts sequences at the resets and pads the pieces for torch.nn.LSTM. Its backend "triton" resets
    within kernels. The module is batch_first. It takes states for every step, and uses those at resets and at the first
    step.
    """
    case = expect(inputs.case, "layers", "resets", "reset_states")
    if backend == "triton" and case.dtype == "fp16":
        raise Unable("its Triton kernels take float32, and bfloat16 in the recurrent product")
    tensordict = import_module("tensordict")
    dtype = torch.float32 if backend == "triton" else case.torch_dtype
    lstm = module_like_torchs(nn, inputs, batch_first=True, dtype=dtype)
    module = import_module("torchrl.modules").LSTMModule(
        lstm=lstm, in_keys=["x", "h", "c"], out_keys=["y", ("next", "h"), ("next", "c")], default_recurrent_mode=True,
        recurrent_backend=backend, recurrent_matmul_precision="ieee" if case.dtype == "fp32" else "tf32",
        recurrent_compute_dtype=torch.bfloat16 if case.dtype == "bf16" else torch.float32,
    )  # fmt: skip
    # The states for every step, [B, T, L, H]. They are zeros unless others were stored.
    zeros = torch.zeros(case.batch, case.steps, case.layers, case.hidden_size, dtype=dtype, device=inputs.x.device)
    is_init = (zeros[:, :, 0, :1].bool() if inputs.resets is None else inputs.resets.T[:, :, None]).contiguous()
    stored = [each.movedim(0, 2).transpose(0, 1).to(dtype) for each in inputs.reset_states or ()] or [zeros, zeros]

    def for_every_step(state: Tensor, stored: Tensor) -> Tensor:
        """Return states for every step, [B, T, L, H], from a state [L, B, H].

        The first step has the state itself, unless there is a reset. All others have the stored states.
        """
        first = torch.where(is_init[:, 0, :, None], stored[:, 0], state.transpose(0, 1).to(dtype))
        return torch.cat([first[:, None], stored[:, 1:]], dim=1)

    def call(x, state):
        entries = {"x": x.transpose(0, 1).to(dtype)} | dict(zip("hc", map(for_every_step, state, stored)))
        done = module(tensordict.TensorDict({**entries, "is_init": is_init}, [case.batch, case.steps]))
        finals = tuple(done["next", name][:, -1].transpose(0, 1) for name in "hc")
        return done["y"].transpose(0, 1).to(case.torch_dtype), finals

    return Engine(call, dict(lstm.named_parameters()))


# 0.13 is the first version with a choice of backends.
needs_torchrl = partial(absence, "torchrl", "pip install 'torchrl>=0.13'")
PROVIDERS = {
    # It needs nvcc and ninja at the first call.
    "flashrnn-cuda": Provider(flashrnn, partial(absence, "flashrnn", "pip install flashrnn")),
    "xlstm-vanilla": Provider(xlstm, partial(absence, "xlstm", "pip install xlstm", cuda=False), everywhere=True),
    "torchrl-pad": Provider(partial(torchrl, "pad"), partial(needs_torchrl, cuda=False), everywhere=True),
    "torchrl-triton": Provider(partial(torchrl, "triton"), needs_torchrl, everywhere=True),
}
