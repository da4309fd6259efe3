"""Wrong calls, and the choice of a backend.

The error has the right type and text, that of torch.nn where it has the same call, and the call changes nothing. The
error of a backend that cannot run says why.
"""

import contextlib
import functools
import importlib.util
import inspect
import os
import re
import sys
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import wrong_calls
from comparing import DEVICE
from places import by_interpreter
from standing_in import CUDA, the_cpu_is_a_card
from test_first_call import selected
from torch import nn, zeros
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from wrong_calls import CALLS, INT

import bench.__main__
import gpu_lstm
import gpu_lstm.__main__
from gpu_lstm.backends import reference
from gpu_lstm.call import choices
from gpu_lstm.call.checks import cure_of
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.dispatch.available import why_unavailable
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels import cupy_rnn, triton_rnn
from gpu_lstm.kernels.triton_rnn import features, launch

# The advice that may follow the words of an error.
CURE = r"(; (use torch\.as_tensor|expected a tensor|it fits if the input|hx is one tensor|use \w+(\.\w+\([-1]*\))+).*)?"


SAME = {  # modules that torch has, too: the class and its arguments
    "lstm": ("LSTM", {}), "deep": ("LSTM", dict(num_layers=2, dropout=0.5)), "first": ("LSTM", dict(batch_first=True)),
    "both": ("LSTM", dict(bidirectional=True)), "projected": ("LSTM", dict(proj_size=2)), "cell": ("LSTMCell", {}),
    "weightless": ("LSTM", dict(device="meta")), "gru": ("GRU", {}), "gru_first": ("GRU", dict(batch_first=True)),
    "gru_cell": ("GRUCell", {}),
}  # fmt: skip


def same_of(library, **options):
    return {name: getattr(library, kind)(3, 4, **own, **options) for name, (kind, own) in SAME.items()}


def of_torch():
    """Build torch's modules, with the names of ours in `modules`."""
    return SimpleNamespace(**same_of(nn))


def modules(backend):
    """Build our modules, once, since a wrong call leaves them as they are."""
    by, same = dict(backend=backend), same_of(gpu_lstm, backend=backend)
    same["deep"].weight_drop = 0.5
    noise = dict(dropout=0.5, weight_drop=0.5)
    return SimpleNamespace(
        **same, stack=gpu_lstm.StackedLSTM(3, [4, 4], **noise, **by), one=gpu_lstm.StackedLSTM(3, [4], **by),
        auto=gpu_lstm.LSTM(3, 4), triton=gpu_lstm.LSTM(3, 4, backend="triton"),
        variant=gpu_lstm.LSTM(3, 4, peepholes=True, layer_norm=True), stream=gpu_lstm.Stream(same["lstm"].eval(), 2),
        stream_of_stack=gpu_lstm.Stream(gpu_lstm.StackedLSTM(3, [4, 4], **by), 2),
        dropping=nn.ModuleDict({name: gpu_lstm.LSTM(3, 4, 2, **{name: 0.5}) for name in wrong_calls.DROPS}),
        backwards=gpu_lstm.keras.GoBackwards(same["first"]), without_bias=wrong_calls.WITHOUT_BIAS,
        gru_stack=gpu_lstm.StackedGRU(3, [4, 4], **noise, **by), slstm=gpu_lstm.SLSTM(3, 4, heads=2),
        torchs_cell=gpu_lstm.LSTMCell(3, 4, backend="torch"), **by
    )  # fmt: skip


@functools.cache
def ours_of(backend):
    """Build the modules of a backend, once, since checks come before a backend is known."""
    with torch.device(DEVICE):
        m = modules(backend)
    torch.manual_seed(0)
    m.picture = picture(m)
    return m


def picture(m):
    """Return everything that a call could change: the contents of modules, random numbers, and the choice of
    backends."""

    def values(tensors):
        return [(id(t), None if t.is_meta else t.detach().cpu().numpy().tobytes()) for t in tensors]

    found = {"random": torch.get_rng_state().numpy().tobytes()}
    for name, value in vars(m).items():
        for path, module in value.named_modules() if isinstance(value, nn.Module) else ():
            held = vars(module).items()
            found[name, path] = {k: v.copy() if isinstance(v, dict | list | set) else v for k, v in held}
            found[name, path, "values"] = values(module._parameters.values())
    for stream in (m.stream, m.stream_of_stack):
        found[stream] = values(tree_leaves(stream._state))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    found["chosen"] = *(list(opened) for opened in (choices.chosen_backends, choices.chosen_racings)), environment
    return found


def error_of(call, *args, **kwargs):
    """Return (type, text) of the exception that a call raises, or None, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = None
        try:
            call(*args, **kwargs)
        except Exception as e:
            error = type(e), str(e)
    return error, [(w.category, str(w.message)) for w in caught]


def refusals(m, *calls):
    """Return (type, text) of the exceptions of calls of the table, after checking that they changed nothing in our
    modules."""
    torch.manual_seed(0)
    found = [error_of(eval, call, vars(wrong_calls), {"m": m}) for call in calls]
    assert all(error is not None and told == [] for error, told in found), found
    unchanged = not hasattr(m, "picture") or picture(m) == m.picture  # pytest would explain the difference for minutes
    assert unchanged
    return [error for error, _ in found]


@pytest.mark.parametrize("row", CALLS, ids=lambda row: row[1])
def test_wrong_calls_are_refused_and_change_nothing(row):
    text, *calls = row
    for call, (error, found) in zip(calls, refusals(ours_of("reference"), *calls), strict=True):
        assert error.__module__ == "builtins"
        found = f"{error.__name__}: {found}"
        assert re.fullmatch(re.escape(text).replace(r"\.\.\.", ".*") + CURE, found), (call, found)


@pytest.mark.parametrize(
    ("value", "helps"),
    [([1.0, 2.0], True), (np.zeros(2), True), ((zeros(2), zeros(2)), False), (wrong_calls.PACKED, False)],
    ids=lambda value: type(value).__name__,
)
def test_as_tensor_is_advised_only_where_it_helps(value, helps):
    assert ("as_tensor" in cure_of(value)) == helps
    with contextlib.nullcontext() if helps else pytest.raises((ValueError, RuntimeError)):
        torch.as_tensor(value)


# Calls that torch refuses, too: the shapes of x, h and c, by module
SHAPES = {
    "lstm": "3  5,2,1,3  5,2,4  5,4  0,2,3  0,0,3  0,3 "  # the rank of x, its features, no steps
            "5,2,3;2,4;2,4  5,2,3;1,2,4;2,4  5,3;1,1,4;1,1,4  5,2,3;1,2,5;1,2,4  5,2,3;1,2,4;1,2,5 "  # wrong states
            "5,2,3;1,3,4;1,2,4  5,2,3;1,2,4;1,3,4  5,3;2,4;1,4  5,2,3;1,2,4  5,2,3;1,2,4;1,2,4;1,2,4",
    "first": "2,5,2  2,0,3  2,5,3;2,1,4;2,1,4  2,5,3;1,5,4;1,5,4  5,3;1,4;1,5",
    "deep": "5,2,4  5,2,3,1  0,2,3  0,0,3  5,2,3;1,2,4;1,2,4",  # where the next layer could catch it
    "both": "5,2,3;1,2,4;1,2,4", "projected": "5,2,3;1,2,4;1,2,4  5,2,3;1,2,2;1,2,2", "weightless": "5,2,3",
    "cell": "2,1,3  []  2,5  5  2,3;1,2,4;2,4  2,3;2,4;[]  2,3;3,4;2,4  2,3;2,4;3,4  2,3;2,5;2,4  2,3;2,4;2,5 "
            "3;5;5  3;2,4;2,4  2,3;4;4  2,3;2,4;4  2,3;2,4  2,3;2,4;2,4;2,4",
    "gru": "3  5,2,1,3  5,2,4  5,4  0,2,3  0,0,3  0,3  5,2,3;2,4  5,3;1,1,4  5,2,3;1,2,5  5,2,3;1,3,4  5,3;2,4 "
           "5,3;1,5",
    "gru_first": "2,5,2  2,0,3  2,5,3;2,1,4  2,5,3;1,5,4  5,3;1,5",
    "gru_cell": "2,1,3  []  2,5  5  2,3;1,2,4  2,3;[]  2,3;3,4  2,3;2,5  3;5  3;2,4  2,3;4"}  # fmt: skip
X3 = "zeros(5, 2, 3), "
OF_BOTH = ("None", "SEQ.numpy()", "zeros(5, 2, 3, dtype=F64)", "zeros(5, 2, 3, dtype=INT)", X3 + "tensor([5, 2])",
           X3 + "RESETS", "zeros(5, 2, 3, device=META)")  # fmt: skip
CELL_OF_BOTH = "None", "zeros(2, 3).numpy()", "zeros(2, 3), ()", "zeros(2, 3), [H2]", "zeros(2, 3, dtype=F64)"
AS_TORCH = [
    *(f"m.{module}({x}{f', {hx}' if 'gru' in module and hx else f', [{hx}]' if hx else ''})"
      for module, shapes in SHAPES.items() for shape in shapes.split()
      for x, _, hx in [", ".join(f"zeros({size})" for size in shape.split(";")).partition(", ")]),
    *(f"m.{module}({arguments})" for module, each in (
        ("lstm", (*OF_BOTH, "[[1.0, 2.0, 3.0]]", "zeros(5, 2, 3, dtype=F16)", X3 + "zeros(1, 2, 4)",
                  X3 + "(None, None)", X3 + "(zeros(1, 2, 4, device=META), zeros(1, 2, 4))",
                  X3 + "(zeros(1, 2, 4), zeros(1, 2, 4, device=META))")),
        ("gru", (*OF_BOTH, X3 + "(zeros(1, 2, 4), zeros(1, 2, 4))", X3 + "()", X3 + "[[0.0]]",
                 X3 + "zeros(1, 2, 4, device=META)", "PACKED, zeros(2, 4)")),
        ("gru_cell", (*CELL_OF_BOTH, "zeros(2, 3), (H2, H2)", "zeros(2, 3), zeros(2, 4, dtype=F64)",
                      "zeros(2, 3), zeros(2, 4, device=META)")),
        ("cell", (*CELL_OF_BOTH, "zeros(2, 3), zeros(2, 2, 4)",
                  "zeros(2, 3), (zeros(2, 4), zeros(1, 2, 4))", "zeros(2, 3), H2", "zeros(3), H2[0]",
                  "zeros(3), H2[:1]", "zeros(3), ()", "zeros(3), (zeros(4), zeros(1, 1, 4))")),
      ) for arguments in each)]  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    with torch.device(DEVICE):
        return of_torch()


@pytest.mark.parametrize(("backend", "call"), [  # a cell by torch's operator has a shorter path
    (backend, call) for call in AS_TORCH for backend in ("reference", *["torch"] * ("cell" in call))])  # fmt: skip
def test_a_call_that_torch_refuses_too_raises_what_torch_raises(theirs, backend, call):
    """Our words are torch's, possibly followed by advice."""
    with torch.device(DEVICE):
        ((found, text),), ((expected, its),) = refusals(ours_of(backend), call), refusals(theirs, call)
    assert found is expected
    assert re.fullmatch(re.escape(its) + CURE, text), (text, its)


def test_torchs_names_may_stand_for_ours(monkeypatch):
    """Every class of torch that gpu_lstm needs is bound when gpu_lstm is imported, so errors stay the same."""
    expected = refusals(ours_of("reference"), *AS_TORCH)
    for name in ("LSTM", "GRU", "LSTMCell", "GRUCell"):
        for place in (nn, nn.modules, nn.modules.rnn):
            monkeypatch.setattr(place, name, getattr(gpu_lstm, name))
    assert refusals(ours_of("reference"), *AS_TORCH) == expected


# Arguments of the constructors that torch's constructors refuse, too
OF_LSTM = dict(
    dropout=(1.5, True, "0.5", None), bias=(1,), batch_first=(1,), input_size=(3.0, 0), hidden_size=(0, -1, None),
    num_layers=(0, 1.5), proj_size=(-1, 4, 1.5), dtype=(INT, "float32"), device=("nowhere",), hidden=(5,))  # fmt: skip
OF_CELL = dict(input_size=(3.0, -1), hidden_size=("4", -4), dtype=(INT,), units=(4,))


@pytest.mark.parametrize(("cls", "wrong"), [
    (nn.LSTM, dict(hidden_size=4)), (nn.LSTM, dict(input_size=3)), (nn.GRU, dict(input_size=3)),
    *((cls, dict(input_size=3, hidden_size=4) | layers | {name: value})
      for cls, layers, arguments in ((nn.LSTM, dict(num_layers=2), OF_LSTM), (nn.GRU, dict(num_layers=2), OF_LSTM),
                                     (nn.LSTMCell, {}, OF_CELL), (nn.GRUCell, {}, OF_CELL))
      for name, values in arguments.items() for value in values)], ids=str)  # fmt: skip
def test_bad_arguments_raise_what_torch_raises(cls, wrong):
    refused, told = error_of(cls, **wrong)
    if refused is None:
        pytest.skip("this torch accepts it")
    error, text = refused
    text = text.replace("RNNBase", cls.__name__)
    for ours in (getattr(of, cls.__name__) for of in (gpu_lstm, gpu_lstm.compat) if hasattr(of, cls.__name__)):
        assert error_of(ours, **wrong) == ((error, text), told)


def test_dropout_of_one_layer_warns_as_torch_does():
    theirs = error_of(nn.LSTM, 3, 4, dropout=0.5)
    assert (theirs[0], len(theirs[1])) == (None, 1)
    for module, stack in ((gpu_lstm.LSTM, gpu_lstm.StackedLSTM), (gpu_lstm.GRU, gpu_lstm.StackedGRU)):
        assert error_of(module, 3, 4, dropout=0.5) == error_of(stack, 3, [4], dropout=0.5) == theirs


# Command lines. The exit status is 2, one line says why, and nothing is on stdout.
OURS, BENCH = gpu_lstm.__main__.main, bench.__main__.main
PLAN = "plan --hidden 8 --batch 2 --device h100"
COMMANDS = [
    (OURS, "nonsense", "invalid choice: 'nonsense'"),
    (OURS, f"{PLAN} --hidden 0", "argument --hidden: expected at least 1, got 0$"),
    (OURS, f"{PLAN} --steps 1.5", "argument --steps: expected a whole number, got '1.5'$"),
    (OURS, f"{PLAN} --device k80", "^unknown device 'k80'; known: h100, a100, "),
    (OURS, f"{PLAN} --hidden 1000000", "^W_hh of 1000000 units takes 8000 GB, more than any known card has$"),
    (OURS, f"{PLAN} --layer-norm --cell gru", "^--layer-norm needs an LSTM without heads, got gru with heads=1$"),
    (OURS, "compile --cells rnn", "argument --cells: invalid choice: 'rnn'"),
    (OURS, "compile --dtype bf16", "argument --dtype: invalid choice: 'bf16'"),
    (OURS, "compile --hidden 0", "argument --hidden: expected at least 1, got 0$"),
    *((BENCH, f"compare {file} {file}", text + "; expected what `python -m bench` writes$") for file, text in (
        ("{binary}", "binary.csv: .*"), ("{results}", "results.zip: .*"), ("{empty}", "empty.csv: No columns .*"))),
    (BENCH, "compare {absent} {absent}", "No such file or directory: '.*absent'$"),
    (BENCH, "page", "old.csv: schema 1.*"),
    (BENCH, "gpu --out {absent}", "there is no CUDA device that torch can use: "),
    (BENCH, "gpu --minutes nan", "argument --minutes: expected more than 0 minutes, got 'nan'$"),
    (BENCH, "--cases nonsense", "^python -m bench: unknown case 'nonsense'; known groups: first, headline, "),
    (BENCH, "--out {folder} --device cpu", "^python -m bench: .*File exists: '")]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu_lstm.kernels.triton_rnn.launch.INTERPRETED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench.__main__, "ROOT", tmp_path)
    contents = {"binary.csv": bytes(range(256)), "empty.csv": b"",
                "results.zip": b"PK\3\4" + bytes(range(128, 256)), "README.md": b"",
                "bench/results/old.csv": b"schema,date\n1,now\n"}  # fmt: skip
    contents = {tmp_path / name: content for name, content in contents.items()}
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    yield {path.stem: path for path in contents} | dict(folder=tmp_path, absent=tmp_path / "absent")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == contents


@pytest.mark.parametrize(("main", "line", "text"), COMMANDS, ids=lambda each: each if isinstance(each, str) else "")
def test_a_wrong_command_line_ends_with_2_and_says_why(files, capsys, main, line, text):
    with pytest.raises(SystemExit) as end:  # argparse raises it, or sys.exit does
        sys.exit(main(line.format(**files).split()))
    printed, told = capsys.readouterr()
    assert (end.value.code, printed) == (2, "")
    *usage, said = told.rstrip("\n").split("\n")
    assert not usage or usage[0].startswith("usage: ")
    assert re.search(text, said), said


F64 = torch.float64
SEQ, *WEIGHTS = (zeros(size, dtype=F64) for size in ((5, 2, 3), (16, 3), (16, 4)))
CALLABLES = dict(
    LSTM=lambda **kwargs: gpu_lstm.LSTM(3, 4, dtype=F64, **kwargs)(SEQ),
    LSTMCell=lambda **kwargs: gpu_lstm.LSTMCell(3, 4, dtype=F64, **kwargs)(SEQ[0]),
    StackedLSTM=lambda **kwargs: gpu_lstm.StackedLSTM(3, [4, 2], dtype=F64, **kwargs)(SEQ),
    lstm_layer=lambda **kwargs: lstm_layer(SEQ, WEIGHTS, **kwargs),
)


def refuses_float64(name="triton"):
    return pytest.raises(TypeError, match=f"^backend '{name}' supports .* and float32, got torch.float64$")


@pytest.mark.parametrize("call", CALLABLES.values(), ids=CALLABLES)
def test_what_chooses_the_backend(call, monkeypatch):
    """The argument overrides `with`, and `with` overrides the environment. An empty variable means auto."""
    layer = Mock(side_effect=reference.layer_by_reference)
    monkeypatch.setattr(reference, "layer_by_reference", layer)

    def by_reference(**arguments):
        layer.reset_mock()
        call(**arguments)
        return layer.called

    for backend in ("triton", gpu_lstm.Backend.CUPY):
        with refuses_float64(gpu_lstm.Backend(backend).value):
            call(backend=backend)
    monkeypatch.setenv("GPU_LSTM_BACKEND", "triton")
    with refuses_float64():
        call()
    assert gpu_lstm.backend("reference")(by_reference)()
    for backend in ("torch", "auto", "reference"):  # auto is torch on the CPU
        found = gpu_lstm.backend(gpu_lstm.Backend.TRITON)(by_reference)(backend=backend)
        assert found is (backend == "reference")
    monkeypatch.setenv("GPU_LSTM_BACKEND", "reference")
    assert by_reference()
    with gpu_lstm.backend("torch"), refuses_float64():
        call(backend="triton")
    monkeypatch.setenv("GPU_LSTM_BACKEND", "")
    assert not by_reference()


def test_a_backend_that_is_chosen_without_with_is_told():
    with pytest.warns(RuntimeWarning, match=r"^gpu_lstm.backend\('triton'\) chose nothing: write `with gpu_lstm.backe"):
        gpu_lstm.backend("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decorated = gpu_lstm.backend("triton")(CALLABLES["LSTM"])
        for _ in range(2):
            with refuses_float64():
                decorated()
        block = gpu_lstm.backend("triton")
        with block, block:
            pass
        del block


def test_a_block_inside_a_compiled_function():
    """A block chooses the graph's backend, which refuses the same as in eager mode. It also holds for calls that are
    left out of the graph."""
    lstm, x = gpu_lstm.LSTM(3, 4), torch.randn(2, 1, 3)
    seen = []
    torch.compiler.reset()  # after an error a function is left out of graphs

    def inside(x, backend="reference"):
        with gpu_lstm.backend(backend):
            return lstm(x)[0]

    @torch.compiler.disable
    def left_out():
        seen.append(choices.requested_racing())

    def racing(x):
        with gpu_lstm.racing("off"):
            left_out()
        return x + 1

    def graph(module, _):
        [layer] = [node for node in module.graph.nodes if "gpu_lstm" in str(node.target)]
        assert "reference" in layer.args
        return module

    torch.testing.assert_close(torch.compile(inside, backend=graph, fullgraph=True)(x), inside(x))
    lstm.double()
    with refuses_float64():
        torch.compile(inside, backend="eager")(x.double(), "triton")
    torch.compile(racing, backend="eager")(x)
    assert seen == [choices.Racing.OFF]


@pytest.mark.parametrize("way", ["eager", "compiled", "watched"])
def test_auto_skips_kernels_that_lack_something_without_a_name(way, monkeypatch):
    """If the user chose the backend, it raises."""
    the_cpu_is_a_card(monkeypatch)
    monkeypatch.setattr(available, "why_unavailable", lambda name, *_: OSError() if name.value == "cupy" else None)
    monkeypatch.setattr(launch, "lacks", lambda problem: "projections" if problem.projected else None)
    lstm, x = gpu_lstm.LSTM(3, 8, proj_size=4), torch.randn(2, 1, 3)

    def in_a_mode(lstm):
        with FlopCounterMode(display=False):
            return lstm(x)

    runs = dict(
        eager=lambda lstm: lstm(x), compiled=torch.compile(lambda lstm: lstm(x), backend="eager", fullgraph=True),
        watched=in_a_mode,
    )  # fmt: skip
    expected = gpu_lstm.LSTM(3, 8, proj_size=4, backend="torch")
    expected.load_state_dict(lstm.state_dict())
    with gpu_lstm.racing("off"), torch.no_grad():
        torch.testing.assert_close(runs[way](lstm), expected(x))
        assert gpu_lstm.explain(lstm, x).others["triton"] == "it has no projections"
        lstm.backend = "triton"
        with pytest.raises(ValueError, match=r"^backend 'triton' has no projections$"):
            lstm(x)


def test_a_torch_for_amd_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for backend in (Backend.TRITON, Backend.CUPY):
        assert "ROCm" in str(why_unavailable(backend, CUDA, torch.float32))
    assert selected() is Backend.TORCH


@pytest.mark.parametrize("error", [OSError("libcuda.so"), RuntimeError("bad build"), AttributeError("no attribute")])
def test_a_broken_package_stops_nobody_who_did_not_ask_for_it(monkeypatch, nothing_cached, error):
    monkeypatch.setattr(available, "import_problem", inspect.unwrap(available.import_problem))
    for package in (cupy_rnn, triton_rnn):
        monkeypatch.setattr(package, "import_packages", Mock(side_effect=error))
    with pytest.warns(UserWarning, match=f"is installed, but fails, and is not used: .*{error}"):
        assert selected() is Backend.TORCH
    with pytest.raises(ImportError, match=str(error)):
        selected("triton")


@by_interpreter
@pytest.mark.parametrize(("triton", "numpy", "runs"), [
    ("3.6.0", "2.4.0", False), ("3.4.0", "2.10.1", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.0", True),
])  # fmt: skip
def test_an_interpreter_that_numpy_is_too_new_for_says_so_at_once(monkeypatch, triton, numpy, runs):
    """Otherwise the middle of a kernel would say that only 0-dimensional arrays can be converted to Python scalars."""
    monkeypatch.setattr(features.triton, "__version__", triton)
    monkeypatch.setattr(np, "__version__", numpy)
    spec = importlib.util.spec_from_file_location("features_again", features.__file__)
    said = pytest.raises(ImportError, match=f"Triton {triton} needs NumPy below 2.4, got {numpy}: pip install")
    with contextlib.nullcontext() if runs else said:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
