"""The contracts: kernels get the tensors that their Problem describes, and names of cells are in few places."""

import ast
import contextlib
import importlib
import inspect
import itertools
import re
from unittest.mock import Mock

import pytest
import torch
from installed import ROOT
from places import by_interpreter
from standing_in import plan_of, recurrence

from gpu_lstm.call.choices import KERNEL_BACKENDS
from gpu_lstm.equations import EQUATIONS
from gpu_lstm.kernels import contract, memory, problem
from gpu_lstm.kernels import layer as layers
from gpu_lstm.kernels.cells import CELLS
from gpu_lstm.kernels.layer import Layer
from gpu_lstm.kernels.problem import Pass, Problem, problem_of
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.parameters import names_of
from gpu_lstm.kernels.triton_rnn.plans.choose import FAMILIES

SCALAR = torch.zeros(())
F16, F32 = torch.float16, torch.float32


def test_what_a_problem_is_told_of_tensors():
    """A Problem is told of reset_h only where zoneout reads it, and of bias_hh and known_h only for a GRU."""
    mask, lengths = torch.zeros(2, 3, 5, dtype=torch.bool), torch.zeros(3, dtype=torch.int32)
    tensors = dict(
        bias_hh=SCALAR, reset_h=SCALAR, reset_c=SCALAR, zoneout_c=mask, lengths=lengths, resets=None, gain_ih=SCALAR
    )
    expected = dict(reset_c=True, zoneout_c=3, lengths=torch.int32)
    for cell, more, told in (
        ("lstm", {}, {}), ("gru", {}, dict(bias_hh=True, known_h=True)),
        ("lstm", dict(zoneout_h=SCALAR), dict(zoneout_h=0, reset_h=True)),
        ("gru", dict(reset_h=None, reset_c=None), dict(bias_hh=True, reset_c=False)),
    ):  # fmt: skip
        given = problem.fields_of(tensors | more)
        found = problem.problem_with(given, cell, 7, batch=3, hidden=5, dtype=F32)
        assert found == Problem(2, 3, 5, F32, cell=cell, **expected | told)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("family", ["resident", "cooperative", "pointwise", "step", "split", "held"])
def test_a_launch_that_waits_has_an_error_word_and_nothing_is_allocated_that_no_kernel_takes(family, backward):
    for steps, normed in (1, False), (2, False), (2, True):
        if (normed and family != "pointwise") or (steps == 1 and family != "step"):
            continue
        hidden = 256 if family == "held" else 64
        p = Problem(steps, 16, hidden, F16, lengths=torch.int64, gain_hh=normed, gain_c=normed, bias_c=normed)
        plan = plan_of(family, p, backward)
        prepared = launch.prepare(p, Pass(backward), plan, torch.device("meta"))
        waits = family not in ("resident", "pointwise") and (steps > 1 or (backward and family == "split"))
        assert (prepared.error_ptr is not None, prepared.at_once is not None) == (waits, waits)
        taken = set(itertools.chain(*names_of(FAMILIES[type(plan.family)].kernels[backward])))
        assert prepared.buffers.keys() <= taken, "as those of family.buffers"


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_a_backend_has_what_its_package_and_its_launcher_list(backend):
    folder = f"gpu_lstm.kernels.{backend.value}_rnn"
    for protocol, module in (contract.Package, folder), (contract.Launcher, f"{folder}.launch"):
        of_backend = importlib.import_module(module)
        assert vars(of_backend).keys() >= protocol.__annotations__.keys()
        for name, method in inspect.getmembers(protocol, inspect.isfunction):
            if not name.startswith("_"):
                _, *expected = inspect.signature(method).parameters
                found = [*inspect.signature(getattr(of_backend, name)).parameters]
                assert found[: len(expected)] == expected, name
    assert backend.value == of_backend.BACKEND


def test_backward_is_prepared_for_the_gradients_that_it_is_given():
    """Each combination of gradients is a kernel of its own, which is verified for it."""
    gates, state = torch.zeros(2, 3, 20), torch.zeros(3, 5)
    r = recurrence(gates, weight_hh=torch.zeros(20, 5), h0=state, c0=state)
    layer = Layer(problem_of(r.inputs, "lstm", False, "ieee"), gates.device, launch)
    for dh, dh_n in itertools.product((None, state), repeat=2):
        layer.backward(dh if dh is None else torch.zeros(2, 3, 5), dh_n, state, gates, torch.zeros(2, 3, 5), r)
        assert list(layer._prepared)[-1] == Pass(True, True, dh is not None, dh_n is not None)


@pytest.mark.parametrize("dtype", [F16, torch.bool], ids=str)
@pytest.mark.parametrize(("first", "count", "far", "said"), [
    (6, 1, 1, "up to {} bytes past the end"), (8, 2, 4, "up to {} bytes past the end"),
    (-1, 1, 1, "from {} bytes before the start"), (-9, 2, 9, "from {} bytes before the start"), (6, 0, 0, ""),
])  # fmt: skip
def test_what_is_written_next_to_a_tensor_is_named(dtype, first, count, far, said):
    """Nothing else changes: the tensor holds the launch's results, unless the launch wrote outside of it."""
    c = torch.zeros(2, 3, dtype=dtype)
    text = f"kernel wrote {said.format(far * c.itemsize)} of c [2, 3], {c.nbytes} bytes of {dtype}"
    told = pytest.raises(memory.WroteOutside, match=f"^{re.escape(text)}$") if said else contextlib.nullcontext()
    with told, memory.margins("kernel", dict(c_ptr=c, T=2, absent_ptr=None)) as inside:
        own = inside["c_ptr"]
        assert (inside["T"], inside["absent_ptr"], own.data_ptr() % 16) == (2, None, 0)
        own.fill_(1)
        outside = own.as_strided((count,), (1,), own.storage_offset() + first)
        assert not dtype.is_floating_point or outside.isnan().all(), "what is read there shows"
        outside.zero_()  # kernels leave zeros in padding, too
    assert said or (c == 1).all()


@by_interpreter
def test_what_is_timed_are_calls_of_the_layer(monkeypatch, launched):
    """The calls have as many steps as tell plans apart and fit the memory, and no padding. No other call uses a layer
    that was timed."""
    problem, cpu = Problem(2, 3, 8, F32, 3, lengths=torch.int64, resets=True), torch.device("cpu")
    sent, steps = [], 5
    monkeypatch.setattr(launch, "MOST_STEPS", steps)
    arguments_of = launch.arguments_of
    monkeypatch.setattr(launch, "arguments_of", lambda *given: sent.append(arguments_of(*given)) or sent[-1])
    plans = [plan_of("step", problem, backward) for backward in (False, True)]
    passes = Pass(save=False), Pass(True, True, True, False)
    found, gradients = (launch.prepare_run(problem, cpu, *each)() for each in zip(passes, plans))
    assert found[0].shape == (steps, 3, problem.width)
    assert found[3] is None, "for inference nothing is saved"
    assert gradients.dgates.shape == (steps, 3, 4 * 8)
    for r in (sent[0][1], sent[1][-1]):
        assert r.inputs.lengths.tolist() == [steps] * 3
    assert (sent[1][0] is not None, sent[1][1]) == (True, None)
    ran = {each.args[0].__name__ for each in launched.mock_calls}
    assert ran == {"step_forward_kernel", "step_backward_kernel"}
    assert not any(layer._prepared for layer in layers._layers.values())


@pytest.mark.parametrize(("change", "steps"), [
    ({}, launch.MOST_STEPS), (dict(steps=1), 1), (dict(batch=256, hidden=1024), 16),
    (dict(batch=4096, hidden=2048), launch.LEAST_STEPS),
], ids=str)  # fmt: skip
def test_plans_are_timed_with_fewer_steps_where_these_take_memory(monkeypatch, change, steps):
    problem, arguments_of = Problem(2, 3, 8, F32)._replace(**change), Mock(return_value=(None, None))
    monkeypatch.setattr(launch, "arguments_of", arguments_of)
    launch.prepare_run(problem, torch.device("cpu"), Pass(), plan_of("step", problem, False))
    assert arguments_of.call_args.args[0].steps == steps


# The contract of a cell


NAMES_A_CELL = {  # beneath the modules, the only files whose code names a cell other than the LSTM
    "kernels": {"cells.py", "equations.py",
                "triton_rnn/equations.py", "cupy_rnn/cuda/equations.cu", "numba_rnn/equations.py",
                "cupy_rnn/launch.py", "numba_rnn/launch.py"},  # the lists of the cells that these backends have
    "gpu_lstm/equations": set(),
    "gpu_lstm/call": set(),
    "gpu_lstm/backends": {"torch_rnn.py"},  # torch's own operators
    "gpu_lstm/dispatch": set(),
}  # fmt: skip
OTHERS = set(CELLS) - {"lstm"}


def without_comments(name, text):
    """Return code without its comments and docstrings."""
    if name.endswith(".cu"):
        return re.sub(r"//.*", "", text)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return ast.unparse(tree)


def code_of(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cu")]
    return {str(p.relative_to(ROOT / folder)): without_comments(p.name, p.read_text()) for p in files}


def test_beneath_the_modules_only_the_cells_and_two_tables_name_a_cell_and_nothing_asks_for_one_by_name():
    """Modules and tools name classes."""
    for folder, expected in NAMES_A_CELL.items():
        assert {name for name, text in code_of(folder).items() if any(c in text.lower() for c in OTHERS)} == expected
    asking = {name for name, text in code_of("gpu_lstm").items() if any(repr(cell) in text for cell in OTHERS)}
    assert asking == {"tools/xlstm.py"}  # an option of other packages


def test_c_is_computed_again_in_float32_of_gates_in_half_precision():
    gates, c, next_cell = torch.rand(4, 64).half(), torch.randn(64), EQUATIONS["lstm"].next_cell
    found = next_cell(tuple(gates), c)
    assert found.dtype == F32
    torch.testing.assert_close(found, next_cell(tuple(gates.float()), c))
