"""Kinds of calls: what decides which backend is faster, and determines the kernels' problems."""

from typing import Any, NamedTuple

import torch

from ..backends.torch_rnn import MOST_STEPS
from ..call import roles
from ..call.regularisers import REGULARISERS
from ..call.request import Request
from ..call.weights import LAYER_NORM, PEEPHOLES, Size
from ..kernels.cells import CELLS
from ..kernels.problem import Pass, Problem, of_constant, power_of_two
from ..kernels.tensors import NOISE, TRAVERSAL, VARIANT, names_of

_OPTIONAL = (n for n in names_of(VARIANT, NOISE, TRAVERSAL) if n in Problem._fields)
_FLAGS = (*_OPTIONAL, "bias_hh", "known_h")  # of what the time loop reads


class Kind(NamedTuple):
    """A kind of call: the keys of decisions, races, plans and verdicts are made of it."""

    cell: str
    layers: tuple[Size, ...]  # [L]
    directions: int
    dtype: torch.dtype  # that layers compute in
    precision: str  # of float32 products: "tf32" or "ieee"
    training: bool  # forward and backward
    recompute: bool
    steps: int  # T, rounded up to a power of two; more than MOST_STEPS + 1 where cuDNN refuses it
    batch: int  # B; rounded up to a power of two in keys of decisions and races
    reverse: bool  # of lstm_layer
    lengths: torch.dtype | None
    resets: bool
    reset_states: bool
    noise: bool  # a regulariser that torch's own lacks, even if the time loop reads none of it
    weight_peephole: bool = False  # from here on tensors by their names
    gain_ih: bool = False  # of a layer norm outside the time loop
    gain_hh: bool = False
    gain_c: bool = False
    bias_c: bool = False
    dropout_h: bool = False
    zoneout_h: int | None = None  # dimensions: 0 for a rate, 3 for a mask
    zoneout_c: int | None = None
    bias_hh: bool = False  # that kernels add
    known_h: bool = False  # see Problem

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What its layers run."""
        return (Pass(), Pass(True)) if self.training else (Pass(save=False),)

    @property
    def variant(self) -> str | None:
        """The variant of the cell, see weights.variant_of."""
        normed = self.gain_ih or self.gain_hh or self.gain_c
        return LAYER_NORM if normed else PEEPHOLES if self.weight_peephole else None

    @property
    def only_ours(self) -> str | None:
        """What torch's own lacks; None: it can run all of it."""
        if not CELLS[self.cell].of_torch:
            return "such cell"
        if self.noise:
            return " or ".join(thing.name.replace("_", " ") for thing in REGULARISERS if thing.tensors)
        if self.steps > MOST_STEPS + 1:
            return f"sequences of more than {MOST_STEPS:,} steps"
        return "states to reset to" if self.reset_states else self.variant and self.variant.replace("_", " ")

    def problem(self, row: int, side_by_side: int = 1) -> Problem:
        """What the kernels of one layer and direction, `row` among [L*D], are asked to do."""
        layer, d = divmod(row, self.directions)
        _, hidden, projected, heads = self.layers[layer]
        return Problem(
            min(self.steps, 2), self.batch, hidden, self.dtype, projected, self.precision, side_by_side,
            reverse=self.reverse or d == 1, reset_h=self.reset_states and self.zoneout_h is not None,
            reset_c=self.reset_states, cell=self.cell, heads=heads, **{name: getattr(self, name) for name in _FLAGS},
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """The key of a race as JSON values: sizes that vary from call to call are rounded up to powers of two."""
        return {
            "cell": self.cell, "layers": [list(size) for size in self.layers], "directions": self.directions,
            "dtype": str(self.dtype), "precision": self.precision, "training": self.training,
            "recompute": self.recompute, "steps": self.steps, "batch": power_of_two(self.batch),
            "lengths": self.lengths is not None, "resets": self.resets, "noise": self.noise,
            "reset_states": self.reset_states, "variant": self.variant,
        }  # fmt: skip


def kind_of(call: Request) -> Kind:
    """What decides how a call runs."""
    options, weights, dtype, traversal = call.options, call.weights[0][0], dtype_of(call), call.traversal
    lengths = torch.int64 if call.form.packed is not None else None
    if traversal.lengths is not None:
        lengths = traversal.lengths.dtype
    flags: dict[str, Any] = {name: getattr(weights, name) is not None for name in names_of(VARIANT)}
    for thing, rate in options.on:
        flags |= thing.flags(rate, options.training)
    known = traversal.reset_states is not None
    flags["bias_hh"], flags["known_h"] = of_constant(options.cell.name, weights.bias_hh is not None, known)
    steps = int(call.steps)
    return Kind(
        options.cell.name, options.sizes, options.directions, dtype,
        call.modes.precision if dtype is torch.float32 else "ieee", call.learns, options.recompute,
        power_of_two(steps + (steps == MOST_STEPS + 1)), int(call.batch), options.reverse, lengths,
        traversal.resets is not None, traversal.reset_states is not None, options.noise, **flags,
    )  # fmt: skip


def dtype_of(call: Request) -> torch.dtype:
    """The dtype that layers compute in: the input's own, or under autocast that of torch's own results.

    On a CPU torch casts a whole LSTM; of a GRU, of a cell, of a PackedSequence and with oneDNN off it casts products
    alone, to which the state is added. A projection is a product.
    """
    autocast, options = call.modes.autocast, call.options
    if autocast is None or not call.x.is_cpu:
        return autocast or call.x.dtype
    packed = call.form.packed is not None and type(options.role) is roles.Module and options.in_one_call
    products = options.one_state or isinstance(options.role, roles.Cell)
    if options.cell.of_torch and not options.sizes[0].projected:
        products |= packed or not call.modes.whole
    return torch.promote_types(autocast, call.states[0][1].dtype) if products else autocast


def describe(key: dict[str, Any]) -> str:
    """A kind of call in few words, from its as_json()."""
    first, *_ = layers = key["layers"]
    sizes = " -> ".join(
        [str(first[0]), *(f"{h}" + f" (P={p})" * bool(p) + f" ({n} heads)" * (n > 1) for _, h, p, n in layers)]
    )
    words = ["both directions"] * (key["directions"] - 1)
    words += [name for name in ("lengths", "resets", "noise", "reset_states", "recompute") if key[name]]
    words += [key["variant"]] * bool(key["variant"])
    words.append("training" if key["training"] else "inference")
    dtype = key["dtype"].removeprefix("torch.")
    if dtype == "float32" and key["precision"]:
        dtype += f" ({key['precision']})"
    return f"{key['cell'].upper()} {sizes}, T <= {key['steps']}, B <= {key['batch']}, {dtype}, {', '.join(words)}"
