"""The CuPy backend's two entry points. One layer, one direction; the input product is already in `gates`.

The kernels are in lstm.cu, compiled at first use; CuPy is imported then, not before. Memory and products are torch's.
"""

import contextlib
import enum
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("lstm.cu")
OPTIONS = ("-std=c++17",)
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}

KERNELS = (
    "lstm_step_forward",
    "lstm_step_project_forward",
    "lstm_step_project_backward",
    "lstm_step_backward",
    "lstm_sequence_forward",
    "lstm_sequence_backward",
)
CLUSTER_SIZES = (8, 16)  # blocks: as many as every device takes, and as many as some do
CLUSTER_KERNELS = tuple(f"lstm_cluster_forward<{blocks}>" for blocks in CLUSTER_SIZES)  # sm_90

PACK = 16  # bytes that a thread reads or writes at once
GATES = BATCH_TILE = 4  # of a block that walks whole sequences
MAX_THREADS = 512  # of such a block
STEP_THREADS = 128  # of a block that takes one step


class Recurrence(NamedTuple):
    """What both passes are given: one layer in one direction."""

    weight_hh: Tensor  # [4H, P]
    weight_hr: Tensor | None  # [P, H]; None without projection, then P = H
    h0: Tensor  # [B, P]
    c0: Tensor  # [B, H] float32
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B]
    reverse: bool
    precision: str  # of float32 products: "tf32" or "ieee"
    mask_h: None = None  # recurrent dropout and zoneout, which these kernels do not take
    zone_h: None = None
    zone_c: None = None


class Family(enum.Enum):
    """How the time loop is run."""

    STEP = "step"  # one launch a step, after a product by cuBLAS
    SEQUENCE = "sequence"  # one launch; a block walks whole sequences
    CLUSTER = "cluster"  # one launch; so does a cluster of blocks. Forward, and on request only


@dataclass(frozen=True)
class Plan:
    """A family with the size of its blocks."""

    family: Family
    threads: int  # of a block
    shared: int = 0  # bytes of a block
    blocks: int = 1  # that share W_hh


STEP_PLAN = Plan(Family.STEP, STEP_THREADS)


def layer_forward(
    gates: Tensor, *recurrence: Any, save: bool, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence of one layer in one direction.

    Args:
        gates: [T, B, 4H], x W_ih^T + b_ih + b_hh. Overwritten by the activated gates if `save`.
        recurrence: the fields of Recurrence, in order.
        save: keep what layer_backward needs.
        plan: how to run it; by default by `choose_plan`.

    Returns:
        h [T, B, P], h_n [B, P], c_n float32 [B, H], and c: float32 [T, B, H] if `save`, else empty.

    Raises:
        TypeError: a dtype that the kernels do not take.
        ValueError: recurrent dropout or zoneout.
    """
    r = _checked(gates, recurrence)
    steps, batch, _ = gates.shape
    h = gates.new_empty(steps, batch, r.h0.shape[1])
    h_n, c_n = r.h0.clone(), r.c0.clone()  # the running states
    c = r.c0.new_empty((steps, *r.c0.shape) if save else 0)
    if batch == 0:
        return h, h_n, c_n, c
    plan = plan or choose_plan(r, gates.dtype, backward=False)
    if plan.family is Family.STEP:
        _step_forward(plan, gates, r, h, h_n, c if save else None, c_n)
    else:
        _sequence_forward(plan, gates, r, h, h_n, c if save else None, c_n)
    return h, h_n, c_n, c


def layer_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    *recurrence: Any,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through the recurrence of one layer in one direction.

    Args:
        dh, dh_n, dc_n: gradients of layer_forward's first three results; None counts as zero.
        gates, c: what layer_forward saved: activated gates [T, B, 4H], float32 [T, B, H]. Not written to.
        recurrence, plan: as for layer_forward.

    Returns:
        dgates [T, B, 4H], gradient of the pre-activations; dh0 [B, P]; dc0 float32 [B, H]; and, with a projection,
        the whole gradient of h [T, B, P] (without one, an empty tensor), from which dW_hr is taken.

    Raises:
        TypeError: a dtype that the kernels do not take.
        ValueError: recurrent dropout or zoneout.
    """
    r = _checked(gates, recurrence)
    batch = gates.shape[1]
    dgates = torch.empty_like(gates)
    dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # [B, H], of c_n; the kernels make it that of c0
    dh_total = gates.new_empty(0 if r.weight_hr is None else (*gates.shape[:2], r.h0.shape[1]))
    dh0 = torch.zeros_like(r.h0)
    if batch == 0:
        return dgates, dh0, dc, dh_total
    plan = plan or choose_plan(r, gates.dtype, backward=True)
    if plan.family is Family.STEP:
        _step_backward(plan, dh, dh_n, gates, c, r, dgates, dh0, dc, dh_total)
    else:
        _sequence_backward(plan, dh, dh_n, gates, c, r, dgates, dh0, dc)
    if r.lengths is not None and dh_n is not None:
        dh0 = torch.where((r.lengths == 0)[:, None], dh_n, dh0)
    return dgates, dh0, dc, dh_total


def _checked(gates: Tensor, recurrence: tuple[Any, ...]) -> Recurrence:
    r = Recurrence(*recurrence)
    if gates.dtype not in ELEMENTS:
        raise TypeError(f"backend 'cupy' takes float16, bfloat16 and float32, got {gates.dtype}")
    if not r.mask_h is r.zone_h is r.zone_c is None:
        raise ValueError("backend 'cupy' takes neither recurrent dropout nor zoneout")
    return r if r.lengths is None else r._replace(lengths=r.lengths.int())


# Planning.


def choose_plan(r: Recurrence, dtype: torch.dtype, backward: bool) -> Plan:
    """The whole sequence in one launch where a block holds W_hh, else step by step."""
    if r.weight_hr is not None:
        return STEP_PLAN
    return sequence_plan(r.c0.shape[1], dtype, shared_limit(r.c0.device), backward) or STEP_PLAN


def sequence_plan(hidden: int, dtype: torch.dtype, limit: int, backward: bool = False, blocks: int = 1) -> Plan | None:
    """A plan for whole sequences, if `blocks` blocks of at most `limit` bytes of shared memory can hold W_hh.

    As many threads as there can be share the products: each of the 4H columns is summed in as many slices.
    """
    width = GATES * ceil(hidden / blocks)
    size = PACK // dtype.itemsize
    for slices in range(min(MAX_THREADS // width, ceil(hidden / size)), 0, -1):
        threads = slices * width
        packs = ceil(hidden / (slices * size))  # of a thread's weights
        vectors = GATES if backward else 2  # dz of every gate, or h of two steps
        floats = BATCH_TILE * (vectors * slices * packs * size + threads)
        shared = packs * threads * PACK + 4 * floats
        if shared <= limit:
            return Plan(Family.SEQUENCE if blocks == 1 else Family.CLUSTER, threads, shared, blocks)
    return None


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have: on any GPU, where the device is none."""
    if device.type != "cuda":
        return 48 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


# The step family. The products of a step read and write dense [B, *] buffers, whatever time each sequence is at.


def _step_forward(plan: Plan, gates, r: Recurrence, h, h_n, c, c_n) -> None:
    (steps, batch, _), hidden, projected = gates.shape, r.c0.shape[1], r.h0.shape[1]
    product = gates.new_empty(batch, 4 * hidden)
    m = gates.new_empty(batch, hidden) if r.weight_hr is not None else h_n
    with _products_in(r.precision):
        for s in range(steps):
            torch.mm(h_n, r.weight_hh.T, out=product)
            _launch_step(
                plan, "lstm_step_forward", gates, hidden,
                gates, product, h if r.weight_hr is None else None, m, c, c_n, r.lengths, r.resets,
                s, steps, batch, hidden, r.reverse,
            )  # fmt: skip
            if r.weight_hr is not None:
                hidden_product = m @ r.weight_hr.T  # [B, P]
                _launch_step(
                    plan, "lstm_step_project_forward", gates, projected,
                    hidden_product, h, h_n, r.lengths, s, steps, batch, projected, r.reverse,
                )  # fmt: skip


def _step_backward(plan: Plan, dh, dh_n, gates, c, r: Recurrence, dgates, dh0, dc, dh_total) -> None:
    (steps, batch, _), hidden, projected = gates.shape, r.c0.shape[1], r.h0.shape[1]
    dz = gates.new_empty(batch, 4 * hidden)
    handed_back = dh0  # [B, P], by the step after: after the first step, the gradient of h0
    with _products_in(r.precision):
        for s in reversed(range(steps)):
            product = handed_back
            if r.weight_hr is not None:
                dh_step = torch.empty_like(r.h0)
                _launch_step(
                    plan, "lstm_step_project_backward", gates, projected,
                    dh, dh_n, handed_back, dh_total, dh_step, r.lengths, s, steps, batch, projected, r.reverse,
                )  # fmt: skip
                product = dh_step @ r.weight_hr
            _launch_step(
                plan, "lstm_step_backward", gates, hidden,
                dh if r.weight_hr is None else None, dh_n if r.weight_hr is None else None, product, gates, c,
                c if s else r.c0, dgates, dz, dc, r.lengths, r.resets, s, steps, batch, hidden, r.reverse,
            )  # fmt: skip
            torch.mm(dz, r.weight_hh, out=handed_back)


def _launch_step(plan: Plan, name: str, gates: Tensor, width: int, *args: Any) -> None:
    """A kernel whose threads share a [B, width] matrix, a pack each."""
    shares = gates.shape[1] * ceil(width * gates.itemsize / PACK)
    launch_kernel(name, gates.dtype, ceil(shares / plan.threads), plan.threads, plan.shared, args)


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """Products of float32 tensors by cuBLAS in `precision`, whatever torch's switch for the others says."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        switch, value = "fp32_precision", precision
    else:
        switch, value = "allow_tf32", precision == "tf32"
    before = getattr(matmul, switch)
    setattr(matmul, switch, value)
    try:
        yield
    finally:
        setattr(matmul, switch, before)


# The families that walk whole sequences.


def _sequence_forward(plan: Plan, gates, r: Recurrence, h, h_n, c, c_n) -> None:
    (steps, batch, _), hidden = gates.shape, r.c0.shape[1]
    launch_kernel(
        "lstm_sequence_forward" if plan.family is Family.SEQUENCE else f"lstm_cluster_forward<{plan.blocks}>",
        gates.dtype, ceil(batch / BATCH_TILE) * plan.blocks, plan.threads, plan.shared,
        (gates, r.weight_hh, h, h_n, c, c_n, r.lengths, r.resets, steps, batch, hidden, r.reverse),
    )  # fmt: skip


def _sequence_backward(plan: Plan, dh, dh_n, gates, c, r: Recurrence, dgates, dh0, dc) -> None:
    (steps, batch, _), hidden = gates.shape, r.c0.shape[1]
    launch_kernel(
        "lstm_sequence_backward", gates.dtype, ceil(batch / BATCH_TILE), plan.threads, plan.shared,
        (
            dh, dh_n, gates, c, r.c0, r.weight_hh, dgates, dh0, dc, r.lengths, r.resets,
            steps, batch, hidden, r.reverse,
        ),
    )  # fmt: skip


# Launching.


def launch_kernel(
    name: str, dtype: torch.dtype, grid: int, block: int, shared_bytes: int, args: tuple[Tensor | int | None, ...]
) -> None:
    """Launch a kernel of lstm.cu on torch's current stream: the seam at which a test can run it elsewhere.

    Args:
        name: of the kernel, with its template arguments after the element type, if it has any.
        dtype: of the elements.
        grid, block: how many blocks, and threads of each.
        shared_bytes: of dynamic shared memory.
        args: in the kernel's order; a tensor goes by its address, None as a null pointer.
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

    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device):
        kernel = _kernel(device, name, dtype)
        with _stream(device):
            kernel((grid,), (block,), tuple(by_value(a) for a in args), shared_mem=shared_bytes)


def name_expression(kernel: str, dtype: torch.dtype) -> str:
    """A kernel of lstm.cu for one dtype, in C++: "f<8>" for float32 is f<float, 8>."""
    name, _, rest = kernel.partition("<")
    return f"{name}<{ELEMENTS[dtype]}, {rest}" if rest else f"{name}<{ELEMENTS[dtype]}>"


def kernels_of(architecture: int) -> tuple[str, ...]:
    """The kernels that lstm.cu has on an architecture, 90 for sm_90."""
    return KERNELS + CLUSTER_KERNELS if architecture >= 90 else KERNELS


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
