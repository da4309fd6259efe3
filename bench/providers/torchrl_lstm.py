"""TorchRL's LSTMModule, which knows resets, written against torchrl 0.14.

Its "pad" backend cuts sequences at the resets, pads the pieces and gives them to torch.nn.LSTM. Its "triton" backend
resets within kernels, whose tensors must be float32; only the recurrent product can be taken in bfloat16. The module
takes the batch first, and states for every step: those at resets, and at first, are where the sequences start from.
"""

import importlib
from functools import partial

import torch
from torch import Tensor, nn

from ..inputs import Inputs
from .engine import Engine, Provider, Unable, absence, expect, module_like_torchs


def build(backend: str, inputs: Inputs) -> Engine:
    """The module in recurrent mode with the weights and resets of the inputs."""
    expect(inputs.case, "layers", "resets", "reset_states")
    case = inputs.case
    if backend == "triton" and case.dtype == "fp16":
        raise Unable("its Triton kernels take float32, and bfloat16 in the recurrent product")
    modules, tensordict = importlib.import_module("torchrl.modules"), importlib.import_module("tensordict")
    dtype = torch.float32 if backend == "triton" else case.torch_dtype
    lstm = module_like_torchs(nn.LSTM, inputs, batch_first=True, dtype=dtype)
    module = modules.LSTMModule(
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


absent = partial(absence, "torchrl", "pip install 'torchrl>=0.13'")  # the first with backends to choose from
PROVIDERS = {
    "torchrl-pad": Provider(partial(build, "pad"), partial(absent, cuda=False), everywhere=True),
    "torchrl-triton": Provider(partial(build, "triton"), absent, everywhere=True),
}
