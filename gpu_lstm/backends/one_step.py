"""One step of all layers without gradients on a CPU. Each layer is one call of a compiled function, by addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import roles
from ..call.modes import Recording, Transforms
from ..call.request import Request
from ..call.weights import State
from ..kernels.layer import Layer


def is_one(call: Request) -> bool:
    """Whether `by_one_step` can run a call: one step in float32, nothing between layers, and no graph or transform."""
    options, modes, x = call.options, call.modes, call.x
    if call.steps != 1 or call.learns or modes.recording != Recording.NOBODY or modes.transforms != Transforms.NONE:
        return False
    plain = options.directions == 1 and not (options.connects or options.noisy) and call.traversal.is_plain()
    usual = x.is_cpu and x.dtype is torch.float32 and x.shape[-1] > 0
    usual = usual and call.weights[0][0].gain_ih is None  # the loop does not normalise W_ih x
    return plain and usual and modes.autocast is None and call.form.packed is None


def by_one_step(call: Request, layers: Sequence[Layer]) -> tuple[Tensor | None, list[State]]:
    """Return the output [1, B, H], or None for a cell, and the final states in the blocks of the call."""
    options, x, number = call.options, call.x.contiguous(), 0
    y = None if type(options.role) is roles.Cell else x.new_empty(1, call.batch, options.sizes[-1].hidden)
    source, finals, rows = x.data_ptr(), [], options.role.lead[0] if options.role.lead else 1
    for h0, c0 in call.states:
        h0, c0 = h0.contiguous(), c0.contiguous()
        h_n = torch.empty_like(h0)
        c_n = h_n if options.one_state else torch.empty_like(c0)
        finals.append((h_n, c_n))
        before, after = (h0.data_ptr(), c0.data_ptr()), (h_n.data_ptr(), c_n.data_ptr())
        sizes = h0.nbytes // rows, c0.nbytes // rows
        for k in range(rows):
            of_h, of_c = k * sizes[0], k * sizes[1]
            out = 0 if y is None or number < len(layers) - 1 else y.data_ptr()
            states = before[0] + of_h, before[1] + of_c, out, after[0] + of_h, after[1] + of_c
            layers[number].step(source, *states, call.weights[number][0])  # type: ignore[misc]
            source, number = after[0] + of_h, number + 1
    return y, finals
