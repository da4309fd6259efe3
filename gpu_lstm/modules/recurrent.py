"""LSTM, GRU and SLSTM: drop-ins for torch.nn.LSTM and GRU, and xLSTM's cell with a hidden state that feeds back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..backends.torch_rnn import packed
from ..call import roles
from ..call.choices import Backend, BackendName
from ..call.options import Options, options_of
from ..call.regularisers import REGULARISER_NAMES
from ..call.weights import State
from ..dispatch.route import run_call
from ..kernels import cells
from ..kernels.private import compiler_callback, fx_is_tracing
from .arguments import OF_LAYERS, Called, DropIn, HasVariants, Layers
from .tracing import in_eager_mode, traced

# torch's classes are bound when this module is imported: `torch.nn.LSTM = gpu_lstm.LSTM` changes nothing here.

States = tuple[Tensor, Tensor, Tensor, Tensor]
TORCHRLS = " as TorchRL's {0}Module gives to what is no torch.nn.{0}: hand it a gpu_lstm.compat.{0}"


class Recurrent(DropIn, Layers):
    """A mixin of LSTM and GRU."""

    _role = roles.Module

    def _init_torchs(self: Any, **arguments: Any) -> None:
        # RNNBase knows torch's classes alone, by name: it is given the one whose weights have as many rows. And not
        # super(): in compat.LSTM torch.nn.LSTM comes next, whose __init__ names the mode itself.
        RNNBase.__init__(self, mode="LSTM" if self._cell.rows == cells.LSTM.rows else "GRU", **arguments)

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
            lengths: (N,), unbatched (). int32 or int64 on the input's device, from 0 to T, in any order. Default: T
            resets: (T, N), with batch_first (N, T), unbatched (T,). bool.
            reset_states: (h, c), of a GRU h, that resets set instead of zeros: one per sequence, as hx, or one per
                step, of which only those at resets are used: (D*L, T, N, P) and (D*L, T, N, H), with batch_first
                (D*L, N, T, ...), unbatched (D*L, T, ...). Gradients flow into them. On every backend but "torch".
            mask: None. TorchRL's modules pass one to what is not torch's LSTM or GRU: give them one of compat.

        ``lengths`` replaces packing: nothing is sorted or copied, and padding, NaN included, never affects results or
        gradients. ``resets`` zeroes the states before the steps where it is True, as at the start of an episode; one at
        t separates time t from time t - 1, for both directions. With ``reset_states`` the forward direction begins step
        t with the state given for t, and the reverse one step t - 1, each from its own rows. All of these are given by
        keyword; torch.onnx alone passes them by position.

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
        return run_call(self._request(input, hx, lengths, resets, reset_states))

    def _options(self: Any) -> Options:
        sizes, of_all = (self.hidden_size,) * self.num_layers, [getattr(self, name) for name in OF_LAYERS]
        rates = tuple([getattr(self, name, 0.0) for name in REGULARISER_NAMES])
        return options_of(self._cell.name, self._role, sizes, *of_all, rates, self.proj_size)


class LSTM(Recurrent, HasVariants, RNNBase):
    """A drop-in for torch.nn.LSTM: the same arguments, parameters, initial weights, results and errors.

    Each layer computes, at every step, with gates in the order i, f, g, o::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      f, o likewise
        g = tanh   (W_ig x + b_ig + W_hg h + b_hg)
        c' = f c + i g          h' = o tanh(c'), or W_hr (o tanh(c')) if proj_size > 0

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        num_layers: layers on top of each other, L. Default: 1
        bias: whether there are bias_ih and bias_hh. Default: True
        batch_first: input and output are (N, T, features), not (T, N, features); states are not affected, and
            neither is unbatched input. Default: False
        dropout: probability of zeroing an element of the output of every layer but the last, when training.
            Default: 0
        bidirectional: a second direction runs from the end to the start; D = 2. Default: False
        proj_size: if > 0, h has this many features. Default: 0
        device, dtype: of the parameters.
        backend: "auto", "triton", "cupy", "numba", "torch" or "reference". Default: as chosen by `gpu_lstm.backend` or
            the environment variable GPU_LSTM_BACKEND, else "auto".
        recompute: save only h and c for backward, and recompute the gates with one product over all steps: about a
            third of the memory. On "triton", "cupy" and "numba". Default: False
        recurrent_dropout: when training, probability of zeroing an element of h before the product with W_hh, the same
            for all gates and steps of a call (Gal & Ghahramani, 2016). Default: 0
        zoneout: probability that an element of a state stays as it was before the step, drawn again for every step
            (Krueger et al., 2017): a pair for h and c, or one for both. In eval() the expectation. Default: 0
        weight_drop: when training, probability of zeroing an element of W_hh, the same for all steps of a call
            (Merity et al., 2018). Default: 0
        peepholes: gates depend on the cell state of their own unit (Gers & Schmidhuber, 2000). Parameters
            weight_peephole_l{k} and, if bidirectional, weight_peephole_l{k}_reverse: p_i, p_f and p_o, (3H,). Default:
            False. With them, before the gates are computed::

                z_i += p_i c      z_f += p_f c      z_o += p_o c'

        layer_norm: normalise W_ih x, W_hh h and c (Ba, Kiros & Hinton, 2016), or those of "ih", "hh" and "c" that are
            named. Parameters gain_ih_l{k} and gain_hh_l{k} (4H,), gain_c_l{k} and, if `bias`, bias_c_l{k} (H,), each
            with _reverse if bidirectional; gains are initially one and bias_c zero. Not with proj_size. Default:
            False. With it, where LN(v) = gain (v - mean(v)) / sqrt(var(v) + 1e-5)::

                z = LN(W_ih x) + b_ih + LN(W_hh h) + b_hh      h' = o tanh(LN(c') + bias_c)

        heads: groups of H / heads units, of which W_hh connects each with itself alone: weight_hh_l{k} is (4H, H /
            heads). Its rows are torch's, each with the weights of the units of its own head, drawn like those of an
            LSTM with H / heads units. Divides `hidden_size`. Not with proj_size, nor with a layer norm of "hh" or
            "c". Default: 1

    Recurrent dropout, zoneout, peepholes and layer norms run on every backend but "torch"; "auto" chooses among these.
    See `forward` for calls.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM for its arguments, in its words; ValueError for an unknown backend, a
            regulariser that is not a probability, or a layer norm of something else or with proj_size, or heads that
            do not go with the rest; TypeError for `recompute` or `peepholes` that is not a bool. `dropout` and these,
            except `peepholes`, `layer_norm` and `heads`, may be set later as attributes, and raise the same errors
            then.

    Example::

        lstm = gpu_lstm.LSTM(10, 20, num_layers=2)
        output, (h_n, c_n) = lstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    _cell, _torchs = cells.LSTM, rnn.LSTM
    __call__: Called[State, State]
    forward: Called[State, State]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        backend: BackendName | Backend | None = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0, weight_drop: float = 0.0, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())

    # The rest of torch.nn.LSTM's public methods, which RNNBase has for a single state only.
    get_expected_cell_size = rnn.LSTM.get_expected_cell_size
    check_forward_args = rnn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = rnn.LSTM.permute_hidden  # type: ignore[assignment]


class GRU(Recurrent, RNNBase):
    """A drop-in for torch.nn.GRU: the same arguments, parameters, initial weights, results and errors.

    Each layer computes, at every step, with rows of weights in the order r, z, n (Cho et al., 2014, with the reset gate
    after the product, as torch.nn.GRU, cuDNN and Keras with reset_after=True have it)::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z likewise
        n = tanh   (W_in x + b_in + r (W_hn h + b_hn))
        h' = (1 - z) n + z h

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for LSTM.
        backend, recompute, recurrent_dropout, weight_drop: as for LSTM.
        zoneout: as for LSTM, of the one state. Default: 0
        heads: as for LSTM; weight_hh_l{k} is (3H, H / heads). Default: 1

    There is no projection, no peepholes and no layer norm. See `forward` for calls.

    Raises:
        ValueError, TypeError: as torch.nn.GRU for its arguments, in its words, and as LSTM for all others.

    Example::

        gru = gpu_lstm.GRU(10, 20, num_layers=2)
        output, h_n = gru(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    zoneout: float
    _cell, _torchs = cells.GRU, rnn.GRU
    __call__: Called[Tensor, Tensor]
    forward: Called[Tensor, Tensor]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, backend: BackendName | Backend | None = None, recompute: bool = False,
        recurrent_dropout: float = 0.0, zoneout: float = 0.0, weight_drop: float = 0.0, heads: int = 1,
        proj_size: None = None,
    ) -> None:  # fmt: skip
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")  # torch's words
        self._make(locals() | {"proj_size": 0})


class SLSTM(Recurrent, RNNBase):
    """sLSTM layers (Beck et al., 2024, https://arxiv.org/abs/2405.04517): an LSTM with an exponential input gate.

    Each layer computes, at every step, with rows of weights in the order i, f, g, o, where the paper calls g z::

        i = exp(z_i)      f, o = sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)      of z = W_ih x + b_ih + W_hh h + b_hh
        c' = f c + i g    n' = f n + i                           h' = o c' / n'

    n, the normaliser, is the sum of the weights that g has in c. c and n may be too large to be written down: a state
    has them times e^-m, with a stabiliser m of each unit.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for LSTM, and
            initial weights, too.
        backend: as for LSTM. It runs on every backend but "torch".
        heads: as for LSTM. Default: 1

    A call is that of an LSTM, see `forward`, but hx, and what is returned, is (h, c, n, m), each (D*L, N, H), unbatched
    without N; zeros by default: n = 0 is an empty state, whatever c and m are. h has the dtype of the input; c, n and m
    may be of any, and are float32 (float64 for a float64 input). What is returned has n = 1, c / n for c and m + log(n)
    for m: the same state in other numbers, since only c / n and m + log(n) matter. So gradients reach c and m of it.

    There are no reset_states, which would be four tensors, no zoneout, since c, n and m change together, and no
    recompute, since backward would need n and m of all steps. `recurrent_dropout` and `weight_drop` may be set as
    attributes.

    Raises:
        ValueError, TypeError: as LSTM for its arguments; ValueError if reset_states are given, or zoneout or recompute
            is set.
        RuntimeError, TypeError: in a call, hx that is not four tensors of these sizes.

    Example::

        slstm = gpu_lstm.SLSTM(10, 20, heads=4)
        output, (h_n, c_n, n_n, m_n) = slstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    _cell, _torchs = cells.SLSTM, rnn.LSTM
    __call__: Called[States, States]
    forward: Called[States, States]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, backend: BackendName | Backend | None = None, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())


class NotCompiled(Recurrent):
    """One that torch.compile leaves out with all that it calls, as torch's own; with `allow_rnn` it is traced."""

    if not TYPE_CHECKING:

        def forward(self, input, hx=None, lengths=None, resets=None, reset_states=None, mask=None):
            arguments = self, input, hx, lengths, resets, reset_states, mask
            if torch.compiler.is_dynamo_compiling() or not compiler_callback():
                return Recurrent.forward(*arguments)
            return in_eager_mode(Recurrent.forward, *arguments)
