"""torch.nn.LSTM: ATen on the CPU, cuDNN on CUDA. The yardstick; and with lengths in the way that PyTorch offers."""

import torch
from torch import nn
from torch.backends.cudnn.rnn import get_cudnn_mode
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..inputs import Inputs
from .engine import Engine, Provider, Unable, expect, module_like_torchs


def plain(inputs: Inputs) -> Engine:
    """The module."""
    expect(inputs.case, "layers", "directions", "packed")
    return Engine.of(module_like_torchs(nn.LSTM, inputs))


def flat(inputs: Inputs) -> Engine:
    """The module with weights in one buffer also in bfloat16, where torch leaves them for cuDNN to copy each time."""
    case = inputs.case
    if case.torch_dtype is not torch.bfloat16 or not inputs.h0.is_cuda:
        raise Unable("only for bfloat16 on CUDA: other weights are in one buffer anyway")
    engine, sizes = plain(inputs), (case.hidden_size, 0, case.layers)
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            list(engine.parameters.values()), 4, case.input_size, get_cudnn_mode("LSTM"), *sizes, False,
            case.directions == 2,
        )  # fmt: skip
    return engine


def packed(inputs: Inputs) -> Engine:
    """For a padded batch: pack, run, pad again, all of it part of the call."""
    expect(inputs.case, "layers", "directions", "ragged")
    if inputs.lengths is None:
        raise Unable("only for padded batches with lengths")
    engine, lengths = plain(inputs.plain()), inputs.lengths.cpu()  # where packing wants them

    def call(x, state):
        y, state = engine.call(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
        return pad_packed_sequence(y, total_length=inputs.case.steps)[0], state

    return Engine(call, engine.parameters)


PROVIDERS = {
    "torch": Provider(plain, everywhere=True, graphed=True),
    "torch-flat": Provider(flat, everywhere=True, graphed=True),
    "torch-packed": Provider(packed, everywhere=True),
}
