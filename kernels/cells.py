"""What a layer knows of a cell: the sizes of its weights, and which of its pre-activations x and h reach.

A unit has four pre-activations and four gates, z [T, B, 4H], whatever its cell: so all kernels have the same tiles. The
equations are in triton_lstm/cells/ and cupy_lstm/cuda/cells/, and in torch's operators in gpu_lstm/cells/.
"""

from typing import NamedTuple

from torch import Tensor


class Cell(NamedTuple):
    """A cell by its sizes. In a Problem, and so in every key, stands its name."""

    name: str
    states: tuple[str, ...]  # what a user holds; inside always h, and c in float32
    rows: int  # of each weight, in units of H
    x_end: int  # x reaches the pre-activations before this one
    h_start: int  # h reaches this one and those after it
    functions: tuple[int, int]  # sigmoid and tanh that a unit's kernels compute, forward and backward
    normalises: bool  # m is made of its last gate and c, so layer norms of c and of W_hh h are possible

    def of_x(self, z: Tensor, hidden: int) -> Tensor:
        """z [..., 4H] -> those that x reaches, [..., rows H]."""
        return z if self.x_end == 4 else z[..., : self.x_end * hidden]

    def of_h(self, z: Tensor, hidden: int) -> Tensor:
        """z [..., 4H] -> those that h reaches, [..., rows H], in torch's order."""
        return z if self.h_start == 0 else z[..., self.h_start * hidden :]

    def from_torch(self, t: Tensor, hidden: int) -> Tensor:
        """W_ih or b_ih [rows H, ...], from torch's order to that of the pre-activations."""
        return t if self.h_start == 0 else t.roll(self.h_start * hidden, 0)

    def to_torch(self, t: Tensor, hidden: int) -> Tensor:
        """The reverse of `from_torch`."""
        return t if self.h_start == 0 else t.roll(-self.h_start * hidden, 0)


LSTM = Cell("lstm", ("h", "c"), 4, 4, 0, (5, 1), True)  # i, f, g, o
# n, r, z, s: the candidate has n of x and s of h; torch's order is r, z, n
GRU = Cell("gru", ("h",), 3, 3, 1, (3, 0), False)
CELLS = {cell.name: cell for cell in (LSTM, GRU)}
_EVERY = tuple(CELLS.values())


def cell_of(rows: int, hidden: int) -> Cell:
    """The cell of a layer of H = `hidden`, by the rows of its weights."""
    for cell in _EVERY:
        if rows == cell.rows * hidden:
            return cell
    raise ValueError(f"expected weight_hh of {' or '.join(f'{cell.rows}H' for cell in _EVERY)} rows, got {rows}")
