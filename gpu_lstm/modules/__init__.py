"""The modules: LSTM, GRU and their cells replace torch's own; stacks have layers of different sizes."""

from .cell import GRUCell, LSTMCell
from .recurrent import GRU, LSTM, SLSTM
from .stacked import StackedGRU, StackedLSTM

__all__ = ["GRU", "LSTM", "SLSTM", "GRUCell", "LSTMCell", "StackedGRU", "StackedLSTM"]
