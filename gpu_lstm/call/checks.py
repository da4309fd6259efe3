"""The checks of a call. Comparisons are cheap; texts are made only on failure, in torch's words where it has them."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..kernels.cells import Cell
from ..kernels.private import assert_on_device
from ..kernels.tensors import BY_NAME, VARIANT, names_of
from .modes import autocasts, need_the_reference
from .weights import LAYER_NORM, NAMES, State, Weights, variant_of


def check_bool(name: str, value: object) -> None:
    """Raise TypeError, in torch's words, unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_tensor(value: object, name: str) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor, got: {type(value).__name__}{cure_of(value)}")


def cure_of(value: object) -> str:
    """How to make a tensor of a value that a user may mistake for one."""
    return "; use torch.as_tensor" if isinstance(value, list | tuple) or hasattr(value, "__array__") else ""


def other_way_round(shape: Sequence[int], swapped: Sequence[int]) -> str:
    """What to do where a tensor would fit if the first two dimensions of the input were swapped."""
    return "; it fits if the input's first two dimensions change places, see batch_first" if shape == swapped else ""


def check_pair(hx: object, function: str = "lstm") -> None:
    """Raise, in torch's words, unless there are two states. One tensor that holds both is not a pair."""
    if not isinstance(hx, (tuple, list)):  # torch.compile of 2.9 does not know tuple | list
        what = f"argument 'hx' (position 2) must be tuple of Tensors, not {type(hx).__name__}"
        raise TypeError(f"{function}(): {what}{cure_of_one(hx, function)}")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")


def check_packed(input: PackedSequence) -> None:
    """Raise unless a PackedSequence, which anyone may make, has a row for each step of each sequence."""
    sizes, data = input.batch_sizes.tolist(), input.data
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    if sum(sizes) != len(data):
        raise RuntimeError(f"Expected data of {sum(sizes)} rows, the sum of batch_sizes, got {len(data)}")
    if sizes != sorted(sizes, reverse=True) or min(sizes, default=0) < 0:
        raise RuntimeError(f"Expected batch_sizes that never grow and are never negative, got {sizes}")


def cure_of_one(hx: object, function: str) -> str:
    """What to do where hx is one tensor: one state of two, or lengths."""
    if not isinstance(hx, Tensor):
        return ""
    cure = "a cell expects (h, c)" if function == "lstm_cell" else "lengths and resets are given by keyword"
    return f"; hx is one tensor: {cure}"


def check_as_torch(x: Tensor, features: int, weight: Tensor) -> None:
    """Raise, in torch's words, unless x [..., I] has so many features, and the dtype of a weight."""
    as_torchs: Any = SimpleNamespace(input_size=features, _flat_weights=[weight])
    RNNBase.check_input(as_torchs, x, None if x.dim() == 3 else x)


def check_list(states: Any, names: Sequence[str], layers: int, name: str, error: type[Exception]) -> Any:
    """`states`; raise unless it has (h, c), of a GRU h, for each layer. A wrong number: `error`."""
    what, in_full = ("tensors", "tensors") if len(names) == 1 else ("pairs", "pairs (h, c)")
    expected = f"{name} should be a list of {in_full}, one a layer, got"
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"{expected}: {type(states).__name__}")
    for k, state in enumerate(states):
        block = (state,) if len(names) == 1 else state
        if not isinstance(block, (list, tuple)):
            raise TypeError(f"{expected} for layer {k}: {type(block).__name__}")
        if len(block) != len(names):
            raise error(f"Expected two states (h, c) of layer {k}, got {len(block)}")
        for letter, tensor in zip(names, block):
            check_tensor(tensor, f"{letter} of layer {k}")
    if len(states) != layers:
        raise error(f"Expected {name} of {layers} {what}, one a layer, got {len(states)}")
    return states


def check_states(hx: Any, names: Sequence[str], size: tuple[int, ...], x: Tensor) -> None:
    """Raise unless hx has a tensor of this size for each of these states, on the device of x."""
    expected = f"hx should be a tuple of {len(names)} tensors ({', '.join(names)})"
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{expected}, got: {type(hx).__name__}")
    if len(hx) != len(names):
        raise RuntimeError(f"{expected}, got {len(hx)}")
    for name, state in zip(names, hx):
        check_tensor(state, name)
        _check_device("hidden", state, x)
        check_size(name, state, size)


def check_size(name: str, tensor: Tensor, size: tuple[int, ...], swapped: Sequence[int] = ()) -> None:
    """Raise, in torch's words, unless a tensor has this size; `swapped`: see `other_way_round`."""
    if tensor.shape != size:
        hint = other_way_round(tensor.shape, swapped)
        raise RuntimeError(f"Expected {name} size {size}, got {list(tensor.shape)}{hint}")


def check_weights(layer: Weights, sizes: Sequence[tuple[int, ...]], weights: list[list[Weights]]) -> None:
    """Raise unless the tensors of a layer have the `sizes`, in the order of Weights, and all layers have the same."""
    for name, tensor, size in zip(NAMES, layer, sizes):
        if tensor is None and name in ("weight_ih", "weight_hh") and None not in size:
            raise TypeError(f"{name} should be a tensor, got: NoneType")
        if tensor is not None:
            check_size(name, tensor, size)
    if (layer.bias_ih is None) != (layer.bias_hh is None):
        raise RuntimeError("bias_ih and bias_hh should be given together")
    if layer.bias_c is not None and layer.gain_c is None:
        raise RuntimeError("bias_c should be given together with gain_c")
    for name in names_of(VARIANT):
        if len({getattr(one, name) is None for directions in weights for one in directions}) > 1:
            raise RuntimeError(f"{name} should be given in every layer and direction, or in none")


def check_rows_of_heads(weight_hh: Tensor, hidden: int | None = None) -> int:
    """H, by default the columns of a W_hh; raise unless it divides the rows, and the columns H."""
    check_tensor(weight_hh, "weight_hh")
    rows, columns = weight_hh.shape if weight_hh.dim() == 2 else (0, 0)
    hidden = columns if hidden is None else hidden
    if not (rows and columns and hidden > 0) or rows % hidden or hidden % columns:
        raise ValueError(f"Expected weight_hh with a multiple of {hidden} rows, got {list(weight_hh.shape)}")
    return hidden


def named_weights(weights: Weights | Sequence[Tensor | None], cell: Cell) -> Weights:
    """The weights of a layer by name, checked: each a tensor with the right number of dimensions."""
    most = len(NAMES) if cell.normalises else NAMES.index("weight_hr")
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights should be a tuple or list of tensors, got: {type(weights).__name__}")
    if not 2 <= len(weights) <= most:
        names = f"weight_ih, weight_hh and, if there are any, {', '.join(NAMES[2:most])}"
        raise ValueError(f"Expected weights of 2 to {most} tensors ({names}), got {len(weights)}")
    named = Weights(*weights)  # type: ignore[arg-type]
    for name, tensor in zip(NAMES, named):
        if tensor is None and name in ("weight_ih", "weight_hh"):
            raise TypeError(f"{name} should be a tensor, got: NoneType")
        if tensor is not None:
            check_tensor(tensor, name)
            expected = len(BY_NAME[name].size.split())
            if tensor.dim() != expected:
                raise RuntimeError(f"{name} must have {expected} dimensions, got {tensor.dim()}")
    if named.weight_hr is not None:
        check_unprojected(variant_of(named) == LAYER_NORM, len(named.weight_hr))
    return named


def check_unprojected(layer_norm: bool, projected: int) -> None:
    """Raise unless layer norm or the projection is off: Ba et al. (2016) do not say which comes first."""
    if layer_norm and projected:
        raise ValueError(f"layer_norm is not defined with a projection: expected proj_size 0, got {projected}")


def is_exact(c: Tensor, x: Tensor) -> bool:
    """Whether c is float32 though x is in half precision: the kernels keep it so, unrounded."""
    return c.dtype is torch.float32 and x.dtype in (torch.float16, torch.bfloat16) and not autocasts(x)


def check_alike(x: Tensor, states: Sequence[State], weights: list[list[Weights]]) -> None:
    """Raise, in torch's own words, unless all tensors are of one device and dtype.

    Under autocast dtypes may differ, and a cell state may be float32 with half precision.
    """
    mixed_allowed = autocasts(x)
    tensors = [("parameter", tensor, False) for layer in weights for one in layer for tensor in one.present()]
    tensors += [("hidden", tensor, is_cell) for state in states for tensor, is_cell in zip(state, (False, True))]
    for what, tensor, is_cell in tensors:
        _check_device(what, tensor, x)
        if tensor.dtype != x.dtype and not mixed_allowed and not (is_cell and is_exact(tensor, x)):
            raise RuntimeError(
                f"Input and {what} tensors are not the same dtype, "
                f"found input tensor with {x.dtype} and {what} tensor with {tensor.dtype}"
            )


def _check_device(what: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(
            f"Input and {what} tensors are not at the same device, "
            f"found input tensor at {x.device} and {what} tensor at {tensor.device}"
        )


def check_lengths(lengths: Tensor, steps: int, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `lengths` is an int tensor of `shape` on `device` with values from 0 to `steps`.

    On CUDA the values are asserted on the device, without a synchronisation; elsewhere at once.
    """
    check_tensor(lengths, "lengths")
    if lengths.dtype not in (torch.int32, torch.int64):
        cure = "; use lengths.long()" if lengths.is_floating_point() else ""
        raise ValueError(f"lengths should be of dtype torch.int32 or torch.int64, got {lengths.dtype}{cure}")
    _check_place("lengths", lengths, shape, device, (steps,) * len(shape))
    if need_the_reference():  # inside vmap there is no value to look at
        return
    has_values = type(lengths) is Tensor and not (lengths.is_cuda or lengths.is_meta) and lengths.numel() > 0
    if has_values and not torch.compiler.is_compiling():
        least, most = map(int, lengths.aminmax())  # half the time of comparisons
        if least < 0 or most > steps:
            raise ValueError(
                f"Expected lengths from 0 to {steps}, the number of steps, got lengths from {least} to {most}"
            )
        return
    fits = ((lengths >= 0) & (lengths <= steps)).all()
    if torch.compiler.is_compiling():  # a text with the number in it would need a graph for each number
        assert_on_device(fits, "Expected lengths from 0 to the number of steps")
    elif lengths.is_cuda or type(lengths) is not Tensor:  # fake tensors have no values
        assert_on_device(fits, f"Expected lengths from 0 to {steps}, the number of steps")


def check_resets(resets: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `resets` is a bool tensor of `shape` on `device`."""
    check_tensor(resets, "resets")
    if resets.dtype != torch.bool:
        raise ValueError(f"resets should be of dtype torch.bool, got {resets.dtype}; use resets.bool()")
    _check_place("resets", resets, shape, device, shape[::-1])


def _check_place(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, swapped: tuple[int, ...]
) -> None:
    if tensor.shape != shape:
        hint = other_way_round(tensor.shape, swapped)
        raise ValueError(f"Expected {name} of shape {list(shape)}, got {list(tensor.shape)}{hint}")
    if tensor.device != device:
        raise ValueError(f"Expected {name} on {device}, where the input is, got {tensor.device}")


def pair_to_reset_to(block: Any, name: str, one_state: bool) -> tuple[Any, Any]:
    """(h, c) of states to reset to, of a GRU twice h; raise unless it is such a block."""
    if one_state:
        check_tensor(block, name)
        return block, block
    if not isinstance(block, (tuple, list)):
        raise TypeError(f"{name} should be a pair of tensors (h, c), got: {type(block).__name__}")
    if len(block) != 2:
        raise ValueError(f"Expected {name} of two states (h, c), got {len(block)}")
    return block[0], block[1]


def check_reset_state(state: Tensor, name: str, sizes: tuple[list[int], list[int]], x: Tensor, is_cell: bool) -> None:
    """Raise unless `state` has one of two sizes, a state per sequence or per step, and the dtype and device of x.

    As for any state, dtypes may differ under autocast, and a cell state may be float32 with half precision.
    """
    check_tensor(state, name)
    if list(state.shape) not in sizes:
        raise ValueError(
            f"Expected {name} of size {sizes[0]}, one a sequence, or {sizes[1]}, one a step, got {list(state.shape)}"
        )
    if state.dtype != x.dtype and not autocasts(x) and not (is_cell and is_exact(state, x)):
        raise ValueError(f"Expected {name} of dtype {x.dtype}, got {state.dtype}")
    if state.device != x.device:
        raise ValueError(f"Expected {name} on {x.device}, where the input is, got {state.device}")
