"""The modules: LSTM, GRU and their cells, which replace torch's own, SLSTM, and stacks of layers with different sizes."""

from .cell import GRUCell, LSTMCell
from .recurrent import GRU, LSTM, SLSTM
from .stacked import StackedGRU, StackedLSTM

__all__ = ["GRU", "LSTM", "SLSTM", "GRUCell", "LSTMCell", "StackedGRU", "StackedLSTM"]
