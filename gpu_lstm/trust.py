"""Kernels are checked on the card at hand before their numbers are trusted.

The first time that a plan is to run a kind of layer there, it runs a small problem that exercises it: several batch
tiles and the tail of one, and, where the call has them, lengths from 0 to T, resets and noise, through the very kernel
that the call takes. Each result and gradient is held to the reference in float64: its error may be at most twice that
of torch's own LSTM in the same dtype. The verdict is remembered (kernels/remembered.py).
"""

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .cell import linear, next_cell
from .kernels import cache as remembered
from .kernels import layer_norm  # type: ignore[import-not-found]  # a folder beside gpu_lstm/ in a checkout
from .kernels.problem import Recurrence  # type: ignore[import-not-found]
from .noise import Noise
from .reference import Gates
from .sequences import Traversal
from .weights import Weights

KIND = "checks"
STEPS, FEATURES = 4, 8  # T, I
NORMS = ("gain_hh", "gain_c", "bias_c")  # of layer norms inside the time loop
FORMAT = 3  # raised whenever the small problem or the rule changes


def distrust(plan: Any, like: Recurrence, *, save: bool = True, given: tuple[bool, bool] | None = None) -> str | None:
    """Why the kernel of a plan of the Triton backend is not trusted; None if it computes the right numbers.

    Args:
        plan: what is to run.
        like: the recurrence of the call: its sizes, dtype, direction and what it has are checked, not its values.
        save: forward keeps what backward needs.
        given: of backward, whether there are gradients of h and of h_n; None: forward is asked for.
    """
    key = _key(plan, like, save, given)
    verdict = remembered.read(KIND, key)
    if not isinstance(verdict, str):
        verdict = _verdict(plan, like, save, given)
        remembered.write(KIND, key, verdict)
    if verdict == "right":
        return None
    remembered.warn_once(
        f"a kernel is not trusted on {key['card']}: {verdict}. Backend 'auto' does without it. "
        f"Please report this, with what `python -m gpu_lstm` prints and the plan: {plan}"
    )
    return verdict


def verify(plan: Any, problem: Any, which: Any, device: torch.device) -> str | None:
    """As `distrust`, of a problem."""
    p, f32 = problem, torch.float32

    def zeros(there: Any, *shape: int, dtype: torch.dtype = p.dtype) -> Any:
        return torch.zeros(shape, dtype=dtype, device=device) if there else None

    def share(dimensions: int | None, features: int) -> Any:
        shape, dtype = ((2, p.batch, features), torch.bool) if dimensions else ((), f32)
        return zeros(dimensions is not None, *shape, dtype=dtype)

    batch, hidden, width = p.batch, p.hidden, p.width
    like = Recurrence(
        weight_hh=zeros(1, 4 * hidden, width), h0=zeros(1, batch, width), c0=zeros(1, batch, hidden, dtype=f32),
        weight_hr=zeros(p.projected, width, hidden), lengths=zeros(p.lengths, batch, dtype=p.lengths or f32),
        resets=zeros(p.resets, 2, batch, dtype=torch.bool), dropout_h=zeros(p.dropout_h, batch, width),
        zoneout_h=share(p.zoneout_h, width), zoneout_c=share(p.zoneout_c, hidden),
        reset_h=zeros(p.reset_h, 2, batch, width), reset_c=zeros(p.reset_c, 2, batch, hidden, dtype=f32),
        weight_peephole=zeros(p.peepholes, 3 * hidden), gain_hh=zeros(p.norms[0], 4 * hidden),
        gain_c=zeros(p.norms[1], hidden), bias_c=zeros(p.norms[2], hidden), reverse=p.reverse, precision=p.precision,
        side_by_side=p.side_by_side,
    )  # fmt: skip
    return distrust(plan, like, save=which.save, given=(which.dh, which.dh_n) if which.backward else None)


def _key(plan: Any, like: Recurrence, save: bool, given: tuple[bool, bool] | None) -> remembered.Key:
    kernel = {name: getattr(plan, name) for name in ("rows", "columns", "k", "num_warps", "num_stages")}
    optional = ("lengths", "resets", "dropout_h", "reset_h", "reset_c", "weight_peephole")
    there = [name for name in optional if getattr(like, name) is not None]
    there += [name for name in NORMS if getattr(like, name) is not None]
    there += [f"{name}, {t.dim()}-D" for name in ("zoneout_h", "zoneout_c") if (t := getattr(like, name)) is not None]
    return remembered.machine(like.h0.device) | dict(
        format=FORMAT, family=plan.family.value, **kernel, hidden=like.c0.shape[1], projected=like.weight_hr is not None,
        width=like.h0.shape[1], dtype=str(like.h0.dtype), precision=like.precision, reverse=like.reverse, there=there,
        save=save, given=given,
    )  # fmt: skip


def _verdict(plan: Any, like: Recurrence, save: bool, given: tuple[bool, bool] | None) -> str:
    """ "right", or what is wrong."""
    problem = Small.like(like, batch=2 * plan.rows + 3)
    if plan.family.value == "resident":
        plan = dataclasses.replace(plan, groups=3)  # a program for each batch tile
    elif plan.family.value == "cooperative":
        plan = dataclasses.replace(plan, groups=min(2, plan.groups))  # one of them walks two
    try:
        with torch.enable_grad(), torch.autocast(like.h0.device.type, enabled=False):
            truth, gates = problem.by_reference(torch.float64, given)
            as_torchs = like.reset_c is like.weight_peephole is None and not (
                like.gain_hh is not None or like.gain_c is not None
            )
            if problem.noise == Noise() and as_torchs:
                theirs = problem.by_torch(given)
            else:
                theirs, _ = problem.by_reference(problem.dtype, given)
        with torch.no_grad():
            ours = problem.by_kernel(plan, gates, save, given)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # it waited in vain, or the card refuses it
        return f"{type(error).__name__}: {error}"
    for name, true in truth.items():
        wrong = _wrong(name, ours[name].double(), theirs[name].double(), true, problem.epsilon)
        if wrong:
            return wrong
    return "right"


def _wrong(name: str, ours: Tensor, theirs: Tensor, true: Tensor, epsilon: float) -> str | None:
    """What is wrong with a result; None if its error is at most twice torch's own, or twice its last place."""
    error, allowed = _rms(ours - true), 2 * max(_rms(theirs - true), epsilon * float(true.abs().max()))
    return None if error <= allowed else f"the RMS error of {name} is {error:.2g}, where {allowed:.2g} is allowed"


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


@dataclasses.dataclass(frozen=True)
class Small:
    """A small problem: what a layer in one direction is given."""

    dtype: torch.dtype
    precision: str  # of float32 products
    # x, h0, c0, weight_ih, weight_hh and perhaps weight_hr, weight_peephole, NORMS, reset_h and reset_c, by the step's
    # time; exact in the dtype
    tensors: dict[str, Tensor]
    traversal: Traversal
    noise: Noise
    dh: Tensor  # [T, B, P] gradient of h
    dh_n: Tensor  # [B, P] of h_n

    @property
    def epsilon(self) -> float:
        """Of the products' last place."""
        return 2.0**-10 if self.precision == "tf32" else torch.finfo(self.dtype).eps

    @classmethod
    def like(cls, r: Recurrence, batch: int) -> "Small":
        """Random numbers in the sizes of `r`, with what `r` has."""
        generator, device, dtype = torch.Generator().manual_seed(0), r.h0.device, r.h0.dtype
        hidden, width = r.c0.shape[1], r.h0.shape[1]

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        tensors = dict(
            x=normal(STEPS, batch, FEATURES), h0=normal(batch, width), c0=normal(batch, hidden),
            weight_ih=normal(4 * hidden, FEATURES, scale=FEATURES**-0.5),
            weight_hh=normal(4 * hidden, width, scale=width**-0.5),
        )  # fmt: skip
        if r.weight_hr is not None:
            tensors["weight_hr"] = normal(width, hidden, scale=hidden**-0.5)
        if r.reset_c is not None:
            tensors |= dict(reset_h=normal(STEPS, batch, width), reset_c=normal(STEPS, batch, hidden))
        if r.weight_peephole is not None:
            tensors["weight_peephole"] = normal(3 * hidden)
        tensors |= {name: 1 + normal(len(t), scale=0.3) for name in NORMS if (t := getattr(r, name)) is not None}
        number = torch.arange(batch, device=device)
        lengths = None if r.lengths is None else (number % (STEPS + 1)).flip(0).to(r.lengths.dtype)
        resets = torch.arange(STEPS, device=device)[:, None] + number  # [T, B]
        noise = Noise(
            None if r.dropout_h is None else (normal(batch, width) > 0).to(dtype) * 2,
            None if r.zoneout_h is None else (normal(STEPS, batch, width) > 0 if r.zoneout_h.dim() else r.zoneout_h),
            None if r.zoneout_c is None else (normal(STEPS, batch, hidden) > 0 if r.zoneout_c.dim() else r.zoneout_c),
        )
        traversal = Traversal(lengths, None if r.resets is None else resets % 3 == 1, r.reverse)
        return cls(dtype, r.precision, tensors, traversal, noise, normal(STEPS, batch, width), normal(batch, width))

    def by_reference(self, dtype: torch.dtype, given: tuple[bool, bool] | None) -> tuple[dict[str, Tensor], Gates]:
        """Results of forward, or if `given` gradients, in some dtype; and the gates."""
        record: list[Gates] = []

        def run(x: Tensor, h0: Tensor, c0: Tensor, weights: Weights, traversal: Traversal) -> Any:
            return reference.layer(x, (h0, c0), weights, traversal, self.noise, record)

        return self._results(run, dtype, given), record[0]

    def by_torch(self, given: tuple[bool, bool] | None) -> dict[str, Tensor]:
        """The same by torch's own LSTM in the problem's dtype."""

        def run(x: Tensor, h0: Tensor, c0: Tensor, weights: Weights, traversal: Traversal) -> Any:
            return native.layer(x, (h0, c0), weights, traversal)

        return self._results(run, self.dtype, given)

    def _results(self, run: Any, dtype: torch.dtype, given: tuple[bool, bool] | None) -> dict[str, Tensor]:
        inputs = {name: t.to(dtype).requires_grad_(given is not None) for name, t in self.tensors.items()}
        optional = {name: inputs.get(name) for name in ("weight_hr", "weight_peephole", *NORMS)}
        weights = Weights(inputs["weight_ih"], inputs["weight_hh"], **optional)
        states = [(inputs["reset_h"], inputs["reset_c"])] if "reset_c" in inputs else None
        h, (h_n, c_n) = run(
            inputs["x"], inputs["h0"], inputs["c0"], weights, self.traversal._replace(reset_states=states)
        )
        if given is None:
            return dict(h=h, h_n=h_n, c_n=c_n)
        pairs = [(h, self.dh), (h_n, self.dh_n)]
        outputs, gradients = zip(*((out, d.to(dtype)) for (out, d), there in zip(pairs, given) if there))
        names = ("x", "h0", "c0", "weight_hh", "reset_h", "reset_c")
        wanted = {name: inputs[name] for name in names if name in inputs}
        found = torch.autograd.grad(outputs, list(wanted.values()), gradients)
        return {f"the gradient of {name}": gradient for name, gradient in zip(wanted, found)}

    def _taken(self, h: Tensor) -> Tensor:
        """What W_hh takes of h, [T, B, P] in float64: its elements that recurrent dropout leaves."""
        return h.double() if self.noise.dropout_h is None else self.noise.dropout_h.double() * h.double()

    def by_kernel(self, plan: Any, gates: Gates, save: bool, given: tuple[bool, bool] | None) -> dict[str, Tensor]:
        """The same by the kernel of a plan; backward it is given the reference's gates and cell states."""
        launch = importlib.import_module("gpu_lstm.kernels.triton_lstm.launch")
        launch_timeouts = importlib.import_module("gpu_lstm.kernels.timeouts")
        t, device = self.tensors, self.dh.device
        reset_h, reset_c = t.get("reset_h"), t.get("reset_c")
        taken = self._taken(self.traversal.states_before(gates.hidden, t["h0"].double(), reset_h))
        product = taken @ t["weight_hh"].double().T  # [T, B, 4H]
        of_hh = of_c = layer_norm.NO_UNIT
        if "gain_hh" in t and given is not None:
            of_hh = layer_norm.unit_of(product)
        if "gain_c" in t and given is not None:
            cell_before = self.traversal.states_before(gates.cell, t["c0"].double(), reset_c)
            of_c = layer_norm.unit_of(next_cell(gates.input, gates.forget, gates.candidate, cell_before))
        gains = [t.get(name) for name in NORMS]
        kinds = self.dtype, torch.float32, torch.float32, torch.float32
        units = [None if each is None else each.to(kind) for each, kind in zip((*of_hh, *of_c), kinds)]
        recurrence = Recurrence(
            weight_hh=t["weight_hh"], weight_hr=t.get("weight_hr"), weight_peephole=t.get("weight_peephole"),
            h0=t["h0"], c0=t["c0"].float(),
            lengths=self.traversal.lengths, resets=self.traversal.resets, reverse=self.traversal.reverse,
            precision=self.precision, **dict(zip(NORMS, gains)),
            **dict(zip(("unit_hh", "scale_hh", "unit_c", "scale_c"), units)),
            reset_h=None if self.noise.zoneout_h is None else reset_h,
            reset_c=None if reset_c is None else reset_c.float(), **self.noise._asdict(),
        )  # fmt: skip
        if given is None:
            before = t["x"].double() @ t["weight_ih"].double().T
            if reset_h is not None:
                zeros = torch.zeros_like(reset_h), torch.zeros_like(t["h0"])
                left = self._taken(self.traversal.states_before(*zeros, reset_h))
                before += linear(left, t["weight_hh"].double(), None, None if gains[0] is None else gains[0].double())
            h, h_n, c_n, _ = launch.layer_forward(before.to(self.dtype), recurrence, save=save, plan=plan)
            results = dict(h=h, h_n=h_n, c_n=c_n)
        else:
            dh, dh_n = (d if there else None for d, there in zip((self.dh, self.dh_n), given))
            activated = torch.cat([gates.input, gates.forget, gates.candidate, gates.output], dim=2).to(self.dtype)
            dgates, dh0, dc0, _, dkept_h, dreset_c = launch.layer_backward(
                dh, dh_n, None, activated, gates.cell.float(), recurrence, plan=plan
            )
            of_h = dgates.double()  # [T, B, 4H] the gradient of W_hh h
            if "gain_hh" in t:
                of_h = layer_norm.gradient(of_h, t["gain_hh"], *layer_norm.unit_of(product))
            results = {
                "the gradient of x": dgates.double() @ t["weight_ih"].double(), "the gradient of h0": dh0,
                "the gradient of c0": dc0, "the gradient of weight_hh": of_h.flatten(0, 1).T @ taken.flatten(0, 1),
            }  # fmt: skip
            if reset_h is not None:
                dreset_h = self._taken(of_h @ t["weight_hh"].double())
                anew = self.traversal.begins_anew()
                assert anew is not None
                dreset_h = torch.where(anew[:, :, None], dreset_h, 0)
                results["the gradient of reset_h"] = dreset_h if self.noise.zoneout_h is None else dreset_h + dkept_h
                results["the gradient of reset_c"] = dreset_c
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        launch_timeouts.raise_if_timed_out(device)
        return results
