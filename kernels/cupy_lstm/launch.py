"""The CuPy backend's two entry points. One layer, one direction; the input product is already in `gates`.

The kernels are in lstm.cu, compiled at first use; CuPy is imported then, not before. Memory and products are torch's.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..recurrence import Recurrence, check_counts
from . import sequence, step
from .planning import Family, Launch, Plan, shared_limit
from .source import CLUSTER_KERNELS, ELEMENTS, OPTIONS, SOURCE, in_order, kernels_of, name_expression


def layer_forward(
    gates: Tensor, recurrence: Recurrence, *, save: bool, plan: Plan | None = None, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence of one layer in one direction.

    Args:
        gates: [T, B, 4H], x W_ih^T + b_ih + b_hh. Overwritten by the activated gates if `save`.
        recurrence: weights, initial states, lengths and the rest.
        save: keep what layer_backward needs.
        plan: how to run it; by default by `choose_plan`.
        launch: launches one kernel; by default `launch_kernel`.

    Returns:
        h [T, B, P], h_n [B, P], c_n float32 [B, H], and c: float32 [T, B, H] if `save`, else empty.

    Raises:
        TypeError: a dtype that the kernels do not take.
        ValueError: recurrent dropout or zoneout; T, B or H is more than the kernels can count to.
    """
    r = _checked(gates, recurrence)
    plan = plan or choose_plan(r, gates.dtype, backward=False)
    return _module_of(plan).forward(gates, r, save=save, plan=plan, launch=launch or launch_kernel)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through the recurrence of one layer in one direction.

    Args:
        dh, dh_n, dc_n: gradients of layer_forward's first three results; None counts as zero.
        gates, c: what layer_forward saved: activated gates [T, B, 4H], float32 [T, B, H]. Not written to.
        recurrence, plan, launch: as for layer_forward.

    Returns:
        dgates [T, B, 4H], gradient of the pre-activations; dh0 [B, P]; dc0 float32 [B, H]; and, with a projection,
        the whole gradient of h [T, B, P] (without one, an empty tensor), from which dW_hr is taken.

    Raises:
        TypeError: a dtype that the kernels do not take.
        ValueError: recurrent dropout or zoneout; T, B or H is more than the kernels can count to.
    """
    r = _checked(gates, recurrence)
    plan = plan or choose_plan(r, gates.dtype, backward=True)
    dgates, dh0, dc0, dh_total = _module_of(plan).backward(
        dh, dh_n, dc_n, gates, c, r, plan=plan, launch=launch or launch_kernel
    )
    if r.lengths is not None and dh_n is not None:
        dh0 = torch.where((r.lengths == 0)[:, None], dh_n, dh0)
    return dgates, dh0, dc0, dh_total


def choose_plan(recurrence: Recurrence, dtype: torch.dtype, backward: bool) -> Plan:
    """The whole sequence in one launch where a block holds W_hh, else step by step."""
    r = recurrence
    if r.projected:
        return step.STEP_PLAN
    return sequence.sequence_plan(r.hidden, dtype, shared_limit(r.c0.device), backward) or step.STEP_PLAN


def _module_of(plan: Plan) -> ModuleType:
    return step if plan.family is Family.STEP else sequence


def _checked(gates: Tensor, r: Recurrence) -> Recurrence:
    """What the kernels take: lengths in int32.

    Raises:
        TypeError, ValueError: they do not take it.
    """
    if gates.dtype not in ELEMENTS:
        raise TypeError(f"backend 'cupy' takes float16, bfloat16 and float32, got {gates.dtype}")
    if r.regularised:
        raise ValueError("backend 'cupy' takes neither recurrent dropout nor zoneout")
    check_counts(gates)
    return r if r.lengths is None else dataclasses.replace(r, lengths=r.lengths.int())


def launch_kernel(kernel: str, dtype: torch.dtype, grid: int, plan: Plan, **arguments: Tensor | int | None) -> None:
    """Launch a kernel of lstm.cu on torch's current stream: the seam at which a test can run it elsewhere.

    Args:
        kernel: its name, with its template arguments after the element type, if it has any.
        dtype: of the elements.
        grid: how many blocks.
        plan: how many threads a block has, and how much shared memory.
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
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if grid == 0:  # as it is for an empty batch
        return
    with torch.cuda.device(device):
        function = _kernel(device, kernel, dtype)
        with _stream(device):
            function((grid,), (plan.threads,), values, shared_mem=plan.shared)


@functools.cache
def _module(architecture: int, dtype: torch.dtype, options: tuple[str, ...]) -> Any:
    import cupy

    names = [name_expression(kernel, dtype) for kernel in kernels_of(architecture)]
    return cupy.RawModule(code=SOURCE.read_text(), options=options, name_expressions=names)


@functools.cache
def _kernel(device: torch.device, name: str, dtype: torch.dtype) -> Any:
    """A kernel, loaded on a device, which is the current one."""
    import cupy

    major, minor = torch.cuda.get_device_capability(device)
    kernel = _module(10 * major + minor, dtype, OPTIONS).get_function(name_expression(name, dtype))
    kernel.max_dynamic_shared_size_bytes = shared_limit(device)
    if name in CLUSTER_KERNELS:
        non_portable_cluster_size_allowed = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, non_portable_cluster_size_allowed, 1)
    return kernel


def _stream(device: torch.device) -> Any:
    """torch's current stream on a device, as CuPy knows it."""
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)  # CuPy older than 14, or torch than its protocol
