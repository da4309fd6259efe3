"""What peepholes and layer norms add to a module: parameters, which come after all others, and two properties."""

from typing import Any

from torch import Tensor, nn

from .weights import LAYER_NORM, NAMES

NORMS = ("ih", "hh", "c")  # what a layer norm may be of: W_ih x, W_hh h, c
ADDED = NAMES[5:]  # weight_peephole, gain_ih, gain_hh, gain_c, bias_c


def norms_of(layer_norm: object) -> tuple[str, ...]:
    """The argument of the modules, checked: those of NORMS that it asks for, in their order.

    Raises:
        TypeError, ValueError: neither a bool nor a tuple or list of some of NORMS.
    """
    if isinstance(layer_norm, bool):
        return NORMS if layer_norm else ()
    if not isinstance(layer_norm, (tuple, list)):
        raise TypeError(f"{LAYER_NORM} should be of type bool, or a tuple of names, got: {type(layer_norm).__name__}")
    if not all(norm in NORMS for norm in layer_norm):
        known = ", ".join(map(repr, NORMS))
        raise ValueError(f"{LAYER_NORM} should be a bool, or name some of {known}, got {layer_norm!r}")
    return tuple(norm for norm in NORMS if norm in layer_norm)


class HasVariants:
    """Of LSTM and LSTMCell, beside torch's RNNBase or RNNCellBase."""

    # On the class, so that they are there in pickles of older modules, and in the dicts of those alone that have one.
    _peepholes: bool = False
    _norms: tuple[str, ...] = ()
    bias: bool
    hidden_size: int

    @property
    def peepholes(self) -> bool:
        """Whether there are peepholes; fixed, since their weights are parameters."""
        return self._peepholes

    @property
    def layer_norm(self) -> bool | tuple[str, ...]:
        """Whether all of "ih", "hh" and "c" are normalised, or which; fixed, as peepholes."""
        return self._norms if 0 < len(self._norms) < len(NORMS) else bool(self._norms)

    def reset_parameters(self) -> None:
        """Draw all weights and biases anew, and make gains of layer norms ones, their bias_c zero."""
        super().reset_parameters()  # type: ignore[misc]
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            if name.startswith(("gain_", "bias_c")):
                nn.init.constant_(parameter, float(name.startswith("gain_")))

    def _add_variants(self: Any, suffix: str, peepholes: bool, norms: tuple[str, ...]) -> None:
        """The parameters of one layer and direction, where its others are: peepholes initialised as weights are."""
        like, hidden = next(self.parameters()), self.hidden_size
        if peepholes:
            self._peepholes = True
            weight = like.new_empty(3 * hidden).uniform_(-(hidden**-0.5), hidden**-0.5)
            self.register_parameter("weight_peephole" + suffix, nn.Parameter(weight))
        if norms:
            self._norms = norms
        for norm in norms:
            gain = like.new_ones(hidden if norm == "c" else 4 * hidden)
            self.register_parameter(f"gain_{norm}{suffix}", nn.Parameter(gain))
        if "c" in norms and self.bias:
            self.register_parameter("bias_c" + suffix, nn.Parameter(like.new_zeros(hidden)))

    def _added(self, suffix: str) -> list[Tensor | None]:
        """Those parameters as Weights' last fields."""
        there = (self._peepholes, *(norm in self._norms for norm in NORMS), "c" in self._norms and self.bias)
        return [getattr(self, name + suffix) if is_there else None for name, is_there in zip(ADDED, there)]
