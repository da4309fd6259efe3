"""The modules LSTM, GRU, SLSTM, LSTMCell, GRUCell, StackedLSTM and StackedGRU."""

from .cell import GRUCell, LSTMCell
from .recurrent import GRU, LSTM, SLSTM
from .stacked import StackedGRU, StackedLSTM

__all__ = ["GRU", "LSTM", "SLSTM", "GRUCell", "LSTMCell", "StackedGRU", "StackedLSTM"]
