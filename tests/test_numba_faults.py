"""Verification finds faults of the compiled loops, and does not refuse loops that are right."""

import contextlib
import copy
import warnings
from unittest.mock import Mock

import pytest
import torch
from cases import check, drawn
from pairs import results

import gpu_lstm
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.numba_rnn import build, launch
from gpu_lstm.kernels.numba_rnn.equations import GRU, LSTM
from gpu_lstm.verification import verify

pytest.importorskip("numba")

# Planted faults: a loop is given wrong sizes or addresses. Verification finds each, and `auto` uses another backend.

as_on_a_new_machine = pytest.mark.usefixtures(
    "nothing_cached", "nothing_raced", "exact_float32_products", "nan_in_fresh_memory"
)
SIZE = 9, 5, 3, 6  # T, B, I, H
ALL = "ragged states peepholes"


def told(of_panels=False, **changes):
    """Loops, or those that make panels, are told other sizes, or addresses of tensors."""

    def plant(monkeypatch):
        put = launch.put

        def changed(call, arguments):
            call = put(call, arguments)
            for name, change in changes.items():
                if bool(call["makes_panels"]) is of_panels:  # the same record is used again
                    call[name] = change(int(call[name]))
            return call

        monkeypatch.setattr(launch, "put", changed)

    return plant


def compiled(function):
    return lambda monkeypatch: monkeypatch.setattr(build, "function", function)


def without(name):
    return told(**{name: lambda address: 0})


def one_further(name, of_panels=False):
    return told(of_panels, **{name: lambda address: address and address + 4})


@as_on_a_new_machine
@pytest.mark.parametrize(("plant", "words", "said"), [
    (told(B=lambda count: count + 1), "gru ragged", "forward wrote up to .* past the end of"),
    (one_further("h"), ALL, r"forward wrote up to 4 bytes past the end of h \["),
    (one_further("dgates"), ALL, r"backward wrote up to 4 bytes past the end of dgates \["),
    (told(H=lambda count: count - 1), "gru", "RMS"), (told(cell=lambda was: LSTM if was == GRU else GRU), ALL, "RMS"),
    (told(from_x=lambda count: count - 1), ALL, "RMS"), (without("reset_c"), ALL, "RMS"),
    (without("h0"), "zoneout", "RMS"), (without("dreset_c"), ALL, "the RMS error of the gradient of reset_c"),
    (told(T=lambda steps: steps - 1), "slstm", "RMS"),
    (without("gain_hh"), "norms", "RMS"), (without("gain_c"), "norms", "RMS"), (without("bias_c"), "norms", "RMS"),
    (one_further("v_hh"), "norms", "RMS"), (one_further("scale_c"), "norms", "RMS"),
    (compiled(lambda name: lambda address: None), "gru", "RMS"),  # computes nothing
    (compiled(Mock(side_effect=RuntimeError("no compiler"))), "gru", "no compiler"),
])  # fmt: skip
def test_a_loop_that_is_wrong_runs_nothing(monkeypatch, spy, plant, words, said):
    """One warning says so, and there is no second trial; asked for by name it raises."""
    plant(monkeypatch)
    verdicts = spy(verify, "_verdict")
    with pytest.warns(UserWarning, match=f"'auto' uses '(torch|reference)' for .*: .*{said}") as warned:
        check(SIZE, words, None, torch.float32, seeds=1)
    assert len([each for each in warned if "'auto' uses" in str(each.message)]) == 1
    asked = verdicts.call_count
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gpu_lstm")
        check(SIZE, words, None, torch.float32, seeds=1)
    module, (x, hx, rest) = drawn(SIZE, words)
    assert gpu_lstm.explain(module, x, **rest).others["numba"].startswith("the kernels fail: ")
    assert verdicts.call_count == asked
    module.backend = "numba"
    with pytest.raises(RuntimeError, match=said):
        results(module, x, hx, **rest)


@as_on_a_new_machine
@pytest.mark.filterwarnings("ignore:gpu_lstm")
@pytest.mark.parametrize("of_panels", [False, True])
def test_a_trial_of_inference_finds_faults_of_both_products(monkeypatch, of_panels):
    """Its first steps read W_hh as it is, and the others read the panels."""
    one_further("weight_hh", of_panels)(monkeypatch)
    gru = gpu_lstm.GRU(3, 6, backend="numba")
    for steps_ in (2, 20):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"this layer on this CPU: .*RMS"):
            gru(torch.randn(steps_, 2, 3))


@as_on_a_new_machine
@pytest.mark.filterwarnings("error:gpu_lstm")
@pytest.mark.parametrize("hidden", [1, 2])
@pytest.mark.parametrize("words", ["norms", "norms expected", "norms masks ragged resets", "norm-c zoneout"])
def test_a_right_loop_of_few_units_is_not_refused_where_terms_cancel(words, hidden):
    """The gradient of LN(c) of one unit is rounding alone."""
    module, (x, hx, rest) = drawn((4, 3, 3, hidden), words, backend="numba")
    output, (h, _) = module(x.requires_grad_(), hx, **rest)
    for given in ((output,), (h,), (output, h)):
        torch.autograd.grad(given, x, [torch.ones_like(t) for t in given], retain_graph=True)
    assert {verdict for *_, verdict in cache.entries(cache.CHECKS)} == {"right"}


@as_on_a_new_machine
@pytest.mark.parametrize("hidden", [1, 2, 3])
@pytest.mark.parametrize(("plant", "words"), [
    (told(reverse=lambda was: 1 - was), "ragged"), (without("resets"), "norms resets"), (without("bias_hh"), "gru"),
    (without("lengths"), "norms ragged"), (without("weight_peephole"), "norms peepholes"), (without("dh"), "norm-c"),
    (told(cell=lambda was: LSTM), "slstm"), (without("zoneout_c"), "norm-hh zoneout"), (without("c0"), "norm-hh"),
])  # fmt: skip
def test_a_fault_in_few_units_is_found(monkeypatch, plant, words, hidden):
    plant(monkeypatch)
    module, (x, hx, rest) = drawn((4, 3, 3, hidden), words, backend="numba")
    with pytest.warns(UserWarning, match="failed its verification"), pytest.raises(RuntimeError, match="RMS"):
        results(module, x, hx, **rest)


@as_on_a_new_machine
@pytest.mark.parametrize("words", ["", "gru"])
@pytest.mark.parametrize("given", [(1,), (0, 1)], ids=["h_n", "output and h_n"])
def test_a_backward_pass_whose_loop_is_refused_runs_by_the_reference(monkeypatch, given, words):
    """The pass is met first in a user's backward(): one warning says so; asked for by name it raises."""
    real = verify._verdict
    verdicts = Mock(side_effect=lambda *a: "planted" if a[1].backward and a[1].dh_n else real(*a))
    monkeypatch.setattr(verify, "_verdict", verdicts)
    module, (x, *_) = drawn(SIZE, words or "norms")
    expected, x = copy.deepcopy(module), x.requires_grad_()
    expected.backend = "reference"

    def gradients(module):
        output, states = module(x)
        found = output, states if words else states[0]
        return torch.autograd.grad([found[k].square().sum() for k in given], [x, *module.parameters()])

    with pytest.warns(UserWarning, match="'auto' does without the kernels of 'numba' for .*: planted") as warned:
        found = [gradients(module) for _ in range(2)]
    for each in found:
        torch.testing.assert_close(each, gradients(expected), rtol=2e-4, atol=2e-5)
    assert len([each for each in warned if "does without" in str(each.message)]) == 1
    assert len({str(call.args[1:2]) for call in verdicts.call_args_list}) == verdicts.call_count
    module.backend = "numba"
    with pytest.raises(RuntimeError, match="no compiled loop can run this layer on this CPU: planted"):
        gradients(module)


@as_on_a_new_machine
def test_a_call_in_a_transform_that_needs_no_gradient_falls_back_as_well(monkeypatch):
    monkeypatch.setattr(verify, "_verdict", lambda *_: "planted")
    gru, x = gpu_lstm.GRU(3, 6).requires_grad_(False), torch.randn(9, 5, 3)
    with pytest.warns(UserWarning, match="does without the kernels of 'numba'"):
        found = torch.func.grad(lambda w: (w * gru(x)[0]).sum())(torch.ones(()))
    gru.backend = "reference"
    torch.testing.assert_close(found, gru(x)[0].sum())


@as_on_a_new_machine
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


@as_on_a_new_machine
@pytest.mark.filterwarnings("error:gpu_lstm")
@pytest.mark.parametrize(("cls", "hidden"), [(gpu_lstm.GRU, 260), (gpu_lstm.LSTM, 384)])
def test_errors_of_torchs_products_are_no_fault_of_a_loop(cls, hidden):
    """Products with few columns have larger errors. Here the gradient of x is such a product."""
    x, resets = torch.randn(3, 3, 3, requires_grad=True), torch.eye(3).bool()
    cls(3, hidden, backend="numba")(x, resets=resets)[0].sum().backward()
    assert [verdict for *_, verdict in cache.entries(cache.CHECKS)] == ["right"] * 2
