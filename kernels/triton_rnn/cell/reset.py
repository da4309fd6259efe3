"""Resets, where the state before a step is zero, or one that the call gives: its pointer is None if it gives none."""

import triton
import triton.language as tl


@triton.jit
def reset_to(before, reset_ptr, cells):
    """The state before a step, zero where it is reset -> there what it is reset to."""
    if reset_ptr is not None:
        before += tl.load(reset_ptr + cells.at, mask=cells.reset, other=0.0).to(tl.float32)
    return before


@triton.jit
def load_state(state_ptr, at, reset_ptr, cells):
    """The state before a step: the one that lies `at`, or what it is reset to."""
    before = tl.load(state_ptr + at, mask=cells.continues, other=0.0).to(tl.float32)
    return reset_to(before, reset_ptr, cells)


@triton.jit
def store_gradient(d, gradient_ptr, dreset_ptr, cells):
    """Store the gradient d of the state before a step. None flows past a reset: there it is that of the state given."""
    if dreset_ptr is not None:
        tl.store(dreset_ptr + cells.at, d, mask=cells.reset)
    tl.store(gradient_ptr + cells.state_at, tl.where(cells.continues, d, 0.0), mask=cells.valid)
