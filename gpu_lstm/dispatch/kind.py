"""Kinds of calls: what decides who is faster, and from which the kernels' problems follow."""

from typing import Any, NamedTuple

import torch

from ..call.options import Size
from ..call.prepare import Call
from ..call.weights import LAYER_NORM, PEEPHOLES
from ..kernels.problem import Problem  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout


class Kind(NamedTuple):
    """A kind of call. The number of steps, which varies from call to call, counts by powers of two."""

    layers: tuple[Size, ...]  # [L]
    directions: int
    reverse: bool  # of one direction
    dtype: torch.dtype  # that layers compute in
    precision: str  # of float32 products in the recurrence
    training: bool  # forward and backward
    recompute: bool
    steps: int  # T, up to the next power of two
    batch: int  # B; in the key of a race up to the next power of two
    lengths: torch.dtype | None
    resets: bool
    dropout_h: bool  # recurrent dropout
    zoneout_h: int | None  # dimensions of the tensor: 0 for a rate, 3 for a mask
    zoneout_c: int | None
    reset_states: bool  # not zeros
    peepholes: bool
    norms: tuple[bool, bool, bool, bool]  # gain_ih, gain_hh, gain_c and bias_c of layer norms

    @property
    def noise(self) -> bool:
        """Whether there is recurrent dropout or zoneout."""
        return self.dropout_h or self.zoneout_h is not None or self.zoneout_c is not None

    @property
    def variant(self) -> str | None:
        """Of the cell, see Weights.variant."""
        return LAYER_NORM if any(self.norms) else PEEPHOLES if self.peepholes else None

    @property
    def only_ours(self) -> str | None:
        """What torch's own LSTM has not; None: it can run all of it."""
        if self.noise:
            return "recurrent dropout or zoneout"
        return "states to reset to" if self.reset_states else self.variant and self.variant.replace("_", " ")

    def problem(self, row: int, side_by_side: int = 1) -> Problem:
        """What the kernels of one layer and direction, `row` among [L*D], are asked to do."""
        layer, d = divmod(row, self.directions)
        _, hidden, projected = self.layers[layer]
        return Problem(
            min(self.steps, 2), self.batch, hidden, self.dtype, projected, self.precision, side_by_side,
            reverse=self.reverse or d == 1, lengths=self.lengths, resets=self.resets, dropout_h=self.dropout_h,
            zoneout_h=self.zoneout_h, zoneout_c=self.zoneout_c,
            reset_h=self.reset_states and self.zoneout_h is not None, reset_c=self.reset_states,
            peepholes=self.peepholes, norms=self.norms[1:],
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """The key of a race as JSON values: sizes that vary from call to call by powers of two."""
        return {
            "layers": [list(size) for size in self.layers], "directions": self.directions,
            "dtype": str(self.dtype), "precision": self.precision, "training": self.training,
            "recompute": self.recompute, "steps": self.steps, "batch": size_class(self.batch),
            "lengths": self.lengths is not None, "resets": self.resets, "noise": self.noise,
            "reset_states": self.reset_states, "variant": self.variant,
        }  # fmt: skip


def kind_of(call: Call) -> Kind:
    """The kind of a call."""
    options, weights, dtype = call.options, call.weights[0][0], dtype_of(call)
    lengths = torch.int64 if call.form.packed is not None else None
    if call.traversal.lengths is not None:
        lengths = call.traversal.lengths.dtype
    zoneout_h, zoneout_c = ((3 if options.training else 0) if p else None for p in options.zoneout)
    return Kind(
        options.sizes, options.directions, options.reverse, dtype,
        call.modes.precision if dtype is torch.float32 else "ieee", call.learns, options.recompute,
        size_class(int(call.steps)), int(call.batch), lengths, call.traversal.resets is not None,
        options.recurrent_dropout > 0, zoneout_h, zoneout_c, call.traversal.reset_states is not None,
        weights.weight_peephole is not None, tuple([t is not None for t in weights[6:]]),  # type: ignore[arg-type]
    )  # fmt: skip


def dtype_of(call: Call) -> torch.dtype:
    """The dtype that layers compute in: the input's own or, for float32 and narrower, autocast's where that is on."""
    autocast, own = call.modes.autocast, call.x.dtype
    return own if autocast is None or own is torch.float64 else autocast


def size_class(n: int) -> int:
    """n, up to the next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def describe(key: dict[str, Any]) -> str:
    """A kind of call in few words, from its as_json()."""
    first, *_ = layers = key["layers"]
    sizes = " -> ".join([str(first[0]), *(f"{h}" + f" (P={p})" * bool(p) for _, h, p in layers)])
    words = ["both directions"] * (key["directions"] - 1)
    words += [name for name in ("lengths", "resets", "noise", "reset_states", "recompute") if key[name]]
    words += [key["variant"]] if key["variant"] else []
    words.append("training" if key["training"] else "inference")
    dtype = key["dtype"].removeprefix("torch.") + f" ({key['precision']})" * (key["dtype"] == "torch.float32")
    return f"LSTM {sizes}, T <= {key['steps']}, B <= {key['batch']}, {dtype}, {', '.join(words)}"
