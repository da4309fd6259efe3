"""What a module's arguments ask of a call: sizes, names of its parameters, regularisers, the backend."""

import functools
from typing import Any, NamedTuple

import torch

from ..kernels.cells import CELLS
from .weights import LAYER_NORM, NAMES, PEEPHOLES

NORMS = ("ih", "hh", "c")  # what may be normalised: W_ih x, W_hh h, c
RESET_STATES = "reset_states"  # the argument of a call, as errors name it

_NAMES = {"module": "{}", "stack": "Stacked{}", "cell": "{}Cell", "layer": "{}_layer"}  # in errors


class Size(NamedTuple):
    """The sizes of a layer."""

    inputs: int  # I
    hidden: int  # H
    projected: int  # P; 0 without a projection

    @property
    def width(self) -> int:
        """Features of h."""
        return self.projected or self.hidden


class Arguments(NamedTuple):
    """What a module asks of every call, from its attributes as they are now."""

    cell: str  # of kernels.cells.CELLS
    role: str  # "module", "stack", "cell" (one step) or "layer" (a function)
    hidden_sizes: tuple[int, ...]  # [L]
    peepholes: bool
    norms: tuple[str, ...]
    input_size: int
    bias: bool
    backend: str | None  # up to here what a cell has, too
    bidirectional: bool = False
    batch_first: bool = False
    training: bool = False
    dropout: float = 0.0  # between layers
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0  # of h and c
    weight_drop: float = 0.0
    recompute: bool = False  # kernels save no gates for backward
    proj_size: int = 0
    residual: bool = False  # a layer whose output is as wide as its input adds the two
    reverse: bool = False  # only for lstm_layer


class Options:
    """Arguments and what follows from them. There is one object for equal arguments while it is in use: a quick key."""

    def __init__(self, a: Arguments) -> None:
        self.cell, self.role = CELLS[a.cell], a.role
        self.name = _NAMES[a.role].format(a.cell if a.role == "layer" else a.cell.upper())
        self.batch_first, self.training, self.backend = a.batch_first, a.training, a.backend
        self.one_state = len(self.cell.states) == 1  # a user holds h; inside c is h
        self.recompute, self.residual, self.reverse = a.recompute, a.residual, a.reverse
        self.directions = 2 if a.bidirectional else 1
        inputs = [a.input_size, *(self.directions * (a.proj_size or hidden) for hidden in a.hidden_sizes)]
        self.sizes = tuple([Size(i, hidden, a.proj_size) for i, hidden in zip(inputs, a.hidden_sizes)])
        self.input_size = a.input_size
        self.hidden, self.width = self.sizes[0].hidden, self.sizes[0].width  # of the first layer
        self.dropout = a.dropout if a.training else 0.0
        self.recurrent_dropout = a.recurrent_dropout if a.training else 0.0
        self.weight_drop = a.weight_drop if a.training else 0.0
        self.zoneout = a.zoneout if isinstance(a.zoneout, tuple) else (a.zoneout, a.zoneout)
        self.rows = len(self.sizes) * self.directions  # of states: layer by layer, direction by direction
        # Rows of states per tensor: a module has all in one tensor, a stack those of a layer.
        self.blocks = (self.directions,) * len(self.sizes) if self.role == "stack" else (self.rows,)
        # Whether these tensors have rows at all: states of one layer and direction are [B, *] elsewhere.
        self.leading = self.role == "module" or (self.role == "stack" and self.directions == 2)
        self.one_row = self.leading and self.rows == 1  # then they are laid out
        self.one_step = self.role == "cell"
        self.as_given = self.role in ("module", "cell")  # torch's own operator takes x and states as a user has them
        self.torch_has_it = self.role != "layer"
        self.of_rnn_base = self.role in ("module", "stack")  # it says what an input has to be
        self.names = _names(a, self.role, self.directions)
        self.present = sum(name is not None for name in self.names[0][0])  # tensors of a layer and direction
        tensors = len(NAMES) if self.role == "layer" else len(self.names[0][0])
        self.weight_sizes = tuple([_weight_sizes(size, self.cell.rows)[:tensors] for size in self.sizes])
        # With layers of one size, torch's own runs all of them in one call.
        self.in_one_call = not a.residual and len(set(a.hidden_sizes)) == 1
        self.connects = a.residual or self.dropout > 0  # something is done between layers
        noise = "zoneout" if self.zoneout != (0, 0) else "recurrent_dropout" if self.recurrent_dropout else None
        self.noisy = noise is not None or self.dropout > 0  # random numbers are drawn, or rates made tensors
        of_cell = None if self.cell.of_torch else f"{a.cell} cells"
        self.feature = noise or (LAYER_NORM if a.norms else PEEPHOLES if a.peepholes else of_cell)
        """The feature that the fewest backends support; None: all support all."""


def _names(a: Arguments, role: str, directions: int) -> tuple[tuple[tuple[str | None, ...], ...], ...]:
    """The names of the parameters of each layer and direction, [L][D], in the order of Weights up to the last that is
    there; None for absent ones before it.
    """
    there = (
        True, True, a.bias, a.bias, a.proj_size > 0, a.peepholes,
        "ih" in a.norms, "hh" in a.norms, "c" in a.norms, "c" in a.norms and a.bias,
    )  # fmt: skip
    count = max(k for k, is_there in enumerate(there) if is_there) + 1
    layers = []
    for k in range(len(a.hidden_sizes)):
        suffix = {"cell": "", "stack": "_l0"}.get(role, f"_l{k}")
        layer = []
        for d in range(directions):
            ending = suffix + "_reverse" * d
            layer.append(tuple([name + ending if is_there else None for name, is_there in zip(NAMES, there[:count])]))
        layers.append(tuple(layer))
    return tuple(layers)


def _weight_sizes(size: Size, rows_of_a_unit: int) -> tuple[tuple[int, ...], ...]:
    """The sizes of a layer's tensors, in the order of Weights."""
    rows, hidden, width = rows_of_a_unit * size.hidden, size.hidden, size.width
    return (
        (rows, size.inputs), (rows, width), (rows,), (rows,), (width, hidden), (3 * hidden,),
        (rows,), (rows,), (hidden,), (hidden,),
    )  # fmt: skip


def options_of(*arguments: Any) -> Options:
    """The Options of these Arguments: the same object for equal ones, of the last 1024, except in a graph."""
    return Options(Arguments(*arguments)) if torch.compiler.is_compiling() else _cached(*arguments)


# An Options that was dropped is made again; as a key it is another one, of which the table of routes keeps so many.
_cached = functools.lru_cache(1024)(lambda *arguments: Options(Arguments(*arguments)))
