"""Faults of the compiled loops for CPUs: verification finds each, and `auto` gives right numbers by another backend.

They are planted in what a loop is told. On cards: test_faults.py.
"""

import contextlib
import warnings
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from cases import built, call_of, check, with_random_parameters
from pairs import results

import gpu_lstm
from gpu_lstm.backends import verify
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.numba_rnn import build, launch
from gpu_lstm.kernels.numba_rnn.equations import GRU, LSTM

pytestmark = pytest.mark.usefixtures("nothing_cached", "exact_float32_products", "nan_in_fresh_memory")
SIZE = 9, 5, 3, 6  # T, B, I, H
ALL = "ragged states peepholes"


def told(**changes: Callable[[int], int]) -> Callable:
    """Loops are told other sizes, or addresses of tensors."""

    def plant(monkeypatch):
        put = launch.put

        def changed(call, arguments):
            call = put(call, arguments)
            for name, change in changes.items():
                call[name] = change(int(call[name]))
            return call

        monkeypatch.setattr(launch, "put", changed)

    return plant


def compiled(function: Callable) -> Callable:
    return lambda monkeypatch: monkeypatch.setattr(build, "function", function)


def without(name: str) -> Callable:
    return told(**{name: lambda address: 0})


def one_further(name: str) -> Callable:
    return told(**{name: lambda address: address and address + 4})


@pytest.mark.parametrize(("plant", "words", "said"), [
    (told(B=lambda count: count + 1), "gru ragged", "forward wrote up to .* past the end of"),
    (one_further("h"), ALL, r"forward wrote up to 4 bytes past the end of h \["),
    (one_further("dgates"), ALL, r"backward wrote up to 4 bytes past the end of dgates \["),
    (told(H=lambda count: count - 1), "gru", "RMS"), (told(reverse=lambda was: 1 - was), "gru ragged", "RMS"),
    (told(cell=lambda was: LSTM if was == GRU else GRU), ALL, "RMS"), (without("resets"), "gru resets", "RMS"),
    (told(from_x=lambda count: count - 1), ALL, "RMS"), (without("lengths"), "gru ragged", "RMS"),
    (without("weight_peephole"), ALL, "RMS"), (without("reset_c"), ALL, "RMS"), (without("bias_hh"), "gru", "RMS"),
    (without("h0"), "zoneout", "RMS"), (without("dreset_c"), ALL, "the RMS error of the gradient of reset_c"),
    (told(cell=lambda was: LSTM), "slstm resets", "RMS"), (told(T=lambda steps: steps - 1), "slstm", "RMS"),
    (compiled(lambda name: lambda address: None), "gru", "RMS"),  # computes nothing
    (compiled(Mock(side_effect=RuntimeError("no compiler"))), "gru", "no compiler"),
])  # fmt: skip
def test_a_loop_that_is_wrong_runs_nothing(monkeypatch, plant, words, said):
    """One warning says so, and there is no second trial; asked for by name it raises."""
    plant(monkeypatch)
    verdicts = Mock(side_effect=verify._verdict)
    monkeypatch.setattr(verify, "_verdict", verdicts)
    with pytest.warns(UserWarning, match=f"'auto' uses '(torch|reference)' for .*: .*{said}") as warned:
        check(SIZE, words, None, torch.float32, seeds=1)
    assert len([each for each in warned if "'auto' uses" in str(each.message)]) == 1
    asked = verdicts.call_count
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gpu_lstm")
        check(SIZE, words, None, torch.float32, seeds=1)
    module = with_random_parameters(built(SIZE, {*words.split()}), 0)
    x, hx, rest = call_of(module, SIZE, {*words.split()}, 0)
    assert gpu_lstm.explain(module, x, **rest).others["numba"].startswith("the kernels fail: ")
    assert verdicts.call_count == asked
    module.backend = "numba"
    with pytest.raises(RuntimeError, match=said):
        results(module, x, hx, **rest)


@pytest.mark.parametrize("plant", [None, without("lengths")], ids=["right", "wrong"])
def test_a_loop_is_verified_before_a_graph_runs_it(monkeypatch, plant):
    """And its verdict is kept on disk."""
    torch._dynamo.reset()
    if plant is not None:
        plant(monkeypatch)
    gru, x, lengths = gpu_lstm.GRU(3, 6), torch.randn(9, 5, 3), torch.tensor([9, 4, 0, 2, 7])
    with pytest.warns(UserWarning, match="does without the kernels of 'numba'") if plant else contextlib.nullcontext():
        found = torch.compile(gru, backend="eager", fullgraph=True)(x, lengths=lengths)
    assert [verdict == "right" for *_, verdict in cache.entries(cache.CHECKS)] == [plant is None]
    gru.backend = "reference"
    torch.testing.assert_close(found, gru(x, lengths=lengths))


@pytest.mark.filterwarnings("error:gpu_lstm")
@pytest.mark.parametrize(("cls", "hidden"), [(gpu_lstm.GRU, 260), (gpu_lstm.LSTM, 384)])
def test_errors_of_torchs_products_are_no_fault_of_a_loop(cls, hidden):
    """Those with few columns, here of the gradient of x."""
    x, resets = torch.randn(3, 3, 3, requires_grad=True), torch.eye(3).bool()
    cls(3, hidden, backend="numba")(x, resets=resets)[0].sum().backward()
    assert [verdict for *_, verdict in cache.entries(cache.CHECKS)] == ["right"] * 2
