"""For code that asks `isinstance(module, torch.nn.LSTM)`, or torch.nn.GRU.

gpu_lstm.LSTM is not an instance of torch.nn.LSTM, since torch.compile refuses to trace any module that is. For code
that checks anyway there are these subclasses of torch's, which are not compiled, but are otherwise the same.
"""

from torch.nn.modules import rnn

from . import modules
from .modules.recurrent import NotCompiled


class LSTM(NotCompiled, modules.LSTM, rnn.LSTM):  # type: ignore[misc]  # its forward accepts lengths and resets too
    """A gpu_lstm.LSTM that is also an instance of torch.nn.LSTM. Arguments, shapes and errors as gpu_lstm.LSTM."""


class GRU(NotCompiled, modules.GRU, rnn.GRU):  # type: ignore[misc]
    """A gpu_lstm.GRU that is also an instance of torch.nn.GRU. Arguments, shapes and errors as gpu_lstm.GRU."""
