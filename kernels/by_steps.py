"""The time loop on the host, see "Launches" in docs/design.md: a step is a product by cuBLAS and a kernel, in parts:

    z -> h              most layers
    z -> c, c -> h      between them LN(c), by torch's own operator
    z -> m, m -> h      between them W_hr m; in the second, units are features of h

where z = W_hh h, or LN(W_hh h). No program waits for another, so a CUDA graph can have all steps. A product covers the
whole batch: where sequences visit different times at the same step, kernels gather and scatter.
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
from .memory import Buffer, buffers_of
from .problem import Pass, Problem, unless_reset
from .settings import precision

Launch = Callable[..., None]
"""launch(step=, ...) launches a kernel whose arguments are bound, but for the step and pointers that change with it."""
Bind = Callable[[dict[str, Any]], Launch]
"""bind(arguments) has them by the names of pointers, and T and B. A kernel takes those that it knows."""

LEAST_SAVED = 16 << 20  # bytes of weights; reading so many from L2 takes about as long as two launches


class Part(NamedTuple):
    """What a launch computes of a step, from "z", "c" or "m" to "c", "m" or "h"; backward the other way."""

    problem: Problem
    start: str
    end: str


def keeps_projection(p: Problem) -> bool:
    """Whether a projection stays in the loop: where it must, or W_hh and W_hr are much smaller than their product."""
    saved = CELLS[p.cell].rows * p.hidden * (p.hidden - p.projected) - p.projected * p.hidden
    return p.projected > 0 and (p.projects_in_loop or p.size * saved > LEAST_SAVED)


def within(p: Problem) -> Problem:
    """What the loop runs of a problem: without its projection, where that is outside."""
    return p if keeps_projection(p) else p._replace(projected=0)


def parts_of(p: Problem, backward: bool) -> list[Part]:
    """The launches of a kernel in a step, in their order."""
    p = within(p)
    stops = [stop for stop, is_there in (("z", True), ("c", p.gain_c), ("m", p.weight_hr), ("h", True)) if is_there]
    of_h = p._replace(hidden=p.width, projected=0)
    parts = [Part(of_h if start == "m" else p, start, end) for start, end in pairwise(stops)]
    return [part._replace(start=part.end, end=part.start) for part in reversed(parts)] if backward else parts


def launches_of(p: Problem, backward: bool) -> int:
    """How many launches a step is in all: parts, products, and layer norms."""
    return len(parts_of(p, backward)) + 1 + keeps_projection(p) + p.gain_hh + p.gain_c


def buffers(p: Problem, pass_: Pass) -> dict[str, Buffer]:
    """The buffers that the kernels and products of a pass write, see contract.Launches."""
    scattered = p.reverse and p.lengths is not None  # sequences visit different times at the same step
    written, backward, of_c = buffers_of(p, pass_), pass_.backward, (p.batch, p.hidden)
    apart = p.heads > 1 or (not backward and (CELLS[p.cell].has_constant or p.gain_hh))
    if scattered or apart:  # else in the gates
        written["dz_ptr" if backward else "z_ptr"] = Buffer(p.dtype, (p.batch, 4 * p.hidden))
    if backward or scattered or p.resets or p.dropout_h:  # else the next product's operand is h
        written["dh_next_ptr" if backward else "h_next_ptr"] = Buffer(p.dtype, (p.batch, p.width))
    if p.gain_c:  # o and c, or the gradients of z_o and LN(c)
        written |= {name: Buffer(torch.float32, of_c) for name in ("o_ptr", "v_ptr")}
    if p.projected:  # m, or the gradient of W_hr m
        written["m_ptr"] = Buffer(p.dtype, (p.batch, p.width) if backward else of_c)
    return written


def forward_steps(binds: Sequence[Bind], arguments: dict[str, Any], p: Problem) -> None:
    """Run all steps; `binds` are of the parts of a step. Of launches that are only recorded, the first step's.

    On the meta device products would import torch's compiler, which takes seconds.
    """
    launches = [bind(arguments) for bind in binds]
    if arguments["gates_ptr"].is_meta:
        return _record(launches)
    gates, z, h, h_next = (arguments.get(f"{name}_ptr") for name in ("gates", "z", "h", "h_next"))
    of_c = [None if t is None else t.float() for t in map(arguments.get, ("gain_c_ptr", "bias_c_ptr"))]
    operand, (product, in_heads, weight) = first_operand(arguments, p), by_head(arguments["weight_hh_ptr"], p)
    times, cell, weight = range(arguments["T"]), CELLS[p.cell], weight.mT
    with precision.held(p.precision):
        for step, time in enumerate(reversed(times) if p.reverse else times):
            normed = {}
            if z is None:
                cell.of_h(gates[time], p.hidden).addmm_(operand, weight)
            else:
                product(in_heads(operand), weight, out=cell.of_h(in_heads(z), p.columns))
            if p.gain_hh:  # its bias is in the gates
                normed["z_ptr"] = torch.native_layer_norm(z, (4 * p.hidden,), arguments["gain_hh_ptr"], None, EPS)[0]
            launches[0](step=step, **normed)
            if p.gain_c:
                launches[1](step=step, v_ptr=torch.native_layer_norm(arguments["v_ptr"], (p.hidden,), *of_c, EPS)[0])
            if p.projected:
                launches[1](step=step, m_ptr=torch.mm(arguments["m_ptr"], arguments["weight_hr_ptr"].mT))
            operand = h[time] if h_next is None else h_next


def backward_steps(binds: Sequence[Bind], arguments: dict[str, Any], p: Problem) -> None:
    """As forward_steps, from the last to the first."""
    norm_hh, norm_c, bias_c = (arguments.get(name) for name in ("norm_hh", "norm_c", "bias_c_ptr"))
    if norm_c is not None:
        normed = norm_c.gain, None if bias_c is None else bias_c.float(), EPS
        normed = norm_c.v if norm_c.v.is_meta else torch.native_layer_norm(norm_c.v, (p.hidden,), *normed)[0]
        arguments = arguments | {"normed_c_ptr": normed}
    launches = [bind(arguments) for bind in binds]
    if arguments["gates_ptr"].is_meta:
        return _record(launches)
    dgates, dz, dh_next = (arguments.get(f"{name}_ptr") for name in ("dgates", "dz", "dh_next"))
    times, cell = range(arguments["T"]), CELLS[p.cell]
    product, in_heads, weight = by_head(arguments["weight_hh_ptr"], p)
    with precision.held(p.precision):
        for step, time in zip(reversed(times), times if p.reverse else reversed(times)):
            launches[0](step=step)
            if p.projected:
                launches[1](step=step, m_ptr=torch.mm(arguments["m_ptr"], arguments["weight_hr_ptr"]))
            if norm_c is not None:
                times_at = _times_at(step, time, arguments, p)
                launches[1](step=step, v_ptr=layer_norm.gradient(arguments["v_ptr"], norm_c, times_at))
            if step:
                of_h = dgates[time] if dz is None else dz
                if norm_hh is not None:
                    of_h = layer_norm.gradient(of_h, norm_hh, _times_at(step, time, arguments, p))
                product(cell.of_h(in_heads(of_h), p.columns), weight, out=in_heads(dh_next))


def first_operand(arguments: dict[str, Any], p: Problem) -> Tensor:
    """What W_hh multiplies at the first step, [B, P]."""
    operand = arguments["h0_ptr"][0]
    if p.dropout_h:
        operand = arguments["dropout_h_ptr"] * operand
    return unless_reset(p, operand, arguments.get("resets_ptr"))


def by_head(weight_hh: Tensor, p: Problem) -> tuple[Callable[..., Any], Callable[..., Any], Tensor]:
    """(A product, the form that it takes [B, *] in, W_hh); of heads in batches of them, for which W_hh is copied."""
    if p.heads == 1:
        return torch.mm, lambda x: x, weight_hh
    weight = arranged(weight_hh, p.width).mT  # [heads, GATES D, D]
    return torch.bmm, lambda x: x.unflatten(1, (p.heads, -1)).transpose(0, 1), weight  # [heads, B, *]


def _record(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch(step=0)


def _times_at(step: int, time: int, arguments: dict[str, Any], p: Problem) -> Any:
    """An index into [T, B, *]: what sequences visit at a step."""
    if not p.reverse or p.lengths is None:
        return time
    lengths = arguments["lengths_ptr"]
    return torch.where(lengths > step, lengths - 1 - step, step), torch.arange(p.batch, device=lengths.device)
