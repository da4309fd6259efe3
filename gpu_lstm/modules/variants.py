"""What peepholes and layer norms add to a module: parameters, which come after all others, and two properties.

And how a call reads a module: Options from its attributes, Weights from its parameters.
"""

from typing import Any

from torch import nn

from ..call.options import NORMS
from ..call.weights import Weights


class HasVariants:
    """A mixin of LSTM and LSTMCell, next to torch's RNNBase or RNNCellBase."""

    _peepholes: bool
    _norms: tuple[str, ...]
    bias: bool

    @property
    def peepholes(self) -> bool:
        """Whether there are peepholes; fixed, since their weights are parameters."""
        return self._peepholes

    @property
    def layer_norm(self) -> bool | tuple[str, ...]:
        """Whether all of "ih", "hh" and "c" are normalised, or which; fixed, like peepholes."""
        return self._norms if 0 < len(self._norms) < len(NORMS) else bool(self._norms)

    def _add_variants(self: Any, peepholes: bool, norms: tuple[str, ...]) -> None:
        """The parameters of each layer and direction, where its others are: peepholes initialised as weights are."""
        if not self._cell.normalises:
            raise ValueError(f"{self._cell.name} cells have no peepholes and no layer norm")
        self._peepholes, self._norms = peepholes, norms
        like, hidden = next(self.parameters()), self.hidden_size
        for suffix in [name.removeprefix("weight_hh") for name, _ in self.named_parameters() if "weight_hh" in name]:
            if peepholes:
                weight = like.new_empty(3 * hidden).uniform_(-self._bound(), self._bound())
                self.register_parameter("weight_peephole" + suffix, nn.Parameter(weight))
            for norm in norms:
                gain = like.new_ones(hidden if norm == "c" else 4 * hidden)
                self.register_parameter(f"gain_{norm}{suffix}", nn.Parameter(gain))
            if "c" in norms and self.bias:
                self.register_parameter("bias_c" + suffix, nn.Parameter(like.new_zeros(hidden)))


OF_CELLS = ("_peepholes", "_norms", "heads", "input_size", "bias", "backend")
OF_LAYERS = (*OF_CELLS, "bidirectional", "batch_first", "training", "recompute")
"""The attributes of cells, and of other modules, in the order of Arguments."""


def weights_of(module: Any, names: tuple) -> list[list[Weights]]:
    """[L][D] of a module by the names of its parameters, see Options.names: as they are now."""
    parameters = module._parameters
    try:
        return [[Weights(*[n and parameters[n] for n in tensors]) for tensors in layer] for layer in names]
    except KeyError:  # another tensor has taken a parameter's place, as weight_norm's does
        return [[Weights(*[n and getattr(module, n) for n in tensors]) for tensors in layer] for layer in names]
