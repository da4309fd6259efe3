"""Conversion to Keras 3 and back, with equal results, and Keras's initial values for any LSTM or GRU.

Compared with torch, Keras's matrices are transposed, its LSTM has one bias instead of two, and its GRU has another
order of gates.
"""

import importlib
import itertools
import math
import numbers
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..call.checks import check_bool, check_lengths, check_tensor
from ..call.choices import Backend, BackendName
from ..call.sequences import Traversal
from ..kernels.heads import dense
from ..kernels.private import copy_all
from ..modules import GRU, LSTM, StackedGRU, StackedLSTM
from ..modules.arguments import NOT_OF_TORCH, OverSequences, recast
from ..tools.convert import OURS

Module = TypeVar("Module", bound=nn.Module)
Rnn = LSTM | StackedLSTM | GRU | StackedGRU
RECURRENT = (*OURS, *OURS.values())
FORGETTING = tuple(cls for cls in RECURRENT if "LSTM" in cls.__name__)  # with a forget gate
BIASES = ("bias_ih", "bias_hh")
_ACCEPTED = "an LSTM, a GRU or a stack of them"


class Pair(NamedTuple):
    """An LSTM or a GRU: its name in Keras, and the classes of gpu_lstm that compute it."""

    name: str  # the name of Keras's layer; the name of its cell is f"{name}Cell"
    module: type[LSTM] | type[GRU]
    stack: type[StackedLSTM] | type[StackedGRU]

    def reordered(self, rows: Tensor) -> Tensor:
        """Return the rows of a weight or bias, H per gate, moved from Keras's order of gates to torch's, or back.

        The gates of an LSTM are i, f, g, o in both. The gates of a GRU are z, r, n in Keras and r, z, n in torch.
        """
        if self.name == "LSTM":
            return rows
        first, second, third = rows.chunk(3)
        return torch.cat([second, first, third])

    def torchs_weights(self, cell: Any, tensor_of: Callable[[Any], Tensor]) -> list[Tensor]:
        """Return W_ih, W_hh and, with a bias, b_ih and b_hh of a Keras cell.

        For an LSTM b_hh is 0, since Keras has none.
        """
        weights = [tensor_of(cell.kernel).T, tensor_of(cell.recurrent_kernel).T]
        if cell.use_bias:
            bias = tensor_of(cell.bias)
            weights += bias.unbind() if bias.dim() == 2 else (bias, torch.zeros_like(bias))
        return list(map(self.reordered, weights))


OF_LSTM = Pair("LSTM", LSTM, StackedLSTM)
OF_GRU = Pair("GRU", GRU, StackedGRU)
PAIRS = (OF_LSTM, OF_GRU)


def import_keras() -> ModuleType:
    """Import and return Keras. The ImportError says what to install."""
    try:
        return importlib.import_module("keras")
    except ImportError as error:
        torchs = "to let Keras run on torch set KERAS_BACKEND=torch in the environment before it is imported"
        cure = f'pip install ".[keras]" from a clone of gpu_lstm, and {torchs}'
        raise ImportError(f"this needs Keras 3 and a backend for it ({error}): {cure}") from error


def check_equations(keras: ModuleType, cell: Any) -> None:
    """Raise ValueError unless a cell has the activations tanh and sigmoid, and a GRU cell reset_after=True."""
    for name, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
        function = getattr(cell, name)
        if function not in (getattr(keras.activations, expected), getattr(keras.ops, expected)):
            actual = getattr(function, "__name__", function)
            raise ValueError(f"{name}={actual!r} has no counterpart; expected {expected!r}")
    if not getattr(cell, "reset_after", True):
        here = "here the reset gate multiplies W_hn h + b_hn, and not h before the product"
        raise ValueError(f"reset_after=False has no counterpart; expected True: {here}")


class GoBackwards(nn.Module):
    """Run a module from the end of each sequence to its start, like Keras's go_backwards=True.

    A call accepts and returns the same as a call of `module` with batched input, except for two things. The order of
    the output is reversed: ``output[:, 0]`` belongs to the last time. With lengths, the zeros of the padding come
    first, as in Keras.

    Args:
        module: An LSTM, a GRU or a stack with one direction and batch_first=True.

    Raises:
        TypeError: `module` is of another class, or the input is not a tensor.
        ValueError: `module` is bidirectional or not batch_first, or the input is not batched.
    """

    def __init__(self, module: Rnn) -> None:
        super().__init__()
        if not isinstance(module, OverSequences):
            raise TypeError(f"GoBackwards accepts {_ACCEPTED}, got {type(module).__name__}")
        if module.bidirectional or not module.batch_first:
            got = f"bidirectional={module.bidirectional} and batch_first={module.batch_first}"
            raise ValueError(f"Expected a module with bidirectional=False and batch_first=True, got {got}")
        self.module = module

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]: ...

    def forward(self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run the module backwards, see the class. The input is [N, T, I]."""
        check_tensor(input, "input")
        if input.dim() != 3:
            raise ValueError(f"Expected input of 3 dimensions (N, T, I), got {input.dim()}")
        if lengths is None:
            return self.module(input.flip(1), hx)
        batch, steps, _ = input.shape
        check_lengths(lengths, steps, (batch,), input)
        # Each sequence is reversed within its length. The output is reversed back in the same way.
        time = Traversal(lengths, reverse=True).steps(input.transpose(0, 1))[0].T[:, :, None]  # [N, T, 1]
        output, states = self.module(input.take_along_dim(time, 1), hx, lengths=lengths)
        return output.take_along_dim(time, 1).flip(1), states


@torch.no_grad()
def from_keras(
    layer: Any, *, freeze_second_bias: bool = True, backend: BackendName | Backend | None = None
) -> Rnn | GoBackwards:
    """Return a module that computes the same as a built Keras layer, with a copy of its weights.

    | Keras | here |
    |---|---|
    | LSTM, gpu_lstm.keras.LSTM, RNN(LSTMCell) | LSTM |
    | Bidirectional of these, merge_mode="concat" | LSTM, bidirectional=True |
    | RNN([LSTMCell, ...]), RNN(StackedRNNCells) | StackedLSTM |
    | the same layers with GRU in place of LSTM | GRU, StackedGRU |
    | any of these except Bidirectional, with go_backwards=True | GoBackwards of the module |

    The module is batch_first, and has the dtype of the layer's variables. It always returns the whole output and the
    states. Regularizers and constraints are not converted.

    Args:
        layer: The Keras layer, on any backend of Keras.
        freeze_second_bias: If True, bias_hh of an LSTM, which is zero, gets requires_grad=False. If False, both biases
            get the gradient of Keras's one bias, so that their sum trains twice as fast. This does not apply to a GRU,
            which has both biases in Keras, too. Default: True
        backend: See `LSTM`.

    Raises:
        ValueError: The layer is not built, or has an argument without a counterpart here.
        TypeError: The layer is of another class, or of a subclass, which may compute anything. Or freeze_second_bias is
            not a bool.
        ImportError: Keras is not installed.
    """
    check_bool("freeze_second_bias", freeze_second_bias)
    keras = import_keras()
    cells, both = _cells_of(keras, layer), type(layer) is keras.layers.Bidirectional
    pair, *_ = [_pair_of(keras, cell) for cell in cells]
    _same("type", [type(cell).__name__ for cell in cells])

    shared: Any = dict(bias=_same("use_bias", [cell.use_bias for cell in cells]), batch_first=True, backend=backend)
    shared["dtype"] = getattr(torch, _same("dtype", [cell.kernel.dtype for cell in cells]))
    inputs, sizes = cells[0].kernel.shape[0], [cell.units for cell in cells]
    module: Rnn
    if not both and type(layer.cell) is keras.layers.StackedRNNCells:
        module = pair.stack(inputs, sizes, **shared)
    else:
        module = pair.module(inputs, _same("units", sizes), bidirectional=both, **shared)
    for weights, cell in zip(itertools.chain(*module._weights(module._options().names)), cells):
        for parameter, new in zip(weights.present(), pair.torchs_weights(cell, _tensor)):
            parameter.copy_(new).requires_grad_(cell.trainable)
        if weights.bias_hh is not None and pair is OF_LSTM:
            weights.bias_hh.requires_grad_(cell.trainable and not freeze_second_bias)
    return GoBackwards(module) if not both and layer.go_backwards else module


def to_keras(module: nn.Module) -> Any:
    """Return a built Keras layer that computes the same as a module, with a copy of its weights.

    | here | Keras | what a call returns |
    |---|---|---|
    | one layer | LSTM or GRU | (output, h, c) |
    | one layer, bidirectional | Bidirectional | (output, h, c, h_reverse, c_reverse) |
    | several layers | RNN(StackedRNNCells) | (output, [h, c], ...), one pair per layer |
    | GoBackwards | the same, go_backwards=True | the same |

    For a GRU there is no c, and each layer has one h instead of [h, c]. The Keras layer accepts (N, T, I), also if the
    module is not batch_first. The bias of a Keras LSTM is bias_ih + bias_hh.

    Args:
        module: An LSTM, GRU, StackedLSTM, StackedGRU, GoBackwards, torch.nn.LSTM or torch.nn.GRU.

    Raises:
        ValueError: The module has an argument without a counterpart in Keras: proj_size, residual, recurrent_dropout,
            zoneout, weight_drop, peepholes or layer_norm, or with several layers dropout or bidirectional.
        TypeError: The module is of another class.
        ImportError: Keras is not installed.
    """
    backwards = isinstance(module, GoBackwards)
    rnn: Any = module.module if backwards else module
    if ours := OURS.get(type(rnn)):
        rnn = recast(rnn, ours)
    pair = next((pair for pair in PAIRS if isinstance(rnn, OverSequences) and rnn._cell is pair.module._cell), None)
    if pair is None:
        raise TypeError(f"to_keras accepts {_ACCEPTED}, or GoBackwards, got {type(rnn).__name__}")
    keras = import_keras()
    by_layer = rnn._weights(rnn._options().names)
    weights, layers = [*itertools.chain(*by_layer)], len(by_layer)  # [L * D]
    for name in ("proj_size", "residual", *NOT_OF_TORCH):
        _refuse(name, getattr(rnn, name, None), " in Keras")
    if layers > 1:
        _refuse("dropout", rnn.dropout, " in Keras; set it to 0 for the numbers of eval()")
        _refuse("bidirectional", rnn.bidirectional, f" in Keras with {layers} layers")

    units = [len(w.weight_hh) // pair.module._cell.rows for w in weights]
    dtype = str(weights[0].weight_ih.dtype).removeprefix("torch.")
    # build() draws initial values. The default draws W_hh by a QR decomposition, which torch lacks in half precision.
    drawn = dict(recurrent_initializer="glorot_uniform") if dtype in ("float16", "bfloat16") else {}
    of_layer = dict(return_sequences=True, return_state=True, go_backwards=backwards, dtype=dtype)
    if layers == 1:
        layer = getattr(keras.layers, pair.name)(units[0], use_bias=rnn.bias, **drawn, **of_layer)
    else:
        of_cell = dict(use_bias=rnn.bias, dtype=dtype, **drawn)
        layer = keras.layers.RNN([getattr(keras.layers, f"{pair.name}Cell")(n, **of_cell) for n in units], **of_layer)
    if rnn.bidirectional:
        layer = keras.layers.Bidirectional(layer, dtype=dtype)
    layer.build((None, None, rnn.input_size))
    arrays: list[Tensor] = []  # by way of float64, which represents the numbers of every dtype exactly
    for w, size in zip(weights, units):
        tensors = w._replace(weight_hh=dense(w.weight_hh, size)).present()
        weight_ih, weight_hh, *biases = [pair.reordered(t.detach()).cpu().double() for t in tensors]
        arrays += [weight_ih.T, weight_hh.T]
        if biases:
            arrays.append(sum(biases) if pair is OF_LSTM else torch.stack(biases))  # type: ignore[arg-type]
    layer.set_weights([t.numpy() for t in arrays])
    layer.trainable = any(parameter.requires_grad for parameter in rnn.parameters())
    return layer


def lengths_of(mask: Tensor) -> Tensor:
    """Return the lengths, int64 [N], that belong to a Keras mask, bool [N, T].

    Each row of the mask must be True up to the end of its sequence, and False after it.

    Raises:
        TypeError: The mask is not a tensor.
        ValueError: The mask is not bool or not [N, T], or a row has a False before a True.
    """
    check_tensor(mask, "mask")
    if mask.dim() != 2 or mask.dtype is not torch.bool:
        raise ValueError(f"Expected a mask [N, T] of dtype torch.bool, got {list(mask.shape)} of {mask.dtype}")
    lengths = mask.sum(1)
    gaps = (mask != (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])).any(1).nonzero()
    if len(gaps):
        row = int(gaps[0])
        gap = f"row {row} has a gap: step {int(mask[row].int().argmin())} is masked, but a later one is not"
        raise ValueError(f"Expected a mask that is True up to the end of each sequence and False after it; {gap}")
    return lengths


@torch.no_grad()
def keras_init(module: Module) -> Module:
    """Give every LSTM and GRU in `module` initial values as Keras draws them, in place; return `module`.

    | parameter | initial value |
    |---|---|
    | weight_ih, weight_hr (which Keras lacks) | glorot_uniform |
    | weight_hh | orthogonal, with all gates of a head as one matrix |
    | biases | 1 for forget gates (see forget_bias), 0 for all others |
    | peepholes, layer norms | unchanged |

    Args:
        module: An LSTM, a GRU, a stack or a cell of these, torch's own LSTM, GRU or cells, or a module that contains
            any of them.

    Raises:
        TypeError: `module` contains no LSTM and no GRU.
    """
    _set(_modules_in(module, RECURRENT, "an LSTM, a GRU"), (*BIASES, "weight_ih", "weight_hh", "weight_hr"), _drawn)
    return module


def _drawn(owner: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Return new initial values for a parameter of `owner`, drawn as `keras_init` says."""
    new = torch.zeros_like(parameter)
    if name.startswith("weight_hh"):
        wide = new.to(torch.promote_types(new.dtype, torch.float32))  # torch has no QR decomposition in half precision
        heads, columns = getattr(owner, "heads", 1), new.shape[1]
        each = [nn.init.orthogonal_(part.clone()) for part in wide.chunk(heads)]  # [4 D, D]
        return torch.stack([t.unflatten(0, (-1, columns)) for t in each], 1).flatten(0, 2).to(new.dtype)
    if not name.startswith(BIASES):
        return nn.init.xavier_uniform_(new)
    return _with_forget_bias(name, new, 1.0) if isinstance(owner, FORGETTING) else new


@torch.no_grad()
def forget_bias(module: Module, value: float = 1.0) -> Module:
    """Set the bias of the forget gates of every LSTM in `module`, in place; return `module`.

    bias_ih is set to `value` and bias_hh to zero, in the rows of the forget gates only.

    Args:
        module: An LSTM, StackedLSTM or LSTMCell, torch's own LSTM or LSTMCell, or a module that contains any of them.
        value: The sum of the two biases. With 1, forget gates are open when training begins.

    Raises:
        TypeError: `module` contains no LSTM, or `value` is not a number.
        ValueError: An LSTM has bias=False, or `value` is not finite. Nothing is set.
    """
    lstms = _modules_in(module, FORGETTING, "an LSTM")
    if not isinstance(value, numbers.Real):
        raise TypeError(f"value should be a number, got: {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"value should be finite, got {value}")
    if not all(lstm.bias for lstm in lstms):
        raise ValueError("Expected an LSTM with a bias, got bias=False")
    _set(lstms, BIASES, lambda _, name, bias: _with_forget_bias(name, bias.clone(), value))
    return module


def _with_forget_bias(name: str, bias: Tensor, value: float) -> Tensor:
    """Set the forget gates' part of an LSTM's bias [4H] in place, to `value` in bias_ih and 0 in bias_hh; return it."""
    bias.chunk(4)[1].fill_(value if name.startswith("bias_ih") else 0.0)
    return bias


def _set(owners: list, names: tuple[str, ...], new: Callable[[nn.Module, str, Tensor], Tensor]) -> None:
    """Set each parameter of `owners` whose name begins with one of `names` to new(owner, name, parameter).

    If an error or an interrupt occurs, no parameter is changed.
    """
    every = [(owner, *each) for owner in owners for each in owner.named_parameters(recurse=False)]
    chosen = [each for each in every if each[1].startswith(names)]
    copy_all([parameter for *_, parameter in chosen], [new(*each) for each in chosen])


def _modules_in(module: nn.Module, classes: tuple[type, ...], what: str) -> list:
    """Return all modules of these classes in `module`. If there is none, raise TypeError with `what` in its text."""
    modules = module.modules() if isinstance(module, nn.Module) else ()
    found = [child for child in modules if isinstance(child, classes)]
    if not found:
        raise TypeError(f"Expected {what} or a module that holds one, got {type(module).__name__}")
    return found


def _cells_of(keras: ModuleType, layer: Any) -> list:
    """Return the cells of a Keras layer, one for each layer and direction; raise if the layer has no counterpart."""
    both = type(layer) is keras.layers.Bidirectional
    rnns = [layer.forward_layer, layer.backward_layer] if both else [layer]
    theirs = keras.layers.RNN, *(getattr(keras.layers, pair.name) for pair in PAIRS)
    for rnn in rnns:
        # Our own classes have `_pair` themselves. A user's subclass only inherits it.
        if type(rnn) not in theirs and "_pair" not in vars(type(rnn)):
            raise TypeError(f"from_keras accepts an LSTM, GRU, RNN or Bidirectional layer, got {type(rnn).__name__}")
        _refuse("stateful", rnn.stateful, "; give the states of one call to the next as hx")
    if both:
        if layer.merge_mode != "concat":
            raise ValueError(f"merge_mode={layer.merge_mode!r} has no counterpart; expected 'concat'")
        _refuse("go_backwards", rnns[0].go_backwards, " in the forward layer of a Bidirectional")
    elif type(layer.cell) is keras.layers.StackedRNNCells:
        return layer.cell.cells
    return [rnn.cell for rnn in rnns]


def _pair_of(keras: ModuleType, cell: Any) -> Pair:
    """Return the Pair of a Keras cell; raise unless the cell is built and has a counterpart."""
    pairs = [pair for pair in PAIRS if type(cell) is getattr(keras.layers, f"{pair.name}Cell")]
    if not pairs:
        raise TypeError(f"Expected cells of type LSTMCell or GRUCell, got {type(cell).__name__}")
    if not cell.built:
        raise ValueError("the layer has no weights yet: build it first, by layer.build((None, None, features))")
    check_equations(keras, cell)
    for name in ("dropout", "recurrent_dropout"):
        _refuse(name, getattr(cell, name), "; set it to 0 in the layer's cell for the numbers of inference")
    return pairs[0]


def _refuse(argument: str, value: Any, hint: str) -> None:
    """Raise ValueError, with a hint, if an argument without a counterpart is on."""
    if value:
        raise ValueError(f"{argument}={value!r} has no counterpart{hint}")


def _same(name: str, values: list) -> Any:
    """Return the one value that all cells have; raise ValueError if they differ."""
    if len(set(values)) > 1:
        raise ValueError(f"Expected the same {name} in all cells, got {values}")
    return values[0]


def _tensor(variable: Any) -> Tensor:
    """Return a copy of a Keras variable in float64, which represents the numbers of every other dtype exactly."""
    return torch.from_numpy(import_keras().ops.convert_to_numpy(variable.value).astype("float64"))
