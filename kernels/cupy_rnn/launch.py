"""The launches of the CuPy backend: a plan of one problem and pass, prepared once and then only launched.

The kernels are in cuda/, compiled at first use, when CuPy is imported. torch allocates memory and computes products.
"""

import contextlib
import functools
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..cards import cuda_obstacle
from ..cells import CELLS as GATES
from ..layer import Chosen, NoKernel, Refuses
from ..memory import EVERY_BIT, Buffer, allocate, buffers_of, checking, gradients_in, margins, steps_of
from ..operands import as_words, transposed_gates
from ..problem import Gradients, Pass, Problem, Recurrence
from ..timeouts import error_word
from .planning import HOST, SEQUENCES, Plan, card_of, choose_plan, words_of
from .source import CELLS, KERNELS, OPTIONS, in_order, join, name_expression, present_in, texts

PACK = 16  # bytes that a thread reads at once


class Prepared:
    """A plan of one problem and pass; see problem.Prepared. With a projection it runs the recurrence of m."""

    def __init__(self, problem: Problem, pass_: Pass, plan: Plan, device: torch.device, trial: bool = False) -> None:
        self.plan, self.at_once, self.projects_outside = plan, plan.side_by_side, problem.projected > 0
        self._problem = p = problem._replace(projected=0)
        self._kernel = KERNELS[pass_.backward]
        self._error = error_word(device, self._kernel, trial)
        row, self._buffers = 4 * words_of(p) // p.size, buffers_of(p, pass_)  # elements of a row of words
        if pass_.backward:
            self._buffers["dgates_ptr"] = Buffer(p.dtype, (p.batch, 4, row), 0, EVERY_BIT)
            if plan.partners > 1:
                self._buffers["partials_ptr"] = Buffer(torch.int32, (p.batch, plan.partners, p.hidden), fill=EVERY_BIT)
        else:
            self._buffers["h_ptr"] = Buffer(p.dtype, (p.batch, row), 1, EVERY_BIT)  # and h0 at its end
            self._buffers["c_n_ptr"] = self._buffers["c_n_ptr"]._replace(fill="c0")  # where c is read at every step

    def forward(self, gates: Tensor, r: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As layer.Layer.forward."""
        p, h0 = self._problem, r.inputs.h0
        memory = allocate(self._buffers, steps_of(gates), gates, r.inputs)
        h, h_n, c_n, c = map(memory.get, ("h_ptr", "h_n_ptr", "c_n_ptr", "c_ptr"))
        _clear_words_without_unit(h, p)
        h[-1].zero_()
        h[-1, :, : p.hidden] = torch.where(h0.isnan(), torch.nan, h0)  # any NaN but the sentinel
        self._launch(
            gates,
            r,
            weights=as_words(r.inputs.weight_hh, p.hidden, PACK),
            h=h,
            h_n=h_n,
            c=c,
            c_n=c_n,
            bias_hh=r.inputs.bias_hh if p.bias_hh else None,
        )
        return h[:-1, :, : p.hidden].contiguous(), h_n, c_n, c

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence
    ) -> Gradients:
        """As layer.Layer.backward."""
        p, steps = self._problem, steps_of(gates)
        memory = allocate(self._buffers, steps, gates, r.inputs)
        dgates, dc = memory["dgates_ptr"], memory["dc_ptr"]
        _clear_words_without_unit(dgates, p)
        if dc_n is not None:  # the kernel makes it the gradient of c0
            dc.copy_(dc_n)
        self._launch(
            gates, r, dh=dh, dh_n=dh_n, c=c, c0=r.inputs.c0, dgates=dgates, partials=memory.get("partials_ptr"),
            weights=transposed_gates(r.inputs.weight_hh, self.plan.partners, GATES[p.cell].rows, p.hidden, PACK), dc=dc,
            dreset_c=memory.get("dreset_c_ptr"),
        )  # fmt: skip
        return gradients_in(memory, dgates[..., : p.hidden].reshape(steps, p.batch, 4 * p.hidden))

    def _launch(self, gates: Tensor, r: Recurrence, **of_pass: Tensor | None) -> None:
        inputs, p = r.inputs, self._problem
        arguments = of_pass | dict(
            gates=gates, resets=inputs.resets, reset_c=inputs.reset_c,
            lengths=None if inputs.lengths is None else inputs.lengths.int(),
            error=self._error, T=steps_of(gates), B=p.batch, reverse=p.reverse,
        )  # fmt: skip
        with margins(self._kernel, arguments) if checking.on else contextlib.nullcontext(arguments) as inside:
            launch_kernel(self._kernel, p.dtype, self.plan, **inside)


def _clear_words_without_unit(rows: Tensor, p: Problem) -> None:
    """Zero what is past the last unit's word in rows [*, H and up to 16 bytes]: no block publishes it."""
    rows.view(torch.int32)[..., ceil(p.hidden * p.size / 4) :] = 0


BACKEND, prepare = "cupy", Prepared
"""See layer.Launcher; as what follows."""


def obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    return cuda_obstacle(BACKEND, device, (7, 0))


def lacks(problem: Problem) -> str | None:
    if problem.cell not in CELLS:
        return f"cell {problem.cell!r}"
    if problem.heads > 1:
        return "heads"
    without = problem.regularised or problem.weight_peephole or problem.normalised
    return "recurrent dropout, zoneout, peepholes or layer norms" if without else None


def choose(problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None) -> Plan:
    card = card_of(device)
    plan = choose_plan(problem, card, pass_.backward)
    if refuses is not None and card is not HOST and (reason := refuses(plan)):
        raise NoKernel(f"no kernel in CUDA C++ can run this layer on this card: {reason}")
    return plan


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: Plan | None) -> Chosen:
    plan = choose_plan(problem, card_of(device), pass_.backward)
    why = "W_hh stays in registers" if plan.chunks else "W_hh is read at every step"
    tiles = f"{SEQUENCES} sequences x {plan.units} units, {plan.grid[0]} blocks x {plan.grid[1]} groups"
    return Chosen(plan, False, "cooperative", tiles, why)


def launch_kernel(kernel: str, dtype: torch.dtype, plan: Plan, **arguments: Tensor | int | None) -> None:
    """Launch a kernel on torch's current stream. Tests replace this function to run the kernel elsewhere.

    Arguments are named as the kernel's parameters; a tensor is passed as its address, None as a null pointer.

    Raises:
        TypeError: an argument is missing, or the kernel has no such parameter.
    """
    import numpy

    def by_value(argument: Tensor | int | None) -> Any:
        if isinstance(argument, int):
            return (numpy.bool_ if isinstance(argument, bool) else numpy.int32)(argument)
        return numpy.uint64(0 if argument is None else argument.data_ptr())

    values = tuple(map(by_value, in_order(kernel, arguments)))
    device = arguments["gates"].device
    function = _loaded(device, kernel, dtype, plan.template("backward" in kernel), present_in(kernel, arguments))
    with _stream(device):
        function(plan.grid, (plan.threads,), values, shared_mem=plan.shared)


@functools.cache
def _loaded(
    device: torch.device, kernel: str, dtype: torch.dtype, template: tuple[str | int, ...], present: frozenset[str]
) -> Any:
    """A kernel with these optional arguments, loaded on a device, which is the current one."""
    import cupy

    name = name_expression(kernel, dtype, template, present)
    module = cupy.RawModule(
        code=join(texts()), options=OPTIONS, name_expressions=[name], enable_cooperative_groups=True
    )
    function = module.get_function(name)
    function.max_dynamic_shared_size_bytes = card_of(device).shared
    return function


def _stream(device: torch.device) -> Any:
    """torch's current stream on a device, as CuPy knows it."""
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)  # CuPy older than 14, or torch than its protocol
