"""The memory of a launch (results, gradients, scratch), and the check that kernels write nothing outside of it."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import CELLS
from .problem import Inputs, Pass, Problem

EVERY_BIT = -1  # as the fill of a Buffer: every bit is set, which is the sentinel of triton_rnn/exchange.py
PATTERN = 0x7FFF  # fills margins: a NaN in every dtype, so that reads of a margin show, too; not the sentinel
LEAST, MOST = 1 << 12, 1 << 20  # limits for the bytes of a margin, which is as large as its tensor within them
ALIGNMENT = 16  # bytes, which compiled kernels assume for every tensor


class Buffer(NamedTuple):
    """A tensor that a launch writes: [T + times, *size], or [*size] if `times` is None."""

    dtype: torch.dtype
    size: tuple[int, ...]
    times: int | None = None
    fill: int | str | None = None  # 0, EVERY_BIT, or a state, "h0" or "c0"; None leaves it uninitialised


Buffers = dict[str, Buffer]
Memory = dict[str, Tensor]
Arguments = dict[str, Any]
"""The tensors that a launch writes, the same after they were allocated, and all arguments, by the names of pointers."""


def buffers_of(p: Problem, pass_: Pass) -> Buffers:
    """Return the results of a pass as buffers, by the names of pointers. In backward they become problem.Gradients."""
    f32, of_h, of_c = torch.float32, (p.batch, p.width), (p.batch, p.hidden)
    every_c = CELLS[p.cell].kept, *of_c
    if not pass_.backward:
        h0, c0 = (None, None) if p.lengths is None else ("h0", "c0")  # the final states of sequences of length 0
        buffers = {"h_ptr": Buffer(p.dtype, of_h, 0), "h_n_ptr": Buffer(p.dtype, (1, *of_h), fill=h0)}
        buffers["c_n_ptr"] = Buffer(f32, every_c, fill=c0)
        return buffers | ({"c_ptr": Buffer(f32, of_c, 0)} if pass_.save else {})
    buffers = {"dgates_ptr": Buffer(p.dtype, (p.batch, 4 * p.hidden), 0), "dc_ptr": Buffer(f32, every_c, fill=0)}
    if p.zoneout_h is not None:
        buffers["dh_from_zoneout_ptr"] = Buffer(f32, (1, *of_h), fill=0)
    if p.projected or p.gain_c:
        buffers["dh_total_ptr"] = Buffer(p.dtype, of_h, 0)
    if p.reset_h:
        buffers["dreset_h_ptr"] = Buffer(f32, of_h, 0, 0)
    if p.reset_c:
        buffers["dreset_c_ptr"] = Buffer(f32, of_c, 0, 0)
    return buffers


def allocate(buffers: Buffers, steps: int, like: Tensor, inputs: Inputs) -> Memory:
    """Allocate and fill the buffers of a launch over T = `steps`, on the device of `like`."""
    tensors, usual = {}, like.dtype
    for name, (dtype, size, times, fill) in buffers.items():
        size = size if times is None else (steps + times, *size)
        # Sizes are passed one by one, which torch parses faster than a tuple.
        t = like.new_empty(*size) if dtype is usual else like.new_empty(*size, dtype=dtype)
        if isinstance(fill, str):
            t.copy_(getattr(inputs, fill))
        elif fill is not None:
            (t.view(torch.int32) if fill else t).fill_(fill)
        tensors[name] = t
    return tensors


class _Checking(threading.local):
    on = False
    kernel: str | None = None


checking = _Checking()
"""`on` says whether this thread launches within `margins`. `kernel` is the last kernel that it launched so."""


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Check all launches of a block, see `margins`."""
    outermost, checking.on = "on" not in vars(checking), True
    try:
        yield
    finally:
        if outermost:
            del checking.on  # from this thread, so that the attribute of the class, False, counts again


class WroteOutside(RuntimeError):
    """A kernel wrote outside of a tensor that it was given."""


@contextlib.contextmanager
def margins(kernel: str, arguments: Arguments) -> Iterator[Arguments]:
    """Yield the arguments for a launch with all tensors copied between margins. After the block they are copied back.

    Error words are passed as they are, since the host reads them at any time.

    Raises:
        WroteOutside: a margin has changed. The message names the kernel, the buffer, and how far outside it was
        written.
    """
    tensors = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and not t.is_meta and "error" not in n}
    wide = {name: _with_margins(t.detach()) for name, t in tensors.items()}
    checking.kernel = kernel
    yield arguments | {name: inner for name, (_, inner) in wide.items()}
    written = [text for name, (outer, inner) in wide.items() if (text := _outside(name, outer, inner))]
    if written:
        raise WroteOutside(f"{kernel} wrote {'; '.join(written)}")
    for name, t in tensors.items():
        t.data.copy_(wide[name][1])  # writes to `data` change no version, which autograd checks in saved tensors


def _with_margins(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes with a margin at both ends, and the copy of a contiguous t that lies between the margins."""
    margin = min(max(LEAST, t.nbytes), MOST) // ALIGNMENT * ALIGNMENT
    outer = _pattern(2 * margin + t.nbytes, t.device)
    return outer, outer[margin : margin + t.nbytes].view(t.dtype).view(t.shape).copy_(t)


def _pattern(count: int, device: torch.device) -> Tensor:
    """Return `count` bytes of the pattern, or one more if `count` is odd."""
    return torch.full(((count + 1) // 2,), PATTERN, dtype=torch.int16, device=device).view(torch.uint8)


def _outside(name: str, outer: Tensor, inner: Tensor) -> str | None:
    """Say in words where the margins of a buffer were written, or return None if nowhere."""
    start = inner.data_ptr() - outer.data_ptr()
    changed = outer != _pattern(outer.numel(), outer.device)
    before, after = changed[:start], changed[start + inner.nbytes :]
    where = f"{name.removesuffix('_ptr')} {list(inner.shape)}, {inner.nbytes:,} bytes of {inner.dtype}"
    if after.any():
        return f"up to {int(after.nonzero().max()) + 1:,} bytes past the end of {where}"
    if before.any():
        return f"from {start - int(before.nonzero().min()):,} bytes before the start of {where}"
    return None
