"""Replace torch's LSTMs and GRUs inside a model by the modules of gpu_lstm, and back."""

import contextlib
import logging
import re
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from torch import nn
from torch.nn.modules import rnn

from .. import compat as drop_in
from ..call.checks import check_bool
from ..modules import GRU, LSTM, GRUCell, LSTMCell
from ..modules.arguments import NOT_OF_TORCH, Checked, OverSequences, recast
from ..modules.stacked import Stack
from .xlstm import CELLS

Classes = Mapping[type[nn.Module], type[nn.Module]]
OURS: Classes = {rnn.LSTM: LSTM, rnn.LSTMCell: LSTMCell, rnn.GRU: GRU, rnn.GRUCell: GRUCell}
_INSTANCES: Classes = {rnn.LSTM: drop_in.LSTM, rnn.GRU: drop_in.GRU}
_COMPAT: Classes = {**OURS, **_INSTANCES, LSTM: drop_in.LSTM, GRU: drop_in.GRU}
_THEIRS: Classes = {ours: torchs for table in (OURS, _INSTANCES) for torchs, ours in table.items()}

Model = TypeVar("Model", bound=nn.Module)


# Types cannot express "exactly this class". So a type checker believes that a subclass is converted, too; it is not.
@overload
def convert(model: rnn.LSTM, compat: bool = False) -> LSTM: ...  # type: ignore[overload-overlap]
@overload
def convert(model: rnn.LSTMCell, compat: bool = False) -> LSTMCell: ...  # type: ignore[overload-overlap]
@overload
def convert(model: rnn.GRU, compat: bool = False) -> GRU: ...  # type: ignore[overload-overlap]
@overload
def convert(model: rnn.GRUCell, compat: bool = False) -> GRUCell: ...  # type: ignore[overload-overlap]
@overload
def convert(model: Model, compat: bool = False) -> Model: ...
def convert(model: nn.Module, compat: bool = False) -> nn.Module:
    """Replace every torch.nn.LSTM, LSTMCell, GRU and GRUCell in `model`, in place, by the module of gpu_lstm.

    Only modules of exactly these classes are replaced. A subclass stays, since its forward may do anything. Parameters
    stay the same objects, so that optimizers keep working. Hooks, training flags, names and shared modules stay, too.
    TorchRL's LSTMModule and GRUModule need instances of torch's classes. Inside them an LSTM becomes a compat.LSTM, and
    a GRU a compat.GRU.

    print(model) shows a replaced module as gpu_lstm.LSTM(...). The logger "gpu_lstm" reports at INFO which modules were
    replaced and which were left. If there was nothing to replace, and no module of gpu_lstm either, there is a
    UserWarning. It names `use_for_slstm` if the model has sLSTM cells of xlstm or TiRex.

    Args:
        model: A module of any kind.
        compat: Replace every LSTM, also those of gpu_lstm, by a compat.LSTM, which is an instance of torch.nn.LSTM, and
            every GRU by a compat.GRU.

    Returns:
        `model`. If `model` is itself of one of these classes, a new module that shares its parameters.

    Raises:
        TypeError: `model` is not a module, or `compat` is not a bool.
    """
    check_bool("compat", compat)
    return _swap(model, _COMPAT if compat else OURS, "convert")


@overload
def to_torch(model: LSTM) -> rnn.LSTM: ...  # type: ignore[overload-overlap]
@overload
def to_torch(model: LSTMCell) -> rnn.LSTMCell: ...  # type: ignore[overload-overlap]
@overload
def to_torch(model: GRU) -> rnn.GRU: ...  # type: ignore[overload-overlap]
@overload
def to_torch(model: GRUCell) -> rnn.GRUCell: ...  # type: ignore[overload-overlap]
@overload
def to_torch(model: Model) -> Model: ...
def to_torch(model: nn.Module) -> nn.Module:
    """Replace every LSTM, LSTMCell, GRU and GRUCell of gpu_lstm and gpu_lstm.compat in `model`, in place, by torch's.

    This is the inverse of `convert`: the same things stay, and the result is returned in the same way. If a subclass of
    one of these classes, or an SLSTM, is left, there is a UserWarning. `backend` and `recompute` are dropped. A module
    with heads gets a new, block-diagonal weight_hh. torch's modules accept neither lengths nor resets.

    Raises:
        TypeError: `model` is not a module, or it contains a StackedLSTM or a StackedGRU. Nothing is replaced.
        ValueError: A module has a regulariser, peepholes or a layer norm, which torch's modules lack. Nothing is
            replaced.
    """
    return _swap(model, _THEIRS, "to_torch")


def _swap(model: nn.Module, classes: Classes, function: str) -> nn.Module:
    """Replace each module whose class is a key of `classes` by a module of the class that is its value.

    `function` is the caller's name in messages. Either all modules are replaced or none: errors are raised before the
    first replacement, and an interrupt undoes the replacements that were made.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} accepts a torch.nn.Module, got {type(model).__name__}")
    modules: dict[str, nn.Module] = dict(model.named_modules())
    twins: dict[nn.Module, nn.Module] = {}
    # TorchRL's modules check isinstance(lstm, torch.nn.LSTM), or GRU, and behave differently if that is False.
    of_torchrl = (m for m in modules.values() if any(c.__module__.split(".")[0] == "torchrl" for c in type(m).__mro__))
    checked = {child for owner in of_torchrl for child in owner.children()}
    swapped, left, done, to_theirs = [], [], False, classes is _THEIRS
    for path, module in modules.items():
        where, cls = path or "the model itself", type(module)
        if to_theirs:
            _check_that_torch_has_it(repr(path) if path else where, module)
        if goal := classes.get(cls):
            twins[module] = recast(module, _COMPAT[cls] if classes is OURS and module in checked else goal)
            in_place = "" if path else ", which cannot be swapped in place: the one that is returned is new"
            swapped.append(f"{where} ({_name(cls)}){in_place}")
        elif isinstance(module, tuple(classes.values())) and not (to_theirs and isinstance(module, tuple(classes))):
            done = True  # this includes a compat.LSTM, an instance of torch's class and of ours
        elif isinstance(module, tuple(classes)):
            left.append(f"{where} ({_name(cls)}), a subclass, which may do anything in its forward")
        elif isinstance(module, Checked) and not module._cell.of_torch:
            done = True
            left += [f"{where} ({_name(cls)}), a cell that torch.nn has not"] * to_theirs
    with contextlib.ExitStack() as undo:
        for module in modules.values():
            children = twins.get(module, module)._modules  # a twin has its own dict of children
            for name, child in module._modules.items():
                if child in twins:
                    undo.callback(children.__setitem__, name, child)
                    children[name] = twins[child]
        undo.pop_all()
    nothing = f"nothing: there is no {' or '.join(map(_name, classes))} in the {_name(type(model))}"
    if not to_theirs and any(_name(type(module)) in CELLS for module in modules.values()):
        nothing += "; gpu_lstm.use_for_slstm changes its sLSTM cells"
    text = f"{function} swapped {', '.join(swapped) or nothing}" + f"; left as it is: {'; '.join(left)}" * bool(left)
    if (swapped or done) and not (to_theirs and left):
        logging.getLogger("gpu_lstm").info(text)
    else:
        warnings.warn(f"gpu_lstm: {text}", stacklevel=3)
    return twins.get(model, model)


def _check_that_torch_has_it(where: str, module: Any) -> None:
    """Raise unless torch.nn has a module that computes the same. `where` names the module in the error."""
    if isinstance(module, Stack):
        cls, has = module._cell.name.upper(), "has layers of one size, and no list of states"
        raise TypeError(f"{where} is a Stacked{cls} of sizes {module.hidden_sizes}; a torch.nn.{cls} {has}")
    for name in NOT_OF_TORCH if type(module) in _THEIRS else ():
        if value := getattr(module, name, 0.0):
            raise ValueError(f"{where} has {name}={value}, which {_name(_THEIRS[type(module)])} has not")


def check_layers(function: str, module: object, classes: Any = OverSequences) -> None:
    """Raise TypeError unless `function` accepts `module`, which has to be of one of these classes."""
    if not isinstance(module, classes):
        advice = " of torch.nn: convert it, gpu_lstm.convert(module)" * isinstance(module, rnn.LSTM | rnn.GRU)
        children = module.named_modules() if isinstance(module, nn.Module) else ()
        if inside := [path for path, child in children if isinstance(child, classes)]:
            advice = f": give it the module {inside[0]!r} of it"
        of_keras = {c.__name__ for c in type(module).__mro__ if c.__module__.split(".")[0] == "keras"}
        if of_keras & {"RNN", "Bidirectional", "Model"}:
            which = "each recurrent layer in it" if "Model" in of_keras else "it"
            advice = f" of Keras: convert {which} first by gpu_lstm.keras.from_keras"
        raise TypeError(f"{function} accepts an LSTM, a GRU, an SLSTM or a stack, got {type(module).__name__}{advice}")


def _name(cls: type) -> str:
    """Return the name of a class as users write it: torch.nn.LSTM."""
    return re.sub(r"^(torch\.nn|gpu_lstm)\.modules\.\w+\.", r"\1.", f"{cls.__module__}.{cls.__qualname__}")
