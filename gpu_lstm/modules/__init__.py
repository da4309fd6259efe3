"""The modules: LSTM and LSTMCell replace torch's own, StackedLSTM stacks layers of different sizes."""

from .cell import LSTMCell
from .lstm import LSTM
from .stacked import StackedLSTM

__all__ = ["LSTM", "LSTMCell", "StackedLSTM"]
