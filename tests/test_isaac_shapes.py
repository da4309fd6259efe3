"""The example of Isaac Lab's shapes, at small sizes: its ways agree, what differs is not timed, and its last line."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from installed import ROOT, load

SMALL = ["--environments", "64", "--hidden", "4", "--rounds", "2"]


@pytest.fixture
def example(monkeypatch):
    """With a clock that advances by 1 s at every look."""
    example, clock = load(ROOT / "examples" / "isaac_shapes.py"), itertools.count()
    monkeypatch.setattr(example, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32  # which main() sets
    yield example
    matmul.allow_tf32, cudnn.allow_tf32 = before


def test_a_line_for_each_shape_and_one_to_send(example, capsys):
    line = example.main(SMALL)
    *rows, empty, last = capsys.readouterr().out.splitlines()
    assert (empty, last) == ("", line)
    shapes = ["T4 B64 H4", "T16 B64 H4", "T24 B64 H4", "T32 B64 H4"]  # of seven, cut to these sizes
    for row, shape in zip(rows[1:], shapes, strict=True):
        assert re.fullmatch(rf"\w+ +{shape}, [1-9]\d* pieces( +1000\.00){{3}} +1\.00, 1\.00", row), row
    assert "gpu_lstm 0." in line
    assert line.endswith("; ".join(f"{shape} 1000.00 1000.00 1000.00" for shape in shapes))


def test_padding_and_pieces_are_what_one_call_gives_and_differ_without_resets(example):
    lstm, ways, cuts = example.prepare(24, 40, 5, torch.device("cpu"))
    assert 5 < cuts <= 24
    expected = ways["one call"]()
    for name in ("pieces", "padded"):
        torch.testing.assert_close(ways[name](), expected)
    lstm.forward = lambda x, state, resets: type(lstm).forward(lstm, x, state)
    with pytest.raises(RuntimeError, match=r"one call and pieces differ by"):
        example.measure(lstm, ways, 1)
