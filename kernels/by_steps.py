"""The time loop on the host, see "Launches" in docs/design.md. A step is a product by cuBLAS and a kernel, in parts:

```
z -> h              most layers
z -> c, c -> h      LN(c) is computed between the two, by torch's own operator
z -> m, m -> h      W_hr m is computed between the two; in the second part, units are features of h
```

Here z = W_hh h, or LN(W_hh h). No program waits for another one, so a CUDA graph can have all steps. A product covers
the whole batch. Where sequences visit different times at the same step, kernels gather and scatter.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layer_norm
from .cells import CELLS
from .heads import arranged
from .layer_norm import EPS
from .memory import Arguments, Buffer, Buffers, buffers_of
from .problem import Pass, Problem, unless_reset
from .process_settings import precision

Launch = Callable[..., None]
"""launch(step=, ...) launches a kernel with bound arguments.

Only the step, and pointers that change with it, are given.
"""
Bind = Callable[[Arguments], Launch]
"""bind(arguments) binds a kernel to T, B, and tensors by the names of pointers.

The kernel ignores names for which it has no parameter.
"""

LEAST_SAVED = 16 << 20  # bytes of weights. By estimate, reading them from L2 takes as long as two launches


class Part(NamedTuple):
    """The part of a step that one launch computes. It starts from "z", "c" or "m", and ends with "c", "m" or "h".

    In backward, start and end are exchanged.
    """

    problem: Problem
    start: str
    end: str


def keeps_projection(p: Problem) -> bool:
    """Whether a projection stays in the loop: if it has to, or if W_hh and W_hr are much smaller than their product."""
    saved = p.gates * p.hidden * (p.hidden - p.projected) - p.projected * p.hidden
    return p.projected > 0 and (p.projects_in_loop or p.size * saved > LEAST_SAVED)


def within(p: Problem) -> Problem:
    """Return the problem that the loop runs. It has no projection if the projection is outside of the loop."""
    return p if keeps_projection(p) else p._replace(projected=0)


def parts_of(p: Problem, backward: bool) -> list[Part]:
    """Return the parts of a step, in their order. Each is a launch of a kernel."""
    p = within(p)
    of_h = p._replace(hidden=p.width, projected=0)
    stops = pairwise("z" + "c" * p.gain_c + "m" * p.weight_hr + "h")
    parts = [Part(of_h if start == "m" else p, start, end) for start, end in stops]
    return [part._replace(start=part.end, end=part.start) for part in reversed(parts)] if backward else parts


def launches_of(p: Problem, backward: bool) -> int:
    """Return how many launches a step is in all: parts, products, and layer norms."""
    return len(parts_of(p, backward)) + 1 + keeps_projection(p) + p.gain_hh + p.gain_c


def buffers(p: Problem, pass_: Pass) -> Buffers:
    """Return the buffers that the kernels and products of a pass write, see contract.Launches."""
    scattered = p.reverse and p.lengths is not None  # sequences visit different times at the same step
    written, backward, of_c = buffers_of(p, pass_), pass_.backward, (p.batch, p.hidden)
    apart = p.heads > 1 or (not backward and (CELLS[p.cell].has_constant or p.gain_hh))
    if scattered or apart:  # otherwise z and dz are in the gates
        written["dz_ptr" if backward else "z_ptr"] = Buffer(p.dtype, (p.batch, 4 * p.hidden))
    if backward or scattered or p.resets or p.dropout_h:  # otherwise h is the operand of the next product
        written["dh_next_ptr" if backward else "h_next_ptr"] = Buffer(p.dtype, (p.batch, p.width))
    if p.gain_c:  # o and c, or the gradients of z_o and LN(c)
        written |= {name: Buffer(torch.float32, of_c) for name in ("o_ptr", "v_ptr")}
    if p.projected:  # m, or the gradient of W_hr m
        written["m_ptr"] = Buffer(p.dtype, (p.batch, p.width) if backward else of_c)
    return written


def run_steps(binds: Sequence[Bind], arguments: Arguments, p: Problem, backward: bool) -> None:
    """Run all steps of a pass. `binds` has a Bind for each part of a step.

    On the meta device, where launches are only recorded, only the parts of one step are launched. Products there would
    import torch's compiler, which takes seconds.
    """
    on_meta = arguments["gates_ptr"].is_meta
    if (norm_c := arguments.get("norm_c")) is not None:
        gain_and_bias = norm_c.gain, None if (bias := arguments.get("bias_c_ptr")) is None else bias.float()
        normed = norm_c.v if on_meta else torch.native_layer_norm(norm_c.v, (p.hidden,), *gain_and_bias, EPS)[0]
        arguments = arguments | {"normed_c_ptr": normed}
    launches = [bind(arguments) for bind in binds]
    if on_meta:
        for launch in launches:
            launch(step=0)
        return
    with precision.held(p.precision):
        (_backward if backward else _forward)(launches, arguments, p)


def _forward(launches: Sequence[Launch], arguments: Arguments, p: Problem) -> None:
    gates, z, h, h_next = (arguments.get(f"{name}_ptr") for name in ("gates", "z", "h", "h_next"))
    of_c = [None if t is None else t.float() for t in map(arguments.get, ("gain_c_ptr", "bias_c_ptr"))]
    operand, (product, in_heads, weight) = arguments["h0_ptr"][0], by_head(arguments["weight_hh_ptr"], p)
    if p.dropout_h:
        operand = arguments["dropout_h_ptr"] * operand
    operand = unless_reset(p, operand, arguments.get("resets_ptr"))  # [B, P]
    times, cell, weight = range(arguments["T"]), CELLS[p.cell], weight.mT
    for step, time in enumerate(reversed(times) if p.reverse else times):
        normed = {}
        if z is None:
            cell.of_h(gates[time], p.hidden).addmm_(operand, weight)
        else:
            product(in_heads(operand), weight, out=cell.of_h(in_heads(z), p.columns))
        if p.gain_hh:  # the bias of this norm is in the gates
            normed["z_ptr"] = torch.native_layer_norm(z, (4 * p.hidden,), arguments["gain_hh_ptr"], None, EPS)[0]
        launches[0](step=step, **normed)
        if p.gain_c:
            launches[1](step=step, v_ptr=torch.native_layer_norm(arguments["v_ptr"], (p.hidden,), *of_c, EPS)[0])
        if p.projected:
            launches[1](step=step, m_ptr=torch.mm(arguments["m_ptr"], arguments["weight_hr_ptr"].mT))
        operand = h[time] if h_next is None else h_next


def _backward(launches: Sequence[Launch], arguments: Arguments, p: Problem) -> None:
    """Run the steps from the last to the first."""
    norm_hh, norm_c = arguments.get("norm_hh"), arguments.get("norm_c")
    dgates, dz, dh_next = (arguments.get(f"{name}_ptr") for name in ("dgates", "dz", "dh_next"))
    times, cell = range(arguments["T"]), CELLS[p.cell]
    product, in_heads, weight = by_head(arguments["weight_hh_ptr"], p)
    for step, time in zip(reversed(times), times if p.reverse else reversed(times)):
        launches[0](step=step)
        if p.projected:
            launches[1](step=step, m_ptr=torch.mm(arguments["m_ptr"], arguments["weight_hr_ptr"]))
        if norm_c is not None:
            at = _times_at(step, time, arguments, p)
            launches[1](step=step, v_ptr=layer_norm.gradient(arguments["v_ptr"], norm_c, at))
        if step:
            of_h = dgates[time] if dz is None else dz
            if norm_hh is not None:
                of_h = layer_norm.gradient(of_h, norm_hh, _times_at(step, time, arguments, p))
            product(cell.of_h(in_heads(of_h), p.columns), weight, out=in_heads(dh_next))


def by_head(weight_hh: Tensor, p: Problem) -> tuple[Callable[..., Any], Callable[..., Any], Tensor]:
    """Return a product function, a function that arranges an operand [B, *] for it, and W_hh, arranged for it.

    With one head, nothing is rearranged. With several heads the product is a batch of products, for which W_hh is
    copied.
    """
    if p.heads == 1:
        return torch.mm, lambda x: x, weight_hh
    weight = arranged(weight_hh, p.width).mT  # [heads, GATES D, D]
    return torch.bmm, lambda x: x.unflatten(1, (p.heads, -1)).transpose(0, 1), weight  # [heads, B, *]


def _times_at(step: int, time: int, arguments: Arguments, p: Problem) -> Any:
    """Return an index into [T, B, *] that selects the times that sequences visit at a step."""
    if not p.reverse or p.lengths is None:
        return time
    lengths = arguments["lengths_ptr"]
    return torch.where(lengths > step, lengths - 1 - step, step), torch.arange(p.batch, device=lengths.device)
