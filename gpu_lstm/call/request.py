"""What a user asks for, and what layers are asked to do."""

from typing import NamedTuple

from torch import Tensor

from .modes import Modes, Recording
from .options import Options
from .roles import Form
from .sequences import Traversal
from .weights import State, Weights


class Request(NamedTuple):
    """What a user asks for, checked. T steps, B sequences, L layers, D directions."""

    x: Tensor  # [T, B, I]; as torch's own operators take it: of a PackedSequence the data [N, I], of a cell [B, I]
    steps: int
    batch: int
    states: list[State]  # the role's blocks
    weights: list[list[Weights]]  # [L][D]
    traversal: Traversal  # of the forward direction; that of lstm_layer(reverse=True) itself
    options: Options
    form: Form
    modes: Modes
    learns: bool  # whether autograd records

    def padded(self) -> tuple[Tensor, Traversal]:
        """x and the traversal, of a PackedSequence as a batch [T, B, I] with lengths and zeros in the padding."""
        if self.form.packed is None:
            return self.x, self.traversal
        x = self.x.new_zeros(self.steps * self.batch, self.x.shape[1]).index_copy(0, self.form.rows(), self.x)
        lengths = self.form.inside().sum(0).to(x.device)
        return x.view(self.steps, self.batch, -1), self.traversal._replace(lengths=lengths)

    def call(self) -> "Call":
        """What layers are asked to do: x [T, B, I], and the blocks cut into rows."""
        x, states, traversal, role = self.x, self.states, self.traversal, self.options.role
        if self.form.packed is not None:
            x, traversal = self.padded()
        if self.modes.recording >= Recording.COMPILED:  # torch.compile lets no operator have the same tensor twice
            states = [(h, h.clone() if c is h else c) for h, c in states]
        if not role.lead:
            x = x if x.dim() == 3 else x[None]
            states = [(h[None], c if role.kept > 1 else c[None]) for h, c in states]
        elif (count := role.lead[0]) > 1:
            states = [row for h, c in states for row in zip(h.chunk(count), c.chunk(count))]
        return Call(x, self.steps, self.batch, states, self.weights, traversal, *self[6:])  # from options on


Call = Request
"""One that is laid out for layers: x is [T, B, I], states are [L*D] of ([1, B, P], [K, B, H]); for a GRU c = h."""
