"""What regularises the recurrence. Where a call has no such noise, its pointer is None and nothing changes.

dropout   h is multiplied by the same factors before every product with W_hh
zoneout   a share of each state stays as it was before the step (Krueger et al., 2017): all or nothing, by a mask,
          or one share for all, a rate
"""

import triton
import triton.language as tl


@triton.jit
def dropout(x, factors_ptr, at, mask):
    """h, or backward what the product returned for it, times the factors that lie `at`."""
    if factors_ptr is not None:
        x *= tl.load(factors_ptr + at, mask=mask, other=0.0).to(x.dtype)
    return x


@triton.jit
def load_share(zoneout_ptr, cells):
    """The share of the state before that stays, as stored: of each cell, or one for all. A tuple, empty without."""
    share = ()
    if zoneout_ptr is not None:
        if zoneout_ptr.dtype.element_ty == tl.float32:
            share = (tl.load(zoneout_ptr),)
        else:
            share = (tl.load(zoneout_ptr + cells.at, mask=cells.valid, other=0),)
    return share


@triton.jit
def zoneout(new, before):
    """The state after a step that computed `new`; `before` is the state before it and, with zoneout, load_share."""
    for n in tl.static_range(1, len(before)):
        stays = before[n].to(tl.float32)
        new = stays * before[0] + (1.0 - stays) * new
    return new


@triton.jit
def zoneout_backward(d, share):
    """Gradient of the state after a step -> (of what the step computed, of what stayed of the state before)."""
    stayed = tl.zeros_like(d)
    for n in tl.static_range(len(share)):
        stays = share[n].to(tl.float32)
        d, stayed = (1.0 - stays) * d, stays * d
    return d, stayed


@triton.jit
def add_stayed(d, stayed, zoneout_ptr):
    """The whole gradient of the state before a step. (To add zeros would be an instruction.)"""
    if zoneout_ptr is not None:
        d += stayed
    return d
