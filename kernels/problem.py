"""The contract of a layer: a Problem, which decides the kernels and has all sizes, and the tensors of one call."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import CELLS
from .tensors import BY_NAME, STATE, TENSORS, WEIGHT, Inputs, Shape

MOST = 2**31 - 2**16
"""The most steps, sequences, or gates of all units. Kernels count them in int32, up to the end of the last tile."""


class Problem(NamedTuple):
    """One layer in one direction: all facts that decide which kernels run it.

    Plans and their verdicts are kept by Problem. A bool with the name of a tensor says whether the tensor is there.
    """

    steps: int  # 1 if T is 1, else 2
    batch: int  # B
    hidden: int  # H
    dtype: torch.dtype
    projected: int = 0  # P, or 0 without a projection
    precision: str = "ieee"  # the precision of float32 products, "tf32" or "ieee"
    side_by_side: int = 1  # how many such directions run at once and share the card
    reverse: bool = False
    lengths: torch.dtype | None = None  # the dtype of the tensor, int32 or int64
    resets: bool = False
    dropout_h: bool = False
    zoneout_h: int | None = None  # the dimensions of the tensor: 0 for a rate, 3 for a mask
    zoneout_c: int | None = None
    reset_h: bool = False  # whether the loop reads reset_h, as zoneout needs; otherwise its product is in the gates
    reset_c: bool = False
    weight_peephole: bool = False
    gain_hh: bool = False
    gain_c: bool = False
    bias_c: bool = False
    cell: str = "lstm"  # a name of cells.CELLS
    bias_hh: bool = False  # whether kernels add bias_hh, in a cell that has_constant
    known_h: bool = False  # whether, in such a cell, W_hh h of resets is in the last gate before the loop
    heads: int = 1  # groups of neighbouring units; W_hh connects the units of a group with each other only

    @property
    def from_x(self) -> int:
        """How many of the four gates, from the first on, have numbers in them before the loop."""
        return 4 if self.known_h else CELLS[self.cell].x_end

    @property
    def gates(self) -> int:
        """The gates that have rows in W_hh. A GRU has three of them, other cells have four."""
        return CELLS[self.cell].rows

    @property
    def columns(self) -> int:
        """The columns of W_hh, D: the features of h, P, or the units of a head."""
        return self.width // self.heads

    @property
    def of_head(self) -> "Problem":
        """The problem of one head as a layer of its own. Heads share the card like two directions."""
        if self.heads == 1:
            return self
        return self._replace(hidden=self.columns, heads=1, side_by_side=self.heads * self.side_by_side)

    @property
    def size(self) -> int:
        """The bytes of an element."""
        return self.dtype.itemsize

    @property
    def width(self) -> int:
        """The features of h: P with a projection, else H."""
        return self.projected or self.hidden

    @property
    def weight_hr(self) -> bool:
        """Whether there is a projection. Like the flags of other tensors it has the name of its tensor."""
        return self.projected > 0

    @property
    def regularised(self) -> bool:
        """Whether there is recurrent dropout, or zoneout of h or c."""
        return self.dropout_h or self.zoneout_h is not None or self.zoneout_c is not None

    @property
    def projects_in_loop(self) -> bool:
        """Whether there is a projection that stays in the time loop because of noise on h, see projection.py."""
        return self.projected > 0 and (self.dropout_h or self.zoneout_h is not None)

    @property
    def normalised(self) -> bool:
        """Whether there is a layer norm inside the time loop."""
        return self.gain_hh or self.gain_c

    @property
    def only_by_steps(self) -> bool:
        """Whether a layer norm or a projection interrupts a step, so that each step needs launches of its own."""
        return self.normalised or self.projects_in_loop

    @property
    def exact_float32(self) -> bool:
        """Whether products are float32 without rounding, which tensor cores do not support."""
        return self.dtype is torch.float32 and self.precision == "ieee"

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON values, for keys of cached results."""
        return {name: str(a) if isinstance(a, torch.dtype) else a for name, a in self._asdict().items()}


class Pass(NamedTuple):
    """Forward or backward, and which tensors come with it."""

    backward: bool = False
    save: bool = True  # whether forward saves the tensors that backward reads
    dh: bool = True  # whether backward is given a gradient of h
    dh_n: bool = True  # whether backward is given a gradient of h_n


class Normed(NamedTuple):
    """The tensors that backward reads of a layer norm of all steps, see layer_norm.py."""

    v: Tensor  # [T, B, N], before the normalisation
    mean: Tensor  # [T, B, 1] float32
    scale: Tensor  # [T, B, 1] float32, 1 / sqrt(var(v) + EPS)
    gain: Tensor  # [N]


class Recurrence(NamedTuple):
    """The tensors that the time loop reads.

    `in_the_loop` names the `inputs` that it reads. The others, such as x and W_ih, are in the gates. h0 is [1, B, P],
    and c0 is [K, B, H] in float32. A reset step begins with h = 0, and with c = 0 or `reset_c`. If a reset sets another
    h, the gates already contain W_hh h. Only backward reads the layer norms.
    """

    inputs: Inputs
    norm_hh: Normed | None = None  # the layer norm of W_hh h [T, B, 4H]
    norm_c: Normed | None = None  # the layer norm of c [T, B, H] in tanh(c), float32


Results = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""The results of forward: h, h_n, c_n and c, see layer.Layer.forward."""


class Gradients(NamedTuple):
    """The gradients that backward returns. A field is None if there is no such gradient."""

    dgates: Tensor  # [T, B, 4H] of the pre-activations, zero in padding
    dh0: Tensor | None  # [1, B, P]; from kernels only the part through zoneout of the first step, in float32
    dc0: Tensor  # [K, B, H] float32
    dh_total: Tensor | None = None  # [T, B, P] of W_hr m with a projection, or of m if c is normalised
    dreset_h: Tensor | None = None  # [T, B, P] float32, through zoneout, zero except at resets
    dreset_c: Tensor | None = None  # [T, B, H] float32, zero except at resets


def sizes_of(p: Problem, steps: int, features: int = 0) -> dict[str, Shape]:
    """Return the sizes of all tensors of TENSORS by name, whether the problem has them or not.

    T = `steps`, I = `features`.
    """
    letters = {
        "1": 1, "T": steps, "B": p.batch, "I": features, "H": p.hidden, "P": p.width, "D": p.columns,
        "3H": 3 * p.hidden, "4H": p.gates * p.hidden, "K": CELLS[p.cell].kept,
    }  # fmt: skip
    return {row.name: row.sized(letters) for row in TENSORS}


def in_the_loop(p: Problem, steps: int) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return (size, dtype) of the Inputs that the time loop of a problem reads, where T = `steps`."""
    sizes, found = sizes_of(p, steps), {}
    for row in TENSORS:
        # The flag is a bool, the dimensions of zoneout, or the dtype of lengths. A loop reads no tensor for which a
        # Problem has no flag, except for states and W_hh, which are always there.
        flag = getattr(p, row.name, row.role in (STATE, WEIGHT))
        if row.loop and flag is not None and flag is not False:
            dtype = flag if isinstance(flag, torch.dtype) else row.dtype or p.dtype
            found[row.name] = ((), torch.float32) if flag == 0 else (sizes[row.name], dtype)
    return found


def fields_of(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Return the fields of a Problem that follow from tensors, see Row.field. Tensors that are None are left out."""
    found = [(BY_NAME[name], t) for name, t in tensors.items() if t is not None]
    return {row.name: row.field(t) for row, t in found if row.field is not None}


def problem_with(fields: dict[str, Any], cell: str, steps: int, **facts: Any) -> Problem:
    """Return the Problem of a layer, from the result of `fields_of` and its other fields, where T = `steps`.

    The time loop reads reset_h only for zoneout, since its product with W_hh is in the gates. Whether there is a bias
    b_hh, and whether h is known before the loop, matters only to a cell that has_constant.
    """
    flags = {name: value for name, value in fields.items() if name in Problem._fields}
    constant = CELLS[cell].has_constant
    flags["reset_h"] = "reset_h" in fields and "zoneout_h" in fields
    flags["bias_hh"] = "bias_hh" in fields and constant
    flags["known_h"] = "reset_h" in fields and constant
    return Problem(min(steps, 2), cell=cell, **flags, **facts)


def problem_of(inputs: Inputs, cell: str, reverse: bool, precision: str) -> Problem:
    """Return the problem of a call with these tensors."""
    (steps, batch, _), (_, _, hidden), width = inputs.x.shape, inputs.c0.shape, inputs.h0.shape[-1]
    return problem_with(
        fields_of(inputs._asdict()), cell, steps, batch=batch, hidden=hidden, dtype=inputs.x.dtype,
        projected=0 if inputs.weight_hr is None else width, precision=precision,
        reverse=reverse, heads=max(1, width // max(1, inputs.weight_hh.shape[1])),
    )  # fmt: skip


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def unless_reset(p: Problem, t: Tensor, resets: Tensor | None) -> Tensor:
    """Return t [B, *], which was computed from h0, with zeros for sequences that are reset before the first step.

    In reverse no reset is before the first step.
    """
    return t if resets is None or p.reverse else t.masked_fill(resets[0, :, None], 0)


def end_index(p: Problem, lengths: Tensor | None, first: bool) -> Any:
    """Return an index into [T, B, *] that selects the first or the last step of every sequence.

    For a sequence without steps it selects an arbitrary time.
    """
    if first != p.reverse:
        return 0
    if lengths is None:
        return -1
    return (lengths.long() - 1).clamp(min=0), torch.arange(p.batch, device=lengths.device)
