"""What a user asks for, and what layers are asked to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .forms import Form
from .modes import Modes
from .sequences import Traversal
from .weights import State, Weights

if TYPE_CHECKING:
    from .options import Options


class Call(NamedTuple):
    """What layers are asked to do. T steps, B sequences, L layers, D directions."""

    x: Tensor  # [T, B, I]
    steps: int
    batch: int
    states: list[State]  # [L*D] of ([1, B, P], [K, B, H]); for a GRU c = h
    weights: list[list[Weights]]  # [L][D]
    traversal: Traversal  # of the forward direction; that of lstm_layer(reverse=True) itself
    options: Options
    modes: Modes
    learns: bool  # whether autograd records


class Request(NamedTuple):
    """What a user asks for, checked."""

    x: Tensor  # [T, B, I]; as torch's own operators take it: of a PackedSequence the data [N, I], of a cell [B, I]
    steps: int
    batch: int
    states: list[State]  # the role's blocks
    weights: list[list[Weights]]
    traversal: Traversal
    options: Options
    form: Form
    modes: Modes
    learns: bool

    def padded(self) -> tuple[Tensor, Traversal]:
        """x and the traversal, of a PackedSequence as a batch [T, B, I] with lengths and zeros in the padding."""
        if self.form.packed is None:
            return self.x, self.traversal
        x = self.x.new_zeros(self.steps * self.batch, self.x.shape[1]).index_copy(0, self.form.rows(), self.x)
        lengths = self.form.inside().sum(0).to(x.device)
        return x.view(self.steps, self.batch, -1), self.traversal._replace(lengths=lengths)
