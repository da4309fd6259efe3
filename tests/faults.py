"""Faults to plant in interpreted kernels: those that a verification must find."""

import triton.language as tl

from gpu_lstm.kernels.triton_lstm import cell, fragments, indexing, norm

# The device functions without a fault, and those that stand in their place: plain functions, since what calls them runs
# in the interpreter.
cell_forward, output_backward, gates_backward = cell.cell_forward, cell.output_backward, cell.gates_backward
load_peepholes, load_affine = indexing.load_peepholes, indexing.load_affine
sequences, time_of = indexing.sequences, indexing.time_of


def o_reads_the_cell_before(x, z, c_prev, peepholes, PEEPHOLES):
    (i, f, g, _), c, _ = cell_forward(x, z, c_prev, peepholes, PEEPHOLES)
    o = cell.sigmoid(x[3] + z[3] + peepholes[2] * c_prev)
    return (i, f, g, o), c, o * cell.tanh(c)


def output_gate_slope_missing(o, *given):
    dz_o, dx = output_backward(o, *given)
    return dz_o / (1.0 - o), dx


def peepholes_times(p_i_and_f, p_o):
    """Of the gradient of c: what passes through the peepholes of i and f, and through that of o."""
    return lambda gates, c_prev, dz_o, dc, p, PEEPHOLES: gates_backward(
        gates, c_prev, dz_o, dc, (p_i_and_f * p[0], p_i_and_f * p[1], p_o * p[2]), PEEPHOLES
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
