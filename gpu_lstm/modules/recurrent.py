"""What LSTM and GRU share, next to torch's RNNBase."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..backends.torch_rnn import packed
from ..call import roles
from ..call.options import Options, options_of
from ..call.prepare import prepare
from ..call.regularisers import NAMES as REGULARISERS
from ..call.weights import Weights
from ..dispatch.route import run
from ..kernels.cells import LSTM
from ..kernels.private import compiler_callback, fx_is_tracing
from .arguments import NOT_OF_TORCH, OWN, DropIn, Layers, repr_of
from .tracing import in_eager_mode, traced
from .variants import OF_LAYERS, weights_of

TORCHRLS = " as TorchRL's {0}Module gives to what is no torch.nn.{0}: hand it a gpu_lstm.compat.{0}"


class Recurrent(DropIn, Layers):
    """A mixin of LSTM and GRU."""

    # On the class, so that they are there in pickles of older modules.
    recompute: bool = False
    _role = roles.Module

    def _init_torchs(self: Any, **arguments: Any) -> None:
        # RNNBase knows torch's classes alone, by name: it is given the one whose weights have as many rows. And not
        # super(): in compat.LSTM torch.nn.LSTM comes next, whose __init__ names the mode itself.
        RNNBase.__init__(self, mode="LSTM" if self._cell.rows == LSTM.rows else "GRU", **arguments)

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
        if self.heads > 1:  # cuDNN has none
            return
        RNNBase.flatten_parameters(self)
        weights = [w for w in self._flat_weights if type(w) is nn.Parameter and w.is_cuda and w.dtype is torch.bfloat16]
        if len({w.data_ptr() for w in weights}) == len(self._flat_weights_names):  # none are tied, as torch requires
            with torch.no_grad():
                for weight, view in zip(weights, packed(weights)):  # type: ignore[arg-type]
                    weight.set_(view)  # type: ignore[call-overload]

    def forward(
        self: Any, input: Tensor | PackedSequence, hx: Any = None, lengths: Tensor | None = None,
        resets: Tensor | None = None, reset_states: Any = None, mask: None = None,
    ) -> tuple[Tensor | PackedSequence, Any]:  # fmt: skip
        """Run all layers over all steps. P = proj_size or, if 0, H; D = 2 if bidirectional, else 1.

        Args:
            input: (T, N, I), with batch_first (N, T, I), unbatched (T, I), or a PackedSequence.
            hx: (h_0, c_0), (D*L, N, P) and (D*L, N, H), unbatched without N; of a GRU h_0. Default: zeros.
            lengths: (N,), unbatched (). int32 or int64 on the input's device, each from 0 to T, in any order.
                Default: T.
            resets: (T, N), with batch_first (N, T), unbatched (T,). bool.
            reset_states: (h, c), of a GRU h, that resets set instead of zeros: one per sequence, as hx, or one per
                step, of which only those at resets are used: (D*L, T, N, P) and (D*L, T, N, H), with batch_first
                (D*L, N, T, ...), unbatched (D*L, T, ...). Gradients flow into them. On the backends "triton", "cupy"
                and "reference".
            mask: None. TorchRL's modules pass one to what is not torch's LSTM or GRU: give them one of compat.

        By keyword from `lengths` on: others are for torch.onnx, which passes all by position.

        ``lengths`` replaces packing: nothing is sorted or copied, and padding, NaN included, never affects results or
        gradients. ``resets`` zeroes the states before the steps where it is True, as at the start of an episode; one at
        t separates time t from time t - 1, for both directions. With ``reset_states`` the forward direction begins step
        t with the state given for t, and the reverse one step t - 1, each from its own rows.

        Returns:
            output: as the input, with D*P features; zero past the end of a sequence.
            (h_n, c_n), of a GRU h_n: as hx; the states after the last step of each sequence. In half precision c_0, of
            a GRU h_0, may be float32, as the kernels keep it, and then so is c_n: a sequence in pieces gives the
            results of the whole.

        Raises:
            ValueError, RuntimeError, TypeError: as torch.nn.LSTM or GRU, in its words. ValueError for lengths, resets
                or reset_states of a wrong shape, dtype or value (on CUDA values are asserted on the device), lengths
                with a PackedSequence, reset_states without resets, or a chosen backend that does not support these,
                recurrent dropout, zoneout or peepholes. TypeError for a mask.
            ImportError, RuntimeError, TypeError: a chosen backend that cannot run, and why.
        """
        if type(input) is not Tensor or fx_is_tracing():
            instead = traced(self, input, hx, lengths=lengths, resets=resets, reset_states=reset_states, mask=mask)
            if instead is not None:
                return instead
        if mask is not None:
            name, torchrls = self._cell.name.upper(), TORCHRLS if self._cell.of_torch else ""
            raise TypeError(f"{name} accepts lengths, and no mask{torchrls.format(name)}")
        options = self._options()
        return run(prepare(options, weights_of(self, options.names), input, hx, lengths, resets, reset_states))

    def extra_repr(self: Any) -> str:
        """As torch's, and our own arguments that are not at their defaults."""
        return RNNBase.extra_repr(self) + repr_of(self, ("heads", *OWN, *NOT_OF_TORCH))

    def _options(self: Any) -> Options:
        """From the attributes as they are now."""
        sizes, of_all = (self.hidden_size,) * self.num_layers, [getattr(self, name) for name in OF_LAYERS]
        rates = tuple([getattr(self, name, 0.0) for name in REGULARISERS])
        return options_of(self._cell.name, self._role, sizes, *of_all, rates, self.proj_size)

    def _weights(self) -> list[list[Weights]]:
        """[L][D], as the module has them now."""
        return weights_of(self, self._options().names)


class NotCompiled(Recurrent):
    """One that torch.compile leaves out with all that it calls, as torch's own; with `allow_rnn` it is traced."""

    if not TYPE_CHECKING:

        def forward(self, input, hx=None, lengths=None, resets=None, reset_states=None, mask=None):
            arguments = self, input, hx, lengths, resets, reset_states, mask
            if torch.compiler.is_dynamo_compiling() or not compiler_callback():
                return Recurrent.forward(*arguments)
            return in_eager_mode(Recurrent.forward, *arguments)
