"""The modules: LSTM and LSTMCell stand in for torch's own, StackedLSTM stacks layers of different sizes."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, overload

import torch
from torch import _VF, Tensor, nn
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.modules.rnn import LSTMCell as TorchLSTMCell
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from . import native
from .backends import RESET_STATES, Backend, BackendName, select
from .functional import check_pair, check_tensors, fastest
from .layers import compute_dtype, one_direction, stack
from .noise import with_weight_drop
from .reference import Gates
from .sequences import Batch, Traversal, check_dense, check_tensor
from .settings import NOT_OF_TORCH, REGULARISERS, Settings, accepted, check_bool, special_of
from .transforms import in_a_graph
from .variants import HasVariants, norms_of
from .weights import LAYER_NORM, PEEPHOLES, State, Weights, check_unprojected

Given = TypeVar("Given", contravariant=True)
Returned = TypeVar("Returned", covariant=True)


class _Call(Protocol[Given, Returned]):
    """The types of `forward`, for a module that is called: nn.Module does not hand them on."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Given | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_states: Given | None = None,
    ) -> tuple[Tensor, Returned]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Given | None = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        reset_states: Given | None = None,
    ) -> tuple[PackedSequence, Returned]: ...


class _Checked:
    """A module whose attributes are held to what its arguments are held to, when they are set later, too."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, accepted(name, value))


# torch's classes are bound above, when this module is imported: `torch.nn.LSTM = gpu_lstm.LSTM` changes nothing here.


class LSTM(_Checked, HasVariants, RNNBase):
    """A drop-in for torch.nn.LSTM: the same arguments, parameters, initial weights, results and errors.

    Each layer computes, at every step, with gates in the order i, f, g, o::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      f, o alike
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
        backend: "auto", "triton", "cupy", "torch" or "reference". Default: as chosen by `gpu_lstm.backend` or the
            environment variable GPU_LSTM_BACKEND, else "auto".
        recompute: for backward keep only h and c, and take the gates again with one product over all steps: about a
            third of the memory. On the backends with kernels of their own. Default: False
        recurrent_dropout: when training, probability of zeroing an element of h where W_hh takes it, the same for all
            gates and steps of a call (Gal & Ghahramani, 2016). Default: 0
        zoneout: probability that an element of a state stays as it was before the step, drawn anew for every step
            (Krueger et al., 2017): a pair for h and c, or one for both. In eval() the expectation. Default: 0
        weight_drop: when training, probability of zeroing an element of W_hh, the same for all steps of a call
            (Merity et al., 2018). Default: 0

        peepholes: the gates see the cell state of their own unit (Gers & Schmidhuber, 2000). Parameters
            weight_peephole_l{k} and, if bidirectional, weight_peephole_l{k}_reverse: p_i, p_f and p_o, (3H,). Default:
            False. With them, before the gates are taken::

                z_i += p_i c      z_f += p_f c      z_o += p_o c'

        layer_norm: normalise W_ih x, W_hh h and c (Ba, Kiros & Hinton, 2016), or those of "ih", "hh" and "c" that are
            named. Parameters gain_ih_l{k} and gain_hh_l{k} (4H,), gain_c_l{k} and, if `bias`, bias_c_l{k} (H,), each
            with _reverse if bidirectional; gains are ones and bias_c is zero at first. Not with proj_size. Default:
            False. With it, where LN(v) = gain (v - mean(v)) / sqrt(var(v) + 1e-5)::

                z = LN(W_ih x) + b_ih + LN(W_hh h) + b_hh      h' = o tanh(LN(c') + bias_c)

    Recurrent dropout, zoneout, peepholes and layer norms run on the backends "triton" and "reference"; "auto" chooses
    between these two.

    `forward` says what a call takes and returns.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM for its arguments, in its words; ValueError for an unknown backend, or
            a regulariser that is no probability, or a layer norm of something else, or with proj_size; TypeError for
            `recompute` or `peepholes` that is no bool. All of these but `peepholes` and `layer_norm`, and `dropout`,
            may be set later as attributes, and raise the same there.

    Example::

        lstm = gpu_lstm.LSTM(10, 20, num_layers=2)
        output, (h_n, c_n) = lstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 2, 4]))
    """

    # On the class, so that they are there in pickles of older modules.
    backend: BackendName | None = None
    recompute: bool = False
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_drop: float = 0.0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: BackendName | Backend | None = None,
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        weight_drop: float = 0.0,
        peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False,
    ) -> None:
        ours = dict(
            backend=backend, recompute=recompute, recurrent_dropout=recurrent_dropout, zoneout=zoneout,
            weight_drop=weight_drop,
        )  # fmt: skip
        check_bool(PEEPHOLES, peepholes)
        norms = norms_of(layer_norm)
        check_unprojected(bool(norms), proj_size)
        ours = {name: accepted(name, value) for name, value in ours.items()}  # before initial weights are drawn
        # Not super(): in compat.LSTM torch.nn.LSTM comes next, whose __init__ names the mode itself.
        RNNBase.__init__(
            self, "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype,
        )  # fmt: skip
        for name, value in ours.items():
            setattr(self, name, value)
        for suffix in [name.removeprefix("weight_hh") for name, _ in self.named_parameters() if "weight_hh" in name]:
            self._add_variants(suffix, peepholes, norms)

    # RNNBase caches the weights here. They are read from the module at every call instead, so that replacing one
    # in any way (functional_call, weight_norm, pruning, assignment) just works.
    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        pass

    if TYPE_CHECKING:
        __call__: _Call[State, State]

    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_states: State | None = None,
    ) -> tuple[Tensor, State]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        reset_states: State | None = None,
    ) -> tuple[PackedSequence, State]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_states: State | None = None,
        mask: None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run all layers over all steps. P = proj_size or, if 0, H; D = 2 if bidirectional, else 1.

        Args:
            input: (T, N, I), with batch_first (N, T, I), unbatched (T, I), or a PackedSequence.
            hx: (h_0, c_0), (D*L, N, P) and (D*L, N, H), unbatched without N. Default: zeros.
            lengths: (N,), unbatched (). int32 or int64 on the input's device, each from 0 to T, in any order.
                Default: T.
            resets: (T, N), with batch_first (N, T), unbatched (T,). bool.
            reset_states: (h, c) that resets leave instead of zeros: one a sequence, as hx, or one a step, of which
                those at resets count: (D*L, T, N, P) and (D*L, T, N, H), with batch_first (D*L, N, T, ...), unbatched
                (D*L, T, ...). Gradients flow into them. On the backends "triton" and "reference".
            mask: never given but by TorchRL's LSTMModule, to an LSTM that is no torch.nn.LSTM: hand it a compat.LSTM.

        ``lengths`` takes the place of packing: nothing is sorted or copied, and what stands past the end of a sequence,
        NaN included, reaches neither a result nor a gradient. ``resets`` zeroes the states before the steps where it is
        True, as at the end of an episode; a reset at t separates time t from time t - 1, for both directions. With
        ``reset_states`` the forward direction takes step t from the state given for t, and the reverse one step t - 1,
        each from its own rows.

        Returns:
            output: as the input, with D*P features; zero past the end of a sequence.
            (h_n, c_n): as h_0 and c_0; the states after the last step of each sequence. In half precision c_0 may be
            float32, as the kernels keep it, and then c_n is: a sequence in pieces is that of the whole.

        Raises:
            ValueError, RuntimeError, TypeError: as torch.nn.LSTM, in its words. ValueError for lengths, resets or
                reset_states of a wrong shape, dtype or value (on CUDA values are asserted on the device), lengths
                beside a PackedSequence, reset_states without resets, or a chosen backend that does not take these,
                recurrent dropout, zoneout or peepholes. TypeError for a mask.
            ImportError, RuntimeError, TypeError: a chosen backend that cannot run, and why.
        """
        if mask is not None:
            raise TypeError(
                "LSTM takes lengths, and no mask as TorchRL's LSTMModule gives to what is no torch.nn.LSTM: hand it a "
                "gpu_lstm.compat.LSTM"
            )
        return self._forward(input, hx, lengths, resets, reset_states)

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_states: State | None = None,
        record: list[Gates] | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """forward, or if there is a `record` by the reference, which keeps there the gates of layers and directions."""
        eager = not in_a_graph()  # else see whole_layer.py
        if not isinstance(input, PackedSequence):
            _check_input(input, "LSTM")
            if hx is not None:
                _check_states(input.dim(), hx)
        else:
            if hx is not None:
                check_pair(hx)
            plain = lengths is resets is reset_states is record is None
            if plain and _backend_for(self, input.data) is Backend.TORCH and eager:
                return self._torch_packed(input, hx)
        batch, given = Batch.of(input, lengths, resets, self.batch_first), hx
        x = batch.x  # [T, B, I]
        if hx is None:
            hx = self._zero_states(x, x.shape[1])
        else:
            hx = batch.state_in(hx[0]), batch.state_in(hx[1])
        self.check_forward_args(x.transpose(0, 1) if self.batch_first else x, hx, None)
        weights, settings = self._weights(), Settings.of(self)
        if reset_states is not None:
            batch = batch.resetting_to(self._reset_states(batch, reset_states))
        able = _backend_for(self, x, record, reset_states is not None)
        backend = fastest(self.backend, able, x, weights, batch.traversal, settings)
        if backend is Backend.TORCH and batch.packed is not None and resets is None and eager:
            return self._torch_packed(batch.packed, given)
        weights = _with_weight_drop(self, x, [hx], weights)
        if backend is Backend.TORCH and batch.traversal.is_plain() and eager:
            y, hx = native.stack(x, hx, weights, self.dropout, self.training)
        else:
            directions = 2 if self.bidirectional else 1
            states = [hx]
            if self.num_layers > 1:
                states = list(zip(hx[0].split(directions), hx[1].split(directions)))
            y, states = _through_layers(batch, states, weights, backend, settings, record)
            h_n, c_n = (torch.cat(state) if len(state) > 1 else state[0] for state in zip(*states))
            hx = h_n, c_n
        return batch.output(y), (batch.state_out(hx[0]), batch.state_out(hx[1]))

    def _torch_packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        """torch's own LSTM takes a PackedSequence as it is."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            hx = self._zero_states(data, int(batch_sizes[0]))
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        weights = _with_weight_drop(self, data, [hx], self._weights())
        y, hx = native.stack(data, hx, weights, self.dropout, self.training, batch_sizes)
        output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return output, self.permute_hidden(hx, unsorted_indices)

    def _weights(self) -> list[list[Weights]]:
        """[L][D], as the module has them now, checked: whatever was assigned since is what the kernels will read."""
        directions = 2 if self.bidirectional else 1
        hidden, width = self.hidden_size, self.proj_size or self.hidden_size
        weights = []
        for k in range(self.num_layers):
            features = self.input_size if k == 0 else directions * width
            layer = [self._weights_of(f"_l{k}{suffix}") for suffix in ("", "_reverse")[:directions]]
            for one in layer:
                one.check_sizes(features, hidden, width)
            weights.append(layer)
        return weights

    def _weights_of(self, suffix: str) -> Weights:
        return Weights(
            getattr(self, "weight_ih" + suffix),
            getattr(self, "weight_hh" + suffix),
            getattr(self, "bias_ih" + suffix) if self.bias else None,
            getattr(self, "bias_hh" + suffix) if self.bias else None,
            getattr(self, "weight_hr" + suffix) if self.proj_size else None,
            *self._added(suffix),
        )

    def _reset_states(self, batch: Batch, given: State) -> list[State]:
        """A user's, checked: (h [T, B, P], c [T, B, H]) of each layer and direction, [L*D]."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        width = self.proj_size or self.hidden_size
        return list(zip(*batch.reset_pair_in(given, [rows], width, self.hidden_size)))

    def _zero_states(self, x: Tensor, batch: int) -> State:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        h_0 = x.new_zeros(rows, batch, self.proj_size or self.hidden_size)
        return h_0, x.new_zeros(rows, batch, self.hidden_size)

    # The rest of torch.nn.LSTM's public methods, which RNNBase has for a single state only.

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """The size of c_0 for `input`."""
        rows, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return rows, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: State, batch_sizes: Tensor | None) -> None:  # type: ignore[override]
        """Raise unless input, h_0 and c_0 have the right dtype and sizes."""
        self.check_input(input, batch_sizes)
        expected = (
            self.get_expected_hidden_size(input, batch_sizes),
            self.get_expected_cell_size(input, batch_sizes),
        )
        for i in range(2):
            self.check_hidden_size(hidden[i], expected[i], f"Expected hidden[{i}] size {{}}, got {{}}")

    def permute_hidden(self, hx: State, permutation: Tensor | None) -> State:  # type: ignore[override]
        """Both states with their batch in another order."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def extra_repr(self) -> str:
        """As torch.nn.LSTM, and those of our own arguments that were not left at their defaults."""
        return super().extra_repr() + _backend_repr(self) + _repr_of(self, ("recompute", *NOT_OF_TORCH))

    def __prepare_scriptable__(self) -> nn.Module:
        return _scriptable(self, TorchLSTM)


class StackedLSTM(_Checked, nn.Module):
    """LSTM layers of different sizes on top of each other, with one pair of states a layer.

    Layer k, an LSTM of its own in ``layers``, has hidden_sizes[k] units and takes the output of layer k - 1. A stack
    of equal sizes gives the numbers of an LSTM with the same weights.

    Args:
        input_size: features of the input, I.
        hidden_sizes: hidden units of each layer, H_k.
        bias, batch_first, dropout, bidirectional, device, dtype: as for LSTM.
        backend, recompute, recurrent_dropout, zoneout, weight_drop, peepholes, layer_norm: as for LSTM.
        residual: add a layer's input to its output wherever both have the same number of features (before dropout).
            At least one layer must allow it. Default: False

    `forward` says what a call takes and returns.

    Raises:
        ValueError, TypeError: as LSTM; hidden_sizes that is no sequence of ints, or empty; `residual` that is no bool,
            or True where no layer allows it.

    Example::

        stack = gpu_lstm.StackedLSTM(6, [32, 16], batch_first=True)
        output, [(h1, c1), (h2, c2)] = stack(torch.randn(2, 3, 6))
    """

    # On the class, so that they are there in pickles of older modules.
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_drop: float = 0.0

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int],
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: BackendName | Backend | None = None,
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        weight_drop: float = 0.0,
        peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False,
    ) -> None:
        super().__init__()
        check_bool(PEEPHOLES, peepholes)
        norms_of(layer_norm)
        # All that could be wrong is looked at before the initial weights of the first layer are drawn.
        sizes = _sizes(hidden_sizes)
        _check_size("input_size", input_size)
        for name, flag in dict(batch_first=batch_first, bidirectional=bidirectional, residual=residual).items():
            check_bool(name, flag)
        directions = 2 if bidirectional else 1
        layer_inputs = [input_size, *(directions * size for size in sizes[:-1])]
        outputs = [directions * size for size in sizes]
        if residual and not any(i == o for i, o in zip(layer_inputs, outputs)):
            raise ValueError(
                "residual=True needs a layer whose output is as wide as its input, "
                f"got inputs of {layer_inputs} and outputs of {outputs} features"
            )
        self.input_size = input_size
        self.hidden_sizes = sizes
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.residual = residual
        self.backend = backend  # type: ignore[assignment]  # which becomes its name
        self.recompute = recompute
        self.recurrent_dropout = recurrent_dropout
        self.zoneout = zoneout
        self.weight_drop = weight_drop
        if self.dropout > 0 and len(sizes) == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers=1",
                stacklevel=2,
            )
        self.layers = nn.ModuleList(
            LSTM(
                features, size, bias=bias, bidirectional=bidirectional, device=device, dtype=dtype,
                peepholes=peepholes, layer_norm=layer_norm,
            )
            for features, size in zip(layer_inputs, sizes)
        )  # fmt: skip

    @property
    def peepholes(self) -> bool:
        """As of an LSTM."""
        return cast(LSTM, self.layers[0]).peepholes

    @property
    def layer_norm(self) -> bool | tuple[str, ...]:
        """As of an LSTM."""
        return cast(LSTM, self.layers[0]).layer_norm

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "residual":
            check_bool(name, value)
        super().__setattr__(name, value)

    if TYPE_CHECKING:
        __call__: _Call[Sequence[State], list[State]]

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Sequence[State] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_states: Sequence[State] | None = None,
    ) -> tuple[Tensor, list[State]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Sequence[State] | None = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        reset_states: Sequence[State] | None = None,
    ) -> tuple[PackedSequence, list[State]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Sequence[State] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_states: Sequence[State] | None = None,
    ) -> tuple[Tensor | PackedSequence, list[State]]:
        """Run all layers over all steps. D = 2 if bidirectional, else 1.

        Args:
            input, lengths, resets: as for `LSTM.forward`.
            hx: [(h, c), ...], a pair a layer, each (N, H_k), or (2, N, H_k) if bidirectional; unbatched without N.
                Default: zeros.
            reset_states: as for `LSTM.forward`, a pair a layer, each as in hx, or with (T, N) or (N, T) for N.

        Returns:
            output: as the input, with D * H_k features of the last layer; zero past the end of a sequence.
            states: as hx, after the last step of each sequence.

        Raises:
            ValueError, RuntimeError, ImportError, TypeError: as `LSTM.forward`; TypeError for hx that is no list of
                pairs, as torch's (h_0, c_0) is none; RuntimeError for another number of them, or other sizes.
        """
        return self._forward(input, hx, lengths, resets, reset_states)

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: Sequence[State] | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_states: Sequence[State] | None = None,
        record: list[Gates] | None = None,
    ) -> tuple[Tensor | PackedSequence, list[State]]:
        """As LSTM._forward."""
        if not isinstance(input, PackedSequence):
            check_tensor(input, "input")
            _check_input(input, "StackedLSTM")
        batch = Batch.of(input, lengths, resets, self.batch_first)
        modules = cast(list[LSTM], list(self.layers))
        modules[0].check_input(batch.x, None)
        states = self._states(batch.x, batch, hx)
        weights, settings = [module._weights()[0] for module in modules], Settings.of(self, self.residual)
        if reset_states is not None:
            batch = batch.resetting_to(self._reset_states(batch, reset_states))
        able = _backend_for(self, batch.x, record, reset_states is not None)
        backend = fastest(self.backend, able, batch.x, weights, batch.traversal, settings)
        weights = _with_weight_drop(self, batch.x, states, weights)
        y, states = _through_layers(batch, states, weights, backend, settings, record)
        if not self.bidirectional:
            states = [(h.squeeze(0), c.squeeze(0)) for h, c in states]
        return batch.output(y), [(batch.state_out(h), batch.state_out(c)) for h, c in states]

    def _reset_states(self, batch: Batch, given: Sequence[State]) -> list[State]:
        """As LSTM._reset_states."""
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{RESET_STATES} should be a list of pairs (h, c), got: {type(given).__name__}")
        if len(given) != len(self.hidden_sizes):
            raise ValueError(
                f"Expected {RESET_STATES} of {len(self.hidden_sizes)} pairs, one a layer, got {len(given)}"
            )
        states: list[State] = []
        for k, (pair, hidden) in enumerate(zip(given, self.hidden_sizes)):
            lead = [2] * self.bidirectional
            h, c = batch.reset_pair_in(pair, lead, hidden, hidden, f"{RESET_STATES} of layer {k}")
            states += zip(h, c) if self.bidirectional else [(h, c)]
        return states

    def _states(self, x: Tensor, batch: Batch, hx: Sequence[State] | None) -> list[State]:
        """A user's states, checked, or zeros: (h, c) of each layer, [D, B, H_k]."""
        directions, batch_size = (2 if self.bidirectional else 1), x.shape[1]
        if hx is None:
            sizes = [(directions, batch_size, hidden) for hidden in self.hidden_sizes]
            return [(x.new_zeros(size), x.new_zeros(size)) for size in sizes]
        check_pairs(hx, len(self.hidden_sizes))
        states = []
        for k, (pair, hidden) in enumerate(zip(hx, self.hidden_sizes)):
            expected = [2] * self.bidirectional + [batch_size] * batch.batched + [hidden]
            for name, state in zip("hc", pair):
                if list(state.shape) != expected:
                    raise RuntimeError(f"Expected {name} of layer {k} of size {expected}, got {list(state.shape)}")
            h, c = (batch.state_in(state) for state in pair)
            states.append((h, c) if self.bidirectional else (h.unsqueeze(0), c.unsqueeze(0)))
        return states

    def extra_repr(self) -> str:
        """The arguments that were not left at their defaults."""
        parts = [f"{self.input_size}, {self.hidden_sizes}"]
        defaults = dict(
            bias=True, batch_first=False, dropout=0.0, bidirectional=False, residual=False, backend=None,
            recompute=False, **dict.fromkeys(REGULARISERS, 0.0), peepholes=False, layer_norm=False,
        )  # fmt: skip
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(parts)


class LSTMCell(_Checked, HasVariants, RNNCellBase):
    """A drop-in for torch.nn.LSTMCell: one step of one layer, with the same parameters, results and errors.

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        bias: whether there are bias_ih and bias_hh. Default: True
        device, dtype: of the parameters.
        backend: as for LSTM.
        peepholes, layer_norm: as for LSTM; the parameters are weight_peephole, gain_ih, gain_hh, gain_c and bias_c.
            Default: False

    `forward` says what a call takes and returns.

    Raises:
        ValueError, TypeError: as LSTM for these.

    Example::

        cell = gpu_lstm.LSTMCell(10, 20)
        h, c = cell(torch.randn(3, 10))
    """

    # On the class, so that they are there in pickles of older modules.
    backend: BackendName | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: BackendName | Backend | None = None,
        peepholes: bool = False,
        layer_norm: bool | Sequence[str] = False,
    ) -> None:
        name = accepted("backend", backend)
        check_bool(PEEPHOLES, peepholes)
        norms = norms_of(layer_norm)
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.backend = name
        self._add_variants("", peepholes, norms)

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: State | None = None) -> State: ...

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Take one step.

        Args:
            input: (N, I) or (I,).
            hx: (h, c), each (N, H) or (H,). Default: zeros.

        Returns:
            (h', c'), as hx.

        Raises:
            ValueError, RuntimeError, TypeError: as torch.nn.LSTMCell, in its words; ValueError for a chosen backend
                that takes no peepholes or layer norm.
            ImportError, RuntimeError, TypeError: a chosen backend that cannot run, and why.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        check_dense(input, "LSTMCell")
        if hx is not None:
            for i, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {state.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)  # [B, I]
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            h, c = zeros, zeros
        else:
            if batched:
                check_pair(hx, "lstm_cell")
            h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))

        parameters = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        weights = Weights(*parameters, None, *self._added(""))
        weights.check_sizes(self.input_size, self.hidden_size, self.hidden_size)
        backend = select(self.backend, x.device, compute_dtype(x), weights.variant)
        backend = fastest(self.backend, backend, x[None], [[weights]], Traversal(), Settings(self.training))
        if backend is Backend.TORCH:
            h, c = _VF.lstm_cell(x, (h, c), *parameters)
        else:
            self._check_sizes(x, h, c)
            check_tensors(x[None], [(h, c)], weights.present())
            _, (h, c) = one_direction(x[None], (h, c), weights, Traversal(), backend)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def _check_sizes(self, x: Tensor, h: Tensor, c: Tensor) -> None:
        expected = x.shape[0], self.hidden_size
        if x.shape[1] != self.input_size or h.shape != expected or c.shape != expected:
            _VF.lstm_cell(
                x, (h, c), self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
            )  # raises, in the words of the torch at hand
            raise RuntimeError(f"Expected hx of size {expected}, got {list(h.shape)} and {list(c.shape)}")

    def extra_repr(self) -> str:
        """As torch.nn.LSTMCell, and the backend if one was chosen."""
        return super().extra_repr() + _backend_repr(self) + _repr_of(self, (PEEPHOLES, LAYER_NORM))

    def __prepare_scriptable__(self) -> nn.Module:
        return _scriptable(self, TorchLSTMCell)


def _backend_for(
    module: "LSTM | StackedLSTM", x: Tensor, record: list[Gates] | None = None, with_reset_states: bool = False
) -> Backend:
    if record is not None:
        return Backend.REFERENCE
    return select(module.backend, x.device, compute_dtype(x), special_of(module, with_reset_states))


def _present(weights: list[list[Weights]]) -> list[Tensor]:
    return [tensor for layer in weights for one in layer for tensor in one.present()]


def _with_weight_drop(
    module: "LSTM | StackedLSTM", x: Tensor, states: list[State], weights: list[list[Weights]]
) -> list[list[Weights]]:
    """The weights of a call. Its tensors are checked before random numbers are drawn."""
    if module.training and module.weight_drop:
        check_tensors(x, states, _present(weights))
    return with_weight_drop(module, weights)


def _through_layers(
    batch: Batch,
    states: list[State],  # [L] of ([D, B, P], [D, B, H])
    weights: list[list[Weights]],  # [L][D]
    backend: Backend,
    settings: Settings,
    record: list[Gates] | None,
) -> tuple[Tensor, list[State]]:
    """The layers of a module: output [T, B, D*P] and the final states."""
    check_tensors(batch.x, states, _present(weights))
    return stack(batch.x, states, weights, batch.traversal, backend, settings, record)


def _scriptable(module: LSTM | LSTMCell, cls: type[nn.Module]) -> nn.Module:
    """What torch.jit.script gets in the place of a module."""
    for name in NOT_OF_TORCH:
        if value := getattr(module, name, False):
            raise ValueError(
                f"the {type(module).__name__} has {name}={value!r}, and would be scripted as a torch.nn."
                f"{cls.__name__}, which takes none"
            )
    return recast(module, cls)


def recast(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """`module` as an instance of `cls`, which has the same parameters: the same Parameter objects, hooks, flags.

    What torch's classes have not is left behind, regularisers only where they are off.
    """
    twin = cls.__new__(cls)
    state = module.__dict__.copy()
    state.pop("_flat_weights", None)  # torch's cache; ours has none
    state.pop("_compiled_call_impl", None)  # of Module.compile(): it would go on calling `module`
    off = [name for name in REGULARISERS if not state.get(name)]
    for ours in ("backend", "recompute", *off):
        state.pop(ours, None)
    for own in ("_parameters", "_buffers", "_modules"):
        state[own] = state[own].copy()
    twin.__dict__.update(state)
    if isinstance(twin, RNNBase):
        twin._init_flat_weights()
    return twin


def _sizes(hidden_sizes: Sequence[int]) -> list[int]:
    """The argument of StackedLSTM as a list, checked."""
    if not isinstance(hidden_sizes, Sequence) or isinstance(hidden_sizes, str | bytes):
        raise TypeError(f"hidden_sizes should be a sequence of ints, got: {type(hidden_sizes).__name__}")
    if not hidden_sizes:
        raise ValueError("hidden_sizes must have at least one layer")
    for size in hidden_sizes:
        _check_size("hidden_size", size)
    return list(hidden_sizes)


def _check_size(name: str, size: object) -> None:
    """In the words of torch 2.9 and newer; older ones do not look at input_size."""
    if not isinstance(size, int):
        raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"{name} must be greater than zero")


def _check_input(input: Tensor, name: str) -> None:
    if input.dim() not in (2, 3):
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    check_dense(input, name)


def _check_states(rank: int, hx: State) -> None:
    """Raise unless h_0 and c_0 are of the input's rank."""
    if hx[0].dim() != rank or hx[1].dim() != rank:
        kind = "batched" if rank == 3 else "unbatched"
        raise RuntimeError(
            f"For {kind} {rank}-D input, hx and cx should also be {rank}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )
    if rank == 3:  # of an unbatched hx torch takes what it needs
        check_pair(hx)


def check_pairs(hx: Sequence[State], layers: int) -> None:
    """Raise unless it is [(h, c), ...], a pair of tensors for each layer of a StackedLSTM.

    Raises:
        TypeError: something else, as torch's (h_0, c_0) with all layers in two tensors.
        RuntimeError: another number of pairs, or of states for a layer.
    """
    expected = "hx should be a list of pairs (h, c), one a layer"
    if not isinstance(hx, (list, tuple)):  # torch 2.8 does not trace `list | tuple`
        raise TypeError(f"{expected}, got: {type(hx).__name__}")
    for k, pair in enumerate(hx):
        if not isinstance(pair, (list, tuple)):
            raise TypeError(f"{expected}, got for layer {k}: {type(pair).__name__}")
    if len(hx) != layers:
        raise RuntimeError(f"Expected hx of {layers} pairs, one a layer, got {len(hx)}")
    for k, pair in enumerate(hx):
        if len(pair) != 2:
            raise RuntimeError(f"Expected two states (h, c) of layer {k}, got {len(pair)}")
        for name, state in zip("hc", pair):
            check_tensor(state, f"{name} of layer {k}")


def _backend_repr(module: LSTM | LSTMCell) -> str:
    return "" if module.backend is None else f", backend={module.backend!r}"


def _repr_of(module: LSTM | LSTMCell, names: Sequence[str]) -> str:
    """Those that are on."""
    return "".join(f", {name}={getattr(module, name)!r}" for name in names if getattr(module, name))
