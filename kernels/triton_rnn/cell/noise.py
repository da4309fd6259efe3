"""What regularises the recurrence. Where a call has no such noise, its pointer is None and nothing changes.

dropout   h is multiplied by the same factors before every product with W_hh
zoneout   a share of each state stays as it was before the step (Krueger et al., 2017): all or nothing, by a mask,
          or one share for all, a rate
"""

import triton
import triton.language as tl

from ..equations import next_cell
from .reset import load_state, store_gradient


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


@triton.jit
def load_h_before(hidden, h_prev_ptr, prev_at, cells):
    """For `zoneout`: h before a step, and the share of it that stays; empty without zoneout."""
    before = ()
    if hidden.zoneout_h_ptr is not None:
        h_prev = load_state(h_prev_ptr, prev_at, hidden.reset_h_ptr, cells)
        before = (h_prev,) + load_share(hidden.zoneout_h_ptr, cells)
    return before


@triton.jit
def load_stayed(hidden, cells):
    """For `zoneout_of_h_backward`: what stayed of the gradient of h after the step after, and the share of h that
    stays; a tuple, empty without zoneout."""
    stayed = ()
    if hidden.zoneout_h_ptr is not None:
        dh = tl.load(hidden.dh_from_zoneout_ptr + cells.state_at, mask=cells.valid, other=0.0)
        stayed = (dh,) + load_share(hidden.zoneout_h_ptr, cells)
    return stayed


@triton.jit
def zoneout_of_h_backward(dh, stayed, hidden, cells):
    """Gradient of h -> of the h that the step computed. dh_from_zoneout hands what stays to the step before."""
    if len(stayed) > 0:
        dh, stays = zoneout_backward(dh + stayed[0], stayed[1:])
        store_gradient(stays, hidden.dh_from_zoneout_ptr, hidden.dreset_h_ptr, cells)
    return dh


@triton.jit
def without_zoneout(c, gates, c_prev, zoneout_c_ptr, S: tl.constexpr):
    """c as the step computed it, from c after zoneout."""
    if zoneout_c_ptr is not None:
        c = next_cell(gates, c_prev, S)
    return c
