"""What a module's arguments ask of a call: sizes, names of its parameters, regularisers, the backend."""

import functools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..kernels.cells import CELLS
from ..kernels.tensors import BY_NAME
from .regularisers import REFERENCE_ONLY, REGULARISERS
from .weights import LAYER_NORM, NAMES, PEEPHOLES

NORMS = ("ih", "hh", "c")  # what may be normalised: W_ih x, W_hh h, c
RESET_STATES = "reset_states"  # the argument of a call, as errors name it

_NAMES = {"module": "{}", "stack": "Stacked{}", "cell": "{}Cell", "layer": "{}_layer"}  # in errors


class Size(NamedTuple):
    """The sizes of a layer."""

    inputs: int | Any  # I; None: x is W_ih x already
    hidden: int  # H
    projected: int  # P; 0 without a projection
    heads: int = 1

    @property
    def width(self) -> int:
        """Features of h."""
        return self.projected or self.hidden

    def of(self, names: Sequence[str], rows: int) -> tuple[tuple[int, ...], ...]:
        """The sizes of the weights of these names, with `rows` to a unit."""
        hidden = self.hidden
        letters = {"I": self.inputs, "H": hidden, "P": self.width, "4H": rows * hidden, "3H": 3 * hidden}
        letters["D"] = self.width // self.heads
        return tuple([BY_NAME[name].sized(letters) for name in names])


_FIELDS = (
    "cell",  # of kernels.cells.CELLS
    "role",  # "module", "stack", "cell" (one step) or "layer" (a function)
    "hidden_sizes",  # tuple [L]
    "peepholes",
    "norms",  # tuple of some NORMS
    "heads",
    "input_size", "bias",
    "backend",  # a name, or None; up to here what a cell has, too
    "bidirectional", "batch_first", "training",
    *(thing.name for thing in REGULARISERS),
    "recompute",  # kernels save no gates for backward
    "proj_size",
    "residual",  # a layer whose output is as wide as its input adds the two
    "reverse",  # only for lstm_layer
)  # fmt: skip
_DEFAULTS = (False, False, False, *[0.0] * len(REGULARISERS), False, 0, False, False)  # of those that no cell has
_class: Any = namedtuple  # as mypy does not know it, which accepts literals alone
Arguments = _class("Arguments", _FIELDS, defaults=_DEFAULTS)
"""What a module asks of every call, from its attributes as they are now."""


class Options:
    """Arguments and what follows from them. There is one object for equal arguments while it is in use: a quick key."""

    def __init__(self, a: Any) -> None:
        self.cell, self.role = CELLS[a.cell], a.role
        self.name = _NAMES[a.role].format(a.cell if a.role == "layer" else a.cell.upper())
        self.batch_first, self.training, self.backend = a.batch_first, a.training, a.backend
        self.one_state = len(self.cell.states) == 1  # a user holds h; inside c is h
        self.kept = self.cell.kept  # the numbers of a unit in c, K
        self.recompute, self.residual, self.reverse = a.recompute, a.residual, a.reverse
        self.directions = 2 if a.bidirectional else 1
        inputs = [a.input_size, *(self.directions * (a.proj_size or hidden) for hidden in a.hidden_sizes)]
        self.sizes = tuple([Size(i, hidden, a.proj_size, a.heads) for i, hidden in zip(inputs, a.hidden_sizes)])
        self.input_size = a.input_size
        self.hidden, self.width = self.sizes[0].hidden, self.sizes[0].width  # of the first layer
        rates = [(thing, thing.rate(getattr(a, thing.name), a.training)) for thing in REGULARISERS]
        self.on = tuple([(thing, rate) for thing, rate in rates if rate])
        self.dropout = next((rate for thing, rate in self.on if thing.name == "dropout"), 0.0)
        self.drops_weights = any([thing.overrides("weight_hh") for thing, _ in self.on])
        self.rows = len(self.sizes) * self.directions  # of states: layer by layer, direction by direction
        self.by_layer = self.role == "stack"  # a user has states in a list, those of a layer together
        self.blocks = self.sizes if self.by_layer else self.sizes[:1]  # of the user's tensors of states
        # How many rows these have. A module's have all; elsewhere states of one layer and direction are [B, *].
        rows = self.directions if self.by_layer else self.rows
        self.lead = (rows,) if self.role == "module" or (self.by_layer and rows == 2) else ()
        self.one_row = bool(self.lead) and self.rows == 1  # then they are laid out
        self.one_step = self.role == "cell"
        self.ranks = (1, 2) if self.one_step else (2, 3)  # of an input, unbatched and batched
        self.as_given = self.role in ("module", "cell")  # torch's own operator takes x and states as a user has them
        self.torch_has_it = self.role != "layer"
        self.of_rnn_base = self.role in ("module", "stack")  # it says what an input has to be
        self.names = _names(a, self.role, self.directions)
        self.present = sum(name is not None for name in self.names[0][0])  # tensors of a layer and direction
        names = NAMES if self.role == "layer" else NAMES[: len(self.names[0][0])]
        self.weight_sizes = tuple([size.of(names, self.cell.rows) for size in self.sizes])
        of_first = zip(self.names[0][0], self.weight_sizes[0])
        self.sizes_of_first = [size for name, size in of_first if name is not None]  # of the tensors that are present
        # With layers of one size, torch's own runs all of them in one call; of heads it knows nothing.
        self.in_one_call = not a.residual and len(set(a.hidden_sizes)) == 1 and a.heads == 1
        self.connects = a.residual or self.dropout > 0  # something is done between layers
        self.noise = any([thing.tensors for thing, _ in self.on])  # layers have random tensors, or rates
        self.noisy = self.noise or self.dropout > 0  # they are drawn, or made
        of_cell = None if self.cell.of_torch else f"{a.cell} cells"
        self.feature = LAYER_NORM if a.norms else PEEPHOLES if a.peepholes else of_cell
        """The feature that the fewest backends support; None: all support all."""
        for thing, _ in self.on:
            feature = thing.name if thing.unknown_to_kernels else thing.feature(a.norms)
            if feature and self.feature not in REFERENCE_ONLY:
                self.feature = feature


def _names(a: Any, role: str, directions: int) -> tuple[tuple[tuple[str | None, ...], ...], ...]:
    """Parameter names by layer and direction, [L][D], in the order of Weights up to the last there is; None: absent."""
    optional = dict(
        weight_ih=a.input_size is not None, bias_ih=a.bias, bias_hh=a.bias and a.input_size is not None,
        weight_hr=a.proj_size > 0, weight_peephole=a.peepholes, gain_ih="ih" in a.norms, gain_hh="hh" in a.norms,
        gain_c="c" in a.norms, bias_c="c" in a.norms and a.bias,
    )  # fmt: skip
    names = [name if optional.get(name, True) else None for name in NAMES]
    names = names[: 1 + max(k for k, name in enumerate(names) if name)]
    layers = []
    for k in range(len(a.hidden_sizes)):
        suffix = {"cell": "", "stack": "_l0"}.get(role, f"_l{k}")
        layer = []
        for d in range(directions):
            ending = suffix + "_reverse" * d
            layer.append(tuple([name and name + ending for name in names]))
        layers.append(tuple(layer))
    return tuple(layers)


def options_of(*arguments: Any) -> Options:
    """The Options of these Arguments: the same object for equal ones, of the last 1024, except in a graph."""
    return Options(Arguments(*arguments)) if torch.compiler.is_compiling() else _cached(*arguments)


# Options that were dropped are made again as new objects, so routes may be kept by old and by new ones of a module.
_cached = functools.lru_cache(1024)(lambda *arguments: Options(Arguments(*arguments)))
