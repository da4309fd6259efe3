"""What can be told of the Triton kernels where there is no GPU; and all that the benchmark knows of gpu_lstm's inside.

Kernels are planned for a named card and never launched; what follows for a step is expected, not measured. Another
commit may differ inside: where gpu_lstm was not imported from this checkout, nothing here is asked.
"""

import contextlib
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
Plans = dict[bool, Any]
"""How kernels run forward (False) and backward (True)."""


def rows(cards: list[str]) -> list[dict[str, Any]]:
    """One for each training case of the CUDA grid's headline and hidden sizes, and each of the named cards."""
    cases = [case for group in ("headline", "hidden") for case in grid("cuda")[group] if case.training]
    return [_row(case, known_cards()[name]) for name in cards for case in cases]


def _row(case: Case, card: Any) -> dict[str, Any]:
    launched, planning = [], inside("kernels.triton_lstm.planning")
    with timing.float32_products(case.dtype):
        layer = as_planned(case)
        plans = {backward: planning.plans(layer, card, backward)[0] for backward in (False, True)}
        bounds = [planning.expected_bound(layer, card, plan, backward).seconds for backward, plan in plans.items()]
        with running(plans, instead=lambda: launched.append(None)):
            # The host does the same for every size, so a small one is timed, whose products take no time to speak of.
            forward, given = _lstm(replace(case, batch=1, input_size=16, hidden_size=16), "cpu")
            dy = torch.ones_like(forward())
            launched.clear()
            torch.autograd.grad(forward(), given, dy)
            launches = len(launched)
            host = timing.interleaved({"": lambda _: torch.autograd.grad(forward(), given, dy)}, "cpu", SECONDS)[""]
            kept = timing.kept_bytes(*_lstm(case, "meta"))  # torch's device where tensors have sizes and no memory
    return {
        **provenance("cpu"), "device": card.name, "case": case.name, **asdict(case), "provider": "ours-triton",
        "graph": False, "status": "expected", "note": families(plans), "kept_bytes": kept, "launches": launches,
        "host_s": timing.percentiles(host)[0], "expected_us_per_step": sum(bounds) * 1e6,
    }  # fmt: skip


def _lstm(case: Case, device: str) -> Any:
    """The forward pass of a layer on the Triton backend, and what has gradients."""
    options: Any = {"dtype": case.torch_dtype, "device": device}
    lstm = gpu_lstm.LSTM(case.input_size, case.hidden_size, backend="triton", **options)
    x = torch.zeros(case.steps, case.batch, case.input_size, **options, requires_grad=True)
    return lambda: lstm(x)[0], [x, *lstm.parameters()]


def inside(name: str) -> Any:
    """A module of gpu_lstm, imported when it is needed: not all can be imported everywhere."""
    return importlib.import_module(f"gpu_lstm.{name}")


def known_cards() -> dict[str, Any]:
    """Those that planning knows, each with a `name`."""
    return inside("kernels.triton_lstm.planning").DEVICES


def backend_of(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs where this one was asked for."""
    return inside("backends").select(backend, device, dtype).value


def as_planned(case: Case) -> Any:
    """One layer in one direction, as planning sees it."""
    planning, precision = inside("kernels.triton_lstm.planning"), inside("precision").recurrent_precision
    sizes = case.steps, case.batch, case.hidden_size, case.torch_dtype
    return planning.Problem(*sizes, precision=precision(case.torch_dtype))


def families(plans: Plans) -> str:
    """Of kernels: "cooperative / step", forward and backward."""
    return " / ".join(plan.family.value for plan in plans.values())


def chosen_plans(case: Case, device: torch.device, family: str | None = None) -> Plans | None:
    """The plans that gpu_lstm chooses, or the first of a family whose kernels fit the card; None if there are none."""
    launch, layer, found = inside("kernels.triton_lstm.launch"), as_planned(case), {}
    for backward in (False, True)[: 1 + case.training]:
        if family is None:
            found[backward] = launch.choose_plan(layer, device, backward)
            continue
        card = launch.device_of(torch.cuda.get_device_properties(device))
        for plan in (plan for plan in launch.plans(layer, card, backward) if plan.family.value == family):
            reports = (
                launch.resources(each, card.architecture) for each in launch.recorded_launches(layer, backward, plan)
            )
            if all(launch.fits(report, card.shared) for report in reports):
                found[backward] = plan
                break
    return found if len(found) == 1 + case.training else None


@contextlib.contextmanager
def running(plans: Plans, instead: Callable[[], None] | None = None) -> Iterator[None]:
    """Within the block kernels run by these plans. If `instead` is given it stands for launches, and needs no GPU."""
    launch, backends = inside("kernels.triton_lstm.launch"), inside("backends")
    before = launch.choose_plan, launch.launch_kernel, backends.obstacle
    launch.choose_plan = lambda layer, device, backward: plans[backward]
    if instead is not None:
        launch.launch_kernel, backends.obstacle = lambda *_, **__: instead(), lambda *_: None
    try:
        yield
    finally:
        launch.choose_plan, launch.launch_kernel, backends.obstacle = before
