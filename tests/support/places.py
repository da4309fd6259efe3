"""Places where a layer runs: a backend, and a family of kernels that forced plans select.

The Triton kernels run in the interpreter. Families whose programs wait for each other use one thread per program,
started in shuffled order, with random pauses and with stores that become visible late. g++ compiles the kernels in CUDA
C++ (host_cuda.py). Only this file knows how kernels are planned and launched. Tests of numbers do not.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import host_cuda
import interpreted  # noqa: F401  # puts functions in the place of assembly
import pytest
import torch
from concurrent_interpreter import ConcurrentRun
from torch import nn

from gpu_lstm.backends import reference, torch_resets
from gpu_lstm.call.modes import Recording
from gpu_lstm.dispatch import available
from gpu_lstm.kernels import cupy_rnn, heads
from gpu_lstm.kernels.cells import CELLS
from gpu_lstm.kernels.cupy_rnn import launch as cupy
from gpu_lstm.kernels.problem import power_of_two
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans.planning import INTERPRETER, Cooperative, Held, Plan, Step
from gpu_lstm.kernels.triton_rnn.plans.threads import resident_plans
from gpu_lstm.kernels.triton_rnn.plans.tiles import pointwise_plan, step_plan

INTERPRETED = launch.INTERPRETED
by_interpreter = pytest.mark.skipif(not INTERPRETED, reason="Triton's kernels are interpreted only where no card is")


def _force(monkeypatch, plan, yield_rate=None):
    """Launch by plan(problem, backward) from now on. With `yield_rate` programs run side by side, and yield at that
    rate.

    float32 products are in TF32, without which no plan is resident. The interpreter computes them exactly.
    """

    def choose_plan(problem, device, pass_, *_):
        head = problem.of_head
        found = plan(head, pass_.backward)
        return dataclasses.replace(found, heads=problem.heads, side_by_side=head.side_by_side)

    monkeypatch.setattr(launch, "choose_plan", choose_plan)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seeds = itertools.count()

    def launch_kernel(kernel, grid, **arguments):
        ConcurrentRun(seed=next(seeds), yield_rate=yield_rate)(kernel, grid, **arguments)

    if yield_rate is not None:
        monkeypatch.setattr(launch, "launch_kernel", launch_kernel)


def resident(monkeypatch):
    _force(monkeypatch, lambda problem, backward: next(iter(resident_plans(problem, INTERPRETER, backward))))


def pointwise(monkeypatch):
    """Make every launch one step, after or before a product by torch."""
    _force(monkeypatch, lambda problem, backward: pointwise_plan(problem, backward))


def step(monkeypatch, programs=3, yield_rate=0.05):
    """Make every launch of the step family, with this many programs."""

    def plan(problem, backward):
        return dataclasses.replace(step_plan(problem, INTERPRETER, backward), programs=programs)

    _force(monkeypatch, plan, yield_rate)


def split(monkeypatch, parts=4, yield_rate=0.05):
    """Make every launch of the step family, in tiles of 16 sequences. Backward products are split into `parts` of K."""

    def plan(problem, backward):
        found = step_plan(problem, INTERPRETER, backward)
        family = Step(found.family.k, parts if backward else 1)
        return dataclasses.replace(found, family=family, programs=3, rows=16)

    _force(monkeypatch, plan, yield_rate)


def held(monkeypatch, yield_rate=0.05, asks_ahead=False):
    """Make every launch of the held family, with at most two groups of programs that hold W_hh of 16 units each."""

    def plan(problem, backward):
        inner = (CELLS[problem.cell].rows if backward else 1) * problem.hidden
        programs, tiles = -(-problem.hidden // 16), -(-problem.batch // 16)
        family = Held(power_of_two(max(16, inner)), asks_ahead)
        return Plan(family, 16, 16, programs, min(2, tiles), num_warps=4, shared=0, why="")

    _force(monkeypatch, plan, yield_rate)


def cooperative(monkeypatch, units=4, groups=8, parts=4, yield_rate=0.05):
    """Make every launch cooperative, with `units` units per program. Backward, `parts` programs share the gates of a
    unit."""
    warps = max(2, units // 4)

    def plan(problem, backward):
        rows = CELLS[problem.cell].rows
        share = parts if rows % parts == 0 else rows if parts > rows else 1
        partners, gates = (share, rows // share) if backward else (1, 1)
        programs = partners * -(-problem.hidden // (partners * units))
        tiles, words = -(-problem.batch // 8), gates * -(-problem.hidden * problem.size // 4)
        chunks = -(-words // (16 * warps))
        return Plan(Cooperative(chunks, partners), 8, units, programs, min(groups, tiles), warps, shared=0, why="")

    _force(monkeypatch, plan, yield_rate)


def cuda(monkeypatch, device="cpu", changes=None):
    """Run the kernels in CUDA C++. On the CPU g++ compiles them, with `changes` to parts of the source, and they are
    not verified."""
    if device == "cpu":
        monkeypatch.setattr(cupy, "choose", lambda *_: cupy.PLAN)
        monkeypatch.setattr(cupy, "obstacle", lambda *_: None)
        monkeypatch.setattr(cupy_rnn, "import_packages", lambda: None)
        monkeypatch.setattr(cupy_rnn, "made_by", dict)
        monkeypatch.setattr(available, "import_problem", inspect.unwrap(available.import_problem))
        host_cuda.stand_in(monkeypatch, changes)


def tf32(monkeypatch, inputs):
    """Compute float32 products in TF32: in the kernels, and at every step of the reference, where x has `inputs`
    features."""

    def linear(x, w, b, gain):
        if w.dim() == 2 and w.shape[1] == inputs:
            return nn.functional.linear(x, w, b)
        return _CutLinear.apply(x, w) + (0 if b is None else b)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(reference, "linear", linear)


class _CutLinear(torch.autograd.Function):
    """x W^T, with W of one head or several, and operands truncated to the 10 bits that tensor cores use.

    The gradient of W is exact, since it is no product of the recurrence.
    """

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return heads.product(_cut(x), _cut(w))

    @staticmethod
    def backward(ctx, d):
        x, w = ctx.saved_tensors
        _, of_x = torch.func.vjp(lambda x: heads.product(x, _cut(w)), x)
        _, of_w = torch.func.vjp(lambda w: heads.product(x, w), w)
        return *of_x(_cut(d)), *of_w(d)


def _cut(t):
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) if t.dtype is torch.float32 else t


class Kernels(NamedTuple):
    """A backend, and the function that forces its kernels. In CUDA C++ the function also takes a device."""

    backend: str
    force: Callable = lambda monkeypatch: None


def two_copies(monkeypatch):
    """Run torch's own LSTM with resets as on CUDA, where the number of steps depends on no data."""
    monkeypatch.setattr(torch_resets, "modes", lambda x: SimpleNamespace(recording=Recording.WATCHED))


PLAN = "units", "groups", "parts"
KERNELS = {
    "torch": Kernels("torch"), "torch/two": Kernels("torch", two_copies), "reference": Kernels("reference"),
    "triton": Kernels("triton"),
    "step": Kernels("triton", step), "held": Kernels("triton", held), "resident": Kernels("triton", resident),
    "held/ahead": Kernels("triton", partial(held, asks_ahead=True)),
    "split/4": Kernels("triton", split), "split/8": Kernels("triton", partial(split, parts=8)),
    "pointwise": Kernels("triton", pointwise),
    **{f"cooperative/{'/'.join(map(str, plan))}": Kernels("triton", partial(cooperative, **dict(zip(PLAN, plan))))
       for plan in ((4, 1, 4), (8, 1, 4), (8, 2, 4), (8, 1, 2), (16, 1, 1))},
    "cupy": Kernels("cupy", cuda), "numba": Kernels("numba"),
}  # fmt: skip
