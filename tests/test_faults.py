"""A check that cannot fail is no check: faults are planted in the kernels, and the comparison must detect each.

Only in the interpreter, where a device function is looked up by its name at every call.
"""

import contextlib
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from comparing import assert_as_good_as_torch, example

from gpu_lstm.kernels.triton_lstm import cell, indexing, launch, norm, resident, step
from gpu_lstm.kernels.triton_lstm.choose import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="compiled kernels hold their device functions")


@triton.jit
def gates_i_and_f_swapped(x, z, c_prev, peepholes, PEEPHOLES: tl.constexpr):
    x, z = (x[1], x[0], x[2], x[3]), (z[1], z[0], z[2], z[3])
    return cell.cell_forward(x, z, c_prev, peepholes, PEEPHOLES)


@triton.jit
def o_sees_the_cell_before(x, z, c_prev, peepholes, PEEPHOLES: tl.constexpr):
    gates, c, _ = cell.cell_forward(x, z, c_prev, peepholes, PEEPHOLES)
    o = cell.sigmoid(x[3] + z[3] + peepholes[2] * c_prev)
    return (gates[0], gates[1], gates[2], o), c, o * cell.tanh(c)


@triton.jit
def peepholes_in_another_order(peephole_ptr, unit, H: tl.constexpr):
    p_i, p_f, p_o = load_peepholes(peephole_ptr, unit, H)
    return p_i, p_o, p_f


load_peepholes = indexing.load_peepholes  # as it was before a fault stood in its place


@triton.jit
def resets_ignored(resets_ptr, time, length, batch, B, in_batch, REVERSE: tl.constexpr):
    return time < 0


@triton.jit
def always_forward(step, length, REVERSE: tl.constexpr):
    return tl.zeros_like(length) + step


@triton.jit
def lengths_ignored(lengths_ptr, batch, in_batch, T):
    return tl.zeros_like(batch) + T


@triton.jit
def previous_row_off_by_one(step, time, batch, B, REVERSE: tl.constexpr):
    return tl.where(step == 0, batch.to(tl.int64), indexing.row_of(time, batch, B))


@triton.jit
def zeros_for_the_state_given(before, reset_ptr, at, reset):
    return before


@triton.jit
def cell_gradient_lost(gates, c_prev, dz_o, dc, peepholes, PEEPHOLES: tl.constexpr):
    dz, _ = cell.gates_backward(gates, c_prev, dz_o, dc, peepholes, PEEPHOLES)
    return dz, dc * 0.0


@triton.jit
def output_gate_slope_missing(o, x, dm):
    dz_o, dx = cell.output_backward(o, x, dm)
    return dz_o / (1.0 - o), dx


@triton.jit
def nothing_through_peepholes_to_c_before(gates, c_prev, dz_o, dc, peepholes, PEEPHOLES: tl.constexpr):
    p_i, p_f, p_o = peepholes
    return cell.gates_backward(gates, c_prev, dz_o, dc, (0.0 * p_i, 0.0 * p_f, p_o), PEEPHOLES)


@triton.jit
def nothing_through_a_peephole_to_c(gates, c_prev, dz_o, dc, peepholes, PEEPHOLES: tl.constexpr):
    p_i, p_f, p_o = peepholes
    return cell.gates_backward(gates, c_prev, dz_o, dc, (p_i, p_f, 0.0 * p_o), PEEPHOLES)


FAULTS = {
    "cell_forward": [gates_i_and_f_swapped, o_sees_the_cell_before],
    "load_peepholes": [peepholes_in_another_order],
    "is_reset": [resets_ignored],
    "time_of": [always_forward],
    "load_lengths": [lengths_ignored],
    "row_before": [previous_row_off_by_one],
    "reset_to": [zeros_for_the_state_given],
    "output_backward": [output_gate_slope_missing],
    "gates_backward": [cell_gradient_lost, nothing_through_peepholes_to_c_before, nothing_through_a_peephole_to_c],
}


@triton.jit
def the_mean_stays(v, mean, scale, gain, bias):
    return gain * (v * scale) + bias


@triton.jit
def nothing_through_the_deviation(d, unit, scale, mean_d, mean_d_unit):
    return scale * (d - mean_d)


@triton.jit
def nothing_through_the_mean(d, unit, scale, mean_d, mean_d_unit):
    return scale * (d - unit * mean_d_unit)


@triton.jit
def gain_of_the_next_unit(gain_ptr, bias_ptr, unit, H: tl.constexpr):
    return load_affine(gain_ptr, None, (unit + 1) % H, H)[0], load_affine(gain_ptr, bias_ptr, unit, H)[1]


load_affine = indexing.load_affine  # as it was


FAULTS_OF_NORMS = {
    "normalise": [the_mean_stays],
    "normalise_backward": [nothing_through_the_deviation, nothing_through_the_mean],
    "load_affine": [gain_of_the_next_unit],
}


def _example(seed, norms, **variant):
    units = 16 if norms else 6  # the norm of few numbers is that of almost equal ones now and then
    return example(
        3, 3, 3, units, ragged=True, resets=0.4, states=True, reverse=True, seed=seed, norms=norms, **variant
    )


def compare(seeds=3, *, norms=()):
    given = partial(_example, peepholes=not norms, norms=norms)
    assert_as_good_as_torch(given, "triton", torch.float32, seeds=seeds, yardstick="reference")


@pytest.fixture(params=[step, resident], ids=["step", "resident"])
def family(request, monkeypatch):
    """The module of a kernel family, whose plans every launch takes."""
    name = request.param.__name__.rpartition(".")[2]

    def plan(problem, device, which, *_):
        return next(p for p in plans(problem, DEVICES["h100"], which.backward) if p.family.value == name)

    monkeypatch.setattr(launch, "choose_plan", plan)
    return request.param


@pytest.mark.parametrize("norms", [(), ("hh", "c")])
def test_without_a_fault(family, norms):
    compare(norms=norms)


def each(faults):
    named = [pytest.param(name, fault, id=fault.fn.__name__) for name, some in faults.items() for fault in some]
    return pytest.mark.parametrize(("name", "fault"), named)


@each(FAULTS | FAULTS_OF_NORMS)
def test_a_planted_fault_is_seen(monkeypatch, family, name, fault):
    for module in (family, norm, indexing):  # wherever the family's kernels find it
        if hasattr(module, name):
            monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        compare(seeds=1, norms=("hh", "c") if name in FAULTS_OF_NORMS else ())


SWAPS = [
    ("forward", "h_n_ptr", "c_n_ptr"),
    ("backward", "gates_ptr", "dgates_ptr"),
    ("backward", "dc_ptr", "dh_n_ptr"),
    ("backward", "reset_c_ptr", "dreset_c_ptr"),
]


@pytest.mark.parametrize(("direction", "one", "other"), SWAPS)
def test_two_pointers_that_change_places_are_seen(monkeypatch, family, direction, one, other):
    """The order of the arguments means nothing, a wrong name is refused, and a wrong value under a name is seen."""
    run = launch.launch_kernel

    def reordered(kernel, grid, **arguments):
        run(kernel, grid, **dict(reversed(arguments.items())))

    def renamed(kernel, grid, **arguments):
        names = {one: "a_" + one} if direction in kernel.__name__ else {}
        run(kernel, grid, **{names.get(name, name): value for name, value in arguments.items()})

    def swapped(kernel, grid, **arguments):
        if direction in kernel.__name__:
            arguments[one], arguments[other] = arguments[other], arguments[one]
        run(kernel, grid, **arguments)

    right = [(reordered, None)] if direction == "forward" else []
    for fault, error in (*right, (renamed, TypeError), (swapped, AssertionError)):
        monkeypatch.setattr(launch, "launch_kernel", fault)
        with pytest.raises(error) if error else contextlib.nullcontext():
            compare(seeds=1)
