"""python -m bench host: microseconds that a call costs on the host, against the whole call of torch.nn.

The calls are timed by gpu_lstm of any commit, in a process of their own. With a GPU kernels are launched there, and the
clock stops before the device is done. Without one the CPU counts as an H100: kernels are planned for it, their launches
do nothing, and all else runs. Triton's launcher and CUDA's own calls are not in those figures.
"""

import argparse
import datetime
import functools
import gc
import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gpu_lstm

from . import report, results, timing
from .inside import CHOOSE, LAUNCH, inside
from .isolated import ROOT, ProviderFailed, Worker, checkout

Place = tuple[str, str]  # device and provider
CARD = "cuda" if torch.cuda.is_available() else "cpu"
YARDSTICK, KERNELS, TORCH = "torch.nn", "kernels", "torch"  # TORCH: backend "torch", on the CPU
PLACES: tuple[Place, ...] = (*dict.fromkeys([(CARD, YARDSTICK), (CARD, KERNELS), ("cpu", YARDSTICK), ("cpu", TORCH)]),)
MODES = ("inference", "forward+graph", "training")
CASES = {
    "T=1": (1, 1), "T=128": (128, 16), "two layers, bidirectional": (128, 16), "StackedLSTM": (128, 16),
    "LSTMCell": (1, 1), "lengths": (128, 16), "resets": (128, 16), "one step with resets": (1, 16), "Stream": (1, 1),
}  # fmt: skip
"""T and B. torch.nn does lengths by a PackedSequence, and resets, of the first step alone, by masking its state."""
I, H = 8, 8  # so small that the matmuls take hardly any time
WARM_UP = 20
TURNS, ROUNDS = 4, 40  # of each commit, case by case; in each turn
LIMIT_S = 300.0  # of a turn: the first compiles kernels on a GPU
TIMES = ["median_s", "least_s", "torch_median_s", "torch_least_s"]
RATIOS = ["ratio", "ratio_of_least", "target"]  # to torch.nn, both of one round, the median; of the least of all rounds
COUNTS = ["calls", "functions", "files", "file_changes"]  # of one call; all but `calls` are gpu_lstm's own
COLUMNS = [*results.PROVENANCE, "base", "case", "mode", "provider", "rounds", *TIMES, *RATIOS, *COUNTS]


def made(case: str, mode: str, device: str, provider: str) -> Callable[[], Any]:
    """A call of a case that returns its output; in training, the gradients of its parameters."""
    (T, B), n, torchs = CASES[case], 2 if case.startswith("two") else 1, provider == YARDSTICK
    package: Any = nn if torchs else gpu_lstm
    on: Any = {"device": device} | ({"backend": "torch"} if provider == TORCH else {})
    x, h, wide = (torch.rand(*size, device=device) for size in ((T, B, I), (n * n, B, H), (1, B, 2 * H)))
    lstm, cell = package.LSTM(I, H, n, bidirectional=n == 2, **on), package.LSTMCell(I, H, **on)
    stack: Any = nn.LSTM(H, 2 * H, **on) if torchs else gpu_lstm.StackedLSTM(I, [H, 2 * H], **on)
    hx, above, of_cell, step = (h, h), (wide, wide), (h[0], h[0]), x[0]
    stream: Any = None if torchs or n == 2 else gpu_lstm.Stream(lstm, B, hx)
    lengths, resets = torch.linspace(1, T, B).long(), torch.arange(T * B, device=device).view(T, B) % 5 == 0
    of_device, first = lengths.to(device), resets[0, :, None]
    pack = functools.partial(pack_padded_sequence, lengths=lengths, enforce_sorted=False)
    calls: dict[tuple[str, bool], Callable[[], Any]] = {
        ("LSTMCell", torchs): lambda: cell(step, of_cell)[0],
        ("StackedLSTM", False): lambda: stack(x, [of_cell, (wide[0], wide[0])])[0],
        ("StackedLSTM", True): lambda: stack(lstm(x, hx)[0], above)[0],
        ("lengths", False): lambda: lstm(x, hx, lengths=of_device)[0],
        ("lengths", True): lambda: pad_packed_sequence(lstm(pack(x), hx)[0])[0],
        ("resets", False): lambda: lstm(x, hx, resets=resets)[0],
        ("resets", True): lambda: lstm(x, tuple([s.masked_fill(first, 0) for s in hx]))[0],
        ("Stream", False): lambda: stream(step),
    }
    call = calls.get((case.removeprefix("one step with "), torchs), lambda: lstm(x, hx)[0])
    if mode != "training":
        return call
    every, y = [p for module in (lstm, cell, stack) for p in module.parameters()], call()
    found = torch.autograd.grad(y, every, dy := torch.ones_like(y), allow_unused=True)
    own = [p for p, gradient in zip(every, found) if gradient is not None]
    return lambda: torch.autograd.grad(call(), own, dy)


@functools.cache
def stub() -> None:
    """Kernels win every race; without a GPU they are planned for an H100 and not launched. AttributeError: too old."""
    os.environ["GPU_LSTM_RACE"] = "off"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # buffers that no kernel wrote are read
    race, plans, h100 = (
        inside("dispatch.race"),
        inside(CHOOSE).plans,
        inside("kernels.triton_lstm.planning").DEVICES["h100"],
    )
    patch.multiple(race, expected_winner=lambda kind, kernel, *_: race.Decision(kernel, "")).start()
    if CARD == "cpu":
        patch.multiple(inside("dispatch.available"), KERNEL_DEVICES=("cpu",), why_unavailable=nothing).start()
        patch.multiple(
            inside(LAUNCH), launch_kernel=None, load=lambda *_: defaultdict(lambda: nothing),
            choose_plan=lambda problem, device, which, *_: plans(problem, h100, which.backward)[0],
        ).start()  # fmt: skip


def nothing(*_: Any, **__: Any) -> None: ...


def count(call: Callable[[], Any]) -> tuple[dict[str, int], set[str]]:
    """COUNTS of a call in this thread (on CUDA backward has its own), and the files of gpu_lstm."""
    folders = tuple(f"{Path(str(module.__file__)).parent}{os.sep}" for module in (gpu_lstm, inside("kernels")))
    calls, files = [], [""]

    def profile(frame: Any, event: str, _: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(event)
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            files.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)  # is counted, too
    found, changes = {*files[1:]}, sum(a != b for a, b in itertools.pairwise(files))
    return dict(zip(COUNTS, (len(calls) - 1, len(files) - 1, len(found), changes))), found


@functools.cache
def ready(case: str, mode: str) -> tuple[dict[Place, Callable[[], Any]], dict[Place, dict[str, int]]]:
    """Calls that are warm, and their COUNTS."""
    calls, counted = {}, {}
    for device, provider in PLACES:
        call = made(case, mode, device, provider)
        for _ in range(WARM_UP):
            call()
        counts, files = count(call)
        launched = any("triton_lstm" in file for file in files)
        if launched != (provider == KERNELS) and (CARD == "cpu" or case != "Stream"):  # whose graph is replayed
            raise ProviderFailed(provider, f"{case}, {mode}: kernels were{' not' * (not launched)} launched")
        calls[device, provider], counted[device, provider] = call, counts
    gc.freeze()  # so that collecting before each sample takes hardly any time
    return calls, counted


def sample(call: Callable[[], Any], _: int, repeats: int, device: str) -> float:
    """Seconds a call, over some of them."""
    synchronize = torch.cuda.synchronize if CARD == "cuda" else nothing
    gc.collect()
    gc.disable()
    call()  # the others left the processor's caches without its code
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = time.perf_counter() - start
    gc.enable()
    synchronize()
    return taken / repeats


def measure(case: str, mode: str, rounds: int, tell: Callable[[str], None]) -> dict[Place, Any]:
    """Where it comes from, COUNTS, and the seconds of every round, in which all take turns.

    ProviderFailed where gpu_lstm is of a commit that differs too much.
    """
    tell(KERNELS)
    try:
        stub()
        with torch.set_grad_enabled(mode != "inference"):
            calls, counts = ready(case, mode)
            seconds = timing.interleaved(calls, CARD, 0.0, (rounds, rounds), sample)
    except (ImportError, AttributeError, TypeError) as error:
        raise ProviderFailed(KERNELS, f"{type(error).__name__}: {error}") from error
    return {place: (results.provenance(place[0]) | counts[place], seconds[place]) for place in PLACES}


def target(case: str, mode: str, provider: str) -> float | None:
    both = {"LSTMCell": 1.2, "one step with resets": 1.3}
    kernels = {("T=1", "inference"): 0.8, ("T=1", "forward+graph"): 0.9, ("T=1", "training"): 0.8}
    torchs = dict.fromkeys(("T=1", "T=128", "two layers, bidirectional"), 1.1)
    return both.get(case) or (torchs.get(case) if provider == TORCH else kernels.get((case, mode)))


def rows_of(case: str, mode: str, base: bool, turns: list[dict[Place, Any]]) -> Iterator[dict[str, Any]]:
    seconds = {place: np.concatenate([turn[place][1] for turn in turns]) for place in PLACES}
    for device, provider in (place for place in PLACES if place[1] != YARDSTICK):
        mine, torchs = seconds[device, provider], seconds[device, YARDSTICK]
        times = [np.median(mine), mine.min(), np.median(torchs), torchs.min()]
        ratios = [np.median(mine / torchs), mine.min() / torchs.min(), target(case, mode, provider)]
        of_call = dict(base=base, case=case, mode=mode, provider=provider, rounds=len(mine))
        yield turns[0][device, provider][0] | of_call | dict(zip([*TIMES, *RATIOS], [*times, *ratios]))


def table(rows: pd.DataFrame, shown: list[str]) -> Table:
    old, new = (rows[rows["base"] == base].reset_index() for base in (True, False))
    cells = new[["case", "mode", "provider"]].copy()
    for column in shown:
        title = column.removesuffix("_s").replace("_", " ").replace("torch", "nn").replace("median", "us")
        write = "{:.2f}" if column in RATIOS else "{:.0f}" if column in COUNTS else "{:.1f}"
        for name, side in ((f"old {title}", old), (title, new)):
            if len(side) and not (side is old and column == "target"):
                cells[name] = report.texts(side[column].astype(float) * (1e6 if column in TIMES else 1), write.format)
    told = "kernels are launched" if CARD == "cuda" else "kernels are planned for an H100, their launches do nothing"
    groups = new["case"].map(list(CASES).index)
    return report.table(cells, "A call on the host", f"{told}; {report.origin(rows)}", groups, ("case",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, metavar="NAME", default=list(CASES), help="of: " + "; ".join(CASES))
    add("--base", metavar="REV", help="measure gpu_lstm in this commit, too, in turns, and show both")
    add("--count", action="store_true", help="calls, files and changes of file of one call, instead of times")
    add("--out", type=Path, help="a new folder for host.csv; default: out/host-DATE-TIME")


def run(options: argparse.Namespace) -> int:
    out = options.out or ROOT / "out" / f"host-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    cases = [(case, mode) for case in options.cases for mode in MODES if case != "Stream" or mode == "inference"]
    turns, rounds = (1, 1) if options.count else (TURNS, ROUNDS)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        paths = {True: stack.enter_context(checkout(options.base))} if options.base else {}
        sides = {of: stack.enter_context(closing(Worker(measure, paths.get(of), LIMIT_S))) for of in (*paths, False)}
        out.mkdir(parents=True)
        for case, mode in track(cases, "calls on the host", console=Console(stderr=True), transient=True):
            found: dict[bool, list[Any]] = {base: [] for base in sides}
            for base in [*sides] * turns:
                try:
                    found[base].append(sides[base](case, mode, rounds))
                except ProviderFailed as error:
                    if not base:
                        raise
                    raise ValueError(f"{options.base} is too old to be measured: {error.args[1]}") from error
            rows += (row for base in sides for row in rows_of(case, mode, base, found[base]))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.to_csv(out / "host.csv", index=False)
    times = [name for name in TIMES if not (options.base and name.startswith("torch"))]
    shown = COUNTS if options.count else [*times, *RATIOS]
    Console().print(table(frame, shown), str(out / "host.csv"), sep="\n")
    return 0
