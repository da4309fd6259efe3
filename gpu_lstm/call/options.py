"""The options of a call, which follow from a module's attributes: sizes, names of parameters, regularisers, backend."""

import functools
from typing import Any, NamedTuple

import torch

from ..kernels.cells import CELLS
from . import roles
from .regularisers import REFERENCE_ONLY, REGULARISERS
from .weights import LAYER_NORM, NAMES, PEEPHOLES, Size

NORMS = ("ih", "hh", "c")  # the names of the layer norms, of W_ih x, W_hh h and c


class Arguments(NamedTuple):
    """The current attributes of a module that decide how its calls run."""

    cell: str  # a key of kernels.cells.CELLS
    role: type[roles.Role]
    hidden_sizes: tuple[int, ...]  # [L]
    peepholes: bool
    norms: tuple[str, ...]  # a part of NORMS
    heads: int
    input_size: int | None  # None: the caller computed W_ih x
    bias: bool
    backend: str | None  # the arguments up to this one are all that LSTMCell and GRUCell have
    bidirectional: bool = False
    batch_first: bool = False
    training: bool = False
    recompute: bool = False  # kernels save no gates for backward
    proj_size: int = 0
    rates: tuple[Any, ...] = (0.0,) * len(REGULARISERS)  # the values of REGULARISERS, as a user gave them
    residual: bool = False  # whether a layer adds its input to its output if both have the same width
    reverse: bool = False  # an argument of the functions only


class Options:
    """The arguments of a module, and everything that follows from them.

    `options_of` returns the same object for equal arguments. So Options are hashed by identity, which makes them a
    quick key of caches.
    """

    def __init__(self, a: Arguments) -> None:
        self.cell = CELLS[a.cell]
        self.one_state = self.cell.one_state  # a user has h only, and c is h
        self.backend, self.training = a.backend, a.training
        self.recompute, self.residual, self.reverse = a.recompute, a.residual, a.reverse
        self.directions = 2 if a.bidirectional else 1
        inputs = [a.input_size, *(self.directions * (a.proj_size or hidden) for hidden in a.hidden_sizes)]
        self.sizes = tuple([Size(i, hidden, a.proj_size, a.heads) for i, hidden in zip(inputs, a.hidden_sizes)])
        self.role = a.role(self.cell, self.sizes, self.directions, a.batch_first)
        rates = [(thing, thing.rate(value, a.training)) for thing, value in zip(REGULARISERS, a.rates)]
        self.on = tuple([(thing, rate) for thing, rate in rates if rate])
        self.dropout = next((rate for thing, rate in self.on if thing.name == "dropout"), 0.0)
        self.drops_weights = any([thing.overrides("weight_hh") for thing, _ in self.on])
        self.names = _names(a, self.directions)
        self.present = sum(name is not None for name in self.names[0][0])  # the tensors of a layer in one direction
        names = NAMES if a.role is roles.Function else NAMES[: len(self.names[0][0])]
        self.weight_sizes = tuple([size.of(names, self.cell.rows) for size in self.sizes])
        # If all layers have one size, torch's own operator runs them in one call. It does not support heads.
        self.in_one_call = not a.residual and len(set(a.hidden_sizes)) == 1 and a.heads == 1
        self.connects = a.residual or self.dropout > 0  # whether something is computed between layers
        self.noisy = self.dropout > 0 or any([thing.tensors for thing, _ in self.on])  # whether a call draws tensors
        of_cell = None if self.cell.of_torch else f"{a.cell} cells"
        features = [of_cell, PEEPHOLES if a.peepholes else None, LAYER_NORM if a.norms else None]
        features += [thing.name for thing, _ in self.on if thing.tensors]
        features += [thing.name for thing, _ in self.on if thing.name in REFERENCE_ONLY]
        self.feature = next((feature for feature in features[::-1] if feature), None)
        """The feature that the fewest backends support. None: every backend supports every feature of this layer."""


def _names(a: Arguments, directions: int) -> tuple[tuple[tuple[str | None, ...], ...], ...]:
    """Return the names of the parameters by layer and direction, [L][D].

    The names of a layer and direction are in the order of Weights. A tensor that the layer lacks has None as its name.
    The last name is never None, so the tuple may be shorter than Weights.
    """
    optional = dict(
        weight_ih=a.input_size is not None, bias_ih=a.bias, bias_hh=a.bias and a.input_size is not None,
        weight_hr=a.proj_size > 0, weight_peephole=a.peepholes, gain_ih="ih" in a.norms, gain_hh="hh" in a.norms,
        gain_c="c" in a.norms, bias_c="c" in a.norms and a.bias,
    )  # fmt: skip
    names = [name if optional.get(name, True) else None for name in NAMES]
    while names[-1] is None:
        names.pop()
    layers = []
    for k in range(len(a.hidden_sizes)):
        endings = [a.role.suffix.format(k) + way for way in ("", "_reverse")[:directions]]
        layers.append(tuple([tuple([name and name + ending for name in names]) for ending in endings]))
    return tuple(layers)


def options_of(*arguments: Any) -> Options:
    """Return the Options of these Arguments.

    Equal arguments give the same object, unless 1,024 others were used since. While torch.compile traces, every call
    makes a new object.
    """
    return Options(Arguments(*arguments)) if torch.compiler.is_compiling() else _cached(*arguments)


# If this cache drops Options, the same arguments give a new object. The routes of the old object are kept, but no call
# finds them any more.
_cached = functools.lru_cache(1024)(lambda *arguments: Options(Arguments(*arguments)))
