"""Kinds of calls: what decides which backend is faster, and determines the kernels' problems."""

from typing import Any, NamedTuple

import torch

from ..call.noise import REGULARISERS
from ..call.options import Size
from ..call.prepare import Call
from ..call.weights import LAYER_NORM, PEEPHOLES
from ..kernels.problem import Pass, Problem

MOST_OF_CUDNN = 65_535  # steps of a sequence


class Kind(NamedTuple):
    """A kind of call. The number of steps, which varies from call to call, is rounded up to a power of two."""

    layers: tuple[Size, ...]  # [L]
    directions: int
    training: bool  # forward and backward
    recompute: bool
    steps: int  # T, rounded up to a power of two; more than MOST_OF_CUDNN + 1 where cuDNN refuses it
    norm_ih: bool  # a layer norm of W_ih x, which is outside the time loop
    like: Problem  # of the first layer; in the key of a race B is rounded up to a power of two
    drawn: bool = False  # whether there is noise, also such that the time loop does not read

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that layers compute in."""
        return self.like.dtype

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What its layers run."""
        return (Pass(), Pass(True)) if self.training else (Pass(save=False),)

    @property
    def noise(self) -> bool:
        """Whether there is a regulariser that torch's own lacks."""
        return self.drawn or self.like.regularised

    @property
    def variant(self) -> str | None:
        """The variant of the cell, see weights.variant_of."""
        return LAYER_NORM if self.norm_ih or self.like.normalised else PEEPHOLES if self.like.weight_peephole else None

    @property
    def only_ours(self) -> str | None:
        """What torch's own lacks; None: it can run all of it."""
        if self.noise:
            return " or ".join(thing.name.replace("_", " ") for thing in REGULARISERS if thing.tensors)
        if self.steps > MOST_OF_CUDNN + 1:
            return f"sequences of more than {MOST_OF_CUDNN:,} steps"
        return "states to reset to" if self.like.reset_c else self.variant and self.variant.replace("_", " ")

    def problem(self, row: int, side_by_side: int = 1) -> Problem:
        """What the kernels of one layer and direction, `row` among [L*D], are asked to do."""
        layer, d = divmod(row, self.directions)
        _, hidden, projected = self.layers[layer]
        reverse = self.like.reverse or d == 1
        return self.like._replace(hidden=hidden, projected=projected, side_by_side=side_by_side, reverse=reverse)

    def as_json(self) -> dict[str, Any]:
        """The key of a race as JSON values: sizes that vary from call to call are rounded up to powers of two."""
        like = self.like
        return {
            "cell": like.cell, "layers": [list(size) for size in self.layers], "directions": self.directions,
            "dtype": str(like.dtype), "precision": like.precision, "training": self.training,
            "recompute": self.recompute, "steps": self.steps, "batch": size_class(like.batch),
            "lengths": like.lengths is not None, "resets": like.resets, "noise": self.noise,
            "reset_states": like.reset_c, "variant": self.variant,
        }  # fmt: skip


def kind_of(call: Call) -> Kind:
    """What decides how a call runs."""
    options, weights, dtype, traversal = call.options, call.weights[0][0], dtype_of(call), call.traversal
    _, hidden, projected = options.sizes[0]
    lengths = torch.int64 if call.form.packed is not None else None
    if traversal.lengths is not None:
        lengths = traversal.lengths.dtype
    flags: dict[str, Any] = {}
    for thing, rate in options.on:
        flags |= thing.flags(rate, options.training)
    reset_c = traversal.reset_states is not None
    steps = int(call.steps)
    steps = size_class(steps + (steps == MOST_OF_CUDNN + 1))
    like = Problem(
        min(steps, 2), int(call.batch), hidden, dtype, projected,
        call.modes.precision if dtype is torch.float32 else "ieee", reverse=options.reverse, lengths=lengths,
        resets=traversal.resets is not None, **flags,
        reset_h=reset_c and flags.get("zoneout_h") is not None, reset_c=reset_c,
        weight_peephole=weights.weight_peephole is not None, gain_hh=weights.gain_hh is not None,
        gain_c=weights.gain_c is not None, bias_c=weights.bias_c is not None, cell=options.cell.name,
    )  # fmt: skip
    normed = weights.gain_ih is not None
    return Kind(options.sizes, options.directions, call.learns, options.recompute, steps, normed, like, options.noise)


def dtype_of(call: Call) -> torch.dtype:
    """The dtype that layers compute in: the input's own, or under autocast that of torch's own results.

    On a CPU torch casts a whole LSTM; of a GRU and of cells it casts products alone, to which the state is added.
    """
    autocast, options = call.modes.autocast, call.options
    if autocast is None:
        return call.x.dtype
    if call.x.is_cpu and (options.one_state or options.role == "cell"):
        return torch.promote_types(autocast, call.states[0][1].dtype)
    return autocast


def size_class(n: int) -> int:
    """n, rounded up to a power of two."""
    return 1 << max(n - 1, 0).bit_length()


def describe(key: dict[str, Any]) -> str:
    """A kind of call in few words, from its as_json()."""
    first, *_ = layers = key["layers"]
    sizes = " -> ".join([str(first[0]), *(f"{h}" + f" (P={p})" * bool(p) for _, h, p in layers)])
    words = ["both directions"] * (key["directions"] - 1)
    words += [name for name in ("lengths", "resets", "noise", "reset_states", "recompute") if key[name]]
    words += [key["variant"]] * bool(key["variant"])
    words.append("training" if key["training"] else "inference")
    dtype = key["dtype"].removeprefix("torch.")
    if dtype == "float32" and key["precision"]:
        dtype += f" ({key['precision']})"
    return f"{key['cell'].upper()} {sizes}, T <= {key['steps']}, B <= {key['batch']}, {dtype}, {', '.join(words)}"
