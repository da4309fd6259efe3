"""One layer in one direction on one card, prepared once and then only launched: the launcher of both backends."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import layer_norm, projection
from .ordering import await_others, record_launch
from .problem import MOST, TENSORS, Pass, Problem, Recurrence, end_index
from .timeouts import raise_if_timed_out

ALIGNMENT = 16  # bytes, which compiled kernels assume


class Gradients(NamedTuple):
    """What backward returns; None where there is none."""

    dgates: Tensor  # [T, B, 4H] of the pre-activations; zero in padding
    dh0: Tensor | None  # [B, P]; from Prepared.backward: float32, and through zoneout of the first step only
    dc0: Tensor  # [B, H] float32
    dh_total: Tensor | None = None  # [T, B, P] of W_hr m with a projection, of m with a layer norm of c
    dreset_h: Tensor | None = None  # [T, B, P] float32, through zoneout; zero but at resets
    dreset_c: Tensor | None = None  # [T, B, H] float32, zero but at resets


class Chosen(NamedTuple):
    """A plan, and how it was chosen."""

    plan: Any  # the backend's own
    measured: bool  # by autotune; else the first that fits in the order of estimated times


class Prepared(Protocol):
    """A plan of one problem and pass, ready to be launched."""

    plan: Any
    at_once: int | None  # launches of it that fit the card together; None: programs do not wait for each other
    projects_outside: bool  # it runs the recurrence of m, see projection.py

    def forward(self, gates: Tensor, r: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As Layer.forward."""

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence
    ) -> Gradients:
        """As Layer.backward, except for dh0."""


Verify = Callable[[Any, Problem, Pass, torch.device], str | None]
"""verify(plan, problem, which, device): why a plan's numbers are not right on the device; None if they are."""


class Layer:
    """One problem on one card. Its plan is chosen once for each Pass, by the first call that needs it.

    Args:
        prepare: prepare(layer, which) chooses a plan; what it returns while a CUDA graph is captured is not kept.
        describe: describe(layer, which, plan) is what `chosen` returns for a plan, or for the first one to be tried.
        verify: asked once for each plan that is chosen, and never while a CUDA graph is captured.

    Raises:
        ValueError: more sequences or units than kernels can count; a projection together with a layer norm in the loop.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        prepare: "Callable[[Layer, Pass], Prepared]",
        describe: "Callable[[Layer, Pass, Any], Chosen]",
        verify: Verify | None = None,
    ) -> None:
        _check_count("sequences", problem.batch)
        _check_count("gates of all units", 4 * problem.hidden)
        if problem.projected and problem.normalised:  # a step would need grid-wide barriers for both
            raise ValueError("expected no projection combined with a layer norm inside the time loop")
        self.problem, self.device, self.verify = problem, device, verify
        self._prepare, self._describe = prepare, describe
        self._prepared: dict[Pass, Prepared] = {}

    def forward(self, gates: Tensor, r: Recurrence, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The recurrence.

        Args:
            gates: [T, B, 4H], x W_ih^T + b_ih + b_hh. Overwritten by the activated gates if `save`; with a projection,
                and without `save`, at every sequence's first step.
            r: weights, initial states, lengths and the rest.
            save: keep what backward needs.

        Returns:
            h [T, B, P], h_n as h0, c_n as c0, and c: float32 [T, B, H] if `save`, else None.

        Raises:
            RuntimeError: an earlier launch timed out; or no kernel can run the problem.
            ValueError: T is more than the kernels can count to.
        """
        if self._is_elsewhere():
            with torch.cuda.device(self.device):
                return self.forward(gates, r, save)
        raise_if_timed_out(self.device)
        _check_count("steps", gates.shape[0])
        if self.problem.batch == 0:
            h, c = (s.new_empty(len(gates), 0, s.shape[-1]) for s in (r.h0, r.c0))
            return h, torch.empty_like(r.h0), torch.empty_like(r.c0), c if save else None
        prepared = self.prepared(SAVE if save else NO_SAVE)
        r, own = _aligned_tensors(r), aligned(gates)
        if prepared.at_once is not None:
            await_others(prepared.at_once, self.device)
        results = projection.forward(prepared, own, r) if prepared.projects_outside else prepared.forward(own, r)
        if prepared.at_once is not None:
            record_launch(self.device)
        if own is not gates:
            gates.copy_(own)
        return results

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence,
        of_h0: bool = True,
    ) -> Gradients:  # fmt: skip
        """Gradients through the recurrence.

        Args:
            dh, dh_n, dc_n: gradients of forward's first three results; None counts as zero.
            gates, c: saved by forward: activated gates [T, B, 4H], float32 [T, B, H]. Not written to.
            r: as for forward.
            of_h0: whether the gradient of h0 is needed.

        Raises:
            RuntimeError: as forward.
        """
        if self._is_elsewhere():
            with torch.cuda.device(self.device):
                return self.backward(dh, dh_n, dc_n, gates, c, r, of_h0)
        raise_if_timed_out(self.device)
        if self.problem.batch == 0:
            dh_total = None if r.weight_hr is r.gain_c is None else r.h0.new_empty(len(gates), 0, r.h0.shape[-1])
            empty = (torch.empty_like(t) for t in (gates, r.h0, r.c0))
            return Gradients(*empty, dh_total, *zeros_for_resets(r))
        prepared = self.prepared(Pass(True, True, dh is not None, dh_n is not None))
        r = _aligned_tensors(r)
        dh, dh_n, dc_n, gates, c = (None if t is None else aligned(t) for t in (dh, dh_n, dc_n, gates, c))
        if prepared.at_once is not None:
            await_others(prepared.at_once, self.device)
        given = dh, dh_n, dc_n, gates, c, r
        found = projection.backward(prepared, *given) if prepared.projects_outside else prepared.backward(*given)
        if prepared.at_once is not None:
            record_launch(self.device)
        return found._replace(dh0=_initial_hidden_gradient(found, dh_n, r) if of_h0 else None)

    def prepared(self, which: Pass) -> Prepared:
        """The plan of a pass, chosen now if it was not before."""
        if (prepared := self._prepared.get(which)) is None:
            prepared = self._prepare(self, which)
            if not self.is_capturing():
                self._prepared[which] = prepared
        return prepared

    def chosen(self, which: Pass) -> Chosen:
        """The plan chosen for a pass, or another in its direction; else the first to be tried. Nothing is compiled."""
        known = (p for each, p in self._prepared.items() if each.backward == which.backward)
        prepared = self._prepared.get(which) or next(known, None)
        return self._describe(self, which, None if prepared is None else prepared.plan)

    def is_capturing(self) -> bool:
        """Whether what is run now becomes part of a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _is_elsewhere(self) -> bool:
        """Kernels are launched on the current device, which may be another."""
        return self.device.type == "cuda" and self.device.index not in (None, torch.cuda.current_device())


SAVE, NO_SAVE = Pass(), Pass(save=False)


def aligned(t: Tensor) -> Tensor:
    """t, or a copy: contiguous, and at an address that is a multiple of 16 bytes, which kernels are compiled for."""
    if t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _aligned_tensors(r: Recurrence) -> Recurrence:
    for t in r[:TENSORS]:
        if t is not None and not (t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0):
            break
    else:
        return r
    return Recurrence(*(None if t is None else aligned(t) for t in r[:TENSORS]), *r[TENSORS:])


def _check_count(of: str, count: int) -> None:
    if count > MOST:
        raise ValueError(f"expected at most {MOST} {of}, got {count}")


def zeros_for_resets(r: Recurrence) -> list[Tensor | None]:
    """Zeros for the gradients of reset_h (through zoneout) and reset_c, float32; None where there is none."""
    return [None if t is None else torch.zeros_like(t, dtype=torch.float32) for t in (r.reset_h, r.reset_c)]


def _initial_hidden_gradient(found: Gradients, dh_n: Tensor | None, r: Recurrence) -> Tensor:
    """dh0, as h0: through the first step, unless it is reset; dh_n [B, P] where a sequence has no step."""
    at = end_index(r, first=True)
    first = found.dgates[at]  # [B, 4H]; zero where length is 0
    if r.gain_hh is not None:
        first = layer_norm.gradient(first, r.gain_hh, r.unit_hh[at], r.scale_hh[at])
    if r.resets is not None and not r.reverse:
        first = first.masked_fill(r.resets[0, :, None], 0)
    dh0 = first @ r.weight_hh
    if r.dropout_h is not None:
        dh0 = r.dropout_h * dh0
    if found.dh0 is not None:
        dh0 = dh0 + found.dh0.to(dh0.dtype)
    dh0 = dh0.view(r.h0.shape)
    if r.lengths is not None and dh_n is not None:
        dh0 = torch.where((r.lengths == 0)[:, None], dh_n, dh0)
    return dh0
