"""The contract of a layer: whoever calls kernels sends what their Problem says, and its sizes are in one place."""

import ast
import itertools
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import oracle
import pytest
import torch
from standing_in import plan_of, recurrence

from gpu_lstm.kernels import memory, problem
from gpu_lstm.kernels.layer import Layer
from gpu_lstm.kernels.problem import Pass, Problem, problem_of
from gpu_lstm.kernels.triton_lstm import autotune, launch

KERNELS = Path(problem.__file__).parent
F16, F32 = torch.float16, torch.float32
MAY_ASK = {  # functions that may read a size from a tensor: to make the Problem, and to copy tensors as they are
    "problem.py": {"problem_of", "steps_of"}, "memory.py": {"_with_margins", "_outside"}, "timeouts.py": {"__init__"},
}  # fmt: skip
OF_TENSORS = {"shape", "numel", "ndim"}  # attributes; and methods
ASKED = {"size", "dim", "stride"}


def sizes_read(source: str) -> list[tuple[str, int]]:
    """The function and line of every read of a tensor's size in host code, where len() of anything counts, too."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in function.decorator_list):
            continue
        for node in ast.walk(function):
            called = node.func if isinstance(node, ast.Call) else None
            reads = isinstance(node, ast.Attribute) and node.attr in OF_TENSORS
            asks = isinstance(called, ast.Attribute) and called.attr in ASKED
            counts = isinstance(called, ast.Name) and called.id == "len" and "gates" in ast.unparse(node)
            if reads or asks or counts:
                found.append((function.name, node.lineno))
    return found


def test_sizes_come_from_the_problem_and_never_from_a_tensor():
    for path in KERNELS.rglob("*.py"):
        for function, line in sizes_read(path.read_text()):
            assert function in MAY_ASK.get(path.name, ()), f"{path.name}:{line}"
    faulty = "def buffers(r): return r.c0.new_empty(r.h0.size(0), len(gates), r.c0.shape[1])"
    assert len(sizes_read(faulty)) == 3


def test_backward_is_prepared_for_the_gradients_that_it_is_given():
    """Each combination is a kernel of its own, which is verified for it."""
    gates, state = torch.zeros(2, 3, 20), torch.zeros(3, 5)
    r = recurrence(gates, weight_hh=torch.zeros(20, 5), h0=state, c0=state)
    layer = Layer(problem_of(r.inputs, False, "ieee"), gates.device, launch)
    for dh, dh_n in itertools.product((None, state), repeat=2):
        layer.backward(dh if dh is None else torch.zeros(2, 3, 5), dh_n, state, gates, torch.zeros(2, 3, 5), r)
        assert list(layer._prepared)[-1] == Pass(True, True, dh is not None, dh_n is not None)


@pytest.mark.parametrize("dtype", [F32, F16, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize(("first", "count", "said"), [
    (6, 0, None), (6, 1, "past the end of c [2, 3]"), (8, 2, "past the end of c [2, 3]"),
    (-1, 1, "before the start of c [2, 3]"), (-9, 2, "before the start of c [2, 3]"),
])  # fmt: skip
def test_what_is_written_next_to_a_tensor_is_named(dtype, first, count, said):
    """And nothing else changes: what a launch wrote is in the tensor afterwards, except if it wrote outside."""
    c = torch.zeros(2, 3, dtype=dtype)

    def run():
        with memory.margins("kernel", dict(c_ptr=c, T=2, absent_ptr=None)) as inside:
            own = inside["c_ptr"]
            assert (inside["T"], inside["absent_ptr"], own.data_ptr() % 16) == (2, None, 0)
            own.fill_(1)
            own.as_strided((count,), (1,), own.storage_offset() + first).fill_(1)

    if said is None:
        run()
        assert (c == 1).all()
        return
    far = c.itemsize * (first + count - 6 if first > 0 else -first)
    way = "up to" if first > 0 else "from"
    with pytest.raises(memory.WroteOutside) as error:
        run()
    assert str(error.value) == f"kernel wrote {way} {far} bytes {said}, {c.nbytes} bytes of {dtype}"


@pytest.mark.skipif(not launch.INTERPRETED, reason="plans of the interpreter")
@pytest.mark.parametrize("projected", [0, 3])
@pytest.mark.parametrize("family", ["step", "resident", "pointwise"])
def test_what_autotune_times_are_calls_of_the_layer(monkeypatch, family, projected):
    """Forward, and backward of what it computed, where dh is h and nothing else is given; numbers are the oracle's.

    By the plans that are timed, which no call uses without a verification.
    """
    problem, cpu, sent = Problem(2, 3, 8, F32, projected, "tf32"), torch.device("cpu"), []
    plans, forward = [plan_of(family, problem, backward) for backward in (False, True)], Layer.forward

    def recorded(layer, gates, r, save):
        sent.append((gates.clone(), r.inputs))
        return forward(layer, gates, r, save)

    run = Mock(side_effect=launch.launch_kernel)
    monkeypatch.setattr(launch, "launch_kernel", run)
    monkeypatch.setattr(Layer, "forward", recorded)
    found = autotune._call(problem, cpu, None)(plans[0])()
    backward = autotune._call(problem, cpu, plans[0])(plans[1])
    (gates, given), (its_gates, its_given) = sent
    assert (gates.shape, gates.std() > 0.5, given.weight_hh.std() > 0.1) == ((2, 3, 32), True, True)

    def inputs_of(gates, given):  # of the oracle: gates as x, times the unit matrix
        tensors = gates, given.h0[0], given.c0[0], torch.eye(32), given.weight_hh, None, None, given.weight_hr
        return [None if t is None else t.double().numpy() for t in tensors]

    h, h_n, c_n, tape = oracle.layer(*inputs_of(gates, given))
    cells = np.array([c for *_, c, _, _, _ in tape]).reshape(3, 2, 8).swapaxes(0, 1)  # by sequence, then by step
    inputs = inputs_of(its_gates, its_given)
    h_of_backward, *_, tape = oracle.layer(*inputs)
    zeros = np.zeros_like(h_n), np.zeros_like(c_n)
    gradients = oracle.layer_gradients(*inputs, tape=tape, dh=h_of_backward, dh_n=zeros[0], dc_n=zeros[1])
    expected = h, h_n[None], c_n[None], cells, gradients[0], gradients[1][None], gradients[2][None]
    for ours, true in zip((*found, *backward()[:3]), expected, strict=True):
        torch.testing.assert_close(ours.double(), torch.from_numpy(true), rtol=0, atol=2e-6)
    ran = {each.args[0].__name__ for each in run.mock_calls}
    assert ran == {f"lstm_{family}_{way}_kernel" for way in ("forward", "backward")}
    assert not any(layer._prepared for layer in launch._layers.values())
