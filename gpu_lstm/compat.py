"""For code that asks `isinstance(module, torch.nn.LSTM)`.

gpu_lstm.LSTM is no instance of torch.nn.LSTM, since torch.compile refuses to trace any module that is. Where code
asks all the same, this class answers yes; it is not compiled, and otherwise the same.
"""

from torch.nn.modules.rnn import LSTM as TorchLSTM

from . import modules


class LSTM(modules.LSTM, TorchLSTM):  # type: ignore[misc]  # its forward takes lengths and resets too
    """gpu_lstm.LSTM that is an instance of torch.nn.LSTM as well. Arguments, shapes and errors as there."""
