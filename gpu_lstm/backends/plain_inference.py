"""Inference of plain layers on a CPU. All steps of a layer are one call of a compiled function, by addresses.

Of a short call most time goes to operators of torch, so there are as few as possible.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import roles
from ..call.choices import Backend
from ..call.modes import Recording, Transforms
from ..call.request import Request
from ..call.weights import State
from ..kernels.layer import Layer
from ..kernels.private import is_profiled
from .layer_loop import named


def is_plain(call: Request) -> bool:
    """Whether `infer` can run a call: float32, one direction, nothing between layers, and no graph or transform."""
    options, modes, x = call.options, call.modes, call.x
    if call.learns or modes.recording != Recording.NOBODY or modes.transforms != Transforms.NONE:
        return False
    plain = options.directions == 1 and not (options.connects or options.noisy) and call.traversal.is_plain()
    usual = x.is_cpu and x.dtype is torch.float32 and x.shape[-1] > 0
    if call.weights[0][0].gain_ih is not None:  # the loop does not normalise W_ih x
        return False
    return plain and usual and modes.autocast is None and call.form.packed is None


def infer(call: Request, backend: Backend, layers: Sequence[Layer]) -> tuple[Tensor | None, list[State]]:
    """Return the output [T, B, H], or None for a cell, and the final states in the blocks of the call."""
    options, x, y, number, T = call.options, call.x.contiguous(), None, 0, call.steps
    source, finals, rows = x.data_ptr(), [], options.role.lead[0] if options.role.lead else 1
    is_cell = type(options.role) is roles.Cell
    for h0, c0 in call.states:
        h0, c0 = h0.contiguous(), c0.contiguous()
        h_n = torch.empty_like(h0)
        c_n = h_n if options.one_state else torch.empty_like(c0)
        finals.append((h_n, c_n))
        before, after = (h0.data_ptr(), c0.data_ptr()), (h_n.data_ptr(), c_n.data_ptr())
        sizes = h0.nbytes // rows, c0.nbytes // rows
        for k in range(rows):
            of_h, of_c = k * sizes[0], k * sizes[1]
            x = x if y is None else y  # it is kept while the layer reads it
            if T > 1 or not (is_cell or number < len(layers) - 1):  # a layer reads one step from the final state
                y = x.new_empty(T, call.batch, options.sizes[number].hidden)
            out = 0 if y is None else y.data_ptr()
            states = before[0] + of_h, before[1] + of_c, out, after[0] + of_h, after[1] + of_c
            arguments = T, source, *states, call.weights[number][0]
            if is_profiled():
                with named(number, 0, backend):
                    layers[number].inference(*arguments)  # type: ignore[misc]
            else:
                layers[number].inference(*arguments)  # type: ignore[misc]
            source, number = out or after[0] + of_h, number + 1
    return y, finals
