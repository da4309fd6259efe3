"""The modules: LSTM, GRU and their cells replace torch's own; stacks have layers of different sizes."""

from .cell import GRUCell, LSTMCell
from .gru import GRU
from .lstm import LSTM
from .slstm import SLSTM
from .stacked import StackedGRU, StackedLSTM

__all__ = ["GRU", "LSTM", "SLSTM", "GRUCell", "LSTMCell", "StackedGRU", "StackedLSTM"]
