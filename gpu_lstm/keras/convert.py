"""Conversion to Keras 3 and back, with equal results; and Keras's initial values for any LSTM or GRU.

Keras's matrices are transposed, its LSTM has one bias where torch's has two, and its GRU another order of gates.
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
from ..modules.arguments import NOT_OF_TORCH, Layers, recast
from ..tools.convert import OURS

Module = TypeVar("Module", bound=nn.Module)
Rnn = LSTM | StackedLSTM | GRU | StackedGRU
RECURRENT = (*OURS, *OURS.values())
FORGETTING = tuple(cls for cls in RECURRENT if "LSTM" in cls.__name__)  # with a forget gate
BIASES = ("bias_ih", "bias_hh")
_ACCEPTED = "an LSTM, a GRU or a stack of them"


class Pair(NamedTuple):
    """LSTM or GRU: its name in Keras, and the classes that compute it here."""

    name: str  # of Keras's layer; its cell's is f"{name}Cell"
    module: type[LSTM] | type[GRU]
    stack: type[StackedLSTM] | type[StackedGRU]

    def reordered(self, rows: Tensor) -> Tensor:
        """Rows of a weight or bias, H a gate, from Keras's order of gates to torch's, or back.

        An LSTM's are i, f, g, o in both. A GRU's are z, r, n in Keras and r, z, n in torch.
        """
        if self.name == "LSTM":
            return rows
        first, second, third = rows.chunk(3)
        return torch.cat([second, first, third])

    def torchs_weights(self, cell: Any, tensor_of: Callable[[Any], Tensor]) -> list[Tensor]:
        """W_ih, W_hh and, with a bias, b_ih and b_hh of a Keras cell. An LSTM's b_hh, which Keras lacks, is 0."""
        weights = [tensor_of(cell.kernel).T, tensor_of(cell.recurrent_kernel).T]
        if cell.use_bias:
            bias = tensor_of(cell.bias)
            weights += bias.unbind() if bias.dim() == 2 else (bias, torch.zeros_like(bias))
        return list(map(self.reordered, weights))


OF_LSTM = Pair("LSTM", LSTM, StackedLSTM)
OF_GRU = Pair("GRU", GRU, StackedGRU)
PAIRS = (OF_LSTM, OF_GRU)


def import_keras() -> ModuleType:
    """Keras; an ImportError says what to install."""
    try:
        return importlib.import_module("keras")
    except ImportError as error:
        torchs = "to let Keras run on torch set KERAS_BACKEND=torch in the environment before it is imported"
        cure = f'pip install ".[keras]" from a clone of gpu_lstm, and {torchs}'
        raise ImportError(f"this needs Keras 3 and a backend for it ({error}): {cure}") from error


def check_equations(keras: ModuleType, cell: Any) -> None:
    """Raise ValueError unless a cell has tanh, sigmoid and, of a GRU, the reset gate after the product."""
    for name, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
        function = getattr(cell, name)
        if function not in (getattr(keras.activations, expected), getattr(keras.ops, expected)):
            actual = getattr(function, "__name__", function)
            raise ValueError(f"{name}={actual!r} has no counterpart; expected {expected!r}")
    if not getattr(cell, "reset_after", True):
        here = "here the reset gate multiplies W_hn h + b_hn, and not h before the product"
        raise ValueError(f"reset_after=False has no counterpart; expected True: {here}")


class GoBackwards(nn.Module):
    """Runs a module from the end of each sequence to its start, like Keras's go_backwards=True.

    A call accepts and returns what `module` does, batched, but ``output[:, 0]`` belongs to the last time. With lengths,
    zeros come first, as in Keras.

    Args:
        module: an LSTM, GRU or stack of one direction, batch_first=True. Its weights are those of a forward one.

    Raises:
        TypeError: another kind of module; input that is not a tensor.
        ValueError: a module that is bidirectional or not batch_first; input that is not batched.
    """

    def __init__(self, module: Rnn) -> None:
        super().__init__()
        if not isinstance(module, Layers):
            raise TypeError(f"GoBackwards accepts {_ACCEPTED}, got {type(module).__name__}")
        if module.bidirectional or not module.batch_first:
            got = f"bidirectional={module.bidirectional} and batch_first={module.batch_first}"
            raise ValueError(f"Expected a module with bidirectional=False and batch_first=True, got {got}")
        self.module = module

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]: ...

    def forward(self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """See the class."""
        check_tensor(input, "input")
        if input.dim() != 3:
            raise ValueError(f"Expected input of 3 dimensions (N, T, I), got {input.dim()}")
        if lengths is None:
            return self.module(input.flip(1), hx)
        batch, steps, _ = input.shape
        check_lengths(lengths, steps, (batch,), input)
        # Each sequence is reversed within its length, and so is the output.
        time = Traversal(lengths, reverse=True).steps(input.transpose(0, 1))[0].T[:, :, None]  # [N, T, 1]
        output, states = self.module(input.take_along_dim(time, 1), hx, lengths=lengths)
        return output.take_along_dim(time, 1).flip(1), states


@torch.no_grad()
def from_keras(
    layer: Any, *, freeze_second_bias: bool = True, backend: BackendName | Backend | None = None
) -> Rnn | GoBackwards:
    """The module that computes what a built Keras layer computes, with a copy of its weights.

    | Keras | here |
    |---|---|
    | LSTM, gpu_lstm.keras.LSTM, RNN(LSTMCell) | LSTM |
    | Bidirectional of these, merge_mode="concat" | LSTM, bidirectional=True |
    | RNN([LSTMCell, ...]), RNN(StackedRNNCells) | StackedLSTM |
    | these with GRU for LSTM | GRU, StackedGRU |
    | any of these but Bidirectional, go_backwards | GoBackwards of the module |

    The module is batch_first, has the dtype of the layer's variables, and always returns the whole output and the
    states. Regularizers and constraints are not converted.

    Args:
        layer: from any backend of Keras.
        freeze_second_bias: whether an LSTM's bias_hh, which is zero, has requires_grad=False. If False, the bias trains
            twice as fast as Keras's. A GRU has both biases in Keras, too.
        backend: of the module, as for LSTM.

    Raises:
        ValueError: a layer that is not built, or an argument of it that has no counterpart here.
        TypeError: another layer, or a subclass, which may compute anything; freeze_second_bias is not a bool.
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
    """The built Keras layer that computes what a module computes, with a copy of its weights.

    One layer becomes keras.layers.LSTM or GRU, or Bidirectional, several become RNN(StackedRNNCells), GoBackwards
    becomes go_backwards=True. It accepts (N, T, I) whatever batch_first is, and returns (output, h, c), (output, h, c,
    h_reverse, c_reverse), or (output, [h, c], ...) with one pair per layer; of a GRU without c, and one h per layer. An
    LSTM's bias is bias_ih + bias_hh.

    Args:
        module: an LSTM, GRU, StackedLSTM, StackedGRU, GoBackwards, torch.nn.LSTM or torch.nn.GRU.

    Raises:
        ValueError: an argument that has no counterpart in Keras: proj_size, residual, recurrent_dropout, zoneout,
            weight_drop, peepholes, layer_norm, and for several layers dropout and bidirectional.
        TypeError: another kind of module.
        ImportError: Keras is not installed.
    """
    backwards = isinstance(module, GoBackwards)
    rnn: Any = module.module if backwards else module
    if ours := OURS.get(type(rnn)):
        rnn = recast(rnn, ours)
    pair = next((pair for pair in PAIRS if isinstance(rnn, Layers) and rnn._cell is pair.module._cell), None)
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
    # Building draws values, and torch has no QR in half precision.
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
    for cell, w, size in zip(_cells_of(keras, layer), weights, units):
        _assign_to(cell, [pair.reordered(t) for t in w._replace(weight_hh=dense(w.weight_hh, size)).present()])
    layer.trainable = any(parameter.requires_grad for parameter in rnn.parameters())
    return layer


def _assign_to(cell: Any, tensors: list[Tensor]) -> None:
    """Set the variables of a Keras cell, by way of float64, which holds the numbers of every dtype."""
    weight_ih, weight_hh, *biases = [tensor.detach().cpu().double() for tensor in tensors]
    cell.kernel.assign(weight_ih.T.numpy())
    cell.recurrent_kernel.assign(weight_hh.T.numpy())
    if biases:
        both = torch.stack(biases).numpy()
        cell.bias.assign(both if len(cell.bias.shape) == 2 else both.sum(0))


def lengths_of(mask: Tensor) -> Tensor:
    """The lengths [N], int64, of a Keras mask [N, T], bool, that is True up to each length and False after it.

    Raises:
        TypeError: a mask that is not a tensor.
        ValueError: a mask that is not bool or not [N, T], or a row of it with a False before a True.
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
    """Give every LSTM and GRU in `module`, in place, initial values as Keras draws them, and return `module`.

    weight_ih and weight_hr (which Keras lacks) are glorot_uniform. weight_hh is orthogonal, all gates of a head as one
    matrix. Biases are 0, of forget gates 1 (see forget_bias). Peepholes and layer norms stay as they are.

    Args:
        module: an LSTM, GRU, a stack or cell of these, torch's own, or a module that holds some.

    Raises:
        TypeError: there is none in `module`.
    """
    _set(_modules_in(module, RECURRENT, "an LSTM, a GRU"), (*BIASES, "weight_ih", "weight_hh", "weight_hr"), _drawn)
    return module


def _drawn(owner: nn.Module, name: str, parameter: Tensor) -> Tensor:
    new = torch.zeros_like(parameter)
    if name.startswith("weight_hh"):
        wide = new.to(torch.promote_types(new.dtype, torch.float32))  # torch has no QR in half
        heads, columns = getattr(owner, "heads", 1), new.shape[1]
        each = [nn.init.orthogonal_(part.clone()) for part in wide.chunk(heads)]  # [4 D, D]
        return torch.stack([t.unflatten(0, (-1, columns)) for t in each], 1).flatten(0, 2).to(new.dtype)
    if not name.startswith(BIASES):
        return nn.init.xavier_uniform_(new)
    return _with_forget_bias(name, new, 1.0) if isinstance(owner, FORGETTING) else new


@torch.no_grad()
def forget_bias(module: Module, value: float = 1.0) -> Module:
    """Set the forget gates' bias of every LSTM in `module`, in place: `value` in bias_ih, zero in bias_hh.

    Args:
        module: an LSTM, StackedLSTM or LSTMCell, torch's own, or a module that holds some, and returned.
        value: the sum of the two biases; with 1, forget gates are open when training begins.

    Raises:
        TypeError: there is no LSTM in `module`, or `value` is not a number.
        ValueError: an LSTM with bias=False, or a value that is not finite. Either way nothing is set.
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
    bias.chunk(4)[1].fill_(value if name.startswith("bias_ih") else 0.0)
    return bias


def _set(owners: list, names: tuple[str, ...], new: Callable[[nn.Module, str, Tensor], Tensor]) -> None:
    """Set parameters, by how their names begin, to new(owner, name, parameter); an error or interrupt changes none."""
    every = [(owner, *each) for owner in owners for each in owner.named_parameters(recurse=False)]
    chosen = [each for each in every if each[1].startswith(names)]
    copy_all([parameter for *_, parameter in chosen], [new(*each) for each in chosen])


def _modules_in(module: nn.Module, classes: tuple[type, ...], what: str) -> list:
    modules = module.modules() if isinstance(module, nn.Module) else ()
    found = [child for child in modules if isinstance(child, classes)]
    if not found:
        raise TypeError(f"Expected {what} or a module that holds one, got {type(module).__name__}")
    return found


def _cells_of(keras: ModuleType, layer: Any) -> list:
    """The cells of a Keras layer, of each layer and direction; an error if it has no counterpart."""
    both = type(layer) is keras.layers.Bidirectional
    rnns = [layer.forward_layer, layer.backward_layer] if both else [layer]
    theirs = keras.layers.RNN, *(getattr(keras.layers, pair.name) for pair in PAIRS)
    for rnn in rnns:
        if type(rnn) not in theirs and "_pair" not in vars(type(rnn)):  # which ours have, and a subclass inherits
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
    if value:
        raise ValueError(f"{argument}={value!r} has no counterpart{hint}")


def _same(name: str, values: list) -> Any:
    if len(set(values)) > 1:
        raise ValueError(f"Expected the same {name} in all cells, got {values}")
    return values[0]


def _tensor(variable: Any) -> Tensor:
    """A copy, in float64, which holds the numbers of every other dtype."""
    return torch.from_numpy(import_keras().ops.convert_to_numpy(variable.value).astype("float64"))
