"""Which of torch's function transforms are at work, and what of them the fused kernels can carry.

torch.func.grad and vjp run through the fused kernels, but in a graph of torch.compile. There, vmap and forward-mode
derivatives need an LSTM that is written in torch's own operators, which the reference is.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)

_ONLY_BY_REFERENCE = (_functorch.TransformType.Vmap, _functorch.TransformType.Jvp)


def constant_when_traced(function: F) -> F:
    """What torch.compiler.assume_constant_result does: torch.compile calls the function, and takes what it returns.

    By hand, since that imports torch's compiler, and with it Triton, whether or not anything is ever compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def need_the_reference() -> bool:
    """Whether the call at hand is inside vmap or a forward-mode derivative; in a compiled graph, in any transform."""
    return _need_the_reference(torch.compiler.is_compiling())


@constant_when_traced
def _need_the_reference(compiling: bool) -> bool:
    # Not traced but asked: torch.compile enters a transform while it traces what is inside. There no tensor of
    # torch.func.grad says that it requires a gradient, so that none would be kept for backward.
    if forward_ad._current_level >= 0:
        return True
    return any(compiling or interpreter.key() in _ONLY_BY_REFERENCE for interpreter in _interpreters())


def in_a_graph() -> bool:
    """Whether the call at hand is traced by torch.compile or torch.export; ONNX knows no operator of ours."""
    return torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export()


def is_watched(x: Tensor) -> bool:
    """Whether what is computed now is traced, transformed or counted, or x is only a description of a tensor."""
    return (
        torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0 or is_transformed()
    )  # fmt: skip


def is_transformed() -> bool:
    """Whether the call at hand is inside a transform of torch.func."""
    return bool(_interpreters())


def gradients_are_differentiated(output: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """In backward: whether somebody may differentiate the gradients, which are made from `tensors`.

    torch.func.grad always asks for a graph. It is of use only inside another transform, or if a tensor below takes part
    in plain autograd. The transform that forward was in is the one whose level `output`, a saved result of it, has; it
    may be over, as it is when the function that torch.func.vjp returned is called.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    interpreters = _interpreters()
    own = _functorch.maybe_get_level(output) == len(interpreters)
    others = interpreters[:-1] if own else interpreters
    if any(interpreter.key() == _functorch.TransformType.Grad for interpreter in others):
        return True
    return any(_below(t).requires_grad for t in tensors if t is not None)


def alive(t: Tensor | None) -> Tensor | None:
    """The tensor without the wrappers of transforms that are over, which another transform does not take."""
    return None if t is None else _functorch.unwrap_if_dead(t)


def _interpreters() -> list:
    if _functorch.peek_interpreter_stack() is None:
        return []
    return retrieve_all_functorch_interpreters()


def _below(t: Tensor) -> Tensor:
    """The tensor that a transform has wrapped."""
    return _functorch.get_unwrapped(t) if _functorch.is_functorch_wrapped_tensor(t) else t
