"""For `kernelize`: the LSTM whose forward takes the place of torch.nn.LSTM's."""

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .call.options import Arguments, options_of
from .call.prepare import prepare
from .call.weights import State
from .dispatch.run import run
from .modules.tracing import traced
from .modules.variants import weights_of


class LSTM(nn.Module):
    """A forward for a torch.nn.LSTM, of which it reads the attributes and parameters; it has none of its own."""

    can_torch_compile = True

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """As torch.nn.LSTM: the same shapes, results, errors. On the backend that `backend` has chosen, or "auto"."""
        # torch.compile does not trace a torch.nn.LSTM, but would compile the functions that its forward calls.
        eager = not torch.compiler.is_compiling() and "torch._dynamo" in sys.modules
        return (_in_eager_mode if eager else _called)(self, input, hx)


def _called(lstm: nn.LSTM, input: Tensor | PackedSequence, hx: State | None) -> tuple[Tensor | PackedSequence, State]:
    if isinstance(input, PackedSequence) and (instead := traced(lstm, input, hx)) is not None:
        return instead
    sizes = (lstm.hidden_size,) * lstm.num_layers
    asked = Arguments("LSTM", sizes, False, (), lstm.input_size, lstm.bias, None, lstm.bidirectional, lstm.batch_first,
                      lstm.training, lstm.dropout, proj_size=lstm.proj_size)  # fmt: skip
    call = prepare(options := options_of(*asked), weights_of(lstm, options.names), input, hx)
    y, states = run(call)
    return call.form.output(y), call.states_out(states)


_in_eager_mode = torch._disable_dynamo(_called)
