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
PLANNING, LAUNCH, FAMILIES, TRIAL = (
    f"kernels.triton_lstm.{name}" for name in ("planning", "launch", "families", "trial")
)


def inside(name: str) -> Any:
    """A module of gpu_lstm, imported when it is needed: not all can be imported everywhere."""
    return importlib.import_module(f"gpu_lstm.{name}")


def as_planned(case: Case) -> Any:
    """One layer in one direction, as planning sees it."""
    sizes, settings = (case.steps, case.batch, case.hidden_size), inside("settings")
    precision = inside("precision").recurrent_precision(case.torch_dtype)
    kind = dict(regularised=case.variant in settings.REGULARISERS, normalised=case.variant == "layer_norm")
    return inside(PLANNING).Problem(*sizes, case.torch_dtype, precision=precision, **kind)


def families(case: Case) -> str:
    """Which kernels ran where gpu_lstm chose: "cooperative / step", forward and backward."""
    layer, chosen = replace(as_planned(case), steps=min(case.steps, 2)), inside(LAUNCH)._chosen
    ran = {
        backward: plan.family.value for (problem, _, backward, _), plan in chosen.items()
        if replace(problem, side_by_side=1) == layer
    }  # fmt: skip
    return " / ".join(ran[backward] for backward in sorted(ran))


def of_family(family: str) -> Callable[..., Any]:
    """In the place of launch.choose_plan: the first plan of a family whose kernels fit the card; None if none does."""
    found: dict[tuple, Any] = {}

    def choose(layer: Any, device: torch.device, backward: bool, variant: tuple, attempt: Any, *_: Any) -> Any:
        key = layer, backward, variant
        if key not in found:
            card = inside(PLANNING).device_of(torch.cuda.get_device_properties(device))
            offered = inside(FAMILIES).plans(layer, card, backward)
            fit = (p for p in offered if p.family.value == family and inside(TRIAL).obstacle(p, attempt) is None)
            found[key] = next(fit, None)
        return found[key]

    return choose


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
        plans = {backward: inside(FAMILIES).plans(layer, card, backward)[0] for backward in (False, True)}
        seconds = [planning.expected(layer, card, plan, backward).seconds for backward, plan in plans.items()]
        with running(lambda layer, device, backward, *_: plans[backward], instead=lambda: launched.append(None)):
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
        "expected_us_per_step": sum(seconds) * 1e6,
    }  # fmt: skip


def _lstm(case: Case, device: str) -> Any:
    """The forward pass of a layer on the Triton backend, and what has gradients."""
    options: Any = {"dtype": case.torch_dtype, "device": device}
    lstm = gpu_lstm.LSTM(case.input_size, case.hidden_size, backend="triton", **options)
    x = torch.zeros(case.steps, case.batch, case.input_size, **options, requires_grad=True)
    return lambda: lstm(x)[0], [x, *lstm.parameters()]
