"""Calls that are timed on the host, by gpu_lstm of any commit, in a process of their own.

With a GPU kernels are launched there, and the clock stops before the device is done. Without one the CPU counts as an
H100: kernels are planned for it, their launches do nothing, and all else runs. Triton's launcher and CUDA's own calls
are not in those figures.
"""

import functools
import gc
import importlib
import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gpu_lstm

from . import results
from .isolated import ProviderFailed

CARD = "cuda" if torch.cuda.is_available() else "cpu"
YARDSTICK, KERNELS, TORCH = "torch.nn", "kernels", "torch"  # TORCH: backend "torch", on the CPU
PLACES = tuple(dict.fromkeys([(CARD, YARDSTICK), (CARD, KERNELS), ("cpu", YARDSTICK), ("cpu", TORCH)]))
MODES = ("inference", "forward+graph", "training")
CASES = {
    "T=1": (1, 1), "T=128": (128, 16), "two layers, bidirectional": (128, 16), "StackedLSTM": (128, 16),
    "LSTMCell": (1, 1), "lengths": (128, 16), "resets": (128, 16), "one step with resets": (1, 16), "Stream": (1, 1),
}  # fmt: skip
"""T and B. torch.nn does lengths by a PackedSequence, and resets, of the first step alone, by masking its state."""
I, H = 8, 8  # so small that the products take no time to speak of
WARM_UP, SAMPLE_S = 20, 1e-3
COUNTS = ["calls", "functions", "files", "file_changes"]  # of one call; all but `calls` are gpu_lstm's own


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
    old = not (Path(gpu_lstm.__file__).parent / "dispatch").exists()  # as it was up to commit 33b857c
    race, launch = "races" if old else "dispatch.race", "kernels.triton_lstm.launch"
    decision, h100 = inside(race).Decision, inside("kernels.triton_lstm.planning").DEVICES["h100"]
    put(race, expected_winner=lambda kind, *rest: decision(kind.kernel if old else rest[0], ""))
    if CARD == "cuda":
        return
    available, why_unavailable = ("backends", "obstacle") if old else ("dispatch.available", "why_unavailable")
    put(available, **{"KERNEL_DEVICES": ("cpu",), why_unavailable: nothing})
    if old:  # a plan is looked up at every call of a CUDA device
        choose, cuda = inside(launch).choose_plan, torch.device("cuda", 0)
        put(launch, launch_kernel=nothing, first_that_fits=lambda proposed, *_: proposed[0], device_of=lambda _: h100)
        put(launch, choose_plan=lambda problem, device, *rest: choose(problem, cuda, *rest))
        for name in ("get_device_properties", "is_current_stream_capturing"):
            setattr(torch.cuda, name, nothing)
    else:
        plans = inside("kernels.triton_lstm.choose").plans
        put(launch, launch_kernel=None, load=lambda *_: defaultdict(lambda: nothing))
        put(launch, choose_plan=lambda problem, device, which, *_: plans(problem, h100, which.backward)[0])


def nothing(*_: Any, **__: Any) -> None:
    """In the place of a launch."""


def inside(name: str) -> Any:
    """A module of gpu_lstm, imported when it is needed: another commit may not have it."""
    return importlib.import_module(f"gpu_lstm.{name}")


def put(name: str, **values: Any) -> None:
    """Replace attributes that a module of gpu_lstm has."""
    for attribute, value in values.items():
        getattr(inside(name), attribute)
        setattr(inside(name), attribute, value)


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
    changes = sum(a != b for a, b in itertools.pairwise(files))
    found = {*files[1:]}
    return dict(zip(COUNTS, (len(calls) - 1, len(files) - 1, len(found), changes))), found


@functools.cache
def ready(case: str, mode: str) -> dict[tuple[str, str], tuple[Callable[[], Any], int, dict[str, int]]]:
    """By device and provider: a call that is warm, how many of them make a sample, and its COUNTS."""
    calls = {}
    for device, provider in PLACES:
        call = made(case, mode, device, provider)
        for _ in range(WARM_UP):
            call()
        counts, files = count(call)
        launched = any("triton_lstm" in file for file in files)
        if launched != (provider == KERNELS) and (CARD == "cpu" or case != "Stream"):  # whose graph is replayed
            raise ProviderFailed(provider, f"{case}, {mode}: kernels were{' not' * (not launched)} launched")
        calls[device, provider] = call, max(1, round(SAMPLE_S / sample(call, 5))), counts
    gc.freeze()  # so that collecting before each sample takes no time
    return calls


def sample(call: Callable[[], Any], repeats: int) -> float:
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


def measure(case: str, mode: str, rounds: int, tell: Callable[[str], None]) -> dict[tuple[str, str], Any]:
    """By device and provider: where it comes from, COUNTS, and the seconds of every round, in which all take turns.

    ProviderFailed where gpu_lstm is of a commit that differs too much.
    """
    tell(KERNELS)
    try:
        stub()
        with torch.set_grad_enabled(mode != "inference"):
            calls = ready(case, mode)
            seconds: dict[tuple[str, str], list[float]] = {place: [] for place in PLACES}
            for number in range(rounds):
                for place in PLACES[:: -1 if number % 2 else 1]:
                    call, repeats, _ = calls[place]
                    seconds[place].append(sample(call, repeats))
    except (ImportError, AttributeError, TypeError) as error:
        raise ProviderFailed(KERNELS, f"{type(error).__name__}: {error}") from error
    origin = {place: results.provenance(place[0]) for place in PLACES}
    return {place: (origin[place] | calls[place][2], seconds[place]) for place in PLACES}
