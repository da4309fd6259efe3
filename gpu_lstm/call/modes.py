"""What decides how a call runs, read from the process once per call: autograd, autocast, tracing, transforms, TF32."""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import private
from ..kernels.private import TransformType, any_autocast, constant_when_traced, forward_level
from . import onednn
from .choices import BACKEND_VARIABLE, RACE_VARIABLE, Backend, chosen_backends, chosen_racings

_ONLY_BY_REFERENCE = (TransformType.Vmap, TransformType.Jvp, TransformType.Functionalize)
PLAIN = (Tensor, torch.nn.Parameter)

_BACKEND, _RACE = map(os.environ.encodekey, (BACKEND_VARIABLE, RACE_VARIABLE))
_environment, _precision = private.environment, private.fp32_precision
_dispatch_modes, _is_tracing, _interpreter = private.count_dispatch_modes, private.is_tracing, private.current_transform
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


class Recording:
    """What watches a call. (Plain numbers: they are hashed at every call, and an Enum's hash is a Python function.)"""

    NOBODY = 0  # eager mode: there is no operator of ours
    WATCHED = 1  # torch.jit.trace, dispatch modes, subclasses of Tensor: kernels run as operators; nothing is raced
    COMPILED = 2  # torch.compile, torch.export: one operator a layer, whatever the backend
    ONNX = 3  # torch's ONNX exporter, which knows no operator of ours: torch's own LSTM, traced, becomes ONNX's


class Transforms:
    """The transforms of torch.func around a call. Most need an LSTM in torch's own operators, as the reference is."""

    NONE = 0
    GRAD = 1  # grad and vjp, which kernels can take part in
    REFERENCE = 2  # vmap, forward-mode derivatives, functionalize; in a compiled graph any


class Modes(NamedTuple):
    """The state of the process that decides how a call is run, in the key of its route."""

    grad: bool  # whether autograd records
    autocast: torch.dtype | None  # see autocast_dtype
    whole: bool  # it casts all of torch's own LSTM, not its products alone
    recording: int  # see Recording
    transforms: int  # see Transforms
    precision: str  # of float32 products in the recurrence, for Triton: "tf32" or "ieee"
    choices: tuple  # of backend and racing, by blocks, else by the environment
    capturing: bool  # a CUDA graph

    @property
    def plain(self) -> bool:
        """Whether nobody watches or transforms a call, and autocast is off."""
        return self.recording == Recording.NOBODY and self.transforms == Transforms.NONE and self.autocast is None


def modes(x: Tensor) -> Modes:
    """The modes as they are now, for a call on x; of its other tensors `prepare` knows whether they are plain."""
    if _is_compiling():
        # Precision and choices are read where the decision is made, so that no graph is bound to them.
        recording = Recording.ONNX if torch.onnx.is_in_onnx_export() else Recording.COMPILED
        transforms = Transforms.REFERENCE if need_the_reference(True) else Transforms.NONE
        return Modes(torch.is_grad_enabled(), *_autocast(x), recording, transforms, "ieee", (), False)
    transforms = Transforms.NONE
    if _interpreter() is not None or forward_level() >= 0:
        transforms = Transforms.REFERENCE if need_the_reference(False) else Transforms.GRAD
    watched = _dispatch_modes() > 0 or type(x) not in PLAIN or _is_tracing()
    recording = Recording.WATCHED if watched else Recording.NOBODY
    autocast = _autocast(x) if any_autocast() else _NO_AUTOCAST
    choices = chosen_backends[0].value or _environment.get(_BACKEND), chosen_racings[0].value or _environment.get(_RACE)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    precision = recurrent_precision(x.dtype)
    return Modes(_is_grad_enabled(), *autocast, recording, transforms, precision, choices, capturing)


def only_torch_runs(backend: str | None) -> bool:
    """Whether nothing but torch's own operator can run a call that it can, on a device where no kernels run.

    False: another backend is chosen, by `backend` or by the user, or there is more to find out.
    """
    if (backend or chosen_backends[0].value or _environment.get(_BACKEND)) not in _TORCHS:
        return False
    return not (any_autocast() or _is_compiling() or _interpreter() is not None or forward_level() >= 0)


_TORCHS = (None, Backend.AUTO, "auto", Backend.TORCH, "torch")


def recurrent_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision` for the recurrent product, by cuDNN's switch, as torch.nn.LSTM: "tf32" or "ieee".

    Products over all steps go through torch.matmul, and obey torch.backends.cuda.matmul.
    """
    return "tf32" if dtype is torch.float32 and _precision("cuda", "rnn") == "tf32" else "ieee"


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return any_autocast() and _knows_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to; None: it is off, or x is float64, which it leaves as it is."""
    return torch.get_autocast_dtype(x.device.type) if x.dtype is not torch.float64 and autocasts(x) else None


_NO_AUTOCAST = None, True


def _autocast(x: Tensor) -> tuple[torch.dtype | None, bool]:
    """Modes.autocast and Modes.whole."""
    if (dtype := autocast_dtype(x)) is None:
        return _NO_AUTOCAST
    return dtype, not x.is_cpu or onednn.takes_whole_lstms(x.dtype, torch.is_grad_enabled())


@constant_when_traced
def _knows_autocast(device_type: str) -> bool:
    """Whether there is autocast for a type of device (for "meta" there is none)."""
    return torch.amp.is_autocast_available(device_type)


@constant_when_traced
def need_the_reference(compiling: bool) -> bool:
    """Whether the current call is inside vmap or a forward-mode derivative; in a compiled graph, in any transform."""
    # Called rather than traced: torch.compile enters a transform while it traces what is inside. There no tensor of
    # torch.func.grad says that it requires a gradient, so that nothing would be saved for backward.
    if forward_level() >= 0:
        return True
    return any(compiling or transform.key() in _ONLY_BY_REFERENCE for transform in private.transforms())


def is_transformed() -> bool:
    """Whether the current call is inside a transform of torch.func."""
    return _interpreter() is not None


def are_differentiated(output: Tensor, tensors: Iterable[Tensor | None], gradients: Sequence[Tensor | None]) -> bool:
    """In backward: whether what is computed from `tensors` and `gradients` may itself be differentiated.

    Also where autograd propagates several gradients at once (`is_grads_batched`), by a vmap of its own. torch.func.grad
    always asks for a graph. It is needed only inside another transform, or if a tensor underneath takes part in plain
    autograd. `output`, a saved result of forward, has the level of the transform that forward ran in; that one may have
    ended, as it has when the function that torch.func.vjp returned is called.
    """
    if any([d is not None and private.is_batched(d) for d in gradients]):
        return True
    if _is_compiling():
        return False
    if forward_level() >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    transforms = private.transforms()
    is_around_forward = private.level_of(output) == len(transforms)
    others = transforms[:-1] if is_around_forward else transforms
    if any(transform.key() == TransformType.Grad for transform in others):
        return True
    wrapped, unwrapped = private.is_wrapped, private.unwrapped
    every = (t for t in (output, *tensors, *gradients) if t is not None)
    return any((unwrapped(t) if wrapped(t) else t).requires_grad for t in every)
