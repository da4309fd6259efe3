"""What a provider builds: something that is called as an LSTM and has gradients to show."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from ..problem import Given, Problem

Call = Callable[[Given], tuple[Given, Tensor, Tensor]]
"""Input [T, B, I] to output [T, B, D*H], packed if the input is, and h_n, c_n [R, B, H]."""


def as_they_are(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """For parameters that are laid out and named as torch.nn.LSTM's."""
    return gradients


class Unable(Exception):
    """A provider does not do such a case: why."""


@dataclass(frozen=True)
class Engine:
    """An LSTM with the weights and states of a problem."""

    call: Call
    parameters: dict[str, Tensor]  # leaves, in the layout of the engine
    h0: Tensor | None  # the leaves that stand for the problem's states; None where they are always zero
    c0: Tensor | None
    to_torch: Callable[[dict[str, Tensor]], dict[str, Tensor]] = as_they_are  # gradients, to torch's names and layout
    within: Callable[[], AbstractContextManager] = contextlib.nullcontext  # of every call and its backward
    kernels: str | None = None  # which kernels run, if there is more than one kind


def load(module: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """Give a module with torch.nn.LSTM's parameters the weights of the problem; its parameters."""
    module.load_state_dict(problem.weights)
    module.requires_grad_(problem.case.run == "training")
    return dict(module.named_parameters())


def states(problem: Problem) -> tuple[Tensor, Tensor]:
    """h0 and c0 of the problem [R, B, H], as leaves."""
    training = problem.case.run == "training"
    return problem.h0.detach().clone().requires_grad_(training), problem.c0.detach().clone().requires_grad_(training)
