"""Swap torch's LSTMs inside a model for ours."""

from torch import nn
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.modules.rnn import LSTMCell as TorchLSTMCell

from .modules import LSTM, LSTMCell, recast

_OURS = {TorchLSTM: LSTM, TorchLSTMCell: LSTMCell}


def convert(model: nn.Module) -> nn.Module:
    """Swap every torch.nn.LSTM and torch.nn.LSTMCell in `model`, in place, for gpu_lstm's.

    Only these exact classes: a subclass may do anything in its forward, and is left alone. Parameters stay the very
    same objects, so that optimizers keep working; hooks, training flags and names stay too. A module that is used
    in several places is swapped for one module in all of them.

    Returns:
        `model`; where it is itself one of these classes, a new module that shares its parameters.
    """
    if type(model) in _OURS:
        model = recast(model, _OURS[type(model)])
    swapped: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        parent = swapped.get(module, module)  # a module that was swapped has a list of children of its own
        for name, child in parent._modules.items():
            if child is not None and type(child) in _OURS:
                if child not in swapped:
                    swapped[child] = recast(child, _OURS[type(child)])
                parent._modules[name] = swapped[child]
    return model
