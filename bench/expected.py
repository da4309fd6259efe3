"""What can be told of the Triton kernels where there is no GPU: launches, the host's time, memory, the plan's bound.

Kernels are planned for a named card and never launched; what follows for a step is expected, not measured.
"""

from dataclasses import asdict, replace
from typing import Any

import torch

import gpu_lstm

from . import internals, timing
from .cases import Case, grid
from .results import provenance

SECONDS = 0.3  # of timing, a case


def check(cards: list[str]) -> None:
    """Raise unless planning knows cards of these names.

    Raises:
        ValueError: an unknown name.
    """
    for name in cards:
        if name not in internals.cards():
            raise ValueError(f"unknown device {name!r}; known: {', '.join(internals.cards())}")


def rows(cards: list[str]) -> list[dict[str, Any]]:
    """One for each training case of the CUDA grid's headline and hidden sizes, and each of the named cards."""
    cases = [case for group in ("headline", "hidden") for case in grid("cuda")[group] if case.training]
    return [_row(case, internals.cards()[name]) for name in cards for case in cases]


def _row(case: Case, card: Any) -> dict[str, Any]:
    launched: list[None] = []
    with timing.float32_products(case.dtype):
        plans, seconds = internals.expected(case, card)
        # The host does the same for every size, so a small one is timed, whose products take no time to speak of.
        forward, backward, _ = _training(replace(case, batch=1, input_size=16, hidden_size=16), "cpu")
        with internals.running(plans, launched=lambda: launched.append(None)):
            backward(forward())
            launches = len(launched)
            host = timing.interleaved({"": lambda _: backward(forward())}, "cpu", SECONDS)[""]
    forward, _, given = _training(case, "meta")  # torch's device where tensors have sizes and no memory
    return {
        **provenance("cpu"), "device": card.name, "case": case.name, **asdict(case), "provider": "ours-triton",
        "graph": False, "status": "expected", "note": internals.families(plans),
        "kept_bytes": timing.kept_bytes(forward, given), "launches": launches,
        "host_s": timing.percentiles(host)[0], "expected_us_per_step": seconds * 1e6,
    }  # fmt: skip


def _training(case: Case, device: str):
    """Forward and backward of a layer on the Triton backend, whatever the device; and what has gradients."""
    options: Any = {"dtype": case.torch_dtype, "device": device}
    lstm = gpu_lstm.LSTM(case.input_size, case.hidden_size, **options)
    x = torch.zeros(case.steps, case.batch, case.input_size, **options, requires_grad=True)
    dy = torch.ones(case.steps, case.batch, case.hidden_size, **options)
    given = [x, *lstm.parameters()]
    return lambda: internals.on_triton(lstm, x), lambda y: torch.autograd.grad(y, given, dy), given
