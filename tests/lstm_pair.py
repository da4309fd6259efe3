"""torch.nn.LSTM and gpu_lstm.LSTM with the same weights, and all that a call of either gives.

The truth is torch.nn.LSTM in float64 on the CPU, with weights and inputs that are float32 numbers.
"""

import torch
from comparing import PLACES
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import gpu_lstm

T, B, I, H = 4, 3, 3, 4


def pair(backend: str, *args, **kwargs) -> tuple[nn.LSTM, gpu_lstm.LSTM]:
    """torch's LSTM in float64, and ours with the same weights."""
    torch.manual_seed(1)
    theirs = nn.LSTM(I, H, *args, **kwargs).double()
    ours = gpu_lstm.LSTM(I, H, *args, **kwargs, backend=backend, **PLACES[backend])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random_inputs(module: nn.Module, batched: bool = True) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x and (h0, c0) for `module`, float32."""
    torch.manual_seed(2)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batch = (B,) if batched else ()
    time_and_batch = (B, T) if batched and module.batch_first else (T, *batch)
    hx = torch.randn(rows, *batch, module.proj_size or H), torch.randn(rows, *batch, H)
    return torch.randn(*time_and_batch, I), hx


def results(module, x: Tensor, hx=None, pack=None, call=None, **ragged) -> dict[str, Tensor]:
    """Output and final states, and the gradients of a random weighing of them by x, h0, c0 and every parameter."""
    parameters = dict(module.named_parameters())
    like = next(iter(parameters.values()))
    inputs = [t.detach().to(like).requires_grad_() for t in (x, *(hx or ()))]
    arguments = [inputs[0] if pack is None else pack(inputs[0])] + ([tuple(inputs[1:])] if hx else [])
    output, (h_n, c_n) = (module if call is None else call)(*arguments, **ragged)
    outputs = [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]
    torch.manual_seed(3)
    weights = [torch.randn(t.shape).to(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, [*inputs, *parameters.values()], weights)
    names = ["output", "h_n", "c_n", "dx", *(["dh0", "dc0"] if hx else []), *(f"d{name}" for name in parameters)]
    return dict(zip(names, (t.detach() for t in (*outputs, *gradients)), strict=True))
