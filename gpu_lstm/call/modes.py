"""The state of the process that decides how a call runs: autograd, autocast, tracing, transforms and TF32.

It is read once per call.
"""

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
    """The ways in which a call may be recorded.

    The values are plain numbers, since they are hashed at every call. The hash of an Enum is a Python function.
    """

    NOBODY = 0  # eager mode: kernels run as operators of torch.library only inside transforms
    WATCHED = 1  # torch.jit.trace, dispatch modes, subclasses of Tensor: kernels run as operators, without races
    COMPILED = 2  # torch.compile, torch.export: one operator for each layer, whatever the backend is
    ONNX = 3  # torch's ONNX exporter: torch's own LSTM runs, since the exporter does not know our operators


class Transforms:
    """The transforms of torch.func around a call. Most of them need an LSTM that is made of torch's own operators.

    The reference is such an LSTM.
    """

    NONE = 0
    GRAD = 1  # grad and vjp, which kernels support
    REFERENCE = 2  # vmap, forward-mode derivatives and functionalize, and in a compiled graph any transform


class Modes(NamedTuple):
    """The state of the process that decides how a call runs. It is a part of the key of a route."""

    grad: bool  # whether autograd records
    autocast: torch.dtype | None  # see autocast_dtype
    whole: bool  # whether autocast casts all of torch's own LSTM, not only its products; True without autocast
    recording: int  # see Recording
    transforms: int  # see Transforms
    precision: str  # see recurrent_precision
    choices: tuple  # the backend and the mode of racing, from blocks or from the environment
    capturing: bool  # whether a CUDA graph is being captured

    @property
    def plain(self) -> bool:
        """Whether the call is neither recorded nor transformed, and autocast is off."""
        return self.recording == Recording.NOBODY and self.transforms == Transforms.NONE and self.autocast is None


def modes(x: Tensor) -> Modes:
    """Return the current modes, for a call on x.

    x is the only tensor that is looked at. `request_of` checks whether another tensor is of a subclass of Tensor.
    """
    if _is_compiling():
        # Precision and choices are read when the decision is made, so that no graph depends on them.
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
    """Whether it is certain that torch's own operator runs a call that no kernel can run, such as a cell on a CPU.

    `backend` is the backend of the module. The answer is False if a backend other than "auto" or "torch" is chosen. It
    is also False under autocast, torch.compile or a transform, where more facts decide.
    """
    if (backend or chosen_backends[0].value or _environment.get(_BACKEND)) not in _TORCHS:
        return False
    return not (any_autocast() or _is_compiling() or _interpreter() is not None or forward_level() >= 0)


_TORCHS = (None, Backend.AUTO, "auto", Backend.TORCH, "torch")


def recurrent_precision(dtype: torch.dtype) -> str:
    """Return the precision of the recurrent product in Triton's terms, "tf32" or "ieee".

    cuDNN's switch decides, as for torch.nn.LSTM. Products over all steps go through torch.matmul, where
    torch.backends.cuda.matmul decides.
    """
    return "tf32" if dtype is torch.float32 and _precision("cuda", "rnn") == "tf32" else "ieee"


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return any_autocast() and _knows_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts x. Return None if autocast is off. It leaves float64 as it is."""
    return torch.get_autocast_dtype(x.device.type) if x.dtype is not torch.float64 and autocasts(x) else None


_NO_AUTOCAST = None, True


def _autocast(x: Tensor) -> tuple[torch.dtype | None, bool]:
    """Return the fields `autocast` and `whole` of Modes."""
    if (dtype := autocast_dtype(x)) is None:
        return _NO_AUTOCAST
    return dtype, not x.is_cpu or onednn.takes_whole_lstms(x.dtype, torch.is_grad_enabled())


@constant_when_traced
def _knows_autocast(device_type: str) -> bool:
    """Whether a type of device has autocast. "meta" has none."""
    return torch.amp.is_autocast_available(device_type)


@constant_when_traced
def need_the_reference(compiling: bool) -> bool:
    """Whether the current call is inside a transform that only the reference supports.

    These are vmap, functionalize and forward-mode derivatives, and, if `compiling`, every transform.
    """
    # torch.compile calls this function instead of tracing it, and enters a transform while it traces the code inside.
    # There, tensors of torch.func.grad do not say that they require gradients. So kernels would save nothing for
    # backward.
    if forward_level() >= 0:
        return True
    return any(compiling or transform.key() in _ONLY_BY_REFERENCE for transform in private.transforms())


def is_transformed() -> bool:
    """Whether the current call is inside a transform of torch.func."""
    return _interpreter() is not None


def are_differentiated(output: Tensor, tensors: Iterable[Tensor | None], gradients: Sequence[Tensor | None]) -> bool:
    """Whether gradients that backward computes from `tensors` and `gradients` may themselves be differentiated.

    The answer is also True if autograd propagates several gradients at once (`is_grads_batched`), which it does by a
    vmap.

    torch.func.grad enables autograd during every backward. So enabled autograd does not mean that the gradients are
    differentiated. They are only if another transform is active, or if a tensor inside the wrappers of the transform
    requires a gradient of plain autograd.

    `output` is a saved result of forward. Its level is the level of the transform in which forward ran. If that is the
    innermost transform now, it is not counted as another one. It may have ended before, for example when the function
    that torch.func.vjp returned is called.
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
