"""What LSTM and GRU share, next to torch's RNNBase."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase

from ..backends.torch_rnn import packed
from ..call.choices import BackendName
from ..call.options import Options
from ..call.weights import Weights
from .arguments import Checked, accepted
from .variants import weights_of


class Recurrent(Checked):
    """A mixin of LSTM and GRU."""

    # On the class, so that they are there in pickles of older modules.
    backend: BackendName | None = None
    recompute: bool = False
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_drop: float = 0.0
    _peepholes: bool = False
    _norms: tuple[str, ...] = ()

    def _make(self: Any, mode: str, torchs: tuple, **ours: Any) -> None:
        """Check our own arguments before RNNBase, with torch's, draws initial weights."""
        accepted_ours = {name: accepted(name, value) for name, value in ours.items()}
        # Not super(): in compat.LSTM torch.nn.LSTM comes next, whose __init__ names the mode itself.
        RNNBase.__init__(self, mode, *torchs)
        for name, value in accepted_ours.items():
            setattr(self, name, value)

    # RNNBase caches the weights here. They are read from the module at every call instead, so that any way of replacing
    # one works: functional_call, weight_norm, pruning, assignment.
    @property
    def _flat_weights(self: Any) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        pass

    def flatten_parameters(self: Any) -> None:
        """As torch's, but also for bfloat16, which torch skips: cuDNN would copy the weights at every call."""
        RNNBase.flatten_parameters(self)
        weights = [w for w in self._flat_weights if type(w) is nn.Parameter and w.is_cuda and w.dtype is torch.bfloat16]
        if len({w.data_ptr() for w in weights}) == len(self._flat_weights_names):  # none are tied, as torch requires
            with torch.no_grad():
                for weight, part in zip(weights, packed(weights)):  # type: ignore[arg-type]
                    weight.set_(part)  # type: ignore[call-overload]

    def _options(self) -> Options:
        raise NotImplementedError

    def _weights(self) -> list[list[Weights]]:
        """[L][D], as the module has them now."""
        return weights_of(self, self._options().names)
