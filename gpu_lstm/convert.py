"""Swap torch's LSTMs inside a model for ours and back, and read the weights of Haste's."""

import contextlib
from collections.abc import Mapping
from typing import TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.modules.rnn import LSTMCell as TorchLSTMCell

from . import compat
from .modules import LSTM, LSTMCell, StackedLSTM, recast
from .settings import REGULARISERS

_OURS: dict[type[nn.Module], type[nn.Module]] = {TorchLSTM: LSTM, TorchLSTMCell: LSTMCell}
_THEIRS: dict[type[nn.Module], type[nn.Module]] = {LSTM: TorchLSTM, compat.LSTM: TorchLSTM, LSTMCell: TorchLSTMCell}


Model = TypeVar("Model", bound=nn.Module)

# A type checker cannot say "of exactly this class": it takes a subclass, which is left alone, for converted, too.


@overload
def convert(model: TorchLSTM) -> LSTM: ...  # type: ignore[overload-overlap]
@overload
def convert(model: TorchLSTMCell) -> LSTMCell: ...  # type: ignore[overload-overlap]
@overload
def convert(model: Model) -> Model: ...
def convert(model: nn.Module) -> nn.Module:
    """Swap every torch.nn.LSTM and torch.nn.LSTMCell in `model`, in place, for gpu_lstm's.

    Only these exact classes: a subclass may do anything in its forward, and is left alone. Parameters stay the very
    same objects, so that optimizers keep working; hooks, training flags and names stay too. A module that is used
    in several places is swapped for one module in all of them.

    Returns:
        `model`; where it is itself one of these classes, a new module that shares its parameters.
    """
    return _swap(model, _OURS)


@overload
def to_torch(model: LSTM) -> TorchLSTM: ...  # type: ignore[overload-overlap]
@overload
def to_torch(model: LSTMCell) -> TorchLSTMCell: ...  # type: ignore[overload-overlap]
@overload
def to_torch(model: Model) -> Model: ...
def to_torch(model: nn.Module) -> nn.Module:
    """Swap every gpu_lstm.LSTM, gpu_lstm.compat.LSTM and gpu_lstm.LSTMCell in `model`, in place, for torch.nn's.

    The way back from `convert`, with the same promises. The backend and `recompute` are dropped: they change no
    result. Code that calls a module with lengths or resets finds that torch.nn.LSTM takes neither.

    Returns:
        `model`; where it is itself one of these classes, a new module that shares its parameters.

    Raises:
        TypeError: there is a StackedLSTM.
        ValueError: an LSTM has a regularizer that torch.nn.LSTM has not. Either way nothing was swapped.
    """
    for path, module in model.named_modules():
        where = repr(path) if path else "the model itself"
        if isinstance(module, StackedLSTM):
            raise TypeError(
                f"{where} is a StackedLSTM of sizes {module.hidden_sizes}, with a pair of states a layer; a "
                "torch.nn.LSTM has layers of one size, and one pair of states for all"
            )
        if type(module) in _THEIRS:
            for name in REGULARISERS:
                if getattr(module, name, 0.0):
                    raise ValueError(f"{where} has {name}={getattr(module, name)}, which torch.nn.LSTM has not")
    return _swap(model, _THEIRS)


def _swap(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """All or nothing: what raises does so before the first is swapped, and an interrupt takes all of it back."""
    modules = list(model.modules())
    twins = {module: recast(module, classes[type(module)]) for module in modules if type(module) in classes}
    with contextlib.ExitStack() as undo:
        for module in modules:
            children = twins.get(module, module)._modules  # a twin has a list of children of its own
            for name, child in module._modules.items():
                if child in twins:
                    undo.callback(children.__setitem__, name, child)
                    children[name] = twins[child]
        undo.pop_all()
    return twins.get(model, model)


def from_haste(source: nn.Module | Mapping[str, Tensor]) -> LSTM:
    """A gpu_lstm.LSTM with the weights of a haste_pytorch.LSTM, on their device and in their dtype.

    Args:
        source: the module, which gives batch_first and the training flag too, or its state_dict: kernel [I, 4H],
            recurrent_kernel [H, 4H] and bias [4H], with gates in the order i, g, f, o.

    Haste's one bias becomes bias_ih; bias_hh is zero. Its forget_bias needs no place: it is where that bias started.

    Raises:
        ValueError: other names or sizes than these, or a module with zoneout or dropout (of the recurrent weights).
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    expected = ["bias", "kernel", "recurrent_kernel"]
    if sorted(state) != expected:
        raise ValueError(f"expected the parameters {expected} of a haste_pytorch.LSTM, got {sorted(state)}")
    kernel, recurrent_kernel, bias = state["kernel"], state["recurrent_kernel"], state["bias"]
    shapes = [list(tensor.shape) for tensor in (kernel, recurrent_kernel, bias)]
    hidden = len(recurrent_kernel)
    if shapes != [[len(kernel), 4 * hidden], [hidden, 4 * hidden], [4 * hidden]]:
        raise ValueError(f"expected sizes [I, 4H], [H, 4H] and [4H] of kernel, recurrent_kernel and bias, got {shapes}")
    for name in ("zoneout", "dropout"):
        if getattr(source, name, 0.0):
            raise ValueError(f"the module has {name}={getattr(source, name)}, which gpu_lstm.LSTM cannot take over")

    lstm = LSTM(
        len(kernel), hidden, batch_first=getattr(source, "batch_first", False), device=kernel.device, dtype=kernel.dtype
    )
    bias = _of_haste(bias)
    weights = _of_haste(kernel), _of_haste(recurrent_kernel), bias, bias.new_zeros(bias.shape)
    lstm.load_state_dict(dict(zip(lstm.state_dict(), weights, strict=True)))
    return lstm.train(getattr(source, "training", True))


def _of_haste(weight: Tensor) -> Tensor:
    """With the gates in front, in the order i, f, g, o."""
    i, g, f, o = weight.chunk(4, dim=-1)
    return torch.cat([i, f, g, o], dim=-1).t()
