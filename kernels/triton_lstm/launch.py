"""The launches of the Triton backend: a plan of one problem and pass, prepared once and then only launched."""

from collections.abc import Callable
from functools import partial
from math import ceil
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..layer import Chosen, Gradients, Layer, Verify, zeros_for_resets
from ..problem import TENSORS, Pass, Problem, Recurrence
from ..timeouts import KERNELS, error_word
from . import features, pointwise
from .binary import RecordedLaunch
from .choose import (
    FAMILIES,
    candidates,
    card_of,
    choose_plan,
    errors_as_of_torch,
    load,
    measured_plan,
    plans_in_use,
)
from .planning import Family, Launch, Plan

INTERPRETED: bool = features.INTERPRETED.value


def interpret(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run a kernel in Triton's interpreter, every argument by its parameter's name."""
    kernel[grid](**arguments)


launch_kernel: Launch | None = interpret if INTERPRETED else None
"""What makes every launch; None: the compiled kernel itself. Tests replace it."""


class Kernel:
    """A kernel as one plan launches it: its constants and options are fixed, and a call passes the rest."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], options: dict[str, Any]) -> None:
        self._kernel, self._grid = kernel, grid
        self._given = tuple(name for name in kernel.arg_names if name not in constants)
        constants = {name: constants[name] for name in kernel.arg_names[len(self._given) :]}  # they come last
        self._values, self._constants, self._fixed = itemgetter(*self._given), constants.values(), constants | options
        self._run: Callable[..., None] | None = None  # of the compiled kernel

    def __call__(self, launch: Launch | None, given: dict[str, Any]) -> None:
        """Launch it with those of the given arguments that it has parameters for."""
        values, launch = self._values(given), launch or launch_kernel
        if launch is None and self._run is not None:
            self._run(*values, *self._constants)
            return
        arguments = dict(zip(self._given, values)) | self._fixed
        if launch is None:
            self._run = load(self._kernel, self._grid, arguments)[(*self._grid, 1, 1)[:3]]
            with errors_as_of_torch():
                self._run(*values, *self._constants)
        else:
            launch(self._kernel, self._grid, **arguments)


# The parameters of kernels that are given the tensors of a Recurrence.
_POINTERS = tuple(f"{name}_ptr".replace("weight_peephole", "peephole") for name in Recurrence._fields[:TENSORS])


class Prepared:
    """A plan of one problem and pass; see layer.Prepared. `launch` makes its launches, by default `launch_kernel`.

    A plan that is only `tried` waits a second for other programs, not as long as the user's calls.
    """

    def __init__(
        self, problem: Problem, which: Pass, plan: Plan, device: torch.device, launch: Launch | None = None,
        tried: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self._launch, self._family = plan, launch, FAMILIES[plan.family]
        one_round = problem.steps == 1 and plan.parts == 1 and not problem.projected and not problem.normalised
        waits = plan.family is Family.COOPERATIVE or (plan.family is Family.STEP and not one_round)
        self.at_once = plan.side_by_side if waits else None
        self.projects_outside = problem.projected > 0 and (plan.family is not Family.STEP or plan.held > 0)
        if self.projects_outside:
            problem = problem._replace(projected=0)
        self._batch_tiles = ceil(problem.batch / plan.rows)
        self._batch, self._hidden, self._width, self._save = problem.batch, problem.hidden, problem.width, which.save
        self._total_width = problem.width if problem.projected or problem.norms[1] else None
        kernel = self._family.KERNELS[which.backward]
        options = dict(num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.registers,
                       launch_cooperative_grid=waits, **features.OPTIONS)  # fmt: skip
        self._kernel = Kernel(kernel, plan.grid, _constants(problem, which, plan), options)
        self._loop = pointwise.LOOPS[which.backward] if plan.family is Family.POINTWISE else None
        self._error = error_word(device, kernel.__name__, tried) if kernel.__name__ in KERNELS else None

    def forward(self, gates: Tensor, r: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As layer.Layer.forward, without a projection unless it is in the time loop."""
        c = r.c0.new_empty(gates.shape[0], self._batch, self._hidden) if self._save else None
        # Kernels write them at every step, except for sequences of length 0; cooperative ones read c there, too.
        copied = r.lengths is not None
        h_n = r.h0.clone() if copied else torch.empty_like(r.h0)
        c_n = r.c0.clone() if copied or self.plan.family is Family.COOPERATIVE else torch.empty_like(r.c0)
        h, buffers = self._family.forward_buffers(gates, r, self.plan)
        self._run(gates, r, {"c_ptr": c, "h_n_ptr": h_n, "c_n_ptr": c_n, **buffers})
        steps, _, width = h.shape
        if width > self._width:  # rows of words
            h = h[: gates.shape[0], :, : self._width].contiguous()
        elif steps > gates.shape[0]:  # h0 at its end; not a view, since autograd forbids changing one in place
            h.resize_(gates.shape[0], self._batch, width)
        return h, h_n, c_n, c

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence
    ) -> Gradients:
        """As layer.Layer.backward."""
        dc = torch.zeros_like(r.c0) if dc_n is None else dc_n.clone()  # of c_n; the kernel makes it that of c0
        dh_from_zoneout = None if r.zoneout_h is None else torch.zeros_like(r.h0, dtype=torch.float32)
        width = self._total_width
        dh_total = None if width is None else gates.new_empty(gates.shape[0], self._batch, width)
        dreset_h, dreset_c = zeros_for_resets(r)
        dgates, buffers = self._family.backward_buffers(gates, r, self.plan)
        self._run(gates, r, {
            "c_ptr": c, "dh_ptr": dh, "dh_n_ptr": dh_n, "dc_ptr": dc, "dh_from_zoneout_ptr": dh_from_zoneout,
            "dh_total_ptr": dh_total, "dreset_h_ptr": dreset_h, "dreset_c_ptr": dreset_c, **buffers,
        })  # fmt: skip
        if dgates.dim() == 4:  # [T, B, 4, H or more], rows of words
            dgates = dgates[..., : self._hidden].reshape(gates.shape)
        return Gradients(dgates, dh_from_zoneout, dc, dh_total, dreset_h, dreset_c)

    def _run(self, gates: Tensor, r: Recurrence, own: dict[str, Any]) -> None:
        """One launch, or one per step, with `own` arguments besides those of all families and both directions."""
        given: dict[str, Any] = dict(zip(_POINTERS, r))
        given |= {
            "gates_ptr": gates, "error_ptr": self._error, "T": gates.shape[0], "B": self._batch,
            "arrivals_ptr": None if self.at_once is None else r.c0.new_zeros(self._batch_tiles, dtype=torch.int32),
        }  # fmt: skip
        given |= own
        if self._loop is None:
            self._kernel(self._launch, given)
        else:
            self._loop(partial(self._kernel, self._launch), given, r)


def _constants(problem: Problem, which: Pass, plan: Plan) -> dict[str, Any]:
    """What problem, pass and plan fix, for kernels of all families."""
    return dict(
        H=problem.hidden, P=problem.width, REVERSE=problem.reverse, SAVE=which.save, PROJECT=problem.projected > 0,
        PEEPHOLES=problem.peepholes, PRECISION=problem.precision,
        BLOCK_B=plan.rows, BLOCK_H=plan.columns, BLOCK_K=plan.k,
        UNITS=plan.columns, CHUNKS=plan.k, WARPS=plan.num_warps, PARTS=plan.parts, AHEAD=plan.ahead,
        HELD=plan.held > 0,
    )  # fmt: skip


_layers: dict[tuple[Problem, torch.device], Layer] = {}


def layer_of(problem: Problem, device: torch.device, verify: Verify | None = None) -> Layer:
    """The layer of a problem on a device; every call returns the same one."""
    layer = _layers.get((problem, device))
    if layer is None:
        layer = _layers.setdefault((problem, device), Layer(problem, device, _prepare, _describe, verify))
    return layer


def forget() -> None:
    """Choose all plans again, since more has been measured."""
    _layers.clear()
    plans_in_use.clear()


def _prepare(layer: Layer, which: Pass) -> Prepared:
    # With neither gradient, backward returns zeros except for what dc_n contributes, which all plans compute alike.
    has_results = not which.backward or which.dh or which.dh_n
    verify = layer.verify if has_results and not layer.is_capturing() else None
    launches = partial(recorded_launches, layer.problem, which)
    plan = choose_plan(layer.problem, layer.device, which, launches, verify)
    return Prepared(layer.problem, which, plan, layer.device)


def _describe(layer: Layer, which: Pass, plan: Plan | None) -> Chosen:
    card = card_of(layer.device)
    plan = plan or candidates(layer.problem, card, which)[0]
    return Chosen(plan, plan == measured_plan(layer.problem, card, which.backward))


def layer_by(problem: Problem, device: torch.device, plan: Plan, launch: Launch | None = None) -> Layer:
    """A layer that uses a given plan, in order to try it."""

    def prepare(layer: Layer, which: Pass) -> Prepared:
        return Prepared(problem, which, plan, device, launch, tried=True)

    return Layer(problem, device, prepare, lambda *_: Chosen(plan, False))


def recorded_launches(problem: Problem, which: Pass, plan: Plan) -> list[RecordedLaunch]:
    """What a plan launches, without launching it: tensors are on the meta device."""
    launches: list[RecordedLaunch] = []

    def record(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        given = {name: a.detach() if isinstance(a, Tensor) else a for name, a in arguments.items()}  # in these sizes
        launches.append(RecordedLaunch(kernel, grid, given))

    meta = torch.device("meta")
    prepared = Prepared(problem, which, plan, meta, record)
    if prepared.projects_outside:  # then all gradients of m are given
        problem, which = problem._replace(projected=0), which._replace(dh=True, dh_n=False)
    gates, r = call_of(problem, meta)
    if which.backward:
        dh = r.h0.new_empty(problem.steps, *r.h0.shape) if which.dh else None
        c = r.c0.new_empty(problem.steps, *r.c0.shape)
        prepared.backward(dh, r.h0 if which.dh_n else None, None, gates, c, r)
    else:
        prepared.forward(gates, r)
    return launches


def call_of(problem: Problem, device: torch.device) -> tuple[Tensor, Recurrence]:
    """The gates and tensors of a call; zeros."""
    p, f32 = problem, torch.float32

    def zeros(there: bool, *shape: int, dtype: torch.dtype = p.dtype) -> Any:
        return torch.zeros(shape, dtype=dtype, device=device) if there else None

    def share(dimensions: int | None, features: int) -> Any:
        shape, dtype = ((p.steps, p.batch, features), torch.bool) if dimensions else ((), f32)
        return zeros(dimensions is not None, *shape, dtype=dtype)

    steps, batch, hidden, width = p.steps, p.batch, p.hidden, p.width
    gain_hh, gain_c, bias_c = p.norms
    return zeros(True, steps, batch, 4 * hidden), Recurrence(
        weight_hh=zeros(True, 4 * hidden, width), weight_hr=zeros(p.projected > 0, width, hidden),
        weight_peephole=zeros(p.peepholes, 3 * hidden),
        h0=zeros(True, batch, width), c0=zeros(True, batch, hidden, dtype=f32),
        lengths=zeros(p.lengths is not None, batch, dtype=p.lengths or f32),
        resets=zeros(p.resets, steps, batch, dtype=torch.bool),
        dropout_h=zeros(p.dropout_h, batch, width),
        zoneout_h=share(p.zoneout_h, width), zoneout_c=share(p.zoneout_c, hidden),
        reset_h=zeros(p.reset_h, steps, batch, width), reset_c=zeros(p.reset_c, steps, batch, hidden, dtype=f32),
        gain_hh=zeros(gain_hh, 4 * hidden), gain_c=zeros(gain_c, hidden), bias_c=zeros(bias_c, hidden),
        unit_hh=zeros(gain_hh, steps, batch, 4 * hidden), scale_hh=zeros(gain_hh, steps, batch, dtype=f32),
        unit_c=zeros(gain_c, steps, batch, hidden, dtype=f32), scale_c=zeros(gain_c, steps, batch, dtype=f32),
        reverse=p.reverse, precision=p.precision, side_by_side=p.side_by_side,
    )  # fmt: skip
