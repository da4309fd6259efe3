"""Wrong calls: the type of the error, its text, and that nothing is changed by the call.

A text says what was expected and what came. Where torch.nn has the same call, type and text are its own.
"""

import os
import re
import warnings
from collections import Counter

import pytest
import torch
import wrong_calls
from comparing import BACKENDS, DEVICE
from torch import nn, zeros
from torch.nn.utils.rnn import pack_sequence
from wrong_calls import CALLS, F64, INT

import bench.__main__
import gpu_lstm
import gpu_lstm.__main__
from gpu_lstm.call import choices

ROWS = [(call, text) for text, *calls in CALLS for call in calls]


@pytest.fixture(scope="module", params=["torch", "reference"])
def m(request):
    return wrong_calls.modules(request.param)


def picture(m):
    """All that a call could change: what modules hold, random numbers, and who was chosen to run."""

    def values(tensors):
        return [(id(t), None if t.is_meta else t.detach().cpu().numpy().tobytes()) for t in tensors]

    def held(attribute):
        return attribute.copy() if isinstance(attribute, dict | list | set) else attribute

    found = {}
    for name, value in vars(m).items():
        for path, module in value.named_modules() if isinstance(value, nn.Module) else ():
            found[name, path] = {key: held(attribute) for key, attribute in vars(module).items()}
            found[name, path, "values"] = values(module.state_dict(keep_vars=True).values())
    for stream in (m.stream, m.stream_of_stack):
        found[stream] = values(t for state in stream._state for t in state)
    found["random"] = torch.get_rng_state().numpy().tobytes()
    chosen = (list(choice.blocks) for choice in (choices.chosen_backend, choices.chosen_racing))
    found["chosen"] = *chosen, dict(os.environ)
    return found


def error_of(call, *args, **kwargs):
    """(type, text) of the exception that a call raises, or None, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call(*args, **kwargs)
            error = None
        except Exception as e:
            error = type(e), str(e)
    return error, [(w.category, str(w.message)) for w in caught]


def refusal(call, m):
    """(type, text) of the exception of a call of the table."""
    (error, told) = error_of(eval, call, vars(wrong_calls), {"m": m})
    assert error is not None
    assert told == []
    return error


def refusal_that_changes_nothing(call, m):
    before = picture(m)
    error = refusal(call, m)
    assert picture(m) == before
    return error


@pytest.mark.parametrize(("call", "text"), ROWS, ids=[call for call, _ in ROWS])
def test_a_wrong_call_is_refused_and_changes_nothing(m, call, text):
    error, found = refusal_that_changes_nothing(call, m)
    assert error.__module__ == "builtins"
    found = f"{error.__name__}: {found}"
    assert re.fullmatch(re.escape(text).replace(r"\.\.\.", ".*"), found), found


# Calls that torch refuses, too

# The shapes of x, h and c, by module,
SHAPES = {
    "lstm": [
        # the rank of x, its features, no steps
        ((3,),), ((5, 2, 1, 3),), ((5, 2, 4),), ((5, 4),), ((0, 2, 3),), ((0, 0, 3),), ((0, 3),),
        # the rank of states, their widths and batch
        ((5, 2, 3), (2, 4), (2, 4)), ((5, 2, 3), (1, 2, 4), (2, 4)), ((5, 3), (1, 1, 4), (1, 1, 4)),
        ((5, 2, 3), (1, 2, 5), (1, 2, 4)), ((5, 2, 3), (1, 2, 4), (1, 2, 5)), ((5, 2, 3), (1, 3, 4), (1, 2, 4)),
        ((5, 2, 3), (1, 2, 4), (1, 3, 4)), ((5, 3), (2, 4), (1, 4)),
        # other than two states
        ((5, 2, 3), (1, 2, 4)), ((5, 2, 3), (1, 2, 4), (1, 2, 4), (1, 2, 4)),
    ],
    "first": [((2, 5, 2),), ((2, 0, 3),), ((2, 5, 3), (2, 1, 4), (2, 1, 4)), ((2, 5, 3), (1, 5, 4), (1, 5, 4)),
              ((5, 3), (1, 4), (1, 5))],
    # where the next layer could catch it; states of one layer, of one direction; h not projected, c projected
    "deep": [((5, 2, 4),), ((5, 2, 3, 1),), ((0, 2, 3),), ((0, 0, 3),), ((5, 2, 3), (1, 2, 4), (1, 2, 4))],
    "both": [((5, 2, 3), (1, 2, 4), (1, 2, 4))],
    "projected": [((5, 2, 3), (1, 2, 4), (1, 2, 4)), ((5, 2, 3), (1, 2, 2), (1, 2, 2))],
    "weightless": [((5, 2, 3),)],
    # the rank of x and its features, the rank of states, batch and widths, unbatched, other than two
    "cell": [
        ((2, 1, 3),), ((),), ((2, 5),), ((5,),), ((2, 3), (1, 2, 4), (2, 4)), ((2, 3), (2, 4), ()),
        ((2, 3), (3, 4), (2, 4)), ((2, 3), (2, 4), (3, 4)), ((2, 3), (2, 5), (2, 4)), ((2, 3), (2, 4), (2, 5)),
        ((3,), (5,), (5,)), ((3,), (2, 4), (2, 4)), ((2, 3), (4,), (4,)), ((2, 3), (2, 4), (4,)),
        ((2, 3), (2, 4)), ((2, 3), (2, 4), (2, 4), (2, 4)),
    ],
}  # fmt: skip
X3 = "zeros(5, 2, 3), "
AS_TORCH = [
    *(f"m.{module}(zeros({x}){f', [zeros(n) for n in {hx}]' if hx else ''})"
      for module, calls in SHAPES.items() for x, *hx in calls),
    *(f"m.lstm({arguments})" for arguments in (
        "None", "[[1.0, 2.0, 3.0]]", "zeros(5, 2, 3, dtype=F64)", "zeros(5, 2, 3, dtype=F16)",
        "zeros(5, 2, 3, dtype=INT)", X3 + "zeros(1, 2, 4)", X3 + "(None, None)",
        "zeros(5, 2, 3, device=META)", X3 + "[zeros(1, 2, 4, device=META)] * 2",
        X3 + "(zeros(1, 2, 4, device=META), zeros(1, 2, 4))", X3 + "(zeros(1, 2, 4), zeros(1, 2, 4, device=META))")),
    "m.cell(None)", "m.cell(zeros(2, 3), ())",
    "m.cell(zeros(2, 3), zeros(2, 2, 4))",
]  # fmt: skip
# For these torch's text is that of the library that computes, or of a product deep inside.
BADLY_WORDED = [
    *(f"m.lstm({X3}(zeros(1, 2, 4, dtype={h}), zeros(1, 2, 4, dtype={c})))"
      for dtype in ("F64", "F16") for h, c in ((dtype, "None"), ("None", dtype), (dtype, dtype))),
    *(f"m.cell({arguments})" for arguments in (
        "zeros(2, 3, dtype=F64)", "zeros(2, 3, dtype=INT)", "zeros(2, 3), [zeros(2, 4, dtype=F64)] * 2",
        "zeros(2, 3, device=META)", "zeros(2, 3), [zeros(2, 4, device=META)] * 2")),
]  # fmt: skip


@pytest.fixture(scope="module", params=BACKENDS)
def both(request):
    """torch's modules and ours, on a GPU if there is one."""
    with torch.device(DEVICE):
        return wrong_calls.of_torch(), wrong_calls.modules(request.param)


@pytest.mark.parametrize("call", AS_TORCH)
def test_a_call_that_torch_refuses_too_raises_what_torch_raises(both, call):
    theirs, ours = both
    with torch.device(DEVICE):
        assert refusal_that_changes_nothing(call, ours) == refusal(call, theirs)


@pytest.mark.parametrize("both", ["torch", "reference"], indirect=True, scope="module")
@pytest.mark.parametrize("call", BADLY_WORDED)
def test_other_calls_that_torch_refuses_raise_an_error_of_the_same_type(both, call):
    theirs, ours = both
    with torch.device(DEVICE):
        found, expected = refusal_that_changes_nothing(call, ours), refusal(call, theirs)
    assert found[0] is expected[0]
    assert found == expected or re.match("Input and (hidden|parameter) tensors are not (the same|at)", found[1])


@pytest.mark.parametrize("module", ["lstm", "cell"])
@pytest.mark.parametrize(("name", "size", "expected"), [
    ("weight_hh", (16, 3), (16, 4)), ("weight_ih", (12, 4), (16, 3)), ("bias_hh", (64,), (16,)),
    ("bias_ih", (1,), (16,)), ("bias_hh", (16, 1), (16,)),  # which would be broadcast
], ids=str)  # fmt: skip
@pytest.mark.parametrize("way", [wrong_calls.handed, wrong_calls.assigned])
def test_a_weight_of_another_size_is_refused_at_the_next_call(both, way, module, name, size, expected):
    """Kernels would read beyond it."""
    _, ours = both
    before = picture(ours)
    error, _ = error_of(way, getattr(ours, module), name + "_l0" * (module == "lstm"), *size)
    assert error == (RuntimeError, f"Expected {name} size {expected}, got {list(size)}")
    assert picture(ours) == before


def test_the_table_is_long_and_names_all_that_is_public():
    counts = Counter(call for call, _ in ROWS)
    assert counts.most_common(1)[0][1] == 1
    assert len(counts) >= 400
    names = " ".join(counts).replace("lstm_layer", "functional")
    assert [name for name in gpu_lstm.__all__ if not re.search(rf"\b{name}\b", names)] == []


def packed(*features, steps=(5, 3), dtype=None):
    return pack_sequence([zeros(n, *features, dtype=dtype) for n in steps])


def states(h, c=None, **kwargs):
    return zeros(h, **kwargs), zeros(h if c is None else c, **kwargs)


@pytest.mark.parametrize("bad", [
    (packed(4),), (packed(3, dtype=F64),), (packed(3), states((1, 3, 4))), (packed(3), states((1, 2, 5), (1, 2, 4))),
    (packed(3), states((2, 2, 4))), (packed(3), states((2, 4))), (packed(3), states((1, 2, 4), dtype=F64)),
], ids=["features", "float64", "hx batch", "hx width", "hx rows", "hx 2-D", "hx float64"])  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bad_packed_calls(backend, bad):
    """They are refused as padded ones are: torch, which refuses them too, has the text of a product deep inside."""
    assert error_of(nn.LSTM(3, 4), *bad)[0] is not None
    with pytest.raises((RuntimeError, ValueError), match=r"input.size\(-1\)|dtype|Expected hidden\[0\] size"):
        gpu_lstm.LSTM(3, 4, backend=backend)(*bad)


# Arguments of the constructors, of which torch's refuse the same


OF_LSTM = dict(
    dropout=(1.5, -0.1, True, "0.5", "half", None), bias=(1, None), batch_first=(1, None), input_size=(3.0, 0, -1, "3"),
    hidden_size=(4.0, 0, -1, None), num_layers=(0, -1, 1.5, "2"), proj_size=(-1, 4, 5, 1.5, "1"),
    dtype=(INT, "float32"), device=("nowhere",),
)  # fmt: skip
OF_CELL = dict(input_size=(3.0, -1), hidden_size=("4", -4), dtype=(INT,), units=(4,))


@pytest.mark.parametrize(("cls", "name", "value"), [
    (cls, name, value) for cls, wrong in ((nn.LSTM, OF_LSTM), (nn.LSTMCell, OF_CELL)) for name in wrong
    for value in wrong[name]
], ids=str)  # fmt: skip
def test_bad_arguments_raise_what_torch_raises(cls, name, value):
    arguments = dict(input_size=3, hidden_size=4) | ({} if cls is nn.LSTMCell else dict(num_layers=2)) | {name: value}
    theirs = error_of(cls, **arguments)
    assert theirs[0] is not None
    assert error_of(getattr(gpu_lstm, cls.__name__), **arguments) == theirs
    assert cls is not nn.LSTM or error_of(gpu_lstm.compat.LSTM, **arguments) == theirs


@pytest.mark.parametrize("bad", [dict(input_size=3), dict(input_size=3, hidden_size=4, hidden=5)], ids=str)
def test_missing_and_unknown_arguments_raise_type_errors(bad):
    theirs, ours = error_of(nn.LSTM, **bad)[0], error_of(gpu_lstm.LSTM, **bad)[0]
    assert theirs[0] is ours[0] is TypeError
    assert ours[1] == theirs[1].replace("RNNBase", "LSTM")


def test_dropout_of_one_layer_warns_as_torch_does():
    error, theirs = error_of(nn.LSTM, 3, 4, dropout=0.5)
    assert error is None
    assert len(theirs) == 1
    assert error_of(gpu_lstm.LSTM, 3, 4, dropout=0.5) == (None, theirs)
    assert error_of(gpu_lstm.StackedLSTM, 3, [4], dropout=0.5) == (None, theirs)


# Command lines: exit status 2, one line that says why, nothing on stdout


OURS, BENCH = gpu_lstm.__main__.main, bench.__main__.main
PLAN = ["plan", "--hidden", "8", "--batch", "2", "--device", "h100"]
LEAST, WHOLE = "expected at least 1, got {}$", "expected a whole number, got '{}'$"
COMMANDS = [
    (OURS, ["nonsense"], "invalid choice: 'nonsense'"),
    (OURS, ["--nonsense"], "unrecognized arguments: --nonsense"),
    (OURS, ["plan"], "the following arguments are required: --hidden, --batch, --device"),
    (OURS, [*PLAN, "--hidden", "0"], "argument --hidden: " + LEAST.format(0)),
    (OURS, [*PLAN, "--hidden", "many"], "argument --hidden: " + WHOLE.format("many")),
    (OURS, [*PLAN, "--hidden", "1.5"], "argument --hidden: " + WHOLE.format("1.5")),
    (OURS, [*PLAN, "--batch", "-1"], "argument --batch: " + LEAST.format("-1")),
    (OURS, [*PLAN, "--steps", "-3"], "argument --steps: " + LEAST.format("-3")),
    (OURS, [*PLAN, "--steps", "0"], "argument --steps: " + LEAST.format(0)),
    (OURS, [*PLAN, "--dtype", "fp64"], "argument --dtype: invalid choice: 'fp64'"),
    (OURS, [*PLAN, "--directions", "3"], "argument --directions: invalid choice: 3"),
    (OURS, [*PLAN, "--device", "k80"], "^unknown device 'k80'; known: h100, a100, "),
    (OURS, [*PLAN, "--hidden", "1000000"], "^W_hh of 1000000 units takes 8000 GB, more than any known card has$"),
    (OURS, ["kernels"], "^python -m gpu_lstm kernels compiles them: unset TRITON_INTERPRET in the environment$"),
    (OURS, ["races", "--merge", "{binary}"], "binary.csv: expected what `python -m gpu_lstm races --export` writes: "),
    (OURS, ["races", "--merge", "{deep}"], "deep.json: expected what `python -m gpu_lstm races --export` writes: "),
    (OURS, ["races", "--merge", "{absent}"], "No such file or directory: '.*absent'$"),
    (OURS, ["races", "--export", "{absent}/file"], "No such file or directory: '.*absent/file'$"),
    (OURS, ["races", "--clear", "--export", "file"], "argument --export: not allowed with argument --clear$"),
    (BENCH, ["compare", "{binary}", "{binary}"], "binary.csv: .*; expected what `python -m bench` writes$"),
    (BENCH, ["compare", "{zipped}", "{zipped}"], "results.zip: .*; expected what `python -m bench` writes$"),
    (BENCH, ["compare", "{empty}", "{empty}"], "empty.csv: No columns .*; expected what `python -m bench` writes$"),
    (BENCH, ["compare", "{absent}", "{absent}"], "No such file or directory: '.*absent'$"),
    (BENCH, ["compare", "{folder}", "{folder}"], "Is a directory: '"),
    (BENCH, ["compare", "{absent}"], "the following arguments are required: new$"),
    (BENCH, ["compare", "a", "b", "--fail-under", "half"], "argument --fail-under: invalid float value: 'half'$"),
    (BENCH, ["gpu", "--minutes", "-3", "--out", "{absent}"],
     "argument --minutes: expected more than 0 minutes, got '-3'$"),
    (BENCH, ["gpu", "--minutes", "nan", "--out", "{absent}"],
     "argument --minutes: expected more than 0 minutes, got 'nan'$"),
    (BENCH, ["--cases", "nonsense"], "^python -m bench: unknown case 'nonsense'; known groups: headline, "),
    (BENCH, ["--providers", "nobody"], "argument --providers: invalid choice: 'nobody'"),
    (BENCH, ["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    (BENCH, ["--out", "{folder}", "--device", "cpu"], "^python -m bench: .*File exists: '"),
    (BENCH, ["--base", "no-such-commit", "--out", "{absent}", "--device", "cpu"], "no commit 'no-such-commit'"),
]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu_lstm.kernels.triton_lstm.launch.INTERPRETED", True)
    binary, deep, zipped, empty = (tmp_path / name for name in ("binary.csv", "deep.json", "results.zip", "empty.csv"))
    binary.write_bytes(bytes(range(256)))
    deep.write_text("[" * 10**6)
    zipped.write_bytes(b"PK\3\4" + bytes(range(128, 256)))
    empty.touch()
    found = dict(binary=binary, deep=deep, zipped=zipped, empty=empty, folder=tmp_path, absent=tmp_path / "absent")
    yield found
    assert sorted(tmp_path.iterdir()) == sorted((binary, deep, zipped, empty))


@pytest.mark.parametrize(("main", "arguments", "text"), COMMANDS, ids=[" ".join(row[1]) for row in COMMANDS])
def test_a_wrong_command_line_ends_with_2_and_says_why(files, capsys, main, arguments, text):
    try:
        status = main([argument.format(**files) for argument in arguments])
    except SystemExit as end:  # argparse's
        status = end.code
    printed, told = capsys.readouterr()
    assert (status, printed) == (2, "")
    *usage, line = told.rstrip("\n").split("\n")
    assert not usage or usage[0].startswith("usage: ")
    assert re.search(text, line), line
