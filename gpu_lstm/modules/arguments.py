"""What the modules share: arguments, which are checked when they are given or set, and how a call reads them."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..call import roles
from ..call.checks import check_bool, check_heads, check_positive, check_unprojected
from ..call.choices import BackendName, parse_backend_name
from ..call.options import NORMS, Options, options_of
from ..call.prepare import prepare
from ..call.regularisers import BY_NAME, OURS, REGULARISER_NAMES
from ..call.request import Request
from ..call.weights import LAYER_NORM, PEEPHOLES, Weights
from ..dispatch.route import run
from ..kernels.cells import LSTM, Cell
from ..kernels.heads import dense
from ..kernels.private import fx_is_tracing
from .tracing import traced

TORCHRLS = " as TorchRL's {0}Module gives to what is no torch.nn.{0}: hand it a gpu_lstm.compat.{0}"
PACKAGE = __package__.rsplit(".", 1)[0] + "."
OWN = ("backend", "recompute")  # what a call reads from the module, beside regularisers
NOT_OF_TORCH = (*OURS, PEEPHOLES, LAYER_NORM)  # what torch.nn.LSTM cannot do, if it is on


def accepted(name: str, value: Any, cell: Cell = LSTM) -> Any:
    """The value of an attribute; checked, and maybe in another form, if it is an argument that may be set later."""
    match name:
        case "backend":
            return None if value is None else parse_backend_name(value)
        case "heads":
            check_positive(name, value)
        case "recompute":
            check_bool(name, value)
            if value and cell.kept > 1:
                why = "its gates depend on states that are not kept"
                raise ValueError(f"recompute is not supported by {cell.name.upper()}: {why}")
        case _ if name in BY_NAME:
            return BY_NAME[name].accepted(value, cell)
    return value


def norms_of(layer_norm: object) -> tuple[str, ...]:
    """The argument of the modules, checked, as names in the order of NORMS."""
    if isinstance(layer_norm, bool):
        return NORMS if layer_norm else ()
    if not isinstance(layer_norm, (tuple, list)):
        raise TypeError(f"{LAYER_NORM} should be of type bool, or a tuple of names, got: {type(layer_norm).__name__}")
    if not all(norm in NORMS for norm in layer_norm):
        known = ", ".join(map(repr, NORMS))
        raise ValueError(f"{LAYER_NORM} should be a bool, or name some of {known}, got {layer_norm!r}")
    return tuple(norm for norm in NORMS if norm in layer_norm)


OF_CELLS = ("_peepholes", "_norms", "heads", "input_size", "bias", "backend")
OF_LAYERS = (*OF_CELLS, "bidirectional", "batch_first", "training", "recompute", "proj_size")
"""The attributes of cells, and of other modules, in the order of Arguments."""


def weights_now(module: Any, names: tuple) -> list[list[Weights]]:
    """[L][D] of a module by the names of its parameters, see Options.names: as they are now."""
    parameters = module._parameters
    try:
        return [[Weights(*[n and parameters[n] for n in tensors]) for tensors in layer] for layer in names]
    except KeyError:  # another tensor has taken a parameter's place, as weight_norm's does
        return [[Weights(*[n and getattr(module, n) for n in tensors]) for tensors in layer] for layer in names]


class Checked:
    """A module whose attributes are checked like its arguments when they are set."""

    # What it tells every call. (Users' subclasses may have a `cell` of their own.)
    _cell: Cell
    _role: type[roles.Role]
    _options: Callable[[], Options]  # from the attributes as they are now
    _weights = weights_now
    # Defaults, on the class, so that modules pickled by older versions have them.
    backend: BackendName | None = None
    _peepholes: bool = False
    _norms: tuple[str, ...] = ()
    heads = 1

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NOT_OF_TORCH and not hasattr(type(self), name) and value:  # no call would read it
            raise ValueError(f"{name} is not supported by {type(self).__name__}, got {value!r}")
        super().__setattr__(name, accepted(name, value, self._cell))

    def _get_name(self) -> str:
        """The name in a model's repr, which shows whose LSTM it is; a user's subclass keeps its own name."""
        cls = type(self)
        return f"gpu_lstm.{cls.__name__}" if cls.__module__.startswith(PACKAGE) else cls.__name__


class DropIn(Checked):
    """One next to torch's RNNBase or RNNCellBase, with parameters of its own."""

    _torchs: type[nn.Module]  # torch's module, for torch.jit.script

    def _make(self: Any, given: dict[str, Any]) -> None:
        """Make a module from its constructor's locals(). Ours are checked before torch's class draws weights."""
        del given["self"]
        for name in (*OWN, *OURS):
            if name in given:
                setattr(self, name, given.pop(name))
        peepholes, norms = given.pop(PEEPHOLES, False), norms_of(given.pop(LAYER_NORM, False))
        heads, projected = given.pop("heads"), given.get("proj_size", 0)
        check_bool(PEEPHOLES, peepholes)
        check_unprojected(bool(norms), projected)
        check_heads(heads, given["hidden_size"], projected, norms)
        if heads != 1:
            self.heads = heads  # which reset_parameters reads
        self._init_torchs(**given)
        if not (peepholes or norms):
            return
        if not self._cell.normalises:
            raise ValueError(f"{self._cell.name} cells have no peepholes and no layer norm")
        self._peepholes, self._norms = peepholes, norms
        options, like = self._options(), next(self.parameters())
        for directions, sizes in zip(options.names, options.weight_sizes):
            for name, size in [each for names in directions for each in zip(names, sizes)]:
                if name is not None and name not in self._parameters:  # next to the others of its layer and direction
                    self.register_parameter(name, nn.Parameter(like.new_empty(size)))
                    self._draw(name, self._parameters[name])

    def reset_parameters(self: Any) -> None:
        """Draw all weights and biases again, in the order of the parameters; gains become ones, bias_c zero.

        So the same seed gives the weights that the constructor drew. Bounds are torch's, 1 / sqrt(H), but 1 / sqrt(D)
        of the W_hh of heads, each of which is like that of a layer of D units.
        """
        for name, parameter in list(self.named_parameters()):
            self._draw(name, parameter)

    def _draw(self: Any, name: str, parameter: nn.Parameter) -> None:
        units = self.hidden_size
        if self.heads > 1 and name.startswith("weight_hh"):
            units = self.hidden_size // self.heads
            if parameter.shape[1] != units:  # as torch's constructor made it
                parameter = nn.Parameter(parameter.new_empty(len(parameter), units))
                setattr(self, name, parameter)
        if name.startswith(("gain_", "bias_c")):
            nn.init.constant_(parameter, float(name.startswith("gain_")))
        else:
            bound = units**-0.5 if units > 0 else 0.0  # a cell may have no units
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self: Any) -> str:
        """As torch's, and our own arguments that are not at their defaults."""
        return super().extra_repr() + repr_of(self)  # type: ignore[misc]

    def __prepare_scriptable__(self: Any) -> nn.Module:
        """torch's module, for torch.jit.script."""
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
    """An LSTM, stack of LSTMs or LSTMCell."""

    @property
    def peepholes(self) -> bool:
        """Whether there are peepholes; fixed, since their weights are parameters."""
        return self._peepholes

    @property
    def layer_norm(self) -> bool | tuple[str, ...]:
        """Whether all of "ih", "hh" and "c" are normalised, or which; fixed, like peepholes."""
        return self._norms if 0 < len(self._norms) < len(NORMS) else bool(self._norms)


class Layers(Checked):
    """A module that runs layers over sequences, which a cell does not. Its regularisers may be set at any time."""

    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_drop: float = 0.0
    recompute: bool = False

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
        return run(self._request(input, hx, lengths, resets, reset_states))

    def _request(
        self, input: Tensor | PackedSequence, hx: Any = None, lengths: Tensor | None = None,
        resets: Tensor | None = None, reset_states: Any = None,
    ) -> Request:  # fmt: skip
        """What a call asks for, checked."""
        options = self._options()
        return prepare(options, self._weights(options.names), input, hx, lengths, resets, reset_states)

    def _options(self: Any) -> Options:
        by_layer = self._role.by_layer
        sizes = tuple(self.hidden_sizes) if by_layer else (self.hidden_size,) * self.num_layers
        of_layers = [getattr(self, name) for name in OF_LAYERS]
        rates = tuple([getattr(self, name) for name in REGULARISER_NAMES])
        return options_of(self._cell.name, self._role, sizes, *of_layers, rates, by_layer and self.residual)


Given = TypeVar("Given", contravariant=True)
Returned = TypeVar("Returned", covariant=True)


class Called(Protocol[Given, Returned]):
    """The types of `forward` for a call of the module, which nn.Module loses."""

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
    """`module` as an instance of `cls`, with the same Parameter objects, hooks and flags.

    A class of torch's gets none of our arguments but regularisers that are on, and of heads a new, block-diagonal W_hh.
    """
    twin = cls.__new__(cls)
    dropped = ["_flat_weights", "_compiled_call_impl"]  # torch's cache; Module.compile()'s, which would call `module`
    if not issubclass(cls, Checked):
        dropped += [*OWN, *(name for name in OURS if not module.__dict__.get(name))]
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in dropped})
    for registry in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[registry] = twin.__dict__[registry].copy()
    if not issubclass(cls, Checked) and getattr(module, "heads", 1) > 1:  # which torch's have not
        for name, weight in twin._parameters.items():
            if name.startswith("weight_hh") and weight is not None:
                twin._parameters[name] = nn.Parameter(dense(weight.detach(), module.hidden_size), weight.requires_grad)
        del twin.heads
    if isinstance(twin, RNNBase):
        twin._init_flat_weights()
    return twin


def repr_of(module: Any, *names: str) -> str:
    """The arguments of these names, and our own, that are not at their defaults."""
    changed = {"bias": not module.bias, "heads": module.heads > 1}  # all others are off, or there are none
    on = [name for name in (*names, "heads", *OWN, *NOT_OF_TORCH) if changed.get(name, getattr(module, name, None))]
    return "".join(f", {name}={getattr(module, name)!r}" for name in on)
