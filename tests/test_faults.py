"""A check that cannot fail is no check: faults are planted in interpreted kernels, and the comparison detects each."""

from itertools import product

import pytest
import torch
import triton.language as tl
from cases import check
from standing_in import plan_of

from gpu_lstm.kernels.triton_lstm import cell, fragments, indexing, launch, norm, pointwise, resident, step

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="compiled kernels hold their device functions")

# The device functions without a fault, and those that stand in their place: plain functions, since what calls them runs
# in the interpreter.
cell_forward, output_backward, gates_backward = cell.cell_forward, cell.output_backward, cell.gates_backward
load_peepholes, load_affine = indexing.load_peepholes, indexing.load_affine
sequences, time_of = indexing.sequences, indexing.time_of


def o_reads_the_cell_before(x, z, c_prev, peepholes):
    (i, f, g, _), c, _ = cell_forward(x, z, c_prev, peepholes)
    o = cell.sigmoid(x[3] + z[3] + peepholes[2] * c_prev)
    return (i, f, g, o), c, o * cell.tanh(c)


def output_gate_slope_missing(o, *given):
    dz_o, dx = output_backward(o, *given)
    return dz_o / (1.0 - o), dx


def peepholes_times(p_i_and_f, p_o):
    """Of the gradient of c: what passes through the peepholes of i and f, and through that of o."""
    return lambda gates, c_prev, dz_o, dc, p: gates_backward(
        gates, c_prev, dz_o, dc, (p_i_and_f * p[0], p_i_and_f * p[1], p_o * p[2])
    )


FAULTS = {  # the device function, and what stands in its place
    "gates i and f swapped": ("cell_forward", lambda x, z, *given: cell_forward(
        (x[1], x[0], *x[2:]), (z[1], z[0], *z[2:]), *given)),
    "o reads the cell before": ("cell_forward", o_reads_the_cell_before),
    "peepholes in another order": ("load_peepholes", lambda *given: tuple(
        load_peepholes(*given)[k] for k in (0, 2, 1))),
    "resets ignored": ("is_reset", lambda time, *_: time < 0),
    "a time too early": ("time_of", lambda *given: tl.maximum(time_of(*given) - 1, 0)),
    "lengths ignored": ("sequences", lambda index, batch: sequences(index, batch)._replace(
        length=tl.zeros_like(index) + batch.T)),
    "previous row off by one": ("row_before", lambda step, time, index, B, REVERSE: tl.where(
        step == 0, index.to(tl.int64), indexing.row_of(time, index, B))),
    "zeros for the state given": ("reset_to", lambda before, *_: before),
    "cell gradient lost": ("gates_backward", lambda *given: (
        gates_backward(*given)[0], gates_backward(*given)[1] * 0.0)),
    "output gate's slope missing": ("output_backward", output_gate_slope_missing),
    "nothing through peepholes to c before": ("gates_backward", peepholes_times(0.0, 1.0)),
    "nothing through a peephole to c": ("gates_backward", peepholes_times(1.0, 0.0)),
}  # fmt: skip
FAULTS_OF_NORMS = {
    "the mean stays": ("normalise", lambda v, mean, scale, gain, bias: gain * (v * scale) + bias),
    "nothing through the deviation": ("normalise_backward", lambda d, unit, scale, mean_d, _: scale * (d - mean_d)),
    "nothing through the mean": ("normalise_backward", lambda d, unit, scale, _, mean_d_unit: scale * (
        d - unit * mean_d_unit)),
    "gain of the next unit": ("load_affine", lambda gain_ptr, bias_ptr, unit, H: (
        load_affine(gain_ptr, None, (unit + 1) % H, H)[0], load_affine(gain_ptr, bias_ptr, unit, H)[1])),
}  # fmt: skip


def plant(monkeypatch, fault: str, *modules) -> bool:
    """A fault wherever kernels of these modules find the function; whether it shows where layers have norms."""
    name, function = (FAULTS | FAULTS_OF_NORMS)[fault]
    for module in (*modules, fragments, indexing, norm):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, function)
    return fault in FAULTS_OF_NORMS


def compare(normed=False, seeds=1):
    """The norm of few numbers is that of almost equal ones now and then."""
    size, variant = ((3, 3, 3, 16), "norms") if normed else ((3, 3, 3, 6), "peepholes")
    check(size, f"ragged states reverse {variant}", "triton", torch.float32, seeds=seeds)


MODULES = dict(step=step, resident=resident, pointwise=pointwise)
NORMED = "step", "resident"


@pytest.fixture
def family(request, monkeypatch):
    """The module of a kernel family by its name, whose plans every launch uses."""
    by = request.param
    monkeypatch.setattr(launch, "choose_plan", lambda problem, device, pass_, *_: plan_of(by, problem, pass_.backward))
    return MODULES[by]


@pytest.mark.parametrize(("family", "fault"), [
    pytest.param(*each, marks=() if each[0] == "resident" else pytest.mark.deep)
    for each in (*product(MODULES, FAULTS), *product(NORMED, FAULTS_OF_NORMS))
], indirect=["family"])  # fmt: skip
def test_a_planted_fault_is_detected(monkeypatch, family, fault):
    normed = plant(monkeypatch, fault, family)
    with pytest.raises(AssertionError):
        compare(normed)


@pytest.mark.parametrize(("family", "normed"), [*product(MODULES, [False]), *product(NORMED, [True])],
                         indirect=["family"])  # fmt: skip
def test_without_a_fault_nothing_is_detected(family, normed):
    compare(normed, seeds=3)
