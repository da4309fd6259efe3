"""The base classes of the modules: their arguments, the checks of these arguments, and `forward`."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..call import roles
from ..call.checks import check_bool, check_heads, check_positive, check_unprojected
from ..call.choices import BackendName, parse_backend_name
from ..call.options import NORMS, Options, options_of
from ..call.prepare import request_of
from ..call.regularisers import BY_NAME, OURS, REGULARISER_NAMES
from ..call.request import Request
from ..call.weights import LAYER_NORM, PEEPHOLES, weights_now
from ..dispatch.route import run_call
from ..kernels.cells import LSTM, Cell
from ..kernels.heads import dense
from ..kernels.private import fx_is_tracing
from .tracing import traced

TORCHRLS = " as TorchRL's {0}Module gives to what is no torch.nn.{0}: hand it a gpu_lstm.compat.{0}"
PACKAGE = __package__.rsplit(".", 1)[0] + "."
OWN = ("backend", "recompute")  # arguments that every call reads from the module, in addition to the regularisers
NOT_OF_TORCH = (*OURS, PEEPHOLES, LAYER_NORM)  # arguments without a counterpart in torch.nn.LSTM


def accepted(name: str, value: Any, cell: Cell = LSTM) -> Any:
    """Return the value of an attribute, checked and converted.

    Only arguments that may be set later as attributes are checked here. Every other attribute is returned as it is.
    """
    match name:
        case "backend":
            return None if value is None else parse_backend_name(value)
        case "heads":
            check_positive(name, value)
        case "batch_first":
            check_bool(name, value)
        case "recompute":
            check_bool(name, value)
            if value and cell.kept > 1:
                why = "its gates depend on states that are not kept"
                raise ValueError(f"recompute is not supported by {cell.name.upper()}: {why}")
        case _ if name in BY_NAME:
            return BY_NAME[name].accepted(value, cell)
    return value


def norms_of(layer_norm: object) -> tuple[str, ...]:
    """Return the layer norms that the argument `layer_norm` turns on, in the order of NORMS. Raise if it is invalid."""
    if isinstance(layer_norm, bool):
        return NORMS if layer_norm else ()
    if not isinstance(layer_norm, (tuple, list)):
        raise TypeError(f"{LAYER_NORM} should be of type bool, or a tuple of names, got: {type(layer_norm).__name__}")
    if not all(norm in NORMS for norm in layer_norm):
        known = ", ".join(map(repr, NORMS))
        raise ValueError(f"{LAYER_NORM} should be a bool, or name some of {known}, got {layer_norm!r}")
    return tuple(norm for norm in NORMS if norm in layer_norm)


OF_VARIANTS = ("_peepholes", "_norms", "heads")
OF_CELLS = (*OF_VARIANTS, "input_size", "bias", "backend")
OF_LAYERS = (*OF_CELLS, "bidirectional", "batch_first", "training", "recompute", "proj_size")
"""The attributes that become the Arguments of a module, in this order from `peepholes` on. Cells have OF_CELLS."""


class Checked:
    """A module whose attributes are checked like the arguments of its constructor when they are set."""

    # A call reads these from the class. The names have an underscore, since a user's subclass may have its own `cell`.
    _cell: Cell
    _role: type[roles.Role]
    _options: Callable[[], Options]  # made of the current attributes
    _weights = weights_now
    # The defaults are on the class, so that modules which older versions pickled have them, too.
    backend: BackendName | None = None
    _peepholes: bool = False
    _norms: tuple[str, ...] = ()
    heads = 1

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NOT_OF_TORCH and not hasattr(type(self), name) and value:  # no call would read the value
            raise ValueError(f"{name} is not supported by {type(self).__name__}, got {value!r}")
        super().__setattr__(name, accepted(name, value, self._cell))

    def _get_name(self) -> str:
        """Return the name of the class for the repr of a model, such as gpu_lstm.LSTM.

        A user's subclass keeps its own name.
        """
        cls = type(self)
        return f"gpu_lstm.{cls.__name__}" if cls.__module__.startswith(PACKAGE) else cls.__name__


class DropIn(Checked):
    """A mixin for torch's RNNBase and RNNCellBase. The module has its parameters itself, unlike a stack."""

    _torchs: type[nn.Module]  # torch's class, which torch.jit.script gets

    def _make(self: Any, given: dict[str, Any]) -> None:
        """Initialize the module from the locals() of its constructor.

        Our own arguments are checked before the constructor of torch's class draws the weights.
        """
        del given["self"]
        for name in (*OWN, *OURS):
            if name in given:
                setattr(self, name, given.pop(name))
        peepholes, norms = given.pop(PEEPHOLES, False), norms_of(given.pop(LAYER_NORM, False))
        heads, projected = given.pop("heads"), given.get("proj_size", 0)
        check_bool(PEEPHOLES, peepholes)
        check_unprojected(bool(norms), projected)
        check_heads(heads, given["hidden_size"], projected, norms)
        if (peepholes or norms) and not self._cell.normalises:
            raise ValueError(f"{self._cell.name} cells have no peepholes and no layer norm")
        self.heads, self._peepholes, self._norms = heads, peepholes, norms
        self.reset_parameters = lambda: None  # torch's constructor calls it before all parameters are there
        self._init_torchs(**given)
        del self.reset_parameters
        options, like = self._options(), next(self.parameters())
        for directions, sizes in zip(options.names, options.weight_sizes):
            for name, size in [each for names in directions for each in zip(names, sizes)]:
                # torch made W_hh for one head, and no parameter of a variant.
                if name is not None and getattr(self._parameters.get(name), "shape", None) != size:
                    self.register_parameter(name, nn.Parameter(like.new_empty(size)))
        self.reset_parameters()

    def reset_parameters(self: Any) -> None:
        """Initialize all parameters again, in their order. The same seed gives the weights that the constructor drew.

        Weights and biases are drawn from U(-b, b), where b = 1 / sqrt(H), as in torch. With heads b = 1 / sqrt(D) for
        W_hh, where D = H / heads, since a head is like a layer with D units. Gains are set to one, bias_c to zero.
        """
        for name, parameter in self.named_parameters():
            if name.startswith(("gain_", "bias_c")):
                nn.init.constant_(parameter, float(name.startswith("gain_")))
            else:
                units = self.hidden_size // (self.heads if name.startswith("weight_hh") else 1)
                bound = units**-0.5 if units > 0 else 0.0  # a cell may have no units
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self: Any) -> str:
        """Return torch's extra_repr, followed by our own arguments that are not at their defaults."""
        return super().extra_repr() + repr_of(self)  # type: ignore[misc]

    def __prepare_scriptable__(self: Any) -> nn.Module:
        """Return a module of torch with the same parameters. torch.jit.script compiles it instead of this module.

        Raises:
            ValueError: The module computes something that torch's module does not.
        """
        would = f"and would be scripted as a torch.nn.{self._torchs.__name__}"
        runs_ours = type(self).forward.__module__.startswith(PACKAGE)
        if not runs_ours or not self._cell.of_torch:
            own = "cell" if runs_ours else "forward"
            raise ValueError(f"{type(self).__qualname__} has a {own} of its own, {would}")
        for name in NOT_OF_TORCH:
            if value := getattr(self, name, False):
                raise ValueError(f"the {type(self).__name__} has {name}={value!r}, {would}, which has none")
        return recast(self, self._torchs)


class HasVariants(Checked):
    """A mixin for the modules that may have peepholes and layer norms: LSTM, StackedLSTM and LSTMCell."""

    @property
    def peepholes(self) -> bool:
        """Whether there are peepholes. It cannot be set later, since the weights of the peepholes are parameters."""
        return self._peepholes

    @property
    def layer_norm(self) -> bool | tuple[str, ...]:
        """True if W_ih x, W_hh h and c are all normalised, False if none is, otherwise a tuple of "ih", "hh" or "c".

        It cannot be set later.
        """
        return self._norms if 0 < len(self._norms) < len(NORMS) else bool(self._norms)


class OverSequences(Checked):
    """A mixin for the modules that run layers over sequences, unlike cells. Its regularisers may be set at any time."""

    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_drop: float = 0.0
    recompute: bool = False

    def forward(
        self: Any, input: Tensor | PackedSequence, hx: Any = None, lengths: Tensor | None = None,
        resets: Tensor | None = None, reset_states: Any = None, mask: None = None,
    ) -> tuple[Tensor | PackedSequence, Any]:  # fmt: skip
        """Run all layers over all steps.

        N is the number of sequences, T the number of steps, L the number of layers, H the number of hidden units. D = 2
        if bidirectional, otherwise D = 1. P = proj_size if > 0, otherwise P = H. Shapes are for batched input
        without batch_first. With batch_first, N comes before T in every shape that has both. Unbatched, no shape has N.

        Args:
            input: The input (T, N, I), or a PackedSequence.
            hx: The initial states, see the table below. Default: zeros
            lengths: The number of steps of each sequence, (N,). int32 or int64 on the input's device. Each is from 0 to
                T, in any order. Default: T
            resets: True where the states are reset, bool (T, N), see below.
            reset_states: The states that a reset sets instead of zeros: either one for each sequence, in the form of
                hx, or one for each step, see the table below. Only the states at resets are used. Gradients flow into
                them. Every backend except "torch" supports them.
            mask: Must be None. TorchRL's modules pass a mask to a module that is not an instance of torch.nn.LSTM or
                torch.nn.GRU. Give them a module of gpu_lstm.compat.

        The states of each module, where bidirectional stacks have (2, N, H_k) and (2, T, N, H_k) for layer k::

            module       hx and the returned states                reset_states for each step
            LSTM         (h, c): (D*L, N, P) and (D*L, N, H)       (D*L, T, N, P) and (D*L, T, N, H)
            GRU          h: (D*L, N, H)                            (D*L, T, N, H)
            SLSTM        (h, c, n, m): (D*L, N, H) each            not supported
            StackedLSTM  [(h, c), ...]: (N, H_k) each              (T, N, H_k) each
            StackedGRU   [h, ...]: (N, H_k) each                   (T, N, H_k) each

        ``lengths`` replaces packing. Nothing is sorted or copied. Padding, even NaN, affects neither results nor
        gradients.

        ``resets`` is True where the states are zeroed, for example at the start of an episode. A reset at t separates
        time t from time t - 1 in both directions: the forward direction starts anew at time t, and the reverse
        direction starts anew at time t - 1. With ``reset_states`` both start with the state that is given for t instead
        of zeros. Each direction uses its own rows of the states.

        Give these arguments by keyword. Only torch.onnx passes them by position.

        Returns:
            output: The output of the last layer, in the form of the input, with D*P features. For a stack P is the
                number of units in its last layer. The output is zero past the end of a sequence.
            states: The states after the last step of each sequence, in the form of hx. In half precision c_0 of an LSTM
                and h_0 of a GRU may be float32, as the kernels keep them. Then c_n or h_n is float32, too, and a
                sequence that is split over several calls gives the results of one call.

        Raises:
            ValueError, RuntimeError, TypeError: A call that torch.nn.LSTM or torch.nn.GRU refuses, too, with torch's
                message.
            ValueError: lengths, resets or reset_states have a wrong shape, dtype, device or value. On CUDA the values
                of lengths are asserted on the device.
            ValueError: lengths are given with a PackedSequence, or reset_states without resets.
            ValueError: The chosen backend does not support an argument of the call or of the module.
            TypeError: A mask is given, or lengths, resets or reset_states are not tensors. Or hx of a stack is not a
                list as in the table. An example is torch's (h_0, c_0).
            RuntimeError: hx of a stack has a wrong number of states, or a state of a wrong size.
            ImportError, RuntimeError, TypeError: A chosen backend cannot run. The message says why.
        """
        if type(input) is not Tensor or fx_is_tracing():
            instead = traced(self, input, hx, lengths=lengths, resets=resets, reset_states=reset_states, mask=mask)
            if instead is not None:
                return instead
        if mask is not None:
            name, torchrls = self._cell.name.upper(), TORCHRLS if self._cell.of_torch else ""
            raise TypeError(f"{name} accepts lengths, and no mask{torchrls.format(name)}")
        return run_call(self._request(input, hx, lengths, resets, reset_states))

    def _request(self, *given: Any, **named: Any) -> Request:
        """Return the request of a call with these arguments of `forward`, checked."""
        options = self._options()
        return request_of(options, self._weights(options.names), *given, **named)

    def _options(self: Any) -> Options:
        """Return the Options that follow from the current attributes."""
        by_layer = self._role.by_layer
        sizes = tuple(self.hidden_sizes) if by_layer else (self.hidden_size,) * self.num_layers
        of_layers = [getattr(self, name) for name in OF_LAYERS]
        rates = tuple([getattr(self, name) for name in REGULARISER_NAMES])
        return options_of(self._cell.name, self._role, sizes, *of_layers, rates, by_layer and self.residual)


Given = TypeVar("Given", contravariant=True)
Returned = TypeVar("Returned", covariant=True)


class Called(Protocol[Given, Returned]):
    """The type of a call of a module. nn.Module declares that a call returns Any."""

    @overload
    def __call__(
        self, input: Tensor, hx: Given | None = None, *, lengths: Tensor | None = None, resets: Tensor | None = None,
        reset_states: Given | None = None,
    ) -> tuple[Tensor, Returned]: ...  # fmt: skip

    @overload
    def __call__(
        self, input: PackedSequence, hx: Given | None = None, *, lengths: None = None, resets: Tensor | None = None,
        reset_states: Given | None = None,
    ) -> tuple[PackedSequence, Returned]: ...  # fmt: skip


def recast(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return `module` as an instance of `cls`, with the same Parameter objects, hooks and flags.

    If `cls` is a class of torch, the instance does not get our arguments, except for regularisers that are on. torch's
    classes have no heads. So if `module` has heads, the instance gets new, block-diagonal weights W_hh.
    """
    twin = cls.__new__(cls)
    dropped = ["_flat_weights", "_compiled_call_impl"]  # torch's cache; a compiled call of `module`
    if not issubclass(cls, Checked):
        dropped += [*OWN, *OF_VARIANTS, *(name for name in OURS if not module.__dict__.get(name))]
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in dropped})
    for registry in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[registry] = twin.__dict__[registry].copy()
    if not issubclass(cls, Checked) and getattr(module, "heads", 1) > 1:  # torch's classes have no heads
        for name, weight in twin._parameters.items():
            if name.startswith("weight_hh") and weight is not None:
                twin._parameters[name] = nn.Parameter(dense(weight.detach(), module.hidden_size), weight.requires_grad)
    if isinstance(twin, RNNBase):
        twin._init_flat_weights()
    return twin


def repr_of(module: Any, *names: str) -> str:
    """Return the arguments of these names, and our own arguments, that are not at their defaults."""
    changed = {"bias": not module.bias, "heads": module.heads > 1}  # all other arguments are falsy by default
    on = [name for name in (*names, "heads", *OWN, *NOT_OF_TORCH) if changed.get(name, getattr(module, name, None))]
    return "".join(f", {name}={getattr(module, name)!r}" for name in on)
