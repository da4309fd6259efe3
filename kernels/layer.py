"""One layer in one direction on one device. It is prepared once, and then only launched."""

import logging
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import cache, heads, layer_norm, projection
from .cells import CELLS
from .contract import Chosen, Launcher, Launches, NoKernel, Timer
from .memory import ALIGNMENT, Arguments, Memory, allocate, buffers_of
from .ordering import in_order
from .problem import MOST, Gradients, Inputs, Pass, Problem, Recurrence, Results, end_index, in_the_loop, unless_reset
from .timeouts import raise_if_timed_out

logger = logging.getLogger("gpu_lstm")

MOST_LAYERS = 1024  # the most layers that are kept; a program with more problems or batch sizes makes them again


Verify = Callable[["Layer", Pass, Inputs, Any], str | None]
"""verify(layer, pass_, inputs, plan) returns why the numbers of a plan are wrong on the layer's device, or None."""


class Layer:
    """One problem on one device. Its plan is chosen once for each Pass, by the first call that needs it.

    Args:
        verify: is called at most once for each plan that may be chosen, and never while a CUDA graph is captured.
        timer: returns a Timer, or None where plans must not be timed. It is called only where plans are verified.
        trial: a plan that is used without a choice and a verification.

    Raises:
        ValueError: the backend does not support the problem, or a size is too large for kernels.
    """

    def __init__(
        self, problem: Problem, device: torch.device, launcher: Launcher, verify: Verify | None = None,
        timer: Callable[[], Timer | None] = lambda: None, trial: Any = None,
    ) -> None:  # fmt: skip
        if (lacking := launcher.lacks(problem)) is not None:
            raise ValueError(f"backend {launcher.BACKEND!r} has no {lacking}")
        _check_count("sequences", problem.batch)
        _check_count("gates of all units", 4 * problem.hidden)
        self.problem, self.device, self.verify, self.backend = problem, device, verify, launcher.BACKEND
        self._index = device.index if device.type == "cuda" else None
        self.launcher, self._trial, self._timer = launcher, trial, timer
        self.multiplies_x = launcher.multiplies_x(problem)
        self._prepared: dict[Pass, Launches] = {}
        self._without: dict[Pass, str] = {}  # the passes for which there is no kernel, and why
        self._names = tuple(in_the_loop(problem, problem.steps))
        self._tensors, self._pointers = attrgetter(*self._names), [f"{name}_ptr" for name in self._names]

    def forward(self, gates: Tensor, r: Recurrence, save: bool) -> Results:
        """Run all steps. Return h, h_n, c_n and c.

        ```
        gates  [T, B, 4H]          x W_ih^T + b_ih + b_hh; for a GRU without b_hh and s
        h      [T, B, P]
        h_n    [1, B, P]
        c_n    [K, B, H] float32
        c      [T, B, H] float32   None unless `save`
        ```

        With `save`, the activated gates overwrite `gates`. With a projection, the gates of every sequence's first step
        may be overwritten in any case.

        If `multiplies_x` and `is_product_alone` are both true, the loop itself computes the gates from r.inputs.x. Then
        `gates` is uninitialised memory with `save`, and x [T, B, I] without. If there is no weight_ih, it is x or a
        copy of x.

        Raises:
            RuntimeError: an earlier launch timed out, or no kernel can run the problem.
        """
        if gates.shape[0] > MOST:
            _check_count("steps", gates.shape[0])
        overwritten = aligned(gates)
        results = self._run(SAVE if save else NO_SAVE, self._forward, projection.forward, overwritten, r)
        if overwritten is not gates:
            gates.copy_(overwritten)
        return results

    @property
    def inference(self) -> Callable[..., None] | None:
        """Launches.inference, or None before a call without gradients has prepared it."""
        prepared = self._prepared.get(NO_SAVE)
        return None if prepared is None else prepared.inference

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence,
        of_h0: bool = True,
    ) -> Gradients:  # fmt: skip
        """Return the gradients, from the gradients of h, h_n and c_n. None stands for zero.

        `gates` and c are as forward saved them, and are not written. `of_h0` says whether the gradient of h0 is needed.
        """
        pass_ = Pass(True, True, dh is not None, dh_n is not None)
        read = [None if t is None else aligned(t) for t in (dh, dh_n, dc_n, gates, c)]
        gradients = self._run(pass_, self._backward, projection.backward, *read, r)
        return gradients._replace(dh0=_initial_hidden_gradient(self.problem, gradients, dh_n, r) if of_h0 else None)

    def _run(self, pass_: Pass, run: Callable[..., Any], projected: Callable[..., Any], *given: Any) -> Any:
        """Run a pass on the `given` tensors, of which the last is r, a Recurrence.

        run(prepared, *given) makes the launches. If the projection is outside of the loop, projected(launch, problem,
        *given) calls it as `launch`. Launches whose programs wait for each other run in order.
        """
        if self._index is not None and self._index != torch.cuda.current_device():  # where kernels are launched
            with torch.cuda.device(self.device):
                return self._run(pass_, run, projected, *given)
        raise_if_timed_out(self.device)
        *tensors, r = given
        prepared, read = self.prepared(pass_, r.inputs), self._tensors(r.inputs)
        for t in read:
            if t.data_ptr() % ALIGNMENT or not t.is_contiguous():
                r = r._replace(inputs=r.inputs._replace(**dict(zip(self._names, map(aligned, read)))))
                break
        run = partial(run, prepared)
        if prepared.projects_outside:
            run = partial(projected, run, self.problem)
        if prepared.at_once is not None:  # its programs wait for each other
            run = partial(in_order, prepared.at_once, self.device, run)
        return run(*tensors, r)

    def _forward(self, prepared: Launches, gates: Tensor, r: Recurrence) -> Results:
        """Make the launches of `forward`. A projection outside of the time loop is not computed here."""
        memory = self._launch(prepared, gates, r, {})
        h = memory["h_ptr"] if prepared.result is None else prepared.result(memory)
        return h, memory["h_n_ptr"], memory["c_n_ptr"], memory.get("c_ptr")

    def _backward(
        self, prepared: Launches, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor,
        r: Recurrence,
    ) -> Gradients:  # fmt: skip
        """Make the launches of `backward`. A projection outside of the time loop is not computed here.

        The gradient of h0 is float32, and has only the part that zoneout of the first step passes on.
        """
        read = {"dh_ptr": dh, "dh_n_ptr": dh_n, "c_ptr": c, "norm_hh": r.norm_hh, "norm_c": r.norm_c}
        memory = self._launch(prepared, gates, r, read, dc_n)
        dgates = memory["dgates_ptr"] if prepared.result is None else prepared.result(memory)
        names = "dh_from_zoneout_ptr", "dc_ptr", "dh_total_ptr", "dreset_h_ptr", "dreset_c_ptr"
        return Gradients(dgates, *map(memory.get, names))

    def _launch(
        self, prepared: Launches, gates: Tensor, r: Recurrence, read: Arguments, dc_n: Tensor | None = None
    ) -> Memory:
        """Make all launches and return their buffers by the names of pointers."""
        steps = gates.shape[0]
        memory = allocate(prepared.buffers, steps, gates, r.inputs)
        if dc_n is not None:  # the kernel turns it into the gradient of c0
            memory["dc_ptr"].copy_(dc_n)
        arguments = dict(zip(self._pointers, self._tensors(r.inputs)), **memory, **read)
        arguments |= {"gates_ptr": gates, "T": steps, "B": self.problem.batch, "error_ptr": prepared.error_ptr}
        if prepared.more is not None:
            arguments |= prepared.more(r, memory)
        prepared.start(arguments)
        return memory

    def prepared(self, pass_: Pass, inputs: Inputs) -> Launches:
        """Return the Launches of a pass. The first call chooses the plan, and verifies it for inputs like these."""
        if (prepared := self._prepared.get(pass_)) is None:
            if pass_ in self._without:
                raise NoKernel(self._without[pass_])
            if self.problem.batch * self.problem.width == 0:  # nothing is launched
                return Launches(None, buffers_of(self.problem, pass_), lambda arguments: None)
            capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if (plan := self._trial) is None:
                # If dc_n is the only gradient, all plans of backward compute the same, and there is nothing to verify.
                verifies = self.verify is not None and (not pass_.backward or pass_.dh or pass_.dh_n) and not capturing
                refuses = partial(self.verify, self, pass_, inputs) if verifies else None
                timer = self._timer() if verifies else None
                plan = self.launcher.choose(self.problem, self.device, pass_, refuses, timer)
                logger.debug("%s, %s: %s", self.problem, pass_, plan)
            prepared = self.launcher.prepare(self.problem, pass_, plan, self.device, self._trial is not None)
            if not capturing:
                self._prepared[pass_] = prepared
        return prepared

    def has_kernel(self, pass_: Pass, inputs: Inputs) -> bool:
        """Whether a kernel runs a pass of a call with these inputs. If not, one warning says why.

        False is final, unless memory was full while a kernel was verified or timed. Then the next call tries again.
        """
        if pass_ not in self._without:
            try:
                with torch.cuda.device(-1 if self._index is None else self._index):
                    self.prepared(pass_, inputs)
                return True
            except torch.OutOfMemoryError:
                why = "memory is full, where a kernel has to be verified or timed"
            except NoKernel as error:
                why = str(error)
                self._without[pass_] = why
            cache.warn_once(f"backend 'auto' does without the kernels of {self.backend!r} for {self.problem}: {why}")
        return False

    def chosen(self, pass_: Pass) -> Chosen:
        """Return the plan of a pass. If there is none yet, return the plan of another pass of the same direction.

        If there is none either, return the plan that would be tried first. Nothing is compiled.
        """
        alike = (prepared for other, prepared in self._prepared.items() if other.backward == pass_.backward)
        prepared = self._prepared.get(pass_) or next(alike, None)
        return self.launcher.describe(self.problem, self.device, pass_, prepared and prepared.plan)


_layers: dict[tuple[Launcher, Problem, torch.device], Layer] = {}
plans_in_use: set[tuple] = set()
"""Plans that fit and compute the right numbers, as backends identify them.

They are not tried again for other batches.
"""


def forget_layers() -> None:
    """Forget all layers, so that their plans are chosen again."""
    _layers.clear()
    plans_in_use.clear()


def kept_layer(launcher: Launcher, problem: Problem, device: torch.device, *checks: Any) -> Layer:
    """Return a backend's Layer for a problem on a device, the same one at every call.

    `checks` are `verify` and `timer`, see Layer.
    """
    key = launcher, problem, device
    if (layer := _layers.get(key)) is None:
        if len(_layers) >= MOST_LAYERS:
            forget_layers()
        layer = _layers.setdefault(key, Layer(problem, device, launcher, *checks))
    return layer


SAVE, NO_SAVE = Pass(), Pass(save=False)


def is_product_alone(i: Inputs) -> bool:
    """Whether the gates before a loop are W_ih x and biases, and nothing else."""
    return i.gain_ih is None and i.reset_h is None and i.x.shape[2] > 0


def aligned(t: Tensor) -> Tensor:
    """Return t or a copy of it, contiguous and at an address that is a multiple of 16 bytes, as kernels assume."""
    if t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _check_count(of: str, count: int) -> None:
    if count > MOST:
        raise ValueError(f"expected at most {MOST} {of}, got {count}")


def _initial_hidden_gradient(p: Problem, gradients: Gradients, dh_n: Tensor | None, r: Recurrence) -> Tensor:
    """Return dh0 [1, B, P].

    It is the gradient through the first step, and zero if that step is reset. For a sequence without steps it is dh_n.
    """
    inputs, at = r.inputs, end_index(p, r.inputs.lengths, first=True)
    first = CELLS[p.cell].of_h(gradients.dgates[at], p.hidden)  # [B, rows H], zero where the length is 0
    if r.norm_hh is not None:
        first = layer_norm.gradient(first, r.norm_hh, at)
    dh0 = heads.gradient_of_h(unless_reset(p, first, inputs.resets), inputs.weight_hh, p.width)[None]
    if inputs.dropout_h is not None:
        dh0 = inputs.dropout_h * dh0
    if gradients.dh0 is not None:
        dh0 = dh0 + gradients.dh0.to(dh0.dtype)
    if inputs.lengths is not None and dh_n is not None:
        dh0 = torch.where((inputs.lengths == 0)[:, None], dh_n, dh0)
    return dh0
