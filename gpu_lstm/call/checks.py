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
from .forms import Form
from .modes import PLAIN, autocasts, need_the_reference
from .options import Options
from .weights import NAMES, State, Weights

_STRIDED = torch.strided


def check_bool(name: str, value: object) -> None:
    """Raise TypeError, in torch's words, unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_tensor(value: object, name: str) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor, got: {type(value).__name__}{_cure_of(value)}")


def _cure_of(value: object) -> str:
    """How to make a tensor of a value that a user may mistake for one."""
    return "; use torch.as_tensor" if isinstance(value, list | tuple) or hasattr(value, "__array__") else ""


def _other_way_round(shape: Sequence[int], swapped: Sequence[int]) -> str:
    """What to do where a tensor would fit if the first two dimensions of the input were swapped."""
    return "; it fits if the input's first two dimensions change places, see batch_first" if shape == swapped else ""


def check_rank_and_layout(input: Tensor, name: str, ranks: tuple[int, int]) -> int:
    """The rank of module `name`'s input; raise unless it is one of `ranks`, and the input dense."""
    try:
        rank = input.dim()
    except AttributeError as error:  # torch.nn.LSTM's error
        raise AttributeError(f"{error}; expected a tensor{_cure_of(input)}") from None
    if rank not in ranks:
        low, high = ranks
        raise ValueError(f"{name}: Expected input to be {low}D or {high}D, got {rank}D instead")
    check_dense(input, name)
    return rank


def check_dense(input: Tensor, name: str) -> None:
    """Raise RuntimeError unless the input of `name` is dense: neither sparse nor nested."""
    if input.layout is not _STRIDED or input.is_nested:
        what = "a nested tensor" if input.is_nested else f"a tensor of layout {input.layout}"
        raise RuntimeError(f"{name}: Expected input to be a dense tensor, got {what}")


def check_pair(hx: object, function: str = "lstm") -> None:
    """Raise, in torch's words, unless there are two states. One tensor that holds both is not a pair."""
    if not isinstance(hx, (tuple, list)):  # torch.compile of 2.9 does not know tuple | list
        what = f"argument 'hx' (position 2) must be tuple of Tensors, not {type(hx).__name__}"
        raise TypeError(f"{function}(): {what}{_cure_of_one(hx, function)}")
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


def check_rank_of_states(rank: int, hx: State) -> None:
    """Raise unless h_0 and c_0 of an LSTM are of the input's rank."""
    if hx[0].dim() != rank or hx[1].dim() != rank:
        form = "batched" if rank == 3 else "unbatched"
        raise RuntimeError(
            f"For {form} {rank}-D input, hx and cx should also be {rank}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors{_cure_of_one(hx, 'lstm')}"
        )
    if rank == 3:  # torch uses the first two states of an unbatched hx
        check_pair(hx)


def check_rank_of_state(rank: int, hx: Any) -> None:
    """Raise, in torch's words, unless h_0 of a GRU is of the input's rank."""
    found = _rank_of_only_state(hx)
    if found != rank:
        form = "batched" if rank == 3 else "unbatched"
        raise RuntimeError(f"For {form} {rank}-D input, hx should also be {rank}-D but got {found}-D tensor")


def check_rank_of_hidden(hx: Any, name: str) -> None:
    """Raise, in torch's words, unless the only state of a cell called `name` is 1D or 2D."""
    rank = _rank_of_only_state(hx)
    if rank not in (1, 2):
        raise ValueError(f"{name}: Expected hidden to be 1D or 2D, got {rank}D instead")


def _rank_of_only_state(hx: Any) -> int:
    try:
        rank: int = hx.dim()
    except AttributeError as error:  # torch.nn.GRU's error
        raise AttributeError(f"{error}; hx is one tensor") from None
    return rank


def _cure_of_one(hx: object, function: str) -> str:
    """What to do where hx is one tensor: one state of two, or lengths."""
    if not isinstance(hx, Tensor):
        return ""
    cure = "a cell expects (h, c)" if function == "lstm_cell" else "lengths and resets are given by keyword"
    return f"; hx is one tensor: {cure}"


def check_states_of_a_cell(hx: Any, batched: bool) -> None:
    """Raise unless it is (h, c), each 1D or 2D."""
    for i, state in enumerate(hx):
        if state.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {state.dim()}D instead")
    if batched:
        check_pair(hx, "lstm_cell")


def check_states(states: Any, options: Options, name: str, error: type[Exception]) -> None:
    """Raise unless `states` has (h, c), or h where a user holds that alone, for each layer; a wrong number: `error`."""
    what = "tensors" if options.one_state else "pairs"
    expected = f"{name} should be a list of {what}{' (h, c)' * (what == 'pairs')}, one a layer"
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"{expected}, got: {type(states).__name__}")
    for k, state in enumerate(states):
        pair = (state,) if options.one_state else state
        if not isinstance(pair, (list, tuple)):
            raise TypeError(f"{expected}, got for layer {k}: {type(pair).__name__}")
        if len(pair) != len(options.cell.states):
            raise error(f"Expected two states (h, c) of layer {k}, got {len(pair)}")
        for letter, tensor in zip("hc", pair):
            check_tensor(tensor, f"{letter} of layer {k}")
    if len(states) != len(options.sizes):
        raise error(f"Expected {name} of {len(options.sizes)} {what}, one a layer, got {len(states)}")


def check_every_state(hx: Any, names: Sequence[str], x: Tensor) -> None:
    """Raise unless hx has a tensor for each of these states, on the device of x."""
    expected = f"hx should be a tuple of {len(names)} tensors ({', '.join(names)})"
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{expected}, got: {type(hx).__name__}")
    if len(hx) != len(names):
        raise RuntimeError(f"{expected}, got {len(hx)}")
    for name, state in zip(names, hx):
        check_tensor(state, name)
        _check_device("hidden", state, x)


def check_size_of_states(names: Sequence[str], states: Sequence[Tensor], size: tuple[int, ...]) -> None:
    """Raise unless all states are of one size."""
    for name, state in zip(names, states):
        if state.shape != size:
            raise RuntimeError(f"Expected {name} size {size}, got {list(state.shape)}")


def check_input(options: Options, form: Form, x: Tensor, weights: list[list[Weights]] | None) -> None:
    """Raise, in torch's words, unless x [..., I] has the first layer's features and, with weights, its dtype."""
    if not options.of_rnn_base:
        return
    weight = x if weights is None or form.packed is not None else weights[0][0].weight_ih
    if weight is not None and (x.shape[-1] != options.input_size or (x.dtype is not weight.dtype and not autocasts(x))):
        as_torchs: Any = SimpleNamespace(input_size=options.input_size, _flat_weights=[weight])
        RNNBase.check_input(as_torchs, x, None if x.dim() == 3 else x)


def check_sizes_of_states(options: Options, x: Tensor, batch: int, block: int, hx: State) -> None:
    """Raise, in torch's words, unless h and c of a block, [*, B, F], have the right sizes."""
    size = options.blocks[block]
    for i, (state, features) in enumerate(zip(hx, (size.width, size.hidden))):
        expected = *options.lead, batch, features
        if state.shape != expected:
            name = f"{'hc'[i]} of layer {block}" if options.by_layer else "hidden" + f"[{i}]" * (not options.one_state)
            hint = _other_way_round(state.shape, (*options.lead, x.shape[0], features))
            raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}{hint}")


def check_sizes(layer: Weights, sizes: Sequence[tuple[int, ...]]) -> None:
    """Raise unless the tensors of a layer have the `sizes`, which are in the order of Weights."""
    for name, tensor, size in zip(NAMES, layer, sizes):
        if tensor is None and name in ("weight_ih", "weight_hh") and None not in size:
            raise TypeError(f"{name} should be a tensor, got: NoneType")
        if tensor is not None and tensor.shape != size:
            raise RuntimeError(f"Expected {name} size {size}, got {list(tensor.shape)}")
    if (layer.bias_ih is None) != (layer.bias_hh is None):
        raise RuntimeError("bias_ih and bias_hh should be given together")
    if layer.bias_c is not None and layer.gain_c is None:
        raise RuntimeError("bias_c should be given together with gain_c")


def check_rows_of_heads(weight_hh: Tensor, hidden: int | None = None) -> int:
    """H, by default the columns of a W_hh; raise unless it divides the rows, and the columns H."""
    check_tensor(weight_hh, "weight_hh")
    rows, columns = weight_hh.shape if weight_hh.dim() == 2 else (0, 0)
    hidden = columns if hidden is None else hidden
    if not (rows and columns and hidden > 0) or rows % hidden or hidden % columns:
        raise ValueError(f"Expected weight_hh with a multiple of {hidden} rows, got {list(weight_hh.shape)}")
    return hidden


def check_same_tensors(weights: list[list[Weights]]) -> None:
    """Raise unless peepholes, and each tensor of layer norms, are in all layers and directions or in none."""
    for name in names_of(VARIANT):
        if len({getattr(one, name) is None for layer in weights for one in layer}) > 1:
            raise RuntimeError(f"{name} should be given in every layer and direction, or in none")


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
        check_unprojected(not named.gain_ih is named.gain_hh is named.gain_c is None, len(named.weight_hr))
    return named


def check_unprojected(layer_norm: bool, projected: int) -> None:
    """Raise unless layer norm or the projection is off: Ba et al. (2016) do not say which comes first."""
    if layer_norm and projected:
        raise ValueError(f"layer_norm is not defined with a projection: expected proj_size 0, got {projected}")


def check_cell(options: Options, form: Form, x: Tensor, state: State, weights: Weights, alike: bool) -> None:
    """Raise, in torch's words, unless x [B, I] and a cell's states fit; `alike`: all have one dtype and device."""
    (inputs, hidden, _, _), (h, c), (batch, features) = options.sizes[0], state, x.shape
    expected = batch, hidden
    if alike and features == inputs and h.shape == expected and c.shape == expected:
        return
    if not options.one_state:
        check_states_of_a_cell(state if form.batched else (h[0], c[0]), form.batched)
    operator, hx = getattr(torch, f"{options.cell.name}_cell"), h if options.one_state else state
    of_torch = weights.weight_ih, weights.weight_hh, weights.bias_ih, weights.bias_hh
    if features == inputs and h.shape == c.shape == expected:
        try:
            return check_alike(x, [state], [[weights]])
        except RuntimeError:
            operator(x, hx, *of_torch)
            raise
    operator(x, hx, *of_torch)
    raise RuntimeError(f"Expected hx of size {expected}, got {list(h.shape)} and {list(c.shape)}")


def is_exact(c: Tensor, x: Tensor) -> bool:
    """Whether c is float32 though x is in half precision: the kernels keep it so, unrounded."""
    return c.dtype is torch.float32 and x.dtype in (torch.float16, torch.bfloat16) and not autocasts(x)


def fits_torchs_cell(options: Options, x: Tensor, state: Sequence[Any], weights: Weights) -> bool:
    """Whether torch's operator for a cell takes all as it is, on the CPU. If not, `prepare` makes it so, or raises."""
    if type(x) is not Tensor or not x.is_cpu or options.feature is not None:
        return False
    if x.dim() != 2 or x.layout is not torch.strided or x.is_nested:
        return False
    dtype, batch = x.dtype, len(x)
    found = [t.shape for t in (x, *state, *weights) if type(t) in PLAIN and t.dtype is dtype and t.is_cpu]
    sizes = [(batch, options.input_size), *[(batch, options.hidden)] * len(options.cell.states)]
    return found == sizes + options.sizes_of_first


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
        hint = _other_way_round(tensor.shape, swapped)
        raise ValueError(f"Expected {name} of shape {list(shape)}, got {list(tensor.shape)}{hint}")
    if tensor.device != device:
        raise ValueError(f"Expected {name} on {device}, where the input is, got {tensor.device}")


def check_reset_pair(pair: object, name: str) -> None:
    """Raise unless states to reset to are (h, c)."""
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{name} should be a pair of tensors (h, c), got: {type(pair).__name__}")
    if len(pair) != 2:
        raise ValueError(f"Expected {name} of two states (h, c), got {len(pair)}")


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
