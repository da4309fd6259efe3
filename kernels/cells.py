"""The facts about a cell that a layer needs besides its equations; see "The contract of a cell" in docs/design.md."""

from typing import NamedTuple

import torch
from torch import Tensor


class Cell(NamedTuple):
    """The facts about a cell. A Problem, and so every key, has the cell's name only."""

    name: str
    states: tuple[str, ...]  # the states that a user holds; inside the library they are always h, and c in float32
    rows: int  # the rows of W_ih, W_hh and each bias, in multiples of H
    x_end: int  # x reaches the pre-activations before this one
    h_start: int  # h reaches this pre-activation and the following ones
    functions: tuple[int, int]  # how many sigmoids, tanhs, exps and logs a unit takes, forward and backward
    of_torch: bool  # whether torch has the cell, and so cuDNN
    normalises: bool  # whether m is made of the last gate and c, so that peepholes and layer norms are possible
    empty: tuple[float, ...] = (0.0,)  # c of a unit before its first step; backward reads only the first number

    @property
    def one_state(self) -> bool:
        """Whether a user holds h alone. Inside the library c is h then."""
        return len(self.states) == 1

    @property
    def kept(self) -> int:
        """K, the count of numbers of a unit in c. The c of all steps, which backward reads, has only the first."""
        return len(self.empty)

    def empty_like(self, c: Tensor) -> Tensor | float:
        """Return the cell state after a reset, in a form that broadcasts with c [K, B, H]."""
        return 0.0 if self.kept == 1 else torch.cat([c.new_full((1, 1, 1), value) for value in self.empty])

    @property
    def has_constant(self) -> bool:
        """Whether x does not reach the last pre-activation. Kernels then add its bias in the time loop."""
        return self.x_end < 4

    def of_x(self, z: Tensor, hidden: int) -> Tensor:
        """Return the gradients [..., rows H] of the pre-activations that x reaches, a part of z [..., 4H]."""
        return z if self.x_end == 4 else z.narrow(-1, 0, self.x_end * hidden)

    def of_h(self, z: Tensor, hidden: int) -> Tensor:
        """Return the gradients [..., rows H] of the pre-activations that h reaches, in torch's order."""
        return z if self.h_start == 0 else z.narrow(-1, self.h_start * hidden, (4 - self.h_start) * hidden)

    def from_torch(self, t: Tensor, hidden: int) -> Tensor:
        """Convert W_ih [rows H, ...] from torch's order of gates to the order of the gradients."""
        return t if self.h_start == 0 else t.roll(self.h_start * hidden, 0)

    def to_torch(self, t: Tensor, hidden: int) -> Tensor:
        """Convert back what `from_torch` converts."""
        return t if self.h_start == 0 else t.roll(-self.h_start * hidden, 0)


# The gates are i, f, g, o.
LSTM = Cell("lstm", ("h", "c"), rows=4, x_end=4, h_start=0, functions=(5, 1), of_torch=True, normalises=True)
# The candidate is made of n, which comes from x, and s, which comes from h. Gates are in the order r, z, n, s. As in
# torch, x reaches the first three. Gradients are in the order n, r, z, s. There, the rows that x reaches are
# neighbours, and the rows that h reaches are neighbours, too.
GRU = Cell("gru", ("h",), rows=3, x_end=3, h_start=1, functions=(3, 0), of_torch=True, normalises=False)
# The gates are u, v, g, o. c is (q, l): q is the mean of all g, and l the logarithm of the sum of their weights. Each
# of the two logs comes with an exp. Backward computes no such function. The 1 makes the estimate match the counted
# instructions.
SLSTM = Cell(
    "slstm", ("h", "c", "n", "m"), rows=4, x_end=4, h_start=0, functions=(8, 1), of_torch=False,
    normalises=False, empty=(0.0, -float("inf")),
)  # fmt: skip
CELLS = {cell.name: cell for cell in (LSTM, GRU, SLSTM)}
