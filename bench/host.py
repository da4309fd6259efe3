"""What can be told of the Triton kernels where there is no GPU: launches, the host's time, memory, the plan's bound.

Kernels are planned for a named card and never launched; what follows for a step is expected, not measured.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gpu_lstm.backends import Backend
from gpu_lstm.functional import lstm_stack
from gpu_lstm.modules import LSTM
from gpu_lstm.precision import recurrent_precision

from . import timing
from .cases import Case, grid
from .results import Row, provenance
from .run import float32_products

launch: Any = importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")
planning: Any = importlib.import_module("gpu_lstm.kernels.triton_lstm.planning")

SECONDS = 0.3  # of timing, a case


def check(devices: list[str]) -> None:
    """Raise unless planning knows cards of these names.

    Raises:
        ValueError: an unknown name.
    """
    for name in devices:
        if name not in planning.DEVICES:
            raise ValueError(f"unknown device {name!r}; known: {', '.join(planning.DEVICES)}")


def expected(devices: list[str]) -> list[Row]:
    """A row for each training case of the CUDA grid's headline and hidden sizes, and each of the named cards."""
    cases = [case for group in ("headline", "hidden") for case in grid("cuda")[group] if case.run == "training"]
    return [_row(case, planning.DEVICES[name]) for name in devices for case in cases]


def _row(case: Case, card: Any) -> Row:
    with float32_products(case.dtype):
        precision = recurrent_precision(case.torch_dtype)
        layer = planning.Problem(case.steps, case.batch, case.hidden, case.torch_dtype, precision=precision)
        plans = {backward: planning.plans(layer, card, backward)[0] for backward in (False, True)}
        bounds = [planning.expected_bound(layer, card, plan, backward) for backward, plan in plans.items()]
        # The host does the same for every size, so a small one is timed, whose products take no time to speak of.
        small = replace(case, batch=1, inputs=16, hidden=16)
        with _launching(plans, lambda *_, **__: None):
            host = timing.interleaved({"host": _training(small, "cpu")}, "cpu", SECONDS)["host"]
        launched: list[None] = []
        with _launching(plans, lambda *_, **__: launched.append(None)):
            _training(small, "cpu")(0)
        kept = _kept_bytes(case)
    return Row(
        **provenance("cpu") | {"device": card.name}, case=case.name, **asdict(case), provider="ours-triton",
        graph=False, status="expected", note=" / ".join(plan.family.value for plan in plans.values()),
        kept_bytes=kept, launches=len(launched), host_s=timing.percentiles(host)[0],
        expected_us_per_step=sum(bound.seconds for bound in bounds) * 1e6,
    )  # fmt: skip


def _training(case: Case, device: str) -> timing.Run:
    """Forward and backward of a layer on the Triton backend, whatever the device."""
    lstm, x = _layer(case, device)
    dy = torch.ones(case.steps, case.batch, case.hidden, dtype=case.torch_dtype, device=device)
    return lambda call: torch.autograd.grad(_call(lstm, x), [x, *lstm.parameters()], dy)


def _kept_bytes(case: Case) -> int:
    """Kept for backward; on torch's meta device, where tensors have sizes and no memory."""
    lstm, x = _layer(case, "meta")
    with timing.kept_for_backward([x, *lstm.parameters()]) as kept:
        _call(lstm, x)
    return kept()


def _layer(case: Case, device: str) -> tuple[LSTM, Tensor]:
    lstm = LSTM(case.inputs, case.hidden, device=device, dtype=case.torch_dtype)
    shape = (case.steps, case.batch, case.inputs)
    return lstm, torch.zeros(shape, dtype=case.torch_dtype, device=device, requires_grad=True)


def _call(lstm: LSTM, x: Tensor) -> Tensor:
    """The module's call but for the choice of a backend, which would be another without a GPU."""
    zeros = x.new_zeros(1, x.shape[1], lstm.hidden_size)
    y, _ = lstm_stack(
        x, [(zeros, zeros)], lstm._layers(),
        lengths=None, resets=None, backend=Backend.TRITON, dropout=0.0, training=True,
    )  # fmt: skip
    return y


@contextlib.contextmanager
def _launching(plans: dict[bool, Any], run: Callable[..., Any]) -> Iterator[None]:
    """Within the block kernels go by these plans, forward and backward, and `run` stands in for every launch."""
    before = launch.choose_plan, launch.launch_kernel
    launch.choose_plan, launch.launch_kernel = (lambda layer, device, backward: plans[backward]), run
    try:
        yield
    finally:
        launch.choose_plan, launch.launch_kernel = before
