"""All that the benchmark knows of gpu_lstm's inside: how kernels are planned and launched. The rest is public API.

Another commit may differ in it: where gpu_lstm was not imported from this checkout, nothing here is asked.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_lstm

from .cases import Case

KNOWN = Path(gpu_lstm.__file__).resolve().parents[1] == Path(__file__).resolve().parents[1]

Plans = dict[bool, Any]
"""How kernels run forward (False) and backward (True)."""


def _module(name: str) -> Any:
    """A module of gpu_lstm, imported when it is needed: the Triton kernels cannot be everywhere."""
    return importlib.import_module(f"gpu_lstm.{name}")


def _layer(case: Case) -> Any:
    """One layer in one direction, as planning sees it."""
    precision = _module("precision").recurrent_precision(case.torch_dtype)
    planning = _module("kernels.triton_lstm.planning")
    return planning.Problem(case.steps, case.batch, case.hidden_size, case.torch_dtype, precision=precision)


def backend_of(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs where this one was asked for."""
    return _module("backends").select(backend, device, dtype).value


def families(plans: Plans) -> str:
    """Of kernels: "cooperative / step", forward and backward."""
    return " / ".join(plan.family.value for plan in plans.values())


def chosen_families(backend: str | None, case: Case, device: torch.device) -> str | None:
    """The families of Triton kernels that gpu_lstm chooses for a case; None where they do not run."""
    if backend_of(backend, device, case.torch_dtype) != "triton":
        return None
    choose = _module("kernels.triton_lstm.launch").choose_plan
    return families({backward: choose(_layer(case), device, backward) for backward in sorted({False, case.training})})


def plans_of(family: str, case: Case, device: torch.device) -> Plans | None:
    """The first plans of a family whose kernels fit the card; None if there are none."""
    launch, layer, found = _module("kernels.triton_lstm.launch"), _layer(case), {}
    card = launch.device_of(torch.cuda.get_device_properties(device))
    for backward in sorted({False, case.training}):
        for plan in launch.plans(layer, card, backward):
            launches = launch.recorded_launches(layer, backward, plan) if plan.family.value == family else []
            reports = [launch.resources(each, card.architecture) for each in launches]
            if reports and all(launch.fits(report, card.shared) for report in reports):
                found[backward] = plan
                break
        else:
            return None
    return found


def cards() -> dict[str, Any]:
    """Those that planning knows, each with a `name`."""
    return _module("kernels.triton_lstm.planning").DEVICES


def expected(case: Case, card: Any) -> tuple[Plans, float]:
    """The plans of a layer's forward and backward on a card, and the seconds that they bound a step by."""
    planning, layer = _module("kernels.triton_lstm.planning"), _layer(case)
    plans = {backward: planning.plans(layer, card, backward)[0] for backward in (False, True)}
    return plans, sum(planning.expected_bound(layer, card, plan, backward).seconds for backward, plan in plans.items())


@contextlib.contextmanager
def running(plans: Plans, launched: Callable[[], None] | None = None) -> Iterator[None]:
    """Within the block kernels run by these plans, whatever would be chosen; `launched` takes the place of launches."""
    launch = _module("kernels.triton_lstm.launch")
    before = launch.choose_plan, launch.launch_kernel
    launch.choose_plan = lambda layer, device, backward: plans[backward]
    if launched is not None:
        launch.launch_kernel = lambda *_, **__: launched()
    try:
        yield
    finally:
        launch.choose_plan, launch.launch_kernel = before


def on_triton(lstm: gpu_lstm.LSTM, x: Tensor) -> Tensor:
    """The module's output from zero states, by the Triton backend where it could not be chosen: without a GPU."""
    zeros = x.new_zeros(1, x.shape[1], lstm.hidden_size)
    y, _ = _module("functional").lstm_stack(
        x, [(zeros, zeros)], lstm._layers(), lengths=None, resets=None,
        backend=gpu_lstm.Backend.TRITON, dropout=0.0, training=True,
    )  # fmt: skip
    return y
