"""The CuPy backend's two entry points. One layer, one direction; the input product is already in `gates`.

The kernels are in cuda/, compiled at first use; CuPy is imported then, not before. Memory and products are torch's.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from .. import projection
from ..architectures import shared_memory_of
from ..giving_up import raise_if_gave_up
from ..initial_gradient import initial_hidden_gradient
from ..ordering import await_others
from ..recurrence import Recurrence, check_counts
from . import cooperative
from .planning import Launch, Plan, Problem, card_of, choose_plan
from .source import ELEMENTS, OPTIONS, in_order, join, name_expression, parts


def layer_forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan | None = None, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence of one layer in one direction.

    Args:
        gates: [T, B, 4H], x W_ih^T + b_ih + b_hh. Overwritten by the activated gates if `save`; with a projection, and
            without `save`, at every sequence's first step.
        recurrence: weights, initial states, lengths and the rest.
        save: keep what layer_backward needs.
        plan: how to run it; by default by `choose_plan`.
        launch: launches one kernel; by default `launch_kernel`.

    Returns:
        h [T, B, P], h_n [B, P], c_n float32 [B, H], and c: float32 [T, B, H] if `save`, else empty.

    Raises:
        RuntimeError: blocks of an earlier launch waited in vain for each other.
        TypeError: a dtype that the kernels do not take.
        ValueError: recurrent dropout, zoneout, peepholes or layer norms; T, B or H is more than the kernels can count
            to.
    """
    r = whole = _checked(gates, recurrence)
    if whole.projected:
        projection.add_initial_product(gates, whole)
        r = projection.recurrence_of_m(whole)
    plan = plan or choose_plan(_problem(gates, r, backward=False), card_of(gates.device))
    await_others(plan.side_by_side, gates.device)
    m, m_n, c_n, c = cooperative.forward(gates, r, save=save, plan=plan, launch=launch or launch_kernel)
    h, h_n = projection.project(m, whole) if whole.projected else (m, m_n)
    return h, h_n, c_n, c


def layer_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    recurrence: Recurrence,
    *,
    plan: Plan | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, ...]:
    """Gradients through the recurrence of one layer in one direction.

    Args:
        dh, dh_n, dc_n: gradients of layer_forward's first three results; None counts as zero.
        gates, c: what layer_forward saved: activated gates [T, B, 4H], float32 [T, B, H]. Not written to.
        recurrence, plan, launch: as for layer_forward.

    Returns:
        dgates [T, B, 4H], gradient of the pre-activations; dh0 [B, P]; dc0 float32 [B, H]; and, with a projection,
        the whole gradient of h [T, B, P] (without one, an empty tensor), from which dW_hr is taken. And an empty
        tensor, and float32 dreset_c [T, B, H], zero but at resets, empty without such states.

    Raises:
        RuntimeError: blocks of an earlier launch waited in vain for each other.
        TypeError: a dtype that the kernels do not take.
        ValueError: recurrent dropout, zoneout, peepholes or layer norms; T, B or H is more than the kernels can count
            to.
    """
    r = whole = _checked(gates, recurrence)
    dm, dm_n, dh_total = dh, dh_n, gates.new_empty(0)
    if whole.projected:
        r = projection.recurrence_of_m(whole)
        dh_total = projection.gradient_of_output(dh, dh_n, len(gates), whole)
        dm, dm_n = projection.gradient_of_m(dh_total, whole), None
    plan = plan or choose_plan(_problem(gates, r, backward=True), card_of(gates.device))
    await_others(plan.side_by_side, gates.device)
    dgates, dc0, dreset_c = cooperative.backward(dm, dm_n, dc_n, gates, c, r, plan=plan, launch=launch or launch_kernel)
    if whole.projected:
        projection.add_gradient_of_next(dh_total, dgates, whole)
    return dgates, initial_hidden_gradient(dgates, dh_n, None, whole), dc0, dh_total, c.new_empty(0), dreset_c


def _problem(gates: Tensor, r: Recurrence, backward: bool) -> Problem:
    return Problem(gates.shape[1], r.hidden, gates.dtype, backward, r.precision, r.side_by_side)


def _checked(gates: Tensor, r: Recurrence) -> Recurrence:
    """What the kernels take: lengths in int32.

    Raises:
        RuntimeError, TypeError, ValueError: as layer_forward.
    """
    raise_if_gave_up(gates.device)
    if gates.dtype not in ELEMENTS:
        raise TypeError(f"backend 'cupy' takes float16, bfloat16 and float32, got {gates.dtype}")
    if r.regularised:
        raise ValueError("backend 'cupy' takes neither recurrent dropout nor zoneout")
    if r.weight_peephole is not None or r.normalised:
        raise ValueError("backend 'cupy' takes neither peepholes nor layer norms")
    check_counts(gates)
    return r if r.lengths is None else dataclasses.replace(r, lengths=r.lengths.int())


def launch_kernel(kernel: str, dtype: torch.dtype, plan: Plan, **arguments: Tensor | int | None) -> None:
    """Launch a kernel on torch's current stream: the seam at which a test can run it elsewhere.

    Args:
        kernel: its name.
        dtype: of the elements.
        plan: its further template arguments, its grid, and what a block takes.
        arguments: by the kernel's names for them; a tensor goes by its address, None as a null pointer.

    Raises:
        TypeError: an argument is missing, or the kernel has no such parameter.
    """
    import numpy

    def by_value(argument: Tensor | int | None) -> Any:
        match argument:
            case Tensor():
                return numpy.uint64(argument.data_ptr())
            case None:
                return numpy.uint64(0)
            case bool():
                return numpy.bool_(argument)
            case _:
                return numpy.int32(argument)

    values = tuple(by_value(a) for a in in_order(kernel, arguments))
    device = arguments["gates"].device
    if arguments["B"] == 0:
        return
    with torch.cuda.device(device):
        function = _kernel(device, kernel, dtype, plan.template("backward" in kernel))
        with _stream(device):
            function(plan.grid, (plan.threads,), values, shared_mem=plan.shared)


@functools.cache
def _kernel(device: torch.device, name: str, dtype: torch.dtype, template: tuple[int, ...]) -> Any:
    """A kernel, loaded on a device, which is the current one."""
    import cupy

    expression = name_expression(name, dtype, template)
    module = cupy.RawModule(
        code=join(parts()), options=OPTIONS, name_expressions=[expression], enable_cooperative_groups=True
    )
    kernel = module.get_function(expression)
    kernel.max_dynamic_shared_size_bytes = shared_memory_of(card_of(device).architecture)
    return kernel


def _stream(device: torch.device) -> Any:
    """torch's current stream on a device, as CuPy knows it."""
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)  # CuPy older than 14, or torch than its protocol
