"""The request of a user, and the call that layers get."""

from typing import NamedTuple

from torch import Tensor

from .modes import Modes, Recording
from .options import Options
from .roles import Form
from .sequences import Traversal
from .weights import AllWeights, State


class Request(NamedTuple):
    """A user's call, checked. It has T steps, B sequences, L layers and D directions.

    x has the form that torch's own operators accept.
    """

    x: Tensor  # [T, B, I], or [sum of lengths, I] for a PackedSequence, or [B, I] for a cell
    steps: int
    batch: int
    states: list[State]  # the role's blocks
    weights: AllWeights  # [L][D]
    traversal: Traversal  # of the forward direction; with lstm_layer(reverse=True), of the reverse direction
    options: Options
    form: Form
    modes: Modes
    learns: bool  # whether autograd records and a tensor requires a gradient

    def padded(self) -> tuple[Tensor, Traversal]:
        """Return x and the traversal, with a PackedSequence as a batch [T, B, I].

        The batch has zeros in the padding, and the traversal has the lengths of the PackedSequence.
        """
        if self.form.packed is None:
            return self.x, self.traversal
        x = self.x.new_zeros(self.steps * self.batch, self.x.shape[1]).index_copy(0, self.form.rows(), self.x)
        lengths = self.form.inside().sum(0).to(x.device)
        return x.view(self.steps, self.batch, -1), self.traversal._replace(lengths=lengths)

    def laid_out(self) -> "Call":
        """Return the call that layers get: x is [T, B, I], and the blocks of states are cut into rows."""
        x, states, traversal, role = self.x, self.states, self.traversal, self.options.role
        if self.form.packed is not None:
            x, traversal = self.padded()
        if self.modes.recording >= Recording.COMPILED:  # torch.compile refuses the same tensor twice in an operator
            states = [(h, h.clone() if c is h else c) for h, c in states]
        if not role.lead:
            x = x if x.dim() == 3 else x[None]
            states = [(h[None], c if role.kept > 1 else c[None]) for h, c in states]
        elif (count := role.lead[0]) > 1:
            states = [row for h, c in states for row in zip(h.chunk(count), c.chunk(count))]
        # _replace would take longer. All fields from options on are kept.
        return Call(x, self.steps, self.batch, states, self.weights, traversal, *self[6:])


Call = Request
"""A Request in the layout of layers: x is [T, B, I], and states are [L*D] pairs ([1, B, P], [K, B, H]). The c of a GRU
is its h."""
