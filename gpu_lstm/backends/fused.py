"""One layer in one direction, forward and backward: the time loop by kernels, the rest by products over all steps."""

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.noise import scaled
from ..call.sequences import Traversal, without_padding
from ..equations import EQUATIONS
from ..equations.lstm import normalised
from ..kernels import heads, layer_norm
from ..kernels.cells import CELLS
from ..kernels.layer import Layer, aligned, is_product_alone
from ..kernels.layer_norm import normed_of
from ..kernels.problem import Gradients, Inputs, Normed, Recurrence
from .layer_loop import traversal_of


def forward(layer: Layer, inputs: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Run the layer forward.

    Returns:
        h: [T, B, P].
        h_n, c_n: [1, B, P] and [K, B, H], in the dtypes of h0 and c0.
        gates: [T, B, 4H], activated. Without `save`, a tensor that must not be read.
        c: [T, B, H] in float32, after each step. None without `save`.
    """
    i, c0, problem = inputs, inputs.c0, layer.problem
    if layer.multiplies_x and is_product_alone(i):
        i = i._replace(x=aligned(i.x))
        gates = i.x  # only the loops of a CPU multiply x themselves, and `gates` is memory for results
        if save:  # the activated gates overwrite the tensor
            gates = i.x.clone() if i.weight_ih is None else i.x.new_empty(*i.x.shape[:2], 4 * problem.hidden)
    else:
        gates = EQUATIONS[problem.cell].input_product(i.x, i.weight_ih, i.bias_ih, i.bias_hh, i.gain_ih)
    if i.reset_h is not None:  # the loop starts a reset step from h = 0, so W_hh h is added here
        known = _at_resets(scaled(i.reset_h, i), traversal_of(i, problem.reverse))
        EQUATIONS[problem.cell].add_product(gates, known, i.weight_hh, i.gain_hh)
    if c0.dtype is not torch.float32:
        i = i._replace(c0=c0.float())
    h, h_n, c_n, c = layer.forward(gates, Recurrence(i), save)
    return h, h_n, c_n if c_n.dtype is c0.dtype else c_n.to(c0.dtype), gates, c


def _at_resets(t: Tensor, traversal: Traversal) -> Tensor:
    """Return t [T, B, F], ordered by time, with zeros at every time whose step does not start from a reset."""
    reset: Any = traversal.resets_in_time()  # never None, since states to reset to come only with resets
    return torch.where(reset[:, :, None], t, 0)


class Saved(NamedTuple):
    """The tensors that backward reads: the inputs, and the results that forward saved."""

    inputs: Inputs
    h: Tensor  # [T, B, P]
    gates: Tensor  # [T, B, 4H], activated, any values in padding; [0] if backward recomputes them
    c: Tensor  # [T, B, H] float32, zero in padding


class AllSteps:
    """The tensors of all steps that backward reads, saved or recomputed.

    Tensors are recomputed only if the `needed` gradients depend on them.
    """

    def __init__(self, layer: Layer, saved: Saved, needed: Set[str]) -> None:
        i, h, problem = saved.inputs, saved.h, layer.problem
        self.inputs, self.gates, self.c = i, saved.gates, saved.c
        self.cell, self.hidden, self.heads = CELLS[problem.cell], problem.hidden, problem.heads
        self.equations, self.traversal = EQUATIONS[problem.cell], traversal_of(i, problem.reverse)
        self.product = layer.launcher.product
        gates_were_dropped = self.gates.dim() < self.c.dim()  # not by numel(), which is 0 for an empty batch, too
        if gates_were_dropped or "weight_hh" in needed or i.gain_hh is not None:
            h = self.traversal.states_before(h, i.h0, i.reset_h)
            if i.dropout_h is not None:  # otherwise `scaled` returns h, which would cost two calls
                h = scaled(h, i)
        self.operand = h  # [T, B, P], the factor of W_hh at each step, finite in padding; saved.h if nothing needs it
        if gates_were_dropped:  # every h is known by now, so one product computes all steps
            z = self.equations.input_product(i.x, i.weight_ih, i.bias_ih, i.bias_hh, i.gain_ih)
            self.equations.add_product(z, h, i.weight_hh, i.gain_hh)
            constants = i.bias_hh if self.cell.has_constant else i.weight_peephole
            c_prev = None if i.weight_peephole is None else self.c_before()
            self.gates = self.equations.activate_in_place(z, constants, c_prev)
        self.norm_hh = None if i.gain_hh is None else self.normed_product(h, i.weight_hh, i.gain_hh)
        self.norm_c = None if i.gain_c is None else normed_of(without_padding(self.c_after(), i.lengths), i.gain_c)

    def normed_product(self, x: Tensor, weight: Tensor, gain: Tensor) -> Normed:
        """Return the tensors that backward reads of LN(x W^T), for x [T, B, K] and W [4H, K]."""
        return normed_of(self.product(x.flatten(0, 1), weight.T).unflatten(0, x.shape[:2]), gain)

    def c_before(self) -> Tensor:
        """Return c before each step, float32 [T, B, H], ordered by time. In padding it has any finite values."""
        return self.traversal.states_before(self.c, self.inputs.c0.float(), self.inputs.reset_c)

    def c_after(self) -> Tensor:
        """Return c after each step, before zoneout acts, float32 [T, B, H]. In padding it has any values."""
        if self.inputs.zoneout_c is None:
            return self.c
        c: Tensor = self.equations.next_cell(self.gates.chunk(4, dim=2), self.c_before())
        return c


def gradients(
    layer: Layer, saved: Saved, output_gradients: Sequence[Tensor | None], needed: Set[str]
) -> dict[str, Tensor | None]:
    """Run the layer backward.

    `output_gradients` are the gradients of h, h_n and c_n, where None stands for zeros. The result has the gradients of
    the Inputs that are `needed`, by name.
    """
    steps, i, (dh, dh_n, dc_n) = AllSteps(layer, saved, needed), saved.inputs, output_gradients
    if i.c0.dtype is not torch.float32:
        i = i._replace(c0=i.c0.float())
    r = Recurrence(i, steps.norm_hh, steps.norm_c)
    loop = layer.backward(dh, dh_n, dc_n, steps.gates, saved.c, r, "h0" in needed)
    return _after_the_loop(steps, loop, needed)


def _after_the_loop(steps: AllSteps, loop: Gradients, needed: Set[str]) -> dict[str, Tensor | None]:
    """Compute the other gradients by products and sums over all steps, and return all gradients by name.

    `loop` are the gradients that the time loop returned. In padding dgates are zero, but zero times a NaN is NaN. So
    padding in the other factor is set to zero first.
    """
    i, cell, hidden, product = steps.inputs, steps.cell, steps.hidden, steps.product
    d: dict[str, Tensor | None] = {"h0": loop.dh0, "reset_c": loop.dreset_c}
    x = i.x if i.lengths is None else without_padding(i.x, i.lengths)
    dz_x, dz_h = cell.of_x(loop.dgates, hidden), cell.of_h(loop.dgates, hidden)  # gradients of W_ih x and of W_hh h
    if i.gain_ih is not None:
        dz_x, d["gain_ih"], _ = layer_norm.gradients(dz_x, steps.normed_product(x, i.weight_ih, i.gain_ih))
    if steps.norm_hh is not None:
        dz_h, d["gain_hh"], _ = layer_norm.gradients(dz_h, steps.norm_hh)
    if steps.norm_c is not None:
        d["gain_c"], d["bias_c"] = _of_norm_of_c(steps, steps.norm_c, loop.dh_total)
    dz_x_rows = dz_x.flatten(0, 1).T  # [rows H, T*B]
    dz_h_rows = dz_x_rows if dz_h is dz_x else dz_h.flatten(0, 1).T
    if "x" in needed:
        d["x"] = dz_x
        if i.weight_ih is not None:
            d["x"] = product(dz_x_rows.T, cell.from_torch(i.weight_ih, hidden)).view_as(i.x)
    if "c0" in needed:
        d["c0"] = loop.dc0.to(i.c0.dtype)
    if "weight_ih" in needed:
        d["weight_ih"] = cell.to_torch(product(dz_x_rows, x.flatten(0, 1)), hidden)
    if "weight_hh" in needed:
        h = steps.operand.flatten(0, 1)  # [T*B, P]
        count = steps.heads
        d["weight_hh"] = product(dz_h_rows, h) if count == 1 else heads.gradient_of_weight(dz_h_rows, h, count)
    if "bias_ih" in needed or "bias_hh" in needed:
        dbias = loop.dgates.sum((0, 1))  # [4H]
        d["bias_ih"] = cell.to_torch(cell.of_x(dbias, hidden), hidden)
        d["bias_hh"] = None if i.bias_hh is None else cell.of_h(dbias, hidden)
    if "weight_hr" in needed:
        m = steps.equations.output(steps.gates.chunk(4, dim=2), steps.c_after(), None, None)  # [T, B, H]
        d["weight_hr"] = loop.dh_total.flatten(0, 1).T @ without_padding(m, i.lengths).flatten(0, 1)
    if "weight_peephole" in needed:
        (dz_i, dz_f, _, dz_o), before = loop.dgates.chunk(4, dim=2), steps.c_before()
        after = without_padding(steps.c_after(), i.lengths)
        sums = [(dz * c).sum((0, 1)) for dz, c in ((dz_i, before), (dz_f, before), (dz_o, after))]
        d["weight_peephole"] = torch.cat(sums).to(loop.dgates.dtype)
    if "reset_h" in needed:
        d["reset_h"] = scaled(heads.gradient_of_h(_at_resets(dz_h, steps.traversal), i.weight_hh, i.h0.shape[2]), i)
        if loop.dreset_h is not None:  # the part that flows through zoneout
            d["reset_h"] = d["reset_h"] + loop.dreset_h.to(dz_h.dtype)
    return d


def _of_norm_of_c(steps: AllSteps, norm: Normed, dm: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of gain_c and bias_c, [H] each, from dm [T, B, H], where m = o tanh(LN(c))."""
    i, o = steps.inputs, steps.gates.chunk(4, dim=2)[3]
    of_tanh = normalised(norm.v, norm.gain, None if i.bias_c is None else i.bias_c.float()).tanh()  # [T, B, H] float32
    d = torch.ops.aten.tanh_backward(dm.float() * o, of_tanh)
    _, dgain, dbias = layer_norm.gradients(without_padding(d, i.lengths), norm)
    return dgain.to(dm.dtype), None if i.bias_c is None else dbias.to(dm.dtype)
