"""The modules LSTM and GRU, which replace torch.nn.LSTM and torch.nn.GRU, and SLSTM, the recurrent cell of xLSTM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn
from torch.nn.modules.rnn import RNNBase
from torch.types import Device

from ..backends.torch_rnn import packed
from ..call import roles
from ..call.choices import AnyBackend
from ..call.weights import State
from ..kernels import cells
from ..kernels.private import compiler_callback
from .arguments import Called, DropIn, HasVariants, OverSequences
from .tracing import in_eager_mode

# torch's classes are bound when this module is imported. So `torch.nn.LSTM = gpu_lstm.LSTM` changes nothing here.

States = tuple[Tensor, Tensor, Tensor, Tensor]


class Recurrent(DropIn, OverSequences):
    """The base class of LSTM, GRU and SLSTM. It is a mixin for torch's RNNBase."""

    _role = roles.Module

    def _init_torchs(self: Any, **arguments: Any) -> None:
        # RNNBase accepts only the modes of torch's own classes. It gets the mode whose weights have the same number of
        # rows for each unit. super().__init__ cannot be called here: in compat.LSTM the next class is torch.nn.LSTM,
        # and its __init__ sets the mode itself.
        RNNBase.__init__(self, mode="LSTM" if self._cell.rows == cells.LSTM.rows else "GRU", **arguments)

    # RNNBase caches the weights in this attribute. Here they are read from the module at every call, so that every way
    # of replacing a weight works: functional_call, weight_norm, pruning and assignment.
    @property
    def _flat_weights(self: Any) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        pass

    def flatten_parameters(self: Any) -> None:
        """Put all weights into one buffer for cuDNN, as torch.nn.LSTM does.

        torch skips bfloat16, so cuDNN would copy bfloat16 weights at every call. Here they are put into one buffer,
        too.
        """
        if self.heads > 1:  # cuDNN does not support heads
            return
        RNNBase.flatten_parameters(self)
        weights = [w for w in self._flat_weights if type(w) is nn.Parameter and w.is_cuda and w.dtype is torch.bfloat16]
        if len({w.data_ptr() for w in weights}) == len(self._flat_weights_names):  # no weights are tied
            with torch.no_grad():
                for weight, view in zip(weights, packed(weights)):  # type: ignore[arg-type]
                    weight.set_(view)  # type: ignore[call-overload]


class LSTM(Recurrent, HasVariants, RNNBase):
    """Apply a multi-layer LSTM to a sequence. It replaces torch.nn.LSTM.

    Arguments, parameters, initial weights, results and errors are the same as in torch.nn.LSTM. Each layer computes the
    following functions at every step. The rows of the weights are in the order i, f, g, o::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh   (W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f c + i g
        h' = o tanh(c')                 with proj_size > 0: h' = W_hr (o tanh(c'))

    x is the input at this step, or the output of the layer below. h and c are the hidden state and the cell state after
    the previous step. h' and c' are the states after this step.

    See `forward` for calls.

    Args:
        input_size: The number of features in the input, I.
        hidden_size: The number of hidden units, H.
        num_layers: The number of layers on top of each other, L. Default: 1
        bias: If False, the layers have no bias_ih and no bias_hh. Default: True
        batch_first: If True, input and output are (N, T, features) instead of (T, N, features). This does not apply to
            states, nor to unbatched input. Default: False
        dropout: The probability of zeroing an element of a layer's output. It applies to every layer except the last
            one, during training. Default: 0
        bidirectional: If True, each layer has a second direction, which runs from the end of a sequence to its start.
            Then D = 2, otherwise D = 1. Default: False
        proj_size: If > 0, h is projected to this number of features, P. Default: 0
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        backend: "auto", "triton", "cupy", "numba", "torch" or "reference". By default `gpu_lstm.backend` decides, then
            the environment variable GPU_LSTM_BACKEND, then "auto".
        recompute: If True, only h and c are saved for backward, which needs about a third of the memory. Backward then
            recomputes the gates with one product over all steps. Backends "triton", "cupy" and "numba" support it.
            Default: False
        recurrent_dropout: The probability of zeroing an element of h before the product with W_hh, during training. The
            same elements are zeroed for all gates and all steps of a call (Gal & Ghahramani, 2016). Default: 0
        zoneout: The probability that an element of a state keeps its previous value, drawn anew at every step
            (Krueger et al., 2017). Give a pair for h and c, or one number for both. In eval() mode each state is the
            expected value instead. Default: 0
        weight_drop: The probability of zeroing an element of W_hh, during training. The same elements are zeroed at all
            steps of a call (Merity et al., 2018). Default: 0
        peepholes: If True, the gates also depend on the cell state of their own unit (Gers & Schmidhuber, 2000). The
            parameters are weight_peephole_l{k} and, if bidirectional, weight_peephole_l{k}_reverse. Each has the shape
            (3H,) and contains p_i, p_f and p_o. Default: False. Before the gates are computed, the following terms are
            added to their pre-activations::

                z_i += p_i c      z_f += p_f c      z_o += p_o c'

        layer_norm: If True, W_ih x, W_hh h and c are normalised (Ba, Kiros & Hinton, 2016). A tuple or list that names
            some of "ih", "hh" and "c" normalises only these. The parameters are gain_ih_l{k} and gain_hh_l{k} of shape
            (4H,), gain_c_l{k} of shape (H,) and, if `bias`, bias_c_l{k} of shape (H,). With bidirectional there are the
            same parameters with the ending _reverse. Gains are initialized with one, bias_c with zero. A layer norm
            cannot be combined with proj_size. Default: False. With all three, each layer computes::

                z = LN(W_ih x) + b_ih + LN(W_hh h) + b_hh
                h' = o tanh(LN(c') + bias_c)
                LN(v) = gain (v - mean(v)) / sqrt(var(v) + 1e-5)

        heads: The number of groups into which the units are divided. W_hh connects the units of a group only with each
            other. weight_hh_l{k} then has the shape (4H, H / heads). Its rows are in torch's order, and each row has
            the weights of the units in its own head. They are initialized like the weights of an LSTM with H / heads
            units. `hidden_size` must be divisible by `heads`. Heads cannot be combined with proj_size, nor with a layer
            norm of "hh" or "c". Default: 1

    Note:
        Every backend except "torch" supports recurrent dropout, zoneout, peepholes and layer norms. "auto" chooses
        among these backends.

        `dropout`, `backend`, `recompute`, `recurrent_dropout`, `zoneout` and `weight_drop` may be set later as
        attributes. They are checked again and raise the same errors.

    Raises:
        ValueError, TypeError: An argument that torch.nn.LSTM refuses, too, with torch's message.
        ValueError: An unknown backend, a regulariser that is not a probability, a `layer_norm` that names something
            else, or a combination that is not defined: a layer norm with proj_size, or heads as described above.
        TypeError: `recompute`, `peepholes`, `layer_norm` or `heads` has a wrong type.

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
        device: Device = None, dtype: torch.dtype | None = None, *,
        backend: AnyBackend = None, recompute: bool = False, recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0, weight_drop: float = 0.0, peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())

    # RNNBase has these public methods of torch.nn.LSTM only for cells with a single state.
    get_expected_cell_size = rnn.LSTM.get_expected_cell_size
    check_forward_args = rnn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = rnn.LSTM.permute_hidden  # type: ignore[assignment]


class GRU(Recurrent, RNNBase):
    """Apply a multi-layer GRU to a sequence. It replaces torch.nn.GRU.

    Arguments, parameters, initial weights, results and errors are the same as in torch.nn.GRU. Each layer computes the
    following functions at every step (Cho et al., 2014). The rows of the weights are in the order r, z, n. The reset
    gate r is applied after the product with W_hn, as in torch.nn.GRU, in cuDNN and in Keras with reset_after=True::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh   (W_in x + b_in + r (W_hn h + b_hn))
        h' = (1 - z) n + z h

    A GRU has no projection, no peepholes and no layer norm. See `forward` for calls.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: See `LSTM`.
        backend, recompute, recurrent_dropout, weight_drop: See `LSTM`.
        zoneout: See `LSTM`. It is one number, since a GRU has one state. Default: 0
        heads: See `LSTM`. weight_hh_l{k} then has the shape (3H, H / heads). Default: 1

    Raises:
        ValueError, TypeError: An argument that torch.nn.GRU refuses, too, with torch's message. The other arguments
            raise the same errors as in `LSTM`.

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
        dropout: float = 0.0, bidirectional: bool = False, device: Device = None,
        dtype: torch.dtype | None = None, *, backend: AnyBackend = None, recompute: bool = False,
        recurrent_dropout: float = 0.0, zoneout: float = 0.0, weight_drop: float = 0.0, heads: int = 1,
        proj_size: None = None,
    ) -> None:  # fmt: skip
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")  # torch's words
        self._make(locals() | {"proj_size": 0})


class SLSTM(Recurrent, RNNBase):
    """Apply a multi-layer sLSTM to a sequence (Beck et al., 2024, https://arxiv.org/abs/2405.04517).

    An sLSTM is an LSTM with an exponential input gate. Each layer computes the following functions at every step. The
    rows of the weights are in the order i, f, g, o. The paper calls g z::

        z = W_ih x + b_ih + W_hh h + b_hh
        i = exp(z_i)
        f = sigmoid(z_f)
        g = tanh(z_g)
        o = sigmoid(z_o)
        c' = f c + i g
        n' = f n + i
        h' = o c' / n'

    The paper also allows f = exp(z_f), which an SLSTM does not have.

    n is the normaliser: the sum of the weights that the values of g have in c. c and n may be too large for a float. In
    place of c and n, a state therefore contains c e^-m and n e^-m. m is a stabiliser, one number for each unit.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: See `LSTM`. The
            initial weights are also the same as in an LSTM with the same heads.
        backend: See `LSTM`. Every backend except "torch" runs an SLSTM.
        heads: See `LSTM`. Default: 1

    A call is the same as a call of an LSTM, except for the states, see `forward`. `hx` and the returned states are
    tuples (h, c, n, m) of four tensors (D*L, N, H). Unbatched they have no N. The default is zeros. A state with n = 0
    is empty, whatever c and m are.

    h has the dtype of the input. c, n and m may have any dtype. They are computed and returned in float32, or in
    float64 for an input in float64.

    Only c / n and m + log(n) influence later steps. A returned state has c / n as its c, 1 as its n, and m + log(n) as
    its m, which is the same state in other numbers. Gradients flow through its c and m, and not through its n.

    An SLSTM has no reset_states, no zoneout and no recompute. reset_states would be four tensors. Zoneout of single
    states is not defined, since c, n and m change together. For recompute, backward would need n and m of all steps.
    `recurrent_dropout` and `weight_drop` may be set as attributes.

    Raises:
        ValueError, TypeError: The same errors as in `LSTM` for the same arguments.
        ValueError: reset_states are given, or zoneout or recompute is set.
        RuntimeError, TypeError: `hx` of a call is not a tuple of four tensors of these sizes.

    Example::

        slstm = gpu_lstm.SLSTM(10, 20, heads=4)
        output, (h_n, c_n, n_n, m_n) = slstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    _cell, _torchs = cells.SLSTM, rnn.LSTM
    __call__: Called[States, States]
    forward: Called[States, States]  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Device = None,
        dtype: torch.dtype | None = None, *, backend: AnyBackend = None, heads: int = 1,
    ) -> None:  # fmt: skip
        self._make(locals())


class NotCompiled(Recurrent):
    """A mixin for the classes of gpu_lstm.compat: torch.compile leaves their calls in eager mode.

    torch.compile treats torch.nn.LSTM in the same way. With Dynamo's option `allow_rnn` it traces torch.nn.LSTM, and
    then it traces these classes, too.
    """

    if not TYPE_CHECKING:

        def forward(self, input, hx=None, lengths=None, resets=None, reset_states=None, mask=None):
            arguments = self, input, hx, lengths, resets, reset_states, mask
            if torch.compiler.is_dynamo_compiling() or not compiler_callback():
                return Recurrent.forward(*arguments)
            return in_eager_mode(Recurrent.forward, *arguments)
