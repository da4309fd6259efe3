"""The contract of a layer: a Problem, which decides the kernels and has all sizes, and the tensors of one call."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import CELLS
from .tensors import BY_NAME, STATE, TENSORS, WEIGHT, Inputs

MOST = 2**31 - 2**16
"""Steps, sequences, gates of all units: kernels count them in int32, and past the last one to the end of a tile."""


class Problem(NamedTuple):
    """One layer in one direction: all that decides which kernels run it. The key of plans and of their verification."""

    steps: int  # T as far as it matters: 1, or 2 for more
    batch: int  # B
    hidden: int  # H
    dtype: torch.dtype
    projected: int = 0  # P, or 0 without a projection
    precision: str = "ieee"  # of float32 products: "tf32" or "ieee"
    side_by_side: int = 1  # how many such directions run at once and share the card
    reverse: bool = False
    lengths: torch.dtype | None = None  # int32 or int64
    resets: bool = False
    dropout_h: bool = False
    zoneout_h: int | None = None  # dimensions of the tensor: 0 for a rate, 3 for a mask
    zoneout_c: int | None = None
    reset_h: bool = False  # the loop reads h to reset to, which zoneout needs; else its product is in the gates
    reset_c: bool = False
    weight_peephole: bool = False
    gain_hh: bool = False
    gain_c: bool = False
    bias_c: bool = False
    cell: str = "lstm"  # of cells.CELLS
    bias_hh: bool = False  # which kernels add; of a cell that has_constant
    known_h: bool = False  # of such a cell: its last gate arrives with W_hh h of the h that are known before the loop
    heads: int = 1  # groups of units that follow one another, of which W_hh connects each with itself alone

    @property
    def from_x(self) -> int:
        """How many of the four gates arrive with numbers in them."""
        return 4 if self.known_h else CELLS[self.cell].x_end

    @property
    def columns(self) -> int:
        """Of W_hh, D: features of h, P, or the units of a head."""
        return self.width // self.heads

    @property
    def of_head(self) -> "Problem":
        """A head as a layer of its own: heads share the card like two directions."""
        if self.heads == 1:
            return self
        return self._replace(hidden=self.columns, heads=1, side_by_side=self.heads * self.side_by_side)

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def width(self) -> int:
        """Features of h: P with a projection, else H."""
        return self.projected or self.hidden

    @property
    def weight_hr(self) -> bool:
        """Whether there is a projection; as a flag of this name, like those of other tensors."""
        return self.projected > 0

    @property
    def regularised(self) -> bool:
        return self.dropout_h or self.zoneout_h is not None or self.zoneout_c is not None

    @property
    def projects_in_loop(self) -> bool:
        """Whether the projection cannot be moved out of the time loop, see projection.py."""
        return self.projected > 0 and self.regularised

    @property
    def normalised(self) -> bool:
        """Whether there is a layer norm inside the time loop."""
        return self.gain_hh or self.gain_c

    @property
    def only_by_steps(self) -> bool:
        """Whether something is in the middle of a step that only products and launches of each step run."""
        return self.normalised or self.projects_in_loop

    @property
    def exact_float32(self) -> bool:
        """Whether products are float32 without rounding, which tensor cores do not support."""
        return self.dtype is torch.float32 and self.precision == "ieee"

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values, for keys of cached results."""
        lengths = None if self.lengths is None else str(self.lengths)
        return self._asdict() | {"dtype": str(self.dtype), "lengths": lengths}


class Pass(NamedTuple):
    """Forward or backward, and which tensors come with it."""

    backward: bool = False
    save: bool = True  # forward: keep what backward reads
    dh: bool = True  # backward: whether there is a gradient of h
    dh_n: bool = True  # of h_n


class Normed(NamedTuple):
    """What backward reads of a layer norm of all steps, see layer_norm.py."""

    v: Tensor  # [T, B, N], what was normalised
    mean: Tensor  # [T, B, 1] float32
    scale: Tensor  # [T, B, 1] float32, 1 / sqrt(var(v) + EPS)
    gain: Tensor  # [N]


class Recurrence(NamedTuple):
    """What the time loop reads: the Inputs that `in_the_loop` names, since x, W_ih and b_ih are in the gates.

    States are [1, B, P] and [K, B, H], c0 float32. Layer norms are those in the loop, of W_hh h and of c in tanh(c). A
    reset step begins with h = 0, and with c = 0 or `reset_c`; for another h, its product with W_hh is in the gates.
    """

    inputs: Inputs
    norm_hh: Normed | None = None  # for backward: of W_hh h [T, B, 4H]
    norm_c: Normed | None = None  # for backward: of c [T, B, H] float32


class Gradients(NamedTuple):
    """What backward returns; None where there is none."""

    dgates: Tensor  # [T, B, 4H] of the pre-activations; zero in padding
    dh0: Tensor | None  # [1, B, P]; from a Layer's launches: float32, and through zoneout of the first step only
    dc0: Tensor  # [K, B, H] float32
    dh_total: Tensor | None = None  # [T, B, P] of W_hr m with a projection, of m if c is normalised
    dreset_h: Tensor | None = None  # [T, B, P] float32, through zoneout; zero but at resets
    dreset_c: Tensor | None = None  # [T, B, H] float32, zero but at resets


def sizes_of(p: Problem, steps: int, features: int = 0) -> dict[str, tuple[int, ...]]:
    """The sizes of all tensors of a problem, whether they are there or not; T = `steps`, I = `features`."""
    letters = {"1": 1, "T": steps, "B": p.batch, "I": features, "H": p.hidden, "P": p.width, "3H": 3 * p.hidden}
    letters |= {"4H": CELLS[p.cell].rows * p.hidden, "D": p.columns, "K": CELLS[p.cell].kept}
    return {row.name: row.sized(letters) for row in TENSORS}


def in_the_loop(p: Problem, steps: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(Size, dtype) of the Inputs of a problem that its time loop reads, T = `steps`."""
    sizes, found = sizes_of(p, steps), {}
    for row in TENSORS:
        # A bool, dimensions of zoneout, the dtype of lengths. What a Problem does not know, no loop reads, except for
        # what is always there: states and W_hh.
        flag = getattr(p, row.name, row.role in (STATE, WEIGHT))
        if row.loop and flag is not None and flag is not False:
            dtype = flag if isinstance(flag, torch.dtype) else row.dtype or p.dtype
            found[row.name] = ((), torch.float32) if flag == 0 else (sizes[row.name], dtype)
    return found


def told_of(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """What a Problem is told of tensors, by their names: of those that are there what TENSORS says."""
    found = [(BY_NAME[name], t) for name, t in tensors.items() if t is not None]
    return {row.name: row.told(t) for row, t in found if row.told is not None}


def problem_with(told: dict[str, Any], cell: str, steps: int, **facts: Any) -> Problem:
    """The Problem of a layer, from what is `told` of its tensors, and all else; T = `steps`.

    The time loop reads h to reset to for zoneout alone: its product with W_hh is in the gates. A bias b_hh, and whether
    h is known before the loop, matter to cells with a constant.
    """
    flags = {name: value for name, value in told.items() if name in Problem._fields}
    flags["reset_h"] = "reset_h" in told and "zoneout_h" in told
    flags["bias_hh"] = "bias_hh" in told and CELLS[cell].has_constant
    flags["known_h"] = CELLS[cell].has_constant and "reset_h" in told
    return Problem(min(steps, 2), cell=cell, **flags, **facts)


def problem_of(inputs: Inputs, cell: str, reverse: bool, precision: str, side_by_side: int = 1) -> Problem:
    """The problem of a call with these tensors."""
    (steps, batch, _), (_, _, hidden), width = inputs.x.shape, inputs.c0.shape, inputs.h0.shape[-1]
    return problem_with(
        told_of(inputs._asdict()), cell, steps, batch=batch, hidden=hidden, dtype=inputs.x.dtype,
        projected=0 if inputs.weight_hr is None else width, precision=precision, side_by_side=side_by_side,
        reverse=reverse, heads=max(1, width // max(1, inputs.weight_hh.shape[1])),
    )  # fmt: skip


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def unless_reset(p: Problem, t: Tensor, resets: Tensor | None) -> Tensor:
    """t [B, *] of the h that the first step reads: zero where a reset is before that step. In reverse none is."""
    return t if resets is None or p.reverse else t.masked_fill(resets[0, :, None], 0)


def end_index(p: Problem, lengths: Tensor | None, first: bool) -> Any:
    """Index into [T, B, *] of every sequence's first or last step; of an arbitrary time if a sequence has no step."""
    if first != p.reverse:
        return 0
    if lengths is None:
        return -1
    return (lengths.long() - 1).clamp(min=0), torch.arange(p.batch, device=lengths.device)
