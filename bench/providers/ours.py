"""gpu_lstm.LSTM: as it chooses for itself, and by each backend and each family of Triton kernels."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

import gpu_lstm
from gpu_lstm.backends import Backend, obstacle
from gpu_lstm.precision import recurrent_precision

from ..problem import Problem
from .engine import Engine, Unable, load, states

BACKENDS = {
    "ours": None,
    "ours-triton": "triton",
    "ours-resident": "triton",
    "ours-cooperative": "triton",
    "ours-step": "triton",
    "ours-cupy": "cupy",
    "ours-torch": "torch",
    "ours-reference": "reference",
}
FAMILIES = ("resident", "cooperative", "step")
NAMES = tuple(BACKENDS)
EVERYWHERE = ("ours",)


def absent(name: str, device: str) -> str | None:
    """What gpu_lstm itself says of the backend."""
    if name.removeprefix("ours-") in FAMILIES and device == "cpu":
        return "a family of kernels is planned for a GPU"
    problem = obstacle(Backend(BACKENDS[name] or "auto"), torch.device(device), torch.float32)
    return None if problem is None else str(problem)


def build(name: str, problem: Problem) -> Engine:
    """The module with the problem's weights, on one backend."""
    case = problem.case
    lstm = gpu_lstm.LSTM(
        case.inputs, case.hidden, case.layers, bidirectional=case.directions == 2,
        device=problem.h0.device, dtype=case.torch_dtype, backend=BACKENDS[name],
    )  # fmt: skip
    parameters, (h0, c0) = load(lstm, problem), states(problem)
    ragged = {"resets": problem.resets}
    if case.sequences == "ragged":
        ragged["lengths"] = problem.lengths

    def call(x):
        y, (h_n, c_n) = lstm(x, (h0, c0), **ragged)
        return y, h_n, c_n

    family = name.removeprefix("ours-")
    if lstm._select(h0) is not Backend.TRITON:
        return Engine(call, parameters, h0, c0)
    if family not in FAMILIES:
        return Engine(call, parameters, h0, c0, kernels=_chosen(problem))
    plans = {backward: _plan_of(family, problem, backward) for backward in {False, case.run == "training"}}
    return Engine(call, parameters, h0, c0, within=lambda: _by(plans))


def _launch() -> Any:
    return importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")


def _layer(problem: Problem) -> Any:
    """One layer in one direction, as planning sees it."""
    case = problem.case
    precision = recurrent_precision(case.torch_dtype)
    return _launch().Problem(case.steps, case.batch, case.hidden, case.torch_dtype, precision=precision)


def _chosen(problem: Problem) -> str:
    """The families that are chosen for the problem."""
    layer, device = _layer(problem), problem.h0.device
    backwards = (False, True) if problem.case.run == "training" else (False,)
    return " / ".join(_launch().choose_plan(layer, device, backward).family.value for backward in backwards)


def _plan_of(family: str, problem: Problem, backward: bool) -> Any:
    """The first plan of a family whose kernels fit the card.

    Raises:
        Unable: there is none.
    """
    launch, layer = _launch(), _layer(problem)
    card = launch.device_of(torch.cuda.get_device_properties(problem.h0.device))
    for plan in launch.plans(layer, card, backward):
        launches = launch.recorded_launches(layer, backward, plan)
        if plan.family.value == family and all(
            launch.fits(launch.resources(each, card.architecture), card.shared) for each in launches
        ):
            return plan
    raise Unable(f"no {family} kernel fits this card {'backward' if backward else 'forward'}")


@contextlib.contextmanager
def _by(plans: dict[bool, Any]) -> Iterator[None]:
    """Within the block kernels run by these plans, forward and backward, whatever the library would choose."""
    launch = _launch()
    before, launch.choose_plan = launch.choose_plan, lambda layer, device, backward: plans[backward]
    try:
        yield
    finally:
        launch.choose_plan = before
