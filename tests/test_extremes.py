"""Empty batches, sizes of 0, sizes that exceed 32 bits, and addresses outside of tensors.

Problems that are too large for any memory are interpreted without memory, and every address is checked.
"""

import dataclasses
from itertools import product
from math import ceil
from types import SimpleNamespace

import host_cuda
import memory_checks
import numpy as np
import pytest
import torch
from cases import built, call_of, with_random_parameters
from comparing import BACKENDS, KERNELS_HERE, PLACES, assert_same, both_classes, both_ways, every_backend
from pairs import results
from places import KERNELS, by_interpreter
from standing_in import plan_of, recurrence
from torch import Tensor, zeros
from torch.nn.functional import pad
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

import gpu_lstm
from gpu_lstm.functional import gru_layer, lstm_layer
from gpu_lstm.kernels.cupy_rnn import launch as cupy
from gpu_lstm.kernels.layer import kept_layer
from gpu_lstm.kernels.numba_rnn import launch as numba_launch
from gpu_lstm.kernels.problem import MOST, Pass, Problem, problem_of
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.parameters import in_tuples
from gpu_lstm.kernels.triton_rnn.plans.planning import Step

T, I, H = 3, 3, 4


@every_backend
def test_of_none_what_goes_round_a_call(backend):
    place = PLACES[backend]
    lstm, x = gpu_lstm.LSTM(I, H, backend=backend, **place), zeros(T, 0, I, **place, requires_grad=True)
    assert gpu_lstm.trace(lstm, x).layers[0][0].cell.shape == (T, 0, H)
    assert "B = 0" in str(gpu_lstm.explain(lstm, x))
    torch._dynamo.reset()  # it compiles a function for a few modules only
    call = torch.compile(lstm, backend="aot_eager", fullgraph=True) if backend == KERNELS_HERE else lstm
    y, _ = call(x)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    (dx,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), lstm.weight_hh_l0)[0].eq(0).all()
    stream = gpu_lstm.Stream(gpu_lstm.StackedLSTM(I, [H, 5], backend=backend, **place), batch=0)
    assert stream(zeros(T, 0, I, **place)).shape == (T, 0, 5)
    stream.reset(zeros(0, dtype=torch.bool, device=place["device"]))
    assert stream(zeros(0, I, **place)).shape == (0, 5)


IN_PLACE = ("output", "h_n", "c_n", "input", "lengths", "weight")


@pytest.mark.parametrize("changed", IN_PLACE)
@pytest.mark.parametrize(("backend", "ragged"), [(KERNELS_HERE, True), *product(BACKENDS[:2], (False, True))])
@both_classes
def test_what_is_changed_in_place_before_backward_is_refused_or_does_not_matter(cls, backend, ragged, changed):
    """torch raises where backward needs the old value. Where backward does not need it, results and gradients are
    right."""
    place = PLACES[backend]
    lstm, x = cls(I, H, 2, backend=backend, **place), torch.randn(T, 2, I, **place)
    lengths = torch.tensor([T, 1], device=place["device"]) if ragged else None
    wanted = [p for name, p in lstm.named_parameters() if name != "weight_ih_l1"]  # this parameter is changed

    k = IN_PLACE.index(changed)

    def gradients(in_place):
        given, its_lengths = x.clone(), None if lengths is None else lengths.clone()
        y, states = lstm(given, lengths=its_lengths)
        h, c = states if cls is gpu_lstm.LSTM else (states, 1 * states)
        tensors = [y, h, c, given, its_lengths, lstm.weight_ih_l1]
        if in_place and tensors[k] is not None:
            with torch.set_grad_enabled(k < 3):  # a change of a result is part of the graph
                tensors[k].mul_(2)
        elif k < 3:
            tensors[k] = 2 * tensors[k]
        return *tensors[:3], *torch.autograd.grad(sum(t.square().sum() for t in tensors[:3]), wanted)

    expected, refusal = gradients(in_place=False), ""
    try:
        found = gradients(in_place=True)
    except RuntimeError as error:
        found, refusal = None, str(error)
    assert found or "modified by an inplace operation" in refusal, refusal
    torch.testing.assert_close(found or expected, expected)


@pytest.mark.parametrize(("layer", "rows"), [(lstm_layer, 4 * H), (gru_layer, 3 * H)])
@every_backend
def test_a_layer_without_features(backend, layer, rows):
    """The layer computes the same as with one feature that is always zero."""
    place = PLACES[backend]
    weights = [torch.randn(shape, **place) for shape in ((rows, 0), (rows, H), (rows,), (rows,))]
    one_feature = [pad(weights[0], (0, 1), value=1.0), *weights[1:]]
    y, _ = layer(zeros(T, 2, 0, **place), weights, backend=backend)
    expected, _ = layer(zeros(T, 2, 1, **place), one_feature, backend=backend)
    assert y.abs().min() > 0
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("layer", [lstm_layer, gru_layer])
@every_backend
def test_gates_that_are_open_or_shut_by_any_amount(backend, layer):
    """A NaN stays a NaN, and only in its own sequence."""
    place, rows = PLACES[backend], 4 * H if layer is lstm_layer else 3 * H
    values = torch.tensor([0.0, 9, 20, 88, 89, 104, 1e30, torch.inf, torch.nan])
    x = torch.cat([values, -values])[None, :, None].repeat(T, 1, 1)  # [T, B, 1]
    weights = torch.randn(rows, 1).sign(), zeros(rows, H), torch.randn(rows), torch.randn(rows)
    found = []
    for at, by in ((place, backend), (PLACES["reference"], "reference")):
        given = x.to(**at).requires_grad_()
        y, _ = layer(given, [t.to(**at) for t in weights], backend=by)
        found.append({"y": y, "dx": torch.autograd.grad(y.sum(), given)[0]})
    assert found[1]["y"][:, :-1].isfinite().all(2).sum(1).tolist() == [2 * len(values) - 2] * T
    assert_same(*found, equal_nan=True)


# The sizes that kernels can count to


@pytest.mark.parametrize(("name", "steps", "batch", "hidden"), [
    ("steps", 2**31, 1, 1), ("sequences", 1, 2**31, 1), ("gates of all units", 1, 1, 2**29),
])  # fmt: skip
@pytest.mark.parametrize("launcher", [launch, cupy, numba_launch], ids=["triton", "cupy", "numba"])
def test_more_than_kernels_can_count_to_is_refused(launcher, name, steps, batch, hidden):
    """The projection, to one feature, keeps W_hh small."""
    of = dict(weight_hh=(4 * hidden, 1), weight_hr=(1, hidden), h0=(batch, 1), c0=(batch, hidden))
    gates = zeros(steps, batch, 4 * hidden, device="meta")
    r = recurrence(gates, **{name: zeros(size, device="meta") for name, size in of.items()})
    with pytest.raises(ValueError, match=f"^expected at most {2**31 - 2**16} {name}, got {2**31}$"):
        kept_layer(launcher, problem_of(r.inputs, "lstm", False, "ieee"), gates.device).forward(gates, r, save=True)


F16 = torch.float16
HUGE = {
    "step, rows": ("step", Problem(3, 2**30, 5, F16, dropout_h=True, zoneout_h=3, zoneout_c=3)),
    "step, W_hh": ("step", Problem(2, 17, 23_200, F16)),
    "split, rows": ("split", Problem(3, 2**30, 64, F16)),  # here a program has a tile of products and one of cells
    "split, W_hh": ("split", Problem(2, 17, 23_232, F16)),
    "resident, rows": ("resident", Problem(3, 2**30, 5, F16)),
    "pointwise, rows": ("pointwise", Problem(3, 2**30, 5, F16, dropout_h=True, zoneout_h=3, zoneout_c=3)),
    "cooperative, rows": ("cooperative", Problem(3, 2**18, 1024, F16)),
    "step, GRU, rows": ("step", Problem(3, 2**30, 5, F16, cell="gru", zoneout_h=3, zoneout_c=3)),
    "pointwise, GRU, rows": ("pointwise", Problem(3, 2**30, 5, F16, cell="gru")),
    "resident, GRU": ("resident", Problem(3, 2**30, 5, F16, cell="gru")),
    "step, GRU, W_hh": ("step", Problem(2, 17, 26_800, F16, cell="gru")),
}
AT_THE_LIMIT = {
    "most sequences": ("step", Problem(2, 2**31 - 2**16, 3, F16)),
    "most units": ("step", Problem(2, 3, MOST // 4, F16, projected=1)),
    "most features": ("step", Problem(2, 3, 1, F16, projected=MOST // 4)),
}


def _launches(name, backward):
    family, problem = (HUGE | AT_THE_LIMIT)[name]
    plan = plan_of("step" if family == "split" else family, problem, backward)  # its tiles are those of parts, too
    # Use at most one tile for each program, and wide tiles of K, so that the interpreter ends soon.
    if family in ("step", "split"):
        tiles = ceil(problem.batch / plan.rows) * ceil(problem.hidden / plan.units)
        parts = 4 if family == "split" and backward else 1
        plan = dataclasses.replace(plan, family=Step(4096, parts), programs=tiles)
    else:
        plan = dataclasses.replace(plan, groups=plan.groups * plan.tiles_per_program)
    ragged = dict(lengths=torch.int64, resets=True, reset_h=problem.regularised, reset_c=True, reverse=not backward)
    return launch.recorded_launches(problem._replace(**ragged), Pass(backward), plan)


@both_ways
@pytest.mark.parametrize("name", HUGE | AT_THE_LIMIT)
def test_grids_are_those_of_a_gpu(name, backward):
    for one in _launches(name, backward):
        x, y, _ = one.grid
        assert (0 < x < 2**31, 0 < y < 2**16) == (True, True), one.grid


class NoMemory:
    """Replaces the interpreter's memory. Lengths are read as T, and everything else as zeros. Accesses must lie within
    the tensors of the launch."""

    def __init__(self, steps):
        self.steps, self.largest = steps, 0  # the index of an element touched

    def load(self, at, mask, other, dtype):
        self._touch("load", at, mask, np.dtype(dtype).itemsize)
        return np.full(at.shape, self.steps if dtype == np.int64 else 0, dtype)

    def store(self, at, value, mask):
        self._touch("store", at, mask, value.itemsize)

    def atomic_rmw(self, op, at, value, mask, order):
        self._touch("atomic", at, mask, value.itemsize)
        return np.zeros_like(value)

    def _touch(self, access, at, mask, size):
        touched = memory_checks.checked(access, at, mask, size)[mask]  # tensors without memory begin at 0
        self.largest = max(self.largest, int(touched.max(initial=0)) // size)


def _run_last_program(monkeypatch, one):
    """Launch only the last program of a recorded kernel, without memory. Return the largest index that it touched."""
    memory, native = NoMemory(one.arguments["T"]), interpreter._interpreter
    names = ("load", "store", "atomic_rmw")
    last = tuple(n - 1 for n in one.grid)
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", SimpleNamespace(
            **{name: getattr(native, name) for name in dir(native) if name not in names},
            **{name: getattr(memory, name) for name in names}))  # fmt: skip
        builder = type(interpreter.interpreter_builder)
        patch.setattr(builder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", last))
        one.kernel[1,](**in_tuples(one.kernel, one.arguments))
    return memory.largest


@by_interpreter
@both_ways
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name.endswith(", rows") else pytest.mark.deep) for name in HUGE])  # fmt: skip
def test_every_address_lies_in_its_tensor(monkeypatch, name, backward):
    largest = max(_run_last_program(monkeypatch, one) for one in _launches(name, backward))
    assert largest >= 2**31, "nothing was touched that int32 does not reach"


def run(family):
    """Run a call and its gradients. The last sequence is the longest, and is reset at its end, so that kernels need
    every tensor that they are given."""
    size, words = (3, 3, 2, 6), {"peepholes", "masks"}  # T, B, I, H
    module = with_random_parameters(built(size, words, backend=KERNELS[family].backend), 0)
    x, hx, rest = call_of(module, size, {"ragged", "states"}, 0)
    rest["resets"].zero_()[-1, -1] = True
    results(module, x, hx, **rest)


@by_interpreter
@pytest.mark.usefixtures("exact_float32_products")
@pytest.mark.parametrize(("family", "name", "said"), [
    ("resident", "reset_c_ptr", "load"), ("cooperative/4/1/4", "gates_ptr", "load"), ("split/4", "h_ptr", "store"),
    ("step", "arrivals_ptr", "atomic"),
])  # fmt: skip
def test_a_tensor_that_is_one_element_short_is_detected_in_triton(monkeypatch, family, name, said):
    KERNELS[family].force(monkeypatch)
    run_kernel = launch.launch_kernel

    def launch_kernel(kernel, grid, **arguments):
        if isinstance(t := arguments.get(name), Tensor):
            arguments[name] = t.view(-1)[1:] if name == "arrivals_ptr" else t.view(-1)[:-1]
        run_kernel(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)
    with pytest.raises(InterpreterError, match=f"a 4-byte {said} ends 4 bytes past the end of {name} "):
        run(family)


@by_interpreter
@pytest.mark.usefixtures("exact_float32_products")
def test_tensors_that_are_one_element_short_are_detected_in_cuda(monkeypatch):
    KERNELS["cupy"].force(monkeypatch)
    host_cuda.stand_in(monkeypatch, less=1)
    with pytest.raises(AssertionError, match=r"after_product: a \d+-byte access ends \d+ bytes past the end of "):
        run("cupy")
