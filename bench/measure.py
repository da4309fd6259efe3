"""Run cases by all their providers. They are built, checked against float64, and only then timed, in turns."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_packed_sequence

from . import results, timing
from .cases import Case, grid
from .inputs import NOISE_SEED, Inputs, named_finals, results_in
from .isolated import ProviderFailed, Worker
from .providers import OURS, PROVIDERS, YARDSTICK, YARDSTICKS, taking_part
from .providers.engine import Unable

SECONDS = 8.0  # time for the timing of a case
ALLOWED = 2.0  # the largest error, as a multiple of torch's own error in the same dtype
SANITY = 8.0  # the largest error of torch's module, by which others are judged, as a multiple of torch's cell's error
# torch's warning that cuDNN copies the weights at every call. Only the unchanged torch.nn.LSTM may be timed with it.
COPIES = "RNN module weights are not part of single contiguous chunk of memory"
GRAPH = " (graph)"  # follows the name of a provider whose call is captured in a CUDA graph
Row = dict[str, Any]  # by results.COLUMNS; a column without a value may be left out


def measure(
    cases: list[Case], names: list[str] | None, device: str, sides: dict[Path, Path | None], deadline: float = math.inf
) -> list[Case]:
    """Run `cases` until the `deadline`, a time of time.monotonic(), and return the rest. Write the rows of each case.

    `sides` are the new files, each with the folder to import gpu_lstm from, or None for this checkout. Several sides
    take turns.
    """
    for file in sides:
        results.create(file)
    torch.set_num_threads(1)  # several threads stall each other, up to 100-fold, beside another program
    headline = grid("cpu" if device == "cpu" else "cuda")["headline"]
    with ExitStack() as stack:
        run: dict[Path, Any] = dict.fromkeys(sides, run_case)
        if device != "cpu" or len(sides) > 1:  # in separate processes
            run = {file: stack.enter_context(closing(Worker(run_case, path))) for file, path in sides.items()}
        for number, case in enumerate(cases):
            if time.monotonic() > deadline:
                return cases[number:]
            print(f"case {number + 1} of {len(cases)}: {case.name}", flush=True)
            for file in list(sides)[:: -1 if number % 2 else 1]:  # the sides take turns in being first
                for row in rows_of(case, taking_part(names, case in headline), device, run[file]):
                    results.append(file, row)
    return []


def rows_of(case: Case, names: list[str], device: str, run: Callable[..., list[Row]]) -> list[Row]:
    """Return the rows of one case by `run`. Providers that fail get a row that says so, and the others run without
    them.

    If only the capture of a provider fails, the provider is timed without a graph. This is done in another process,
    since a broken capture may leave the memory and the random numbers of this process unusable.
    """
    failed: dict[str, str] = {}
    while not failed.keys() >= set(names):
        try:
            return run(case, names, device, failed)
        except ProviderFailed as error:
            provider, text = error.args
            # If the name is none of these, all of them failed.
            failed |= dict.fromkeys([provider] if provider.removesuffix(GRAPH) in names else names, text)
    return [_row(case, name, device, status="failed", note=failed[name]) for name in names]


def run_case(
    case: Case, names: list[str], device: str, failed: dict[str, str], tell: Callable[[str], None] = lambda name: None
) -> list[Row]:
    """Return the rows of a case by the providers `names`, the yardstick first.

    `tell` is called with the name of the provider that runs next. If a provider raises, ProviderFailed is raised, since
    the device may then be unusable. Providers and captures that are in `failed` are not tried again.
    """
    torch.set_num_threads(1)  # as in `measure`, since this may be another process
    outcomes: dict[str, Row] = {name: {"status": "failed", "note": text} for name, text in failed.items()}
    calls: dict[tuple[str, bool], Callable[[], object]] = {}
    with timing.float32_products(case.dtype):
        inputs, gate = Inputs.of(case, device), Gate()
        for name in (name for name in names if name not in failed):
            tell(running := name)
            try:
                if (reason := PROVIDERS[name].absent(device)) is not None:
                    outcomes[name] = {"status": "absent", "note": reason}
                    continue
                trial = Trial(name, inputs)
                with warnings.catch_warnings():
                    if name != YARDSTICK:
                        warnings.filterwarnings("error", COPIES)
                    outcomes[name] = gate.judge(trial)
                if outcomes[name]["status"] in results.TIMED:
                    outcomes[name] |= trial.memory(device)
                    calls[name, False] = trial.call
                    if device != "cpu" and PROVIDERS[name].graphed and name + GRAPH not in failed:
                        tell(running := name + GRAPH)
                        calls[name, True] = timing.captured(trial.call)
            except (Unable, UserWarning) as error:
                outcomes[name] = {"status": "unable", "note": str(error)}
            except Exception as error:
                raise ProviderFailed(running, f"{type(error).__name__}: {error}") from error
        del gate  # and with it the results in float64
        tell("all, timed in turn")
        copy, product = timing.ceilings(case.dtype, device)
        seconds = timing.interleaved(calls, device, SECONDS)
    of_all = {"copy_bytes_per_s": copy, "product_flops_per_s": product, **results.card_state(device)}
    of_all["bound_s"] = max(case.operations() / product, case.bytes_moved() / copy)
    rows = []
    for name in names:
        if (name, False) not in calls:
            rows.append(_row(case, name, device, **outcomes[name]))
        elif name + GRAPH in failed:
            note = f"not captured: {failed[name + GRAPH]}"
            rows.append(_row(case, name, device, graph=True, status="failed", note=note))
    for (name, graph), figures in _figures(seconds).items():
        rows.append(_row(case, name, device, graph=graph, **figures, **of_all, **outcomes[name]))
    return rows


def _figures(seconds: dict[tuple[str, bool], np.ndarray]) -> dict[tuple[str, bool], Row]:
    """Return the columns of times from the seconds of each round, by (provider, whether it ran as a graph)."""
    best = min((seconds[name, False] for name in YARDSTICKS if (name, False) in seconds), key=np.median, default=None)
    rows: dict[tuple[str, bool], Row] = {}
    for each, mine in seconds.items():
        rows[each] = {"rounds": len(mine), **dict(zip(("median_s", "p20_s", "p80_s"), timing.percentiles(mine)))}
        if best is not None:
            rows[each] |= zip(("speed", "speed_p20", "speed_p80"), timing.percentiles(best / mine))
        if (OURS, False) in seconds:
            ratios = timing.bootstrapped(mine / seconds[OURS, False])
            rows[each] |= zip(("over_ours", "over_ours_low", "over_ours_high"), ratios)
    return rows


def _row(case: Case, provider: str, device: str, graph: bool = False, **columns: Any) -> Row:
    columns_of_case = {"case": case.name, **asdict(case), "provider": provider, "graph": graph}
    return results.provenance(device) | columns_of_case | columns


class Trial:
    """The engine of a provider for a case, and the leaves of its gradients.

    The constructor raises Unable if the provider does not support the case. A yardstick runs the plain case instead.
    """

    def __init__(self, name: str, inputs: Inputs) -> None:
        self.name, self.status, self.training = name, "measured", inputs.case.training
        try:
            self.engine = PROVIDERS[name].build(inputs)
        except Unable:
            if name not in YARDSTICKS:
                raise
            self.status, inputs = "yardstick", inputs.plain()
            self.engine = replace(PROVIDERS[name].build(inputs), kernels=lambda: "without lengths, resets or variant")
        self.inputs = inputs
        self.form = inputs.packed(inputs.dy) if inputs.case.sequences == "packed" else None
        x, self.dy = (t if self.form is None else inputs.packed(t).data for t in (inputs.x, inputs.dy))
        copies = (t.detach().clone().requires_grad_(self.training) for t in (x, *inputs.states))
        self.leaves = [*copies, *self.engine.parameters.values()]

    def forward(self) -> tuple[Any, Any]:
        x, *states = self.leaves[: 1 + len(self.inputs.states)]
        return self.engine.call(x if self.form is None else self.form._replace(data=x), tuple(states))

    def call(self) -> tuple[Any, tuple[Tensor, ...]]:
        """Run one call, with backward in training. Return (output, h_n, c_n) and the gradients of all leaves."""
        with torch.set_grad_enabled(self.training):
            y, finals = self.forward()
            y = y if self.form is None else y.data
            return (y, *finals), torch.autograd.grad(y, self.leaves, self.dy) if self.training else ()

    def memory(self, device: str) -> Row:
        peak: Row = {} if device == "cpu" else {"peak_bytes": timing.peak_bytes(self.call, device)}
        return peak | ({"kept_bytes": timing.kept_bytes(self.forward, self.leaves)} if self.training else {})

    def results(self) -> dict[str, Tensor]:
        """Return the results of a call, named as by `inputs.results_in`."""
        torch.manual_seed(NOISE_SEED)
        (y, *finals), gradients = self.call()
        # dm0 is left out, since some providers take it for zero.
        of_states = [f"d{name}0" for name, _ in zip("hcn", self.inputs.states)]
        named = {"output": y} | named_finals(tuple(finals)) | dict(zip(("dx", *of_states), gradients))
        if self.form is not None:
            for name in named.keys() & {"output", "dx"}:
                packed = self.form._replace(data=named[name])
                named[name] = pad_packed_sequence(packed, total_length=self.inputs.case.steps)[0]
        return named | (self.engine.named(gradients[1 + len(self.inputs.states) :]) if self.training else {})


class Gate:
    """Decide whether results are right: the error may be ALLOWED times torch's own error in the same dtype."""

    def __init__(self) -> None:
        self._truths: dict[Case, tuple[dict[str, Tensor], dict[str, float]]] = {}  # with the errors of torch's cell
        self._torchs: dict[str, float] = {}  # errors of torch.nn.LSTM

    def judge(self, trial: Trial) -> Row:
        case, dtype, values = trial.inputs.case, trial.inputs.case.torch_dtype, trial.results()
        if case not in self._truths:
            true = results_in(torch.float64, trial.inputs)
            self._truths[case] = true, relative_errors(results_in(dtype, trial.inputs), true)
        true, cells = self._truths[case]
        errors = relative_errors(values, {name: t for name, t in true.items() if values.get(name, t) is not None})
        factor, torchs = (SANITY, {}) if trial.name == YARDSTICK else (ALLOWED, self._torchs)
        least = torch.finfo(dtype).eps / ALLOWED  # a smaller error is never a fault
        over = {name: errors[name] / (factor * max(cells[name], torchs.get(name, 0.0), least)) for name in errors}
        worst = max(over, key=lambda name: (math.isnan(over[name]), over[name]))
        status, note = trial.status, trial.engine.kernels()
        if not over[worst] <= 1:
            status, note = "wrong", f"error of {worst} is {over[worst]:.2g} times what is allowed"
        elif trial.name == YARDSTICK:
            self._torchs = errors
        return {"status": status, "note": note, "error": over[worst]}


def relative_errors(values: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Return the error of each result, relative to the truth in the Euclidean norm.

    The error is absolute if the truth is 0, and NaN if the result is missing.
    """
    errors = dict.fromkeys(true, math.nan)
    for name, truth in true.items():
        if name in values and values[name].shape == truth.shape:
            errors[name] = (values[name].detach().double() - truth).norm().item() / (truth.norm().item() or 1.0)
    return errors
