"""Mistakes that users of torch.nn.LSTM make: torch's type of error, with a text that says what to do."""

import numpy as np
import pytest
import torch
from torch import nn

import gpu_lstm
from gpu_lstm.functional import lstm_layer

X, LENGTHS, RESETS = torch.zeros(5, 3, 4), torch.tensor([5, 2, 1]), torch.zeros(5, 3, dtype=torch.bool)
STATE, PAIR = torch.zeros(1, 3, 6), torch.zeros(2, 3, 6)
OURS, FIRST = gpu_lstm.LSTM(4, 6), gpu_lstm.LSTM(4, 6, batch_first=True)
KEYWORD, SWAP = "lengths and resets are given by keyword", "first two dimensions change places, see batch_first"

MISTAKES = {  # the call, what the user should read, and the same call of torch's own
    "an array": (lambda: OURS(X.numpy()), "expected a tensor; use torch.as_tensor", lambda: THEIRS(X.numpy())),
    "a list": (lambda: OURS(X.tolist()), "expected a tensor; use torch.as_tensor", lambda: THEIRS(X.tolist())),
    "None": (lambda: OURS(None), "'NoneType' object has no attribute 'dim'; expected a tensor$", lambda: THEIRS(None)),
    "an array, cell": (
        lambda: gpu_lstm.LSTMCell(4, 6)(np.zeros((3, 4))), "use torch.as_tensor",
        lambda: nn.LSTMCell(4, 6)(np.zeros((3, 4))),
    ),
    "an array, stack": (lambda: gpu_lstm.StackedLSTM(4, [6])(X.numpy()), "use torch.as_tensor", None),
    "an array, layer": (lambda: lstm_layer(X.numpy(), OURS._flat_weights), "use torch.as_tensor", None),
    "lengths as hx": (lambda: OURS(X, LENGTHS), KEYWORD, lambda: THEIRS(X, LENGTHS)),
    "resets as hx": (lambda: OURS(X, RESETS), KEYWORD, lambda: THEIRS(X, RESETS)),
    "one state": (lambda: OURS(X, PAIR), KEYWORD, lambda: THEIRS(X, PAIR)),
    "float lengths": (lambda: OURS(X, lengths=LENGTHS.float()), r"use lengths.long\(\)", None),
    "a list of lengths": (lambda: OURS(X, lengths=[5, 2, 1]), "use torch.as_tensor", None),
    "float resets": (lambda: OURS(X, resets=RESETS.float()), r"use resets.bool\(\)", None),
    "states, other way": (
        lambda: FIRST(X, (STATE, STATE)), SWAP, lambda: nn.LSTM(4, 6, batch_first=True)(X, (STATE, STATE)),
    ),
    "lengths, other way": (lambda: FIRST(X, lengths=LENGTHS), SWAP, None),
    "resets, other way": (lambda: OURS(X, resets=RESETS.T), SWAP, None),
}  # fmt: skip
THEIRS = nn.LSTM(4, 6)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_text_says_what_to_do_and_the_type_is_torchs(mistake):
    ours, text, theirs = MISTAKES[mistake]
    with pytest.raises((AttributeError, TypeError, ValueError, RuntimeError), match=text) as error:
        ours()
    if theirs is not None:
        with pytest.raises(error.type):
            theirs()
