"""Let the sLSTM cells of the packages xlstm and tirex-ts compute by gpu_lstm, in place."""

import functools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from ..call.checks import check_bool
from ..call.choices import Backend
from ..call.modes import modes
from ..call.prepare import request_of_layer
from ..call.request import Request
from ..call.weights import Weights
from ..equations.slstm import next_sum, states_from, states_of
from ..functional import slstm_layer
from ..kernels.cells import SLSTM

CELLS = ("xlstm.blocks.slstm.cell.sLSTMCell_vanilla", "xlstm.blocks.slstm.cell.sLSTMCell_cuda",
         "tirex.models.slstm.cell.sLSTMCell")  # fmt: skip
_ACCEPTED = {
    "function": ("slstm",), "gradient_recurrent_cut": (None, False),
    "gradient_recurrent_clipval": (None,), "forward_clipval": (None,),
}  # fmt: skip
"""The values of a cell's options with which the cell computes what slstm_layer computes. An option that a cell lacks
has the first value. gradient_recurrent_cut and gradient_recurrent_clipval cut or clip numbers in xlstm's CUDA kernels,
where a clip of 0.0 is one. forward_clipval is meant to, but xlstm 2.0.6 never reads it."""
MOST_STEPS = 4
"""The most steps that `_by_steps` runs on a CPU with gradients. Without gradients it runs twice as many. With more,
slstm_layer is faster."""


def use_for_slstm(model: nn.Module, on: bool = True) -> int:
    """Let every sLSTM cell of xlstm and TiRex in `model` compute by `functional.slstm_layer`, in place.

    The cells keep their parameters, state_dict, hooks and flags, and the form of inputs, outputs and states. They have
    no resets, and ignore `lengths` as xlstm's own cells do. A few steps on a CPU are computed by a loop in torch's
    operators, which is faster there than a call of `slstm_layer`.

    The cell computes in the dtype of the input, or under autocast in autocast's dtype. W_hh and the bias are cast to
    this dtype. The packages differ. TiRex's torch backend rounds the input, W_hh and the product W_hh h to bfloat16,
    and rounds all four states to bfloat16 after each step. Its bias and gates are in float32. xlstm's CUDA kernels cast
    the input, W_hh and the states to the dtypes of their config, and the bias to its dtype_b. States are returned in
    float32, or in float64 if the input is float64. c, n and m differ from the packages', but represent the same state,
    see `SLSTM`.

    xlstm's default backend is "cuda". It compiles kernels by nvcc when a cell is constructed, and raises a KeyError if
    there is no GPU. xlstm's backend "vanilla" and TiRex's backend "torch" compile nothing.

    A cell of a subclass stays as it is, and a warning names it, since it may compute something else.

    A cell's own method `step` stays the package's. The method `step` of xlstm's layers and models calls `forward`.

    Args:
        model: A module of any kind. It may itself be a cell.
        on: If False, the cells compute by their own package again. Default: True

    Returns:
        The number of cells. The logger "gpu_lstm" names them at INFO.

    Raises:
        TypeError: `model` is not a module, or `on` is not a bool.
        ValueError: There is no such cell, or a cell computes what slstm_layer cannot compute: function="lstm", or
            clipping or cutting of outputs or gradients. Nothing is changed.
    """
    check_bool("on", on)
    if not isinstance(model, nn.Module):
        raise TypeError(f"use_for_slstm accepts a torch.nn.Module, got {type(model).__name__}")
    cells: dict[nn.Module, type] = {}
    names = []
    for path, module in model.named_modules():
        cls = type_before_parametrizations(module)
        theirs = next((base for base in cls.__mro__ if f"{base.__module__}.{base.__qualname__}" in CELLS), None)
        if theirs is None:
            continue
        where = f"the cell {path!r}" if path else "the model itself"
        if cls not in (theirs, _by_ours(theirs)):
            warnings.warn(f"{where} stays as it is: {cls.__name__} is a subclass of {theirs.__name__}", stacklevel=2)
            continue
        for name, expected in _ACCEPTED.items():
            if (value := getattr(module.config, name, expected[0])) not in expected:
                raise ValueError(f"{where} has {name}={value!r}, which slstm_layer has not")
        cells[module] = theirs
        names.append(f"{path or 'the model itself'} ({theirs.__module__}.{theirs.__qualname__})")
    if not cells:
        raise ValueError(f"there is none of {', '.join(CELLS)} in the {type(model).__name__}")
    for cell, theirs in cells.items():
        cls = _by_ours(theirs) if on else theirs
        if is_parametrized(cell):  # keep the class that torch put on top, with a property for each parametrized weight
            top = type(cell)
            cls = type(top.__name__, (cls,), dict(vars(top)))
        cell.__class__ = cls
    by = "functional.slstm_layer" if on else "their own package"
    logging.getLogger("gpu_lstm").info(f"use_for_slstm: by {by} compute {', '.join(names)}")
    return len(cells)


@functools.cache  # with one class for each class of a package, one compiled graph serves all cells
def _by_ours(theirs: type) -> Any:
    """Return the subclass of a cell's class that computes by `slstm_layer`."""
    return type(theirs.__name__, (ByOurs, theirs), {"_theirs": theirs})


def _remade(theirs: type) -> Any:
    """Return an instance without attributes, for pickle, which could not find the class that `_by_ours` makes."""
    cls = _by_ours(theirs)
    return cls.__new__(cls)


class ByOurs(nn.Module):
    """The methods that replace a cell's own. `_by_ours` puts this base class before the cell's class.

    Sizes are written in xlstm's letters: B sequences, S = T steps, N heads of D units each, H = N D.
    """

    _theirs: Any
    config: Any
    _recurrent_kernel_: Tensor  # a parameter, or the tensor that has taken its place
    _bias_: Tensor

    def __reduce__(self) -> tuple:
        # With parametrized weights, torch defines a __getstate__ that raises an error.
        state = getattr(self, "__getstate__", self.__dict__.copy)()
        return _remade, (self._theirs,), state

    def forward(self, input: Tensor, state: Tensor | None = None, lengths: Any = None) -> tuple[Tensor, Tensor]:
        """Run the cell on all steps; return the output and the final state.

        The input is [B, S, 4H], or as config.input_shape says, with the gates i, f, z, o. The state is [4, B, H]: h, c,
        n and m. `lengths` is accepted and ignored, as by xlstm's own cell.
        """
        z, kernel, bias = self._tensors(input)
        heads = int(kernel.shape[0])  # under torch.jit.trace a size is a tensor
        if is_short(z, kernel, state):
            h, final = _by_steps(z, kernel, bias, state)
        else:
            hx = None if state is None else (state[0].to(z.dtype), *state[1:])
            h, states = slstm_layer(z, _weight_hh(kernel), bias, hx, heads=heads)
            final = torch.stack([each.to(torch.promote_types(z.dtype, torch.float32)) for each in states])
        shape = getattr(self.config, "output_shape", "BNSH")
        if "N" in shape:
            h = h.view(*h.shape[:2], heads, -1)  # [S, B, N, D]
            return h if shape == "SBNH" else h.permute(1, 2, 0, 3), final
        return h if shape == "SBH" else h.transpose(0, 1), final

    def _tensors(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z [S, B, 4H], the kernel [N, D of h, 4 D of z] and the bias [4H], all in the dtype of z."""
        z = input if getattr(self.config, "input_shape", "BSGNH") == "SBGNH" else input.transpose(0, 1)
        kernel, bias = self._recurrent_kernel_.to(z.dtype), self._bias_.to(z.dtype)
        heads, rows, columns = map(int, kernel.shape)
        if rows > columns:  # xlstm's vanilla: the kernel is [N, 4 D of z, D of h], the bias [4, N, D]
            return z, kernel.mT, bias
        return z, kernel, bias.unflatten(0, (heads, 4, -1)).transpose(0, 1).flatten()  # the bias was [N, 4, D]

    def request(self, input: Tensor) -> Request | None:
        """Return the request of `slstm_layer` that `forward` makes, or None if `_by_steps` computes the call."""
        z, kernel, bias = self._tensors(input)
        if is_short(z, kernel, None):
            return None
        return request_of_layer(SLSTM, z, Weights(None, _weight_hh(kernel), bias), heads=len(kernel))


def _weight_hh(kernel: Tensor) -> Tensor:
    """Return the kernel [N, D of h, 4 D of z] as W_hh [4H, D]."""
    return kernel.unflatten(2, (4, -1)).permute(2, 0, 3, 1).flatten(0, 2)


def is_short(z: Tensor, kernel: Tensor, state: Tensor | None) -> bool:
    """Whether `_by_steps` can run a call and is faster. slstm_layer runs every other call, and raises the errors."""
    if not (z.is_cpu and kernel.is_cpu and z.dtype in (torch.float32, torch.float64) and z.dim() == 3):
        return False
    now = modes(z)
    if not now.plain or now.choices[0] not in (None, Backend.AUTO, "auto"):  # in a graph, sizes may be symbols
        return False
    steps, batch, gates = z.shape
    hidden = kernel.shape[0] * kernel.shape[1]
    most = MOST_STEPS if now.grad else 2 * MOST_STEPS
    fits = state is None or (isinstance(state, Tensor) and state.is_cpu and state.shape == (4, batch, hidden))
    return 0 < steps <= most and gates == 4 * hidden and fits


def _by_steps(z: Tensor, kernel: Tensor, bias: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return h [S, B, H] and the final state [4, B, H] of a call with few steps.

    The loop has as few of torch's operators as possible: for so few numbers an operator's own cost is most of the time.

    Args:
        z: [S, B, 4H]. kernel: [N, D, 4D]. bias: [4H]. state: [4, B, H] or None.
    """
    (steps, batch, _), (heads, units, _) = z.shape, kernel.shape
    if state is None:
        h = q = z.new_zeros(batch, heads, units)
        l = torch.full_like(h, -float("inf"))
    else:
        h, *others = state.to(z.dtype).view(4, batch, heads, units).unbind()
        q, l = states_from(*others)
    outputs = []
    for z_x in (z + bias).view(steps, batch, 4, heads, units).unbind():
        z_h = torch.bmm(h.transpose(0, 1), kernel).view(heads, batch, 4, units).permute(1, 2, 0, 3)
        i, f, g, o = (z_x + z_h).unbind(1)  # [B, N, D]
        u, l = next_sum(i, f, l, torch.is_grad_enabled())
        q = torch.lerp(q, g.tanh(), u)
        h = o.sigmoid() * q
        outputs.append(h)
    return torch.stack(outputs).flatten(2), torch.stack([h, *states_of(q, l)]).flatten(2)
