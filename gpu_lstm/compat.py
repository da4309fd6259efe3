"""Modules for code that checks `isinstance(module, torch.nn.LSTM)` or `isinstance(module, torch.nn.GRU)`.

gpu_lstm.LSTM is not an instance of torch.nn.LSTM, since torch.compile does not trace such instances. For code that
needs the check, this module has subclasses of torch's classes. They are not compiled. Otherwise they are the same.
"""

from torch.nn.modules import rnn

from . import modules
from .modules.recurrent import NotCompiled


class LSTM(NotCompiled, modules.LSTM, rnn.LSTM):  # type: ignore[misc]  # its forward accepts lengths and resets too
    """An LSTM that is also an instance of torch.nn.LSTM. See `gpu_lstm.LSTM` for arguments, shapes and errors."""


class GRU(NotCompiled, modules.GRU, rnn.GRU):  # type: ignore[misc]
    """A GRU that is also an instance of torch.nn.GRU. See `gpu_lstm.GRU` for arguments, shapes and errors."""
