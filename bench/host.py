"""python -m bench host: measure the microseconds of a call on the host, compared with the whole call of torch.nn.

With a GPU the kernels are launched, and the clock stops before the device is done. Without a GPU the CPU stands for an
H100: kernels are planned for an H100, and everything runs except launches, Triton's launcher and CUDA's own calls.
"""

import functools
import gc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import gpu_lstm

from . import report, results, timing
from .cases import Case
from .inputs import Inputs
from .isolated import ProviderFailed, Worker, checkout
from .providers import PROVIDERS, ours
from .providers.engine import Engine, module_like_torchs

TRITON = "gpu_lstm.kernels.triton_rnn"
CARD = "cuda" if torch.cuda.is_available() else "cpu"
# The providers. TORCH is gpu_lstm with backend "torch" on the CPU.
YARDSTICK, KERNELS, TORCH = "torch.nn", "kernels", "torch"
PLACES = (*dict.fromkeys([(CARD, YARDSTICK), (CARD, KERNELS), ("cpu", YARDSTICK), ("cpu", TORCH)]),)  # device, provider
MODES = ("inference", "forward+graph", "training")
H = 8  # so small that the matmuls take hardly any time
LONG = Case("training", "fp32", steps=128, batch=16, input_size=H, hidden_size=H)
SHORT = replace(LONG, steps=1, batch=1)
CASES = {
    "T=1": SHORT, "T=128": LONG, "two layers, bidirectional": replace(LONG, layers=2, directions=2), "LSTMCell": SHORT,
    "lengths": replace(LONG, sequences="ragged"), "resets": replace(LONG, reset_rate=0.2),
    "one step with resets": replace(LONG, steps=1, reset_rate=0.2), "Stream": replace(SHORT, mode="step"),
    **{f"GRU, {case}": replace(of, cell="gru") for case, of in (("T=1", SHORT), ("T=128", LONG))},
}  # fmt: skip
INSTEAD = {"lengths": "torch-packed", "one step with resets": "cleanrl-loop"}  # the workaround with torch.nn
TURNS, ROUNDS = 4, 40  # turns of each commit for a case; rounds in each turn
LIMIT_S = 300.0  # for a turn; on a GPU the first turn compiles kernels


def made(case: str, mode: str, device: str, provider: str) -> Callable[[], Any]:
    """Return a call of a case. The call returns the output, or in training the gradients of the parameters."""
    inputs, torchs = Inputs.of(CASES[case], device), provider == YARDSTICK
    backend: Any = TORCH if provider == TORCH else None
    if case == "LSTMCell":
        kind: Any = nn.LSTMCell if torchs else functools.partial(gpu_lstm.LSTMCell, backend=backend)
        cell = kind(H, H, device=device)
        engine = Engine(lambda x, state: cell(x[0], (state[0][0], state[1][0])), dict(cell.named_parameters()))
    elif case == "Stream" and not torchs:
        lstm: Any = module_like_torchs(gpu_lstm, inputs, backend=backend)
        stream = gpu_lstm.Stream(lstm, inputs.case.batch, inputs.states)
        return lambda: stream(inputs.x[0])
    elif torchs:
        engine = PROVIDERS[INSTEAD.get(case, "torch")].build(inputs.plain() if case == "resets" else inputs)
    else:
        engine = ours.build(backend, inputs)
    x, state, parameters = inputs.x, inputs.states, list(engine.parameters.values())
    dy = inputs.dy[0] if case == "LSTMCell" else inputs.dy
    if mode == "training":
        return lambda: torch.autograd.grad(engine.call(x, state)[0], parameters, dy)
    return lambda: engine.call(x, state)[0]


@functools.cache
def stub() -> None:
    """Let kernels win every race. Without a GPU also plan them for an H100, and do not launch them.

    Raises:
        AttributeError: this commit of gpu_lstm is too old.
    """
    os.environ["GPU_LSTM_RACE"] = "off"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # buffers are read that no kernel has written; their denormals would be slow
    plans, won = resolve_name(f"{TRITON}.plans.choose:plans"), resolve_name("gpu_lstm.dispatch.race:Decision")
    h100 = resolve_name(f"{TRITON}.plans.planning:DEVICES")["h100"]
    patch("gpu_lstm.dispatch.race.expected_winner", lambda kind, kernel, *_: won(kernel, "")).start()
    if CARD == "cpu":
        patch(f"{TRITON}.DEVICES", ("cpu",)).start()
        patch("gpu_lstm.dispatch.available.why_unavailable", nothing).start()
        patch("gpu_lstm.call.prepare.only_torch_runs", nothing).start()
        patch.multiple(
            f"{TRITON}.launch", launch_kernel=None, load=lambda *_: defaultdict(lambda: nothing),
            choose_plan=lambda problem, device, pass_, *_: plans(problem, h100, pass_.backward)[0],
        ).start()  # fmt: skip


def nothing(*_: Any, **__: Any) -> None: ...


def runs_kernels(call: Callable[[], Any]) -> bool:
    """Whether a call enters a file of the Triton kernels in this thread. (On CUDA backward has a thread of its own.)"""
    files = set()
    sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename))
    try:
        call()
    finally:
        sys.setprofile(None)
    return any("triton_rnn" in file for file in files)


@functools.cache
def ready(case: str, mode: str) -> dict[Any, Callable[[], Any]]:
    """Return warmed-up calls by (device, provider). Each was checked to run kernels exactly if it should."""
    calls = {place: made(case, mode, *place) for place in PLACES}
    for (_, provider), call in calls.items():
        for _ in range(20):  # warm-up
            call()
        launched = runs_kernels(call)
        if launched != (provider == KERNELS) and (CARD == "cpu" or case != "Stream"):  # a Stream replays its graph
            raise ProviderFailed(provider, f"{case}, {mode}: kernels were{' not' * (not launched)} launched")
    gc.freeze()  # so that garbage collection before each sample is fast
    return calls


def sample(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Return the seconds per call, averaged over `repeats` calls."""
    synchronize = torch.cuda.synchronize if CARD == "cuda" else nothing
    gc.collect()
    gc.disable()
    call()  # other calls have displaced its code from the processor's caches
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = time.perf_counter() - start
    gc.enable()
    synchronize()
    return taken / repeats


def measure(case: str, mode: str, rounds: int, tell: Callable[[str], None]) -> tuple[list[Any], dict[Any, Any]]:
    """Return the provenance of each device, and the seconds of every call in every round. All calls take turns."""
    tell(KERNELS)
    try:
        stub()
        with torch.set_grad_enabled(mode != "inference"):
            seconds = timing.interleaved(ready(case, mode), CARD, 0.0, (rounds, rounds), sample)
    except (ImportError, AttributeError, TypeError) as error:  # this commit of gpu_lstm differs too much
        raise ProviderFailed(KERNELS, f"{type(error).__name__}: {error}") from error
    return [results.provenance(device) for device in dict.fromkeys([CARD, "cpu"])], seconds


def line(case: str, mode: str, place: tuple[str, str], found: dict[str, list[Any]]) -> dict[str, str]:
    """Return a line of the table from the seconds of each side's turns.

    `ratio` is the median over the rounds of the time divided by torch.nn's time.
    """
    cells = {"case": case, "mode": mode, "provider": place[1]}
    for side, turns in found.items():
        mine, torchs = (np.concatenate([turn[of] for turn in turns]) for of in (place, (place[0], YARDSTICK)))
        us = {"us": np.median(mine)} | ({"nn us": np.median(torchs)} if len(found) == 1 else {})
        ratios = {"ratio": np.median(mine / torchs), "of least": mine.min() / torchs.min()}
        cells |= {side + name: f"{1e6 * value:.1f}" for name, value in us.items()}
        cells |= {side + name: f"{value:.2f}" for name, value in ratios.items()}
    return cells


def run(names: list[str], commit: str | None) -> int:
    """Measure cases and print a table. If a commit is given, measure it in turns with this one."""
    cases = [(case, mode) for case in names for mode in MODES if case != "Stream" or mode == "inference"]
    lines, origins = [], []
    with ExitStack() as stack:
        paths = {"old ": stack.enter_context(checkout(commit))} if commit else {}
        sides = {side: stack.enter_context(closing(Worker(measure, paths.get(side), LIMIT_S))) for side in (*paths, "")}
        for case, mode in track(cases, "calls on the host", console=Console(stderr=True), transient=True):
            found: dict[str, list[Any]] = {side: [] for side in sides}
            for side in [*sides] * TURNS:
                try:
                    origin, seconds = sides[side](case, mode, ROUNDS)
                except ProviderFailed as error:
                    if not side:
                        raise
                    raise ValueError(f"{commit} is too old to be measured: {error.args[1]}") from error
                found[side].append(seconds)
                origins += origin
            lines += [line(case, mode, place, found) for place in PLACES if place[1] != YARDSTICK]
    told = "kernels are launched" if CARD == "cuda" else "kernels are planned for an H100, their launches do nothing"
    cells, caption = pd.DataFrame(lines), f"{told}; {report.origin(pd.DataFrame(origins))}"
    report.console().print(report.table(cells, "A call on the host", caption))
    return 0
