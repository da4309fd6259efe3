"""Plans of the Triton kernels where there is no GPU; and all that the benchmark knows of gpu_lstm's inside.

Kernels are planned for a named card and never launched; the time of a step is estimated, not measured. Another commit
may differ inside: where gpu_lstm was not imported from this checkout, nothing here is used.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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
PLANNING, LAUNCH, CHOOSE = (f"kernels.triton_lstm.{name}" for name in ("planning", "launch", "choose"))


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
            fits = (p for p in plans if p.family.value == family and chooser.why_it_does_not_fit(launches(p)) is None)
            found[problem, which] = next(fits, None)
        return found[problem, which]

    return choose


def running(choose: Callable, stub: Callable | None = None) -> Callable[[], AbstractContextManager]:
    """Blocks in which `choose` chooses kernels, with caches of their own; with a `stub` for launches, without a GPU."""
    launch, run, available = map(inside, (LAUNCH, "dispatch.run", "dispatch.available"))
    changes: list[Any] = [(launch, "choose_plan", choose), (launch, "_layers", {}), (run, "_routes", {})]
    if stub is not None:
        changes += [(launch, "launch_kernel", stub), (available, "why_unavailable", lambda *_: None)]

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


def rows(cards: list[str]) -> list[dict[str, Any]]:
    """One for each training case of the CUDA grid's headline and hidden sizes, and each of the named cards."""
    cases = [case for group in ("headline", "hidden") for case in grid("cuda")[group] if case.training]
    return [_row(case, inside(PLANNING).DEVICES[name]) for name in cards for case in cases]


def _row(case: Case, card: Any) -> dict[str, Any]:
    launched: list[None] = []
    with timing.float32_products(case.dtype):
        layer, planning = as_planned(case), inside(PLANNING)
        plans = {backward: inside(CHOOSE).plans(layer, card, backward)[0] for backward in (False, True)}
        seconds = [planning.expected(layer, card, plan, backward).seconds for backward, plan in plans.items()]
        with running(lambda *of: plans[of[2].backward], lambda *_, **__: launched.append(None))():
            # The host does the same for every size, so a small one is timed, whose matmuls take hardly any time.
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
        "expected_us_per_step": sum(seconds) * 1e6,
    }  # fmt: skip


def _lstm(case: Case, device: str) -> Any:
    options: Any = {"dtype": case.torch_dtype, "device": device}
    lstm = gpu_lstm.LSTM(case.input_size, case.hidden_size, backend="triton", **options)
    x = torch.zeros(case.steps, case.batch, case.input_size, **options, requires_grad=True)
    return lambda: lstm(x)[0], [x, *lstm.parameters()]
