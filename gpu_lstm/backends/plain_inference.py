"""Inference of plain layers on a CPU. All steps of a layer are one call of a compiled function, by addresses.

Of a short call most time goes to operators of torch, so there are as few as possible.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import roles
from ..call.choices import Backend
from ..call.request import Request
from ..call.weights import State
from ..kernels.layer import Layer
from ..kernels.private import is_profiled
from .layer_loop import NOTHING, named


def can_infer(request: Request) -> bool:
    """Whether `infer` can run a call: float32, nothing between layers, and no graph, transform or autocast."""
    options, modes, x = request.options, request.modes, request.x
    if request.learns or not modes.plain or request.form.packed is not None or options.connects or options.noisy:
        return False
    if request.weights[0][0].gain_ih is not None or request.traversal.reset_states is not None:
        return False  # the loop does not normalise W_ih x, and does not multiply states to reset to
    return x.is_cpu and x.dtype is torch.float32 and x.shape[-1] > 0


def infer(request: Request, backend: Backend, layers: Sequence[Layer]) -> tuple[Tensor | None, list[State]]:
    """Return the output [T, B, D*H], or None for a cell, and the final states in the blocks of the call."""
    options, x, number, T = request.options, request.x.contiguous(), 0, request.steps
    is_cell, rows = type(options.role) is roles.Cell, options.role.lead[0] if options.role.lead else 1
    lengths, resets, *_ = request.traversal
    resets = None if resets is None else resets.contiguous()
    lengths = None if lengths is None else lengths.long().contiguous()
    marks = [0 if t is None else t.data_ptr() for t in (resets, lengths)]
    finals, outputs = [], []
    for h0, c0 in request.states:
        h0, c0 = h0.contiguous(), c0.contiguous()
        h_n = torch.empty_like(h0) if lengths is None else h0.clone()
        c_n = h_n if options.one_state else torch.empty_like(c0) if lengths is None else c0.clone()
        finals.append((h_n, c_n))
        before, after = (h0.data_ptr(), c0.data_ptr()), (h_n.data_ptr(), c_n.data_ptr())
        sizes = h0.nbytes // rows, c0.nbytes // rows
        for row in range(rows):
            of_h, of_c, (k, d) = row * sizes[0], row * sizes[1], divmod(number, options.directions)
            y = None if is_cell else x.new_empty(T, request.batch, options.sizes[k].hidden)
            out, new = 0 if y is None else y.data_ptr(), (after[0] + of_h, after[1] + of_c)
            arguments = T, x.data_ptr(), (before[0] + of_h, before[1] + of_c, out, *new), marks, request.weights[k][d]
            with named(k, d, backend) if is_profiled() else NOTHING:
                layers[number].inference(*arguments)  # type: ignore[misc]
            number += 1
            if y is not None:
                outputs.append(y)
                if d == options.directions - 1:
                    x, outputs = y if d == 0 else torch.cat(outputs, 2), []
    return None if is_cell else x, finals
