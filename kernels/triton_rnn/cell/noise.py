"""Recurrent dropout and zoneout. If a call has no such noise, its pointer is None, and the functions change nothing.

dropout   Before every product with W_hh, h is multiplied by the same factors.
zoneout   A share of each state stays as it was before the step (Krueger et al., 2017). With a mask the share of each
          cell is 0 or 1. With a rate all cells have one share.
"""

import triton
import triton.language as tl


@triton.jit
def dropout(x, factors_ptr, at, mask):
    """Multiply x by the factors at the offsets `at`. Forward x is h, backward the product W_hh^T dgates."""
    if factors_ptr is not None:
        x *= tl.load(factors_ptr + at, mask=mask, other=0.0).to(x.dtype)
    return x


@triton.jit
def load_share(zoneout_ptr, cells):
    """Load the share of the state before the step that stays.

    Returns a tuple: empty without zoneout, else with one element in its stored dtype. The element is the mask of the
    cells, [BB, BH] or [THREADS], or a scalar rate. A pointer to float32 is a rate.
    """
    share = ()
    if zoneout_ptr is not None:
        if zoneout_ptr.dtype.element_ty == tl.float32:
            share = (tl.load(zoneout_ptr),)
        else:
            share = (tl.load(zoneout_ptr + cells.at, mask=cells.valid, other=0),)
    return share


@triton.jit
def zoneout(new, before):
    """Return the state after a step that computed `new`. `before` is (the state before the step, *load_share)."""
    for n in tl.static_range(1, len(before)):
        stays = before[n].to(tl.float32)
        new = stays * before[0] + (1.0 - stays) * new
    return new


@triton.jit
def zoneout_backward(d, share):
    """Split the gradient d of the state after a step into (the part of the computed state, the part that stayed).

    The second part belongs to the state before the step. `share` is from load_share.
    """
    stayed = tl.zeros_like(d)
    for n in tl.static_range(len(share)):
        stays = share[n].to(tl.float32)
        d, stayed = (1.0 - stays) * d, stays * d
    return d, stayed


@triton.jit
def add_stayed(d, stayed, zoneout_ptr):
    """Add the part that stayed to the gradient d of the state before a step.

    Without zoneout that part is zero, and d is returned as it is: an addition of zeros would cost an instruction.
    """
    if zoneout_ptr is not None:
        d += stayed
    return d
