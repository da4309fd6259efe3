"""All that the benchmark knows of gpu_lstm's inside.

Another commit may differ there: where gpu_lstm was not imported from this checkout, nothing of it is used.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import gpu_lstm

from .cases import Case

INSIDE_IS_KNOWN = Path(gpu_lstm.__file__).resolve().parents[1] == Path(__file__).resolve().parents[1]
LAUNCH, CHOOSE = (f"kernels.triton_lstm.{name}" for name in ("launch", "choose"))


def inside(name: str) -> Any:
    """A module of gpu_lstm, imported when it is needed: not all can be imported everywhere, or in another commit."""
    return importlib.import_module(f"gpu_lstm.{name}")


def as_planned(case: Case) -> Any:
    """One layer in one direction, as planning sees it."""
    zoneout = 3 if case.variant == "zoneout" else None
    return inside("kernels.problem").Problem(
        min(case.steps, 2), case.batch, case.hidden_size, case.torch_dtype,
        precision=inside("call.modes").recurrent_precision(case.torch_dtype), zoneout_h=zoneout, zoneout_c=zoneout,
        dropout_h=case.variant == "recurrent_dropout", norms=(case.variant == "layer_norm",) * 3,
    )  # fmt: skip


def families(case: Case) -> str:
    """Which kernels ran where gpu_lstm chose: "cooperative / step", forward and backward."""

    def planned_by(problem: Any) -> tuple:
        return *problem[:6], problem.regularised, problem.normalised

    wanted = planned_by(as_planned(case))
    ran = {
        which.backward: prepared.plan.family.value for (problem, _), layer in inside(LAUNCH)._layers.items()
        if planned_by(problem) == wanted for which, prepared in layer._prepared.items()
    }  # fmt: skip
    return " / ".join(ran[backward] for backward in sorted(ran))


def of_family(family: str) -> Callable[..., Any]:
    """In the place of launch.choose_plan: the first plan of a family whose kernels fit the card; None if none does."""
    chooser, found = inside(CHOOSE), dict[tuple, Any]()

    def choose(problem: Any, device: torch.device, which: Any, launches: Callable[[Any], Any], *_: Any) -> Any:
        if (problem, which) not in found:
            plans = chooser.plans(problem, chooser.card_of(device), which.backward)
            plans = (plan for plan in plans if plan.family.value == family)
            fitting = (plan for plan in plans if chooser.why_it_does_not_fit(launches(plan)) is None)
            found[problem, which] = next(fitting, None)
        return found[problem, which]

    return choose


def running(choose: Callable) -> Callable[[], AbstractContextManager]:
    """Blocks in which `choose` chooses kernels, with caches of their own."""
    launch, run = map(inside, (LAUNCH, "dispatch.run"))
    changes: list[Any] = [(launch, "choose_plan", choose), (launch, "_layers", {}), (run, "_routes", {})]

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        before = [(module, name, getattr(module, name)) for module, name, _ in changes]
        for change in changes:
            setattr(*change)
        try:
            yield
        finally:
            for change in before:
                setattr(*change)

    return block
