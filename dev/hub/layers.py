"""Layers for `kernelize`: their forward replaces the forward of torch.nn.LSTM and torch.nn.GRU."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .call import roles
from .call.options import Arguments, options_of
from .call.prepare import request_of
from .call.weights import State, weights_now
from .dispatch.route import run_call
from .modules.tracing import traced


class LSTM(nn.Module):
    """A forward for a torch.nn.LSTM. It reads the attributes and parameters of that module, and has none of its own."""

    can_torch_compile = True

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """Run the module on the backend of `gpu_lstm.backend`, else "auto".

        Shapes, results and errors are torch.nn.LSTM's.
        """
        return _run(self, input, hx)


class GRU(nn.Module):
    """A forward for a torch.nn.GRU, like LSTM."""

    can_torch_compile = True

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the module. Shapes, results and errors are torch.nn.GRU's."""
        return _run(self, input, hx)


def _run(module: Any, input: Tensor | PackedSequence, hx: Any) -> tuple[Tensor | PackedSequence, Any]:
    # torch.compile does not trace a torch.nn.LSTM, but it would compile the functions that forward calls.
    eager = not torch.compiler.is_compiling() and "torch._dynamo" in sys.modules
    return (_in_eager_mode if eager else _called)(module, input, hx)


def _called(module: Any, input: Tensor | PackedSequence, hx: Any) -> tuple[Tensor | PackedSequence, Any]:
    if isinstance(input, PackedSequence) and (instead := traced(module, input, hx)) is not None:
        return instead
    sizes = (module.hidden_size,) * module.num_layers
    asked = Arguments(module.mode.lower(), roles.Module, sizes, False, (), 1, module.input_size, module.bias, None,
                      module.bidirectional, module.batch_first, module.training, False,
                      module.proj_size, (module.dropout, *Arguments._field_defaults["rates"][1:]))  # fmt: skip
    return run_call(request_of(options := options_of(*asked), weights_now(module, options.names), input, hx))


_in_eager_mode = torch._disable_dynamo(_called)
