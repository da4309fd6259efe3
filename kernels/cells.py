"""What a layer knows of a cell without its equations, see "The contract of a cell" in docs/design.md."""

from typing import NamedTuple

import torch
from torch import Tensor


class Cell(NamedTuple):
    """What is known of a cell. In a Problem, and so in every key, stands its name."""

    name: str
    states: tuple[str, ...]  # what a user holds; inside always h, and c in float32
    rows: int  # of each weight, in units of H
    x_end: int  # x reaches the pre-activations before this one
    h_start: int  # h reaches this one and those after it
    functions: tuple[int, int]  # how many sigmoids, tanhs, exps and logs a unit takes, forward and backward
    of_torch: bool  # torch has it, and so cuDNN
    normalises: bool  # m is made of its last gate and c: it may have peepholes, and layer norms of c and of W_hh h
    empty: tuple[float, ...] = (0.0,)  # c of a unit before its first step; backward reads the first number alone

    @property
    def one_state(self) -> bool:
        """Whether a user holds h alone: inside c is h."""
        return len(self.states) == 1

    @property
    def kept(self) -> int:
        """How many float32 numbers of a unit c has, K; c of all steps, which backward reads, has the first alone."""
        return len(self.empty)

    def empty_like(self, c: Tensor) -> Tensor | float:
        """What a reset leaves, to be broadcast with c [K, B, H]."""
        return 0.0 if self.kept == 1 else torch.cat([c.new_full((1, 1, 1), value) for value in self.empty])

    @property
    def has_constant(self) -> bool:
        """Whether x does not reach its last pre-activation: before the time loop that is a bias, which kernels add."""
        return self.x_end < 4

    def of_x(self, z: Tensor, hidden: int) -> Tensor:
        """Gradients z [..., 4H] of the pre-activations -> those that x reaches, [..., rows H]."""
        return z if self.x_end == 4 else z.narrow(-1, 0, self.x_end * hidden)

    def of_h(self, z: Tensor, hidden: int) -> Tensor:
        """The same of h, in torch's order."""
        return z if self.h_start == 0 else z.narrow(-1, self.h_start * hidden, (4 - self.h_start) * hidden)

    def from_torch(self, t: Tensor, hidden: int) -> Tensor:
        """W_ih [rows H, ...], from torch's order to that of the gradients."""
        return t if self.h_start == 0 else t.roll(self.h_start * hidden, 0)

    def to_torch(self, t: Tensor, hidden: int) -> Tensor:
        """The reverse of `from_torch`."""
        return t if self.h_start == 0 else t.roll(-self.h_start * hidden, 0)


# i, f, g, o
LSTM = Cell("lstm", ("h", "c"), rows=4, x_end=4, h_start=0, functions=(5, 1), of_torch=True, normalises=True)
# The candidate is made of n, from x, and s, from h. Gates are in the order r, z, n, s, where x reaches the first three,
# as in torch; gradients in the order n, r, z, s, where what x and what h reach are neighbours.
GRU = Cell("gru", ("h",), rows=3, x_end=3, h_start=1, functions=(3, 0), of_torch=True, normalises=False)
# u, v, g, o; c is q, the mean of all g, and l, the logarithm of the sum of their weights. Two logs have two exps;
# backward computes none, but 1 brings the estimate to the count of its instructions.
SLSTM = Cell(
    "slstm", ("h", "c", "n", "m"), rows=4, x_end=4, h_start=0, functions=(8, 1), of_torch=False,
    normalises=False, empty=(0.0, -float("inf")),
)  # fmt: skip
CELLS = {cell.name: cell for cell in (LSTM, GRU, SLSTM)}
