"""Cases by all their providers: built, found right against float64, and only then timed, in turn."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import results, timing
from .cases import Case, grid
from .inputs import Inputs, data_of, results_in
from .isolated import ProviderFailed, Worker
from .providers import PROVIDERS, YARDSTICK, taking_part
from .providers.engine import Unable

SECONDS = 8.0  # of timing, a case
ALLOWED = 2.0  # times torch's own error in the same dtype
SANITY = 8.0  # times the error of torch.lstm_cell, for torch.nn.LSTM itself, whose error is the measure of the rest

Row = dict[str, Any]
"""Columns of results.COLUMNS; those without a value may be left out."""


def measure(
    cases: list[Case], names: list[str] | None, device: str, sides: dict[Path, Path | None], deadline: float = math.inf
) -> list[Case]:
    """Run `cases` one after another, every row in its file before the next starts; those there was no time for.

    Args:
        cases: what to run, in this order.
        names: who takes part; None for all in the headline, and in the other cases those that say so.
        device: "cpu", or a CUDA device, where cases run in a process of their own.
        sides: new files, and for each the folder to import gpu_lstm from; None for the gpu_lstm that is imported here.
            Several sides take turns case by case, each in a process of its own.
        deadline: by time.monotonic(); no case is begun after it.
    """
    for file in sides:
        results.create(file)
    torch.set_num_threads(1)  # several stall each other, by a factor of 100, where anything else wants a core
    headline = grid("cpu" if device == "cpu" else "cuda")["headline"]
    with contextlib.ExitStack() as stack:
        run: dict[Path, Callable[..., list[Row]]] = dict.fromkeys(sides, run_case)
        if device != "cpu" or len(sides) > 1:
            run = {file: stack.enter_context(Worker(run_case, path)) for file, path in sides.items()}
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        bar = stack.enter_context(Progress(*columns, transient=True))
        task = bar.add_task("", total=len(cases))
        for number, case in enumerate(cases):
            if time.monotonic() > deadline:
                return cases[number:]
            bar.update(task, description=case.name)
            for file in list(sides)[:: -1 if number % 2 else 1]:  # now the one side first, now the other
                for row in _rows(case, taking_part(names, case in headline), device, run[file]):
                    results.append(file, row)
            bar.advance(task)
    return []


def _rows(case: Case, names: list[str], device: str, run: Callable[..., list[Row]]) -> list[Row]:
    """Of one case. Providers that fail are named as failed, and the others run without them."""
    failed: dict[str, str] = {}
    while set(failed) != set(names):
        try:
            return run(case, names, device, failed)
        except ProviderFailed as error:
            blamed = [error.provider] if error.provider in names else names  # where nobody in particular: everybody
            failed |= {name: error.text for name in blamed}
    return [_row(case, name, device, status="failed", note=text) for name, text in failed.items()]


def run_case(
    case: Case, names: list[str], device: str, failed: dict[str, str], tell: Callable[[str], None] = lambda name: None
) -> list[Row]:
    """Rows of a case, one or more for each provider of `names`, of whom the yardstick is the first.

    Those that `failed` before, and how, are not tried again. `tell` is called with the name of the provider in hand,
    so that whoever waits knows which one hangs. Raises ProviderFailed where one raises; the device may be unusable
    from then on.
    """
    torch.set_num_threads(1)  # as in `measure`: this may be a process of its own
    outcomes: dict[str, Row] = {name: {"status": "failed", "note": text} for name, text in failed.items()}
    trials: dict[str, Trial] = {}
    calls: dict[tuple[str, bool], timing.Call] = {}
    with timing.float32_products(case.dtype):
        inputs, gate = Inputs.of(case, device), Gate()
        for name in (name for name in names if name not in failed):
            with _blaming(name, tell):
                if (reason := PROVIDERS[name].absent(device)) is not None:
                    outcomes[name] = {"status": "absent", "note": reason}
                    continue
                try:
                    trial = Trial(name, inputs)
                except Unable as error:
                    outcomes[name] = {"status": "unable", "note": str(error)}
                    continue
                outcomes[name] = gate.judge(trial)
                if outcomes[name]["status"] in results.TIMED:
                    trials[name] = trial
        del gate  # and what it knows from float64
        for name, trial in trials.items():
            with _blaming(name, tell):
                outcomes[name] |= trial.memory(device)
                calls[name, False] = trial.call
                if device != "cpu" and PROVIDERS[name].graphed:
                    calls[name, True] = timing.captured(trial.call)
        tell("all, timed in turn")
        copy, product = timing.ceilings(case.dtype, device)
        seconds = timing.interleaved(calls, device, SECONDS)

    rows = [_row(case, name, device, **outcomes[name]) for name in names if name not in trials]
    bound = max(case.operations() / product, case.bytes_moved() / copy)
    ceilings = {"bound_s": bound, "copy_bytes_per_s": copy, "product_flops_per_s": product}
    for (name, graph), mine in seconds.items():
        figures = dict(zip(("median_s", "p20_s", "p80_s"), timing.percentiles(mine)))
        if (YARDSTICK, False) in seconds:
            speeds = timing.percentiles(seconds[YARDSTICK, False] / mine)
            figures |= zip(("speed", "speed_p20", "speed_p80"), speeds)
        rows.append(_row(case, name, device, graph=graph, rounds=len(mine), **figures, **ceilings, **outcomes[name]))
    return rows


def _row(case: Case, provider: str, device: str, **columns: Any) -> Row:
    given = {"case": case.name, **asdict(case), "provider": provider, "graph": False}
    return {**results.provenance(device), **given, **columns}


@contextlib.contextmanager
def _blaming(provider: str, tell: Callable[[str], None]) -> Iterator[None]:
    """What is raised within the block is this provider's fault."""
    tell(provider)
    try:
        yield
    except Exception as error:
        raise ProviderFailed(provider, f"{type(error).__name__}: {error}") from error


class Trial:
    """A provider's engine, and the leaves that gradients are taken of. Raises Unable; the yardstick does its best."""

    def __init__(self, name: str, inputs: Inputs) -> None:
        self.name, self.status, self.inputs = name, "measured", inputs
        try:
            self.engine = PROVIDERS[name].build(inputs)
        except Unable:
            if name != YARDSTICK:
                raise
            self.status, self.inputs = "yardstick", inputs.plain()
            self.engine = PROVIDERS[name].build(self.inputs)
        self.training = inputs.case.training
        h0, c0, *self.xs = (
            t.detach().clone().requires_grad_(self.training)
            for t in (inputs.h0, inputs.c0, *(data_of(self.inputs.as_given(x)) for x in inputs.xs))
        )
        self.states, self.given = (h0, c0), self.inputs.as_given(inputs.xs[0])  # the latter for its form
        self.dy = data_of(self.inputs.as_given(inputs.dy))

    def call(self, number: int) -> tuple[Any, tuple[Tensor, ...]]:
        """One call, with backward if the case has it: (output, h_n, c_n) and the gradients of all leaves."""
        with self.engine.within(), torch.set_grad_enabled(self.training):
            found = self._forward(number)
            gradients = torch.autograd.grad(data_of(found[0]), self._leaves(number), self.dy) if self.training else ()
            return found, gradients

    def results(self) -> dict[str, Tensor]:
        """Output, final states and, for training, every gradient, by the names that `inputs.results_in` gives."""
        (y, h_n, c_n), gradients = self.call(0)
        found = {"output": self.inputs.padded(y), "h_n": h_n, "c_n": c_n}
        if self.training:
            dx, dh0, dc0, *others = gradients
            parameters = self.engine.to_torch(dict(zip(self.engine.parameters, others)))
            found |= {"dx": self.inputs.padded(self._batch(dx)), "dh0": dh0, "dc0": dc0}
            found |= {f"d{name}": gradient for name, gradient in parameters.items()}
        return found

    def memory(self, device: str) -> Row:
        """Peak bytes of a call and, for training, the bytes kept between forward and backward."""
        with self.engine.within():
            kept = timing.kept_bytes(lambda: self._forward(0), self._leaves(0)) if self.training else None
        return {"peak_bytes": timing.peak_bytes(self.call, device), "kept_bytes": kept}

    def _batch(self, data: Tensor) -> Any:
        return self.given._replace(data=data) if isinstance(self.given, PackedSequence) else data

    def _forward(self, number: int) -> Any:
        return self.engine.call(self._batch(self.xs[number % len(self.xs)]), *self.states)

    def _leaves(self, number: int) -> list[Tensor]:
        return [self.xs[number % len(self.xs)], *self.states, *self.engine.parameters.values()]


class Gate:
    """Tells who is right: against float64, with at most ALLOWED times torch's own error in the dtype of the case."""

    def __init__(self) -> None:
        self._truths: dict[Case, tuple[dict[str, Tensor], dict[str, float]]] = {}  # and the errors of torch.lstm_cell
        self._torchs: dict[str, float] = {}  # errors of torch.nn.LSTM

    def judge(self, trial: Trial) -> Row:
        """Status, note and error of a provider."""
        case, dtype = trial.inputs.case, trial.inputs.case.torch_dtype
        if case not in self._truths:
            true = results_in(torch.float64, trial.inputs)
            self._truths[case] = true, _errors(results_in(dtype, trial.inputs), true)
        true, cells = self._truths[case]
        errors = _errors(trial.results(), true)
        factor, torchs = (SANITY, {}) if trial.name == YARDSTICK else (ALLOWED, self._torchs)
        least = torch.finfo(dtype).eps / ALLOWED  # an error that nothing can be blamed for
        over = {name: errors[name] / (factor * max(cells[name], torchs.get(name, 0.0), least)) for name in errors}
        worst = max(over, key=lambda name: (math.isnan(over[name]), over[name]))
        if not over[worst] <= 1:
            note = f"error of {worst} is {over[worst]:.2g} times what is allowed"
            return {"status": "wrong", "note": note, "error": over[worst]}
        if trial.name == YARDSTICK:
            self._torchs = errors
        note = "without the lengths and resets" if trial.status == "yardstick" else trial.engine.kernels
        return {"status": trial.status, "note": note, "error": over[worst]}


def _errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Of every true result, relative, by the Euclidean norm; absolute where it is zero; NaN where none was found."""

    def error(result: Tensor | None, truth: Tensor) -> float:
        if result is None or result.shape != truth.shape:
            return math.nan
        return (result.double() - truth).norm().item() / (truth.norm().item() or 1.0)

    return {name: error(found.get(name), truth) for name, truth in true.items()}
