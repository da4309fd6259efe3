"""What can be told of the Triton kernels where there is no GPU; and all that the benchmark knows of gpu_lstm's inside.

Kernels are planned for a named card and never launched; what follows for a step is expected, not measured. Another
commit may differ inside: where gpu_lstm was not imported from this checkout, nothing here is asked.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import gpu_lstm

from . import timing
from .cases import Case, grid
from .results import provenance

SECONDS = 0.3  # of timing, a case
INSIDE_IS_KNOWN = Path(gpu_lstm.__file__).resolve().parents[1] == Path(__file__).resolve().parents[1]
PLANNING, LAUNCH = "kernels.triton_lstm.planning", "kernels.triton_lstm.launch"


def inside(name: str) -> Any:
    """A module of gpu_lstm, imported when it is needed: not all can be imported everywhere."""
    return importlib.import_module(f"gpu_lstm.{name}")


def as_planned(case: Case) -> Any:
    """One layer in one direction, as planning sees it."""
    precision = inside("precision").recurrent_precision(case.torch_dtype)
    return inside(PLANNING).Problem(case.steps, case.batch, case.hidden_size, case.torch_dtype, precision=precision)


def families(case: Case, device: torch.device) -> str:
    """Which kernels run where gpu_lstm chooses: "cooperative / step", forward and backward."""
    choose, passes = inside(LAUNCH).choose_plan, (False, True)[: 1 + case.training]
    return " / ".join(choose(as_planned(case), device, backward).family.value for backward in passes)


@functools.cache
def first_plan(family: str, layer: Any, device: torch.device, backward: bool) -> Any:
    """The first plan of a family whose kernels fit the card; None if there is none."""
    launch, card = inside(LAUNCH), inside(LAUNCH).device_of(torch.cuda.get_device_properties(device))
    for plan in (plan for plan in launch.plans(layer, card, backward) if plan.family.value == family):
        reports = [
            launch.resources(each, card.architecture) for each in launch.recorded_launches(layer, backward, plan)
        ]
        if all(launch.fits(report, card.shared) for report in reports):
            return plan
    return None


@contextlib.contextmanager
def running(choose: Callable[..., Any], instead: Callable[[], None] | None = None) -> Iterator[None]:
    """Within the block kernels are chosen by `choose`. If `instead` is given it stands for launches, and no GPU."""
    launch, backends = inside(LAUNCH), inside("backends")
    before = launch.choose_plan, launch.launch_kernel, backends.obstacle
    launch.choose_plan = choose
    if instead is not None:
        launch.launch_kernel, backends.obstacle = lambda *_, **__: instead(), lambda *_: None
    try:
        yield
    finally:
        launch.choose_plan, launch.launch_kernel, backends.obstacle = before


def rows(cards: list[str]) -> list[dict[str, Any]]:
    """One for each training case of the CUDA grid's headline and hidden sizes, and each of the named cards."""
    cases = [case for group in ("headline", "hidden") for case in grid("cuda")[group] if case.training]
    return [_row(case, inside(PLANNING).DEVICES[name]) for name in cards for case in cases]


def _row(case: Case, card: Any) -> dict[str, Any]:
    launched: list[None] = []
    with timing.float32_products(case.dtype):
        layer, planning = as_planned(case), inside(PLANNING)
        plans = {backward: planning.plans(layer, card, backward)[0] for backward in (False, True)}
        bounds = [planning.expected_bound(layer, card, plan, backward).seconds for backward, plan in plans.items()]
        with running(lambda layer, device, backward: plans[backward], instead=lambda: launched.append(None)):
            # The host does the same for every size, so a small one is timed, whose products take no time to speak of.
            forward, given = _lstm(replace(case, batch=1, input_size=16, hidden_size=16), "cpu")
            dy = torch.ones(case.steps, 1, 16, dtype=case.torch_dtype)
            torch.autograd.grad(forward(), given, dy)
            launches = len(launched)
            host = timing.interleaved({"": lambda _: torch.autograd.grad(forward(), given, dy)}, "cpu", SECONDS)[""]
            kept = timing.kept_bytes(*_lstm(case, "meta"))  # torch's device where tensors have sizes and no memory
    return {
        **provenance("cpu"), "device": card.name, "case": case.name, **asdict(case), "provider": "ours-triton",
        "graph": False, "status": "expected", "note": " / ".join(plan.family.value for plan in plans.values()),
        "kept_bytes": kept, "launches": launches, "host_s": timing.percentiles(host)[0],
        "expected_us_per_step": sum(bounds) * 1e6,
    }  # fmt: skip


def _lstm(case: Case, device: str) -> Any:
    """The forward pass of a layer on the Triton backend, and what has gradients."""
    options: Any = {"dtype": case.torch_dtype, "device": device}
    lstm = gpu_lstm.LSTM(case.input_size, case.hidden_size, backend="triton", **options)
    x = torch.zeros(case.steps, case.batch, case.input_size, **options, requires_grad=True)
    return lambda: lstm(x)[0], [x, *lstm.parameters()]
