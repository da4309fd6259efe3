"""One case by all its providers: built, found right against float64, and only then timed, in turn."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ceilings, timing
from .cases import Case
from .problem import Problem, results_in
from .providers import PROVIDERS, YARDSTICK, ours, torch_lstm
from .providers.engine import Engine, Unable
from .results import Row, provenance

SECONDS = 8.0  # of timing, a case
ALLOWED = 2.0  # times torch's own error in the same dtype
SANITY = 8.0  # times the error of torch.lstm_cell, for torch.nn.LSTM itself, whose error is the measure of the rest
GRAPHED = {*torch_lstm.NAMES, *ours.NAMES} - {"ours-reference"}  # on CUDA also replayed from a graph


class ProviderFailed(Exception):
    """A provider raised: its name, and what."""

    def __init__(self, provider: str, text: str) -> None:
        super().__init__(provider, text)  # both, so that it survives pickling
        self.provider, self.text = provider, text


def run_case(
    case: Case,
    names: list[str],
    device: str,
    failed: dict[str, str],
    tell: Callable[[str], None] = lambda provider: None,
) -> list[Row]:
    """Rows of a case, one or more for each provider of `names`, the yardstick among them.

    Args:
        case, names, device: what to run, by whom, where.
        failed: providers that failed before, and how: they are not tried again.
        tell: called with the name of the provider in hand, so that whoever waits knows which one hangs.

    Raises:
        ProviderFailed: a provider raised. The device may be unusable from then on.
    """
    with float32_products(case.dtype):
        problem = Problem.of(case, device)
        notes: dict[str, dict[str, Any]] = {name: {"status": "failed", "note": text} for name, text in failed.items()}
        trials: dict[str, _Trial] = {}
        truths: dict[Case, _Truth] = {}
        torchs_own: dict[str, float] = {}  # errors of the yardstick
        for name in names:
            if name in failed:
                continue
            tell(name)
            try:
                reason = PROVIDERS[name].absent(name, device)
                if reason is not None:
                    notes[name] = {"status": "absent", "note": reason}
                    continue
                trials[name] = trial = _Trial(name, problem)
                if trial.problem.case not in truths:
                    truths[trial.problem.case] = _Truth(trial.problem)
                truth = truths[trial.problem.case]
                errors = truth.errors(trial.results())
                if name == YARDSTICK:
                    torchs_own = errors
                    notes[name] = trial.judged(truth.over_allowed(errors, {}, SANITY))
                else:
                    notes[name] = trial.judged(truth.over_allowed(errors, torchs_own, ALLOWED))
            except Unable as error:
                notes[name] = {"status": "unable", "note": str(error)}
            except Exception as error:
                raise ProviderFailed(name, f"{type(error).__name__}: {error}") from error
        truths.clear()

        ceiling = ceilings.measured(case.dtype, device)
        right = {name: trial for name, trial in trials.items() if notes[name]["status"] in ("measured", "yardstick")}
        runs: dict[tuple[str, bool], timing.Run] = {}
        for name, trial in right.items():
            tell(name)
            try:
                notes[name] |= trial.memory(device)
                runs[name, False] = trial.run
                if device != "cpu" and name in GRAPHED:
                    runs[name, True] = timing.captured(trial.run)
            except Exception as error:
                raise ProviderFailed(name, f"{type(error).__name__}: {error}") from error
        tell("all, timed in turn")
        taken = timing.interleaved(runs, device, SECONDS)

        rows = [unmeasured(case, name, device, **notes[name]) for name in names if name not in right]
        baseline = taken.get((YARDSTICK, False))
        for (name, graph), seconds in taken.items():
            figures = notes[name] | _figures(case, ceiling, seconds, baseline)
            rows.append(Row(**provenance(device), **_fields(case), provider=name, graph=graph, **figures))
        return rows


def unmeasured(
    case: Case, provider: str, device: str, status: str, note: str | None, error: float | None = None
) -> Row:
    """The row of a provider that was not timed, and why."""
    return Row(
        **provenance(device), **_fields(case), provider=provider, graph=False, status=status, note=note, error=error
    )


class _Trial:
    """A provider that has built its engine: it is judged, weighed and run."""

    def __init__(self, name: str, problem: Problem) -> None:
        self.status = "measured"
        self.problem = problem
        try:
            self.engine: Engine = PROVIDERS[name].build(name, problem)
        except Unable:
            if name != YARDSTICK:
                raise
            self.status, self.problem = "yardstick", problem.plain()
            self.engine = PROVIDERS[name].build(name, self.problem)
        self.training = problem.case.run == "training"
        self.inputs = [self.problem.given(x) for x in self.problem.xs]  # of (leaf, what is handed in)
        dy = self.problem.dy
        self.dy = self.problem.packed(dy).data if self.problem.case.sequences == "packed" else dy

    def run(self, call: int) -> tuple[Any, tuple[Tensor, ...]]:
        """One call, with backward if the case has it: (output, h_n, c_n) and the gradients of all leaves."""
        leaf, given = self.inputs[call % len(self.inputs)]
        with self.engine.within():
            if not self.training:
                with torch.no_grad():
                    return self.engine.call(given), ()
            results = self.engine.call(given)
            return results, torch.autograd.grad(_data(results[0]), list(self._leaves(leaf).values()), self.dy)

    def results(self) -> dict[str, Tensor]:
        """Output, final states and, for training, every gradient, by the names that `problem.results_in` gives."""
        (y, h_n, c_n), gradients = self.run(0)
        found = {"output": self.problem.padded(y), "h_n": h_n, "c_n": c_n}
        if self.training:
            by_leaf = dict(zip(self._leaves(self.inputs[0][0]), gradients))
            found["dx"] = self._dx(by_leaf)
            found |= {f"d{state}": by_leaf[state] for state in ("h0", "c0") if state in by_leaf}
            parameters = {name: by_leaf[name] for name in self.engine.parameters}
            found |= {f"d{name}": gradient for name, gradient in self.engine.to_torch(parameters).items()}
        return found

    def judged(self, over_allowed: dict[str, float]) -> dict[str, Any]:
        """Status, note and error, given every result's error over what is allowed."""
        worst = max(over_allowed, key=lambda name: (math.isnan(over_allowed[name]), over_allowed[name]))
        error = over_allowed[worst]
        if not error <= 1:
            return {"status": "wrong", "note": f"error of {worst} is {error:.2g} times what is allowed", "error": error}
        note = "without the lengths and resets" if self.status == "yardstick" else self.engine.kernels
        return {"status": self.status, "note": note, "error": error}

    def memory(self, device: str) -> dict[str, Any]:
        """Peak bytes of a call and, for training, the bytes kept between forward and backward."""
        peak = timing.peak_bytes(self.run, device)
        if not self.training:
            return {"peak_bytes": peak}
        leaf, given = self.inputs[0]
        with timing.kept_for_backward(list(self._leaves(leaf).values())) as kept, self.engine.within():
            self.engine.call(given)
        return {"peak_bytes": peak, "kept_bytes": kept()}

    def _leaves(self, leaf: Tensor) -> dict[str, Tensor]:
        states = {"h0": self.engine.h0, "c0": self.engine.c0}
        return {"x": leaf, **{name: t for name, t in states.items() if t is not None}, **self.engine.parameters}

    def _dx(self, by_leaf: dict[str, Tensor]) -> Tensor:
        given = self.inputs[0][1]
        dx = by_leaf["x"]
        return self.problem.padded(given._replace(data=dx) if isinstance(given, PackedSequence) else dx)


class _Truth:
    """What float64 says of a problem, and how far torch.lstm_cell is from it in the dtype of the case."""

    def __init__(self, problem: Problem) -> None:
        dtype = problem.case.torch_dtype
        self._true = results_in(torch.float64, problem)
        self._cell = self.errors(results_in(dtype, problem))
        self._least = torch.finfo(dtype).eps / ALLOWED  # an error that nothing can be blamed for

    def errors(self, found: dict[str, Tensor]) -> dict[str, float]:
        """Of each result, relative, by the Euclidean norm; absolute where the truth is zero."""
        return {name: _error(result, self._true[name]) for name, result in found.items()}

    def over_allowed(self, errors: dict[str, float], torchs_own: dict[str, float], factor: float) -> dict[str, float]:
        """Each error over `factor` times torch's own: that of its cell, or if larger of its module."""
        return {
            name: error / (factor * max(self._cell[name], torchs_own.get(name, 0.0), self._least))
            for name, error in errors.items()
        }


def _data(output: Tensor | PackedSequence) -> Tensor:
    return output.data if isinstance(output, PackedSequence) else output


def _error(found: Tensor, true: Tensor) -> float:
    if found.shape != true.shape:
        return float("nan")
    difference, size = (found.double() - true.double()).norm().item(), true.double().norm().item()
    return difference / (size or 1.0)


def _fields(case: Case) -> dict[str, Any]:
    return {"case": case.name, **asdict(case)}


def _figures(
    case: Case, ceiling: ceilings.Ceilings, seconds: list[float], baseline: list[float] | None
) -> dict[str, Any]:
    median, p20, p80 = timing.percentiles(seconds)
    bound = ceiling.bound_s(case)
    figures = {
        "runs": len(seconds), "median_s": median, "p20_s": p20, "p80_s": p80, "us_per_step": median / case.steps * 1e6,
        "bound_s": bound, "bound_fraction": bound / median, **asdict(ceiling),
    }  # fmt: skip
    if baseline is not None:
        speed, low, high = timing.percentiles([theirs / mine for theirs, mine in zip(baseline, seconds)])
        figures |= {"speed": speed, "speed_p20": low, "speed_p80": high}
    return figures


@contextlib.contextmanager
def float32_products(dtype: str) -> Iterator[None]:
    """Products of float32 tensors in TF32 within the block, or exactly, as the case's dtype says."""
    tf32 = dtype == "tf32"
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
