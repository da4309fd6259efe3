"""An LSTM layer as a function, and the checks that the modules share with it."""

from collections.abc import Sequence

from torch import Tensor

from . import races
from .backends import KERNEL_BACKENDS, RESET_STATES, Backend, BackendName, requested, select
from .layers import compute_dtype, one_direction
from .precision import autocasts, is_exact
from .sequences import Batch, Traversal, check_dense, check_tensor
from .settings import Settings, check_bool
from .weights import NAMES, State, Weights


def lstm_layer(
    x: Tensor,
    weights: Weights | Sequence[Tensor | None],
    hx: State | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_states: State | None = None,
    reverse: bool = False,
    backend: BackendName | Backend | None = None,
) -> tuple[Tensor, State]:
    """One LSTM layer in one direction.

    Args:
        x: input, floating point [T, B, I].
        weights: (weight_ih [4H, I], weight_hh [4H, P], bias_ih [4H], bias_hh [4H], weight_hr [P, H],
            weight_peephole [3H], gain_ih [4H], gain_hh [4H], gain_c [H], bias_c [H]) in the dtype of x; from bias_ih
            on they may be None or left out. P = H without weight_hr. Peepholes are to the gates i, f and o; gains ask
            for a layer norm, see `LSTM`, without a projection. Both run on the backends "triton" and "reference".
        hx: initial states (h0 [B, P], c0 [B, H]); zeros if None.
        lengths: int32 or int64 [B], each from 0 to T, in any order: how many steps each sequence has.
        resets: bool [T, B]; where True, the state is zeroed before that step is taken. A reset at t separates time
            t from t - 1, for the reverse direction too.
        reset_states: the states that resets leave instead of zeros: h [B, P] and c [B, H], or one a step, [T, B, P] and
            [T, B, H], of which those at resets count. On the backends "triton" and "reference".
        reverse: from each sequence's last step to its first.
        backend: "auto", "triton", "cupy", "torch" or "reference"; None: as chosen by `gpu_lstm.backend` or by the
            environment.

    Returns:
        h [T, B, P], zero past the end of a sequence, and (h_n [B, P], c_n [B, H]) after its last step.

    Raises:
        RuntimeError: a tensor of the wrong shape, device or dtype; T = 0; other than two states.
        TypeError: something that is no tensor, or no bool.
        ValueError: wrong lengths, resets or reset_states, or a backend that does not take these, peepholes or a layer
            norm; a layer norm with weight_hr; less than two weights or more than ten; H = 0 or P = 0; more steps,
            sequences or units than the backend's kernels can count to; an unknown backend.
        ImportError, RuntimeError, TypeError: a chosen backend that cannot run, and why.
    """
    check_tensor(x, "input")
    check_dense(x, "lstm_layer")
    if x.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {x.dim()}")
    check_bool("reverse", reverse)
    weights = _named(weights)
    sequences, features = x.shape[1:]
    hidden = weights.weight_hh.shape[0] // 4
    projected = hidden if weights.weight_hr is None else weights.weight_hr.shape[0]
    weights.check_sizes(features, hidden, projected)
    for name, size in (("hidden_size", hidden), ("proj_size", projected)):
        if size == 0:
            raise ValueError(f"{name} must be greater than zero")
    if hx is None:
        hx = x.new_zeros(sequences, projected), x.new_zeros(sequences, hidden)
    check_pair(hx)
    h0, c0 = hx
    for i, (state, size) in enumerate(((h0, projected), (c0, hidden))):
        check_tensor(state, f"hidden[{i}]")
        if state.shape != (sequences, size):
            raise RuntimeError(f"Expected hidden[{i}] size {(sequences, size)}, got {list(state.shape)}")
    check_tensors(x, [(h0, c0)], weights.present())
    batch, special = Batch.of(x, lengths, resets, batch_first=False), None
    if reset_states is not None:
        batch, special = batch.resetting_to([batch.reset_pair_in(reset_states, [], projected, hidden)]), RESET_STATES
    special = weights.variant or special
    traversal = batch.traversal.backwards() if reverse else batch.traversal
    chosen = select(backend, x.device, compute_dtype(x), special)
    chosen = fastest(backend, chosen, x, [[weights]], traversal, Settings(training=False))
    return one_direction(x, (h0, c0), weights, traversal, chosen)


def _named(weights: Weights | Sequence[Tensor | None]) -> Weights:
    """The weights of a layer by name: tensors, each of as many dimensions as it has to have."""
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights should be a tuple or list of tensors, got: {type(weights).__name__}")
    if not 2 <= len(weights) <= len(NAMES):
        names = f"weight_ih, weight_hh and, if there are any, {', '.join(NAMES[2:])}"
        raise ValueError(f"Expected weights of 2 to {len(NAMES)} tensors ({names}), got {len(weights)}")
    named = Weights(*weights)  # type: ignore[arg-type]
    for name, tensor in zip(NAMES, named):
        if tensor is None and name in ("weight_ih", "weight_hh"):
            raise TypeError(f"{name} should be a tensor, got: NoneType")
        if tensor is not None:
            check_tensor(tensor, name)
            expected = 2 if name in ("weight_ih", "weight_hh", "weight_hr") else 1
            if tensor.dim() != expected:
                raise RuntimeError(f"{name} must have {expected} dimensions, got {tensor.dim()}")
    return named


def check_pair(hx: State, function: str = "lstm") -> None:
    """Raise, in torch's words, unless there are two states. One tensor that holds both is no pair."""
    if not isinstance(hx, (tuple, list)):  # torch 2.8 does not trace `tuple | list`
        kind = type(hx).__name__
        raise TypeError(f"{function}(): argument 'hx' (position 2) must be tuple of Tensors, not {kind}")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")


def fastest(
    argument: BackendName | Backend | None,
    able: Backend,
    x: Tensor,  # [T, B, I]
    weights: list[list[Weights]],  # [L][D]
    traversal: Traversal,
    settings: Settings,
) -> Backend:
    """`able`, which `select` found; or where that has kernels and nobody asked for it, whoever is faster here."""
    if able not in KERNEL_BACKENDS or requested(argument) is not Backend.AUTO:
        return able
    return races.choose(able, x, weights, traversal, settings)


def check_tensors(x: Tensor, states: Sequence[State], weights: Sequence[Tensor]) -> None:
    """Raise, in torch's own words, unless all tensors are of one device and dtype and there is a step to take.

    Under autocast dtypes may differ, and a cell state may be float32 beside half precision.
    """
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    mixed_allowed = autocasts(x)
    given = [("parameter", tensor, False) for tensor in weights]
    given += [("hidden", tensor, is_cell) for state in states for tensor, is_cell in zip(state, (False, True))]
    for kind, tensor, is_cell in given:
        if tensor.device != x.device:
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, "
                f"found input tensor at {x.device} and {kind} tensor at {tensor.device}"
            )
        if tensor.dtype != x.dtype and not mixed_allowed and not (is_cell and is_exact(tensor, x)):
            raise RuntimeError(
                f"Input and {kind} tensors are not the same dtype, "
                f"found input tensor with {x.dtype} and {kind} tensor with {tensor.dtype}"
            )
