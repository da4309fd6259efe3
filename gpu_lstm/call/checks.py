"""The checks of a call's arguments.

The text of an error is made only on failure, since checks run at every call. If torch raises the same error, the text
is torch's.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..kernels.cells import Cell
from ..kernels.private import assert_on_device
from ..kernels.tensors import BY_NAME, VARIANT, Shape, names_of
from .modes import autocasts, need_the_reference
from .weights import NAMES, AllWeights, Weights

SWAPPED = "; it fits if the input's first two dimensions change places, see batch_first"  # the end of an error's text


def check_bool(name: str, value: object) -> None:
    """Raise TypeError, in torch's words, unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_positive(name: str, size: object) -> None:
    """Raise, in torch's words, unless `size` is a positive int."""
    if not isinstance(size, int):
        raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"{name} must be greater than zero")


def check_heads(heads: int, hidden: int, projected: int = 0, norms: Sequence[str] = ()) -> None:
    """Raise unless `heads` is a positive int that divides `hidden`.

    With more than one head, also raise if there is a projection, or a layer norm of W_hh h or of c. They combine all
    units.
    """
    check_positive("heads", heads)
    if heads == 1:
        return
    check_positive("hidden_size", hidden)
    if hidden % heads:
        raise ValueError(f"hidden_size must be divisible by heads, got hidden_size={hidden} and heads={heads}")
    if projected:
        raise ValueError(f"heads are not defined with a projection: expected proj_size 0, got {projected}")
    if not {"hh", "c"}.isdisjoint(norms):
        raise ValueError(f"layer_norm of 'hh' or 'c' is over all units: expected heads=1, got {heads}")


def check_tensor(value: object, name: str) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor, got: {type(value).__name__}{cure_of(value)}")


def check_dimensions(name: str, tensor: Tensor, count: int) -> None:
    """Raise RuntimeError, in torch's words, unless a tensor has this number of dimensions."""
    if tensor.dim() != count:
        raise RuntimeError(f"{name} must have {count} dimensions, got {tensor.dim()}")


def check_count(values: Any, counts: Sequence[int], texts: tuple[str, str], error: type[Exception]) -> None:
    """Raise TypeError unless `values` is a tuple or list. Raise `error` unless its length is one of `counts`.

    `texts` are the messages of the two errors. {} in a text stands for the type of `values`, or for its length.
    """
    if not isinstance(values, (tuple, list)):  # torch.compile of 2.9 does not know tuple | list
        raise TypeError(texts[0].format(type(values).__name__, cure=cure_of_one(values)))
    if len(values) not in counts:
        raise error(texts[1].format(len(values)))


PAIR = (
    "lstm(): argument 'hx' (position 2) must be tuple of Tensors, not {}{cure}",
    "lstm expects two hidden states",
)
"""torch's messages for an hx that is not a pair of states. One tensor that contains both is not a pair."""


def check_states(
    states: Any, names: Sequence[str], texts: tuple[str, str] = PAIR, error: type[Exception] = RuntimeError
) -> None:
    """Raise unless `states` is a tuple or list of tensors, one for each name. See `check_count` for the errors."""
    check_count(states, (len(names),), texts, error)
    for name, state in zip(names, states):
        check_tensor(state, name)


def cure_of(value: object) -> str:
    """Return advice for an error about a value that is not a tensor, or "" if torch.as_tensor would not help."""
    numbers = isinstance(value, list | tuple) and not any(isinstance(each, Tensor) for each in value)
    return "; use torch.as_tensor" if numbers or hasattr(value, "__array__") else ""


def cure_of_one(hx: object, cure: str = "expected (h, c); lengths and resets are given by keyword") -> str:
    """Return advice for an error about an hx that is one tensor instead of a pair, or "" if it is not a tensor.

    The tensor may be one of the two states, or lengths that were given by position.
    """
    return f"; hx is one tensor: {cure}" if isinstance(hx, Tensor) else ""


def check_packed(input: PackedSequence) -> None:
    """Raise unless a PackedSequence has a row of data for each step of each sequence.

    Users can make a PackedSequence themselves, so it may be inconsistent.
    """
    sizes, data = input.batch_sizes.tolist(), input.data
    check_dimensions("input", data, 2)
    if sum(sizes) != len(data):
        raise RuntimeError(f"Expected data of {sum(sizes)} rows, the sum of batch_sizes, got {len(data)}")
    if sizes != sorted(sizes, reverse=True) or min(sizes, default=0) < 0:
        raise RuntimeError(f"Expected batch_sizes that never grow and are never negative, got {sizes}")


def check_as_torch(x: Tensor, features: int, weight: Tensor) -> None:
    """Raise, in torch's words, unless x [..., I] has this number of features and the dtype of `weight`."""
    as_torchs: Any = SimpleNamespace(input_size=features, _flat_weights=[weight])
    RNNBase.check_input(as_torchs, x, None if x.dim() == 3 else x)


def check_list(states: Any, names: Sequence[str], layers: int, name: str, error: type[Exception]) -> Any:
    """Return `states`. Raise unless it is a list with a state for each layer: a pair (h, c), or h alone.

    `names` are the names of one layer's states. `name` is the name of the whole list in errors. `error` is raised if
    there is a wrong number of states or layers, TypeError if something else is wrong.
    """
    what, in_full = ("tensors", "tensors") if len(names) == 1 else ("pairs", "pairs (h, c)")
    expected = f"{name} should be a list of {in_full}, one a layer, got"
    for k, state in enumerate(states if isinstance(states, (tuple, list)) else ()):
        texts = f"{expected} for layer {k}: {{}}", f"Expected two states (h, c) of layer {k}, got {{}}"
        of_layer = [f"{letter} of layer {k}" for letter in names]
        check_states((state,) if len(names) == 1 else state, of_layer, texts, error)
    texts = f"{expected}: {{}}", f"Expected {name} of {layers} {what}, one a layer, got {{}}"
    check_count(states, (layers,), texts, error)
    return states


def check_size(name: str, tensor: Tensor, size: Shape, swapped: Sequence[int] = ()) -> None:
    """Raise, in torch's words, unless a tensor has this size.

    `swapped` is the size that would be right if the first two dimensions of the input were swapped. The error says so.
    """
    if tensor.shape != size:
        hint = SWAPPED if tensor.shape == swapped else ""
        raise RuntimeError(f"Expected {name} size {size}, got {list(tensor.shape)}{hint}")


def check_weights(layer: Weights, sizes: Sequence[Shape], weights: AllWeights) -> None:
    """Raise unless the weights of a layer in one direction fit.

    `layer` has the weights to check. `sizes` are the sizes of its tensors, in the order of Weights. bias_ih and bias_hh
    must be given together, and bias_c only with gain_c. `weights` are all weights of the call, [L][D]. Each tensor for
    peepholes or a layer norm must be present in every layer and direction, or in none.
    """
    for name, tensor, size in zip(NAMES, layer, sizes):
        if None not in size:
            _check_weight(name, tensor)
        if tensor is not None:
            check_size(name, tensor, size)
    if (layer.bias_ih is None) != (layer.bias_hh is None):
        raise RuntimeError("bias_ih and bias_hh should be given together")
    if layer.bias_c is not None and layer.gain_c is None:
        raise RuntimeError("bias_c should be given together with gain_c")
    for name in names_of(VARIANT):
        if len({getattr(one, name) is None for directions in weights for one in directions}) > 1:
            raise RuntimeError(f"{name} should be given in every layer and direction, or in none")


def named_weights(weights: Weights | Sequence[Tensor | None], cell: Cell) -> Weights:
    """Return the weights of a layer by name.

    Raise if there are too few or too many, if one has a wrong type or number of dimensions, or if a layer norm is
    combined with a projection.
    """
    most = len(NAMES) if cell.normalises else NAMES.index("weight_hr")
    names = f"weight_ih, weight_hh and, if there are any, {', '.join(NAMES[2:most])}"
    texts = (
        "weights should be a tuple or list of tensors, got: {}",
        f"Expected weights of 2 to {most} tensors ({names}), got {{}}",
    )
    check_count(weights, range(2, most + 1), texts, ValueError)
    for name, tensor in zip(NAMES, weights):
        _check_weight(name, tensor)
        if tensor is not None:
            check_dimensions(name, tensor, len(BY_NAME[name].size.split()))
    named = Weights(*weights)  # type: ignore[arg-type]
    if named.weight_hr is not None:
        check_unprojected(not named.gain_ih is named.gain_hh is named.gain_c is None, len(named.weight_hr))
    return named


def _check_weight(name: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is a tensor. All except weight_ih and weight_hh may be None."""
    if tensor is not None or name in ("weight_ih", "weight_hh"):
        check_tensor(tensor, name)


def check_unprojected(layer_norm: bool, projected: int) -> None:
    """Raise if a layer norm is combined with a projection. Ba et al. (2016) do not define which of them comes first."""
    if layer_norm and projected:
        raise ValueError(f"layer_norm is not defined with a projection: expected proj_size 0, got {projected}")


def is_exact(c: Tensor, x: Tensor) -> bool:
    """Whether c is in float32 although x is in half precision. The kernels keep such a c without rounding it."""
    return c.dtype is torch.float32 and x.dtype in (torch.float16, torch.bfloat16) and not autocasts(x)


def fits(tensor: Tensor, x: Tensor, is_c: bool) -> bool:
    """Whether a tensor has a dtype that is allowed together with x. `is_c` says that the tensor is c.

    The dtype of x is allowed, and under autocast every dtype. c may also be exact, see `is_exact`.
    """
    return tensor.dtype is x.dtype or autocasts(x) or (is_c and is_exact(tensor, x))


def check_device(what: str, tensor: Tensor, x: Tensor) -> None:
    """Raise unless `tensor` is on the device of the input."""
    if tensor.device != x.device:
        found = f"found input tensor at {x.device} and {what} tensor at {tensor.device}"
        raise RuntimeError(f"Input and {what} tensors are not at the same device, {found}")


def check_lengths(lengths: Tensor, steps: int, shape: Shape, x: Tensor) -> None:
    """Raise unless `lengths` is an int tensor of this shape, on the device of x, with values from 0 to `steps`.

    On CUDA the values are asserted on the device, without a synchronisation. On a CPU they are checked at once.
    """
    check_tensor(lengths, "lengths")
    if lengths.dtype not in (torch.int32, torch.int64):
        cure = "; use lengths.long()" if lengths.is_floating_point() else ""
        if lengths.dtype is torch.bool:  # these are resets that were given by position
            cure = "; lengths and resets are given by keyword"
        raise ValueError(f"lengths should be of dtype torch.int32 or torch.int64, got {lengths.dtype}{cure}")
    _check_place("lengths", lengths, shape, x, (steps,) * len(shape))
    compiling = torch.compiler.is_compiling()
    if need_the_reference(compiling):  # inside vmap there is no value to look at
        return
    has_values = type(lengths) is Tensor and not (lengths.is_cuda or lengths.is_meta) and lengths.numel() > 0
    if has_values and not compiling:
        least, most = map(int, lengths.aminmax())  # takes half the time of comparisons
        if least < 0 or most > steps:
            expected = f"Expected lengths from 0 to {steps}, the number of steps"
            raise ValueError(f"{expected}, got lengths from {least} to {most}")
        return
    fits = ((lengths >= 0) & (lengths <= steps)).all()
    if compiling:  # a text with the number in it would need a graph for each number
        assert_on_device(fits, "Expected lengths from 0 to the number of steps")
    elif lengths.is_cuda or type(lengths) is not Tensor:  # fake tensors have no values
        assert_on_device(fits, f"Expected lengths from 0 to {steps}, the number of steps")


def check_resets(resets: Tensor, shape: Shape, x: Tensor) -> None:
    """Raise unless `resets` is a bool tensor of this shape, on the device of the input."""
    check_tensor(resets, "resets")
    if resets.dtype != torch.bool:
        cure = cure_of_flags("resets", resets, shape)
        raise ValueError(f"resets should be of dtype torch.bool, got {resets.dtype}{cure}")
    _check_place("resets", resets, shape, x, shape[::-1])


def cure_of_flags(name: str, flags: Tensor, shape: Sequence[int]) -> str:
    """Return advice on how to turn `flags` into a bool tensor of this shape, or "" if the shapes do not fit."""
    cure = ".squeeze(-1)" * (flags.shape == (*shape, 1)) + ".bool()" * (flags.dtype is not torch.bool)
    return f"; use {name}{cure}" if cure and flags.shape in (shape, (*shape, 1)) else ""


def _check_place(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor, swapped: Sequence[int] = ()) -> None:
    """Raise ValueError unless a tensor has this shape and is on the device of x. See `check_size` for `swapped`."""
    if tensor.shape != shape:
        hint = SWAPPED if tensor.shape == swapped else cure_of_flags(name, tensor, shape)
        raise ValueError(f"Expected {name} of shape {list(shape)}, got {list(tensor.shape)}{hint}")
    if tensor.device != x.device:
        raise ValueError(f"Expected {name} on {x.device}, where the input is, got {tensor.device}")


def check_reset_state(state: Tensor, name: str, sizes: tuple[list[int], list[int]], x: Tensor, is_c: bool) -> None:
    """Raise unless `state` is a tensor that a reset may set.

    `sizes` are the two sizes that are allowed: with a state for each sequence, and with a state for each step. The
    dtype must be allowed together with x, see `fits`. The device must be the device of x.
    """
    check_tensor(state, name)
    if list(state.shape) not in sizes:
        expected = f"{sizes[0]}, one a sequence, or {sizes[1]}, one a step"
        raise ValueError(f"Expected {name} of size {expected}, got {list(state.shape)}")
    if not fits(state, x, is_c):
        raise ValueError(f"Expected {name} of dtype {x.dtype}, got {state.dtype}")
    _check_place(name, state, state.shape, x)
