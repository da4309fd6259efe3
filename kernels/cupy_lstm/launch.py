"""The launches of the CuPy backend: a plan of one problem and pass, prepared once and then only launched.

The kernels are in cuda/, compiled at first use, when CuPy is imported. torch allocates memory and computes products.
"""

import functools
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..architectures import shared_memory_of
from ..layer import Chosen, Gradients, Layer, Verify, zeros_for_resets
from ..operands import as_words, transposed_gates
from ..problem import Pass, Problem, Recurrence
from ..timeouts import error_word
from .planning import Plan, card_of, choose_plan
from .source import ELEMENTS, KERNELS, OPTIONS, given_of, in_order, join, name_expression, parts

PACK = 16  # bytes that a thread reads at once
SENTINEL = -1  # the word, as int32, for data that are not there yet


class Prepared:
    """A plan of one problem and pass; see layer.Prepared. With a projection it runs the recurrence of m."""

    def __init__(self, problem: Problem, which: Pass, plan: Plan) -> None:
        self.plan, self._which = plan, which
        self.at_once = plan.side_by_side
        self.projects_outside = problem.projected > 0

    def forward(self, gates: Tensor, r: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As layer.Layer.forward."""
        steps, batch, _ = gates.shape
        hidden = r.c0.shape[-1]
        h = _rows_of_words(gates, steps + 1, batch)
        h[-1].zero_()
        h[-1, :, :hidden] = torch.where(r.h0.isnan(), torch.nan, r.h0)  # any NaN but the sentinel
        h_n, c_n = r.h0.clone(), r.c0.clone()  # what a sequence of length 0 ends with
        c = r.c0.new_empty(steps, batch, hidden) if self._which.save else None
        self._launch(gates, r, weights=as_words(r.weight_hh, PACK), h=h, h_n=h_n, c=c, c_n=c_n)
        return h[:-1, :, :hidden].contiguous(), h_n, c_n, c

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence
    ) -> Gradients:
        """As layer.Layer.backward."""
        steps, batch, _ = gates.shape
        hidden, count = r.c0.shape[-1], self.plan.parts
        dgates = _rows_of_words(gates, steps, batch, 4)
        partials = None
        if count > 1:
            partials = torch.full((batch, count, hidden), SENTINEL, dtype=torch.int32, device=gates.device)
        dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; the kernel makes it that of c0
        _, dreset_c = zeros_for_resets(r)
        self._launch(
            gates, r, dh=dh, dh_n=dh_n, c=c, c0=r.c0, weights=transposed_gates(r.weight_hh, count, PACK),
            dgates=dgates, partials=partials, dc=dc, dreset_c=dreset_c,
        )  # fmt: skip
        return Gradients(dgates[..., :hidden].reshape(gates.shape), None, dc, dreset_c=dreset_c)

    def _launch(self, gates: Tensor, r: Recurrence, **arguments: Tensor | None) -> None:
        kernel = KERNELS[self._which.backward]
        launch_kernel(
            kernel, gates.dtype, self.plan, gates=gates, resets=r.resets, reset_c=r.reset_c,
            lengths=None if r.lengths is None else r.lengths.int(), error=error_word(gates.device, kernel),
            T=gates.shape[0], B=gates.shape[1], reverse=r.reverse, **arguments,
        )  # fmt: skip


def _rows_of_words(gates: Tensor, *rows: int) -> Tensor:
    """[*rows, H and up to 16 bytes] of the dtype of `gates` [T, B, 4H]: sentinels; zeros in words without a unit."""
    hidden, size = gates.shape[-1] // 4, PACK // gates.itemsize
    filled = gates.new_empty(*rows, ceil(hidden / size) * size)
    words = filled.view(torch.int32).fill_(SENTINEL)
    words[..., ceil(hidden * gates.itemsize / 4) :] = 0
    return filled


@functools.cache
def layer_of(problem: Problem, device: torch.device, verify: Verify | None = None) -> Layer:
    """The layer of a problem on a device; every call returns the same one.

    Plans are not verified: one source is compiled for all problems.

    Raises:
        TypeError: a dtype that the kernels do not accept.
        ValueError: recurrent dropout, zoneout, peepholes or layer norms; or as Layer.
    """
    if problem.dtype not in ELEMENTS:
        raise TypeError(f"backend 'cupy' supports float16, bfloat16 and float32, got {problem.dtype}")
    if problem.regularised:
        raise ValueError("backend 'cupy' supports neither recurrent dropout nor zoneout")
    if problem.peepholes or problem.normalised:
        raise ValueError("backend 'cupy' supports neither peepholes nor layer norms")

    def plan(which: Pass) -> Plan:
        return choose_plan(problem, card_of(device), which.backward)

    return Layer(
        problem, device, lambda _, which: Prepared(problem, which, plan(which)),
        lambda _, which, __: Chosen(plan(which), False),
    )  # fmt: skip


forget = layer_of.cache_clear
"""Choose all plans again."""


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

    values = tuple(by_value(a) for a in in_order(kernel, arguments))
    device = arguments["gates"].device
    function = _kernel(device, kernel, dtype, plan.template("backward" in kernel), given_of(kernel, arguments))
    with _stream(device):
        function(plan.grid, (plan.threads,), values, shared_mem=plan.shared)


@functools.cache
def _kernel(
    device: torch.device, name: str, dtype: torch.dtype, template: tuple[int, ...], given: frozenset[str]
) -> Any:
    """A kernel, loaded on a device, which is the current one, for the optional arguments that are given."""
    import cupy

    name = name_expression(name, dtype, template, given)
    module = cupy.RawModule(
        code=join(parts()), options=OPTIONS, name_expressions=[name], enable_cooperative_groups=True
    )
    kernel = module.get_function(name)
    kernel.max_dynamic_shared_size_bytes = shared_memory_of(card_of(device).architecture)
    return kernel


def _stream(device: torch.device) -> Any:
    """torch's current stream on a device, as CuPy knows it."""
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)  # CuPy older than 14, or torch than its protocol
