"""For code that asks `isinstance(module, torch.nn.LSTM)`.

gpu_lstm.LSTM is not an instance of torch.nn.LSTM, since torch.compile refuses to trace any module that is. For code
that checks anyway there is this subclass of it, which is not compiled, but is otherwise the same.
"""

from torch.nn.modules.rnn import LSTM as TorchLSTM

from . import modules


class LSTM(modules.LSTM, TorchLSTM):  # type: ignore[misc]  # its forward accepts lengths and resets too
    """A gpu_lstm.LSTM that is also an instance of torch.nn.LSTM. Arguments, shapes and errors as gpu_lstm.LSTM."""
