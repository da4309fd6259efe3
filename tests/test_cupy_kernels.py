"""What is particular to the kernels in CUDA C++: memory, NaN as data; and planted faults are detected.

Without a GPU the very same source is compiled by g++ (host_cuda.py). On a GPU:

    pytest tests/test_cupy_kernels.py --require-gpu
    compute-sanitizer --tool memcheck   python -m pytest tests/test_cupy_kernels.py -k cuda
"""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from cases import check
from places import CUPY_PLANS, cuda, cupy_plan
from standing_in import few_polls, recurrence
from torch import Tensor

from gpu_lstm.kernels import timeouts
from gpu_lstm.kernels.cards import Card
from gpu_lstm.kernels.cupy_rnn import launch, source
from gpu_lstm.kernels.layer import Layer, kept_layer
from gpu_lstm.kernels.problem import Problem, Recurrence, problem_of

pytestmark = pytest.mark.usefixtures("exact_float32_products", "nan_in_fresh_memory")


@pytest.fixture
def device(monkeypatch, host_or_card) -> str:
    cuda(monkeypatch, launch.choose_plan, host_or_card)
    return host_or_card


def _given(device: str, dtype=torch.float32, T=4, B=3, H=8) -> tuple[Tensor, Recurrence]:
    torch.manual_seed(0)
    sizes = (4 * H, H), (B, H), (B, H), (T, B, 4 * H)
    weight, h0, c0, gates = (torch.randn(size).to(device, dtype) for size in sizes)
    return gates, recurrence(gates, weight_hh=weight, h0=h0, c0=c0.float())


def _layer_of(gates: Tensor, r: Recurrence, precision: str = "ieee") -> Layer:
    return kept_layer(launch, problem_of(r.inputs, "lstm", False, precision), gates.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensors_that_are_not_aligned_give_the_same_bits(device, dtype):
    def moved(t: Tensor) -> Tensor:
        """The same, an element past an address that is a multiple of 16 bytes."""
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def results(move):
        gates, r = _given(device, dtype)
        of_loop = {name: move(getattr(r.inputs, name)) for name in ("weight_hh", "h0", "c0")}
        gates, r = move(gates), r._replace(inputs=r.inputs._replace(**of_loop))
        layer = _layer_of(gates, r)
        h, h_n, c_n, c = layer.forward(gates, r, save=True)
        return gates, h, h_n, c_n, *layer.backward(move(h), move(h_n), None, gates, move(c), r)

    assert all(a is b is None or torch.equal(a, b) for a, b in zip(results(moved), results(torch.clone), strict=True))


def test_a_nan_is_data_and_stays_in_its_sequence(monkeypatch, device):
    """Nobody waits for it for ever, although the sentinel is a NaN."""
    monkeypatch.setattr(launch, "choose_plan", CUPY_PLANS["kept/4"])
    gates, r = _given(device, torch.float16)
    r.inputs.h0.view(torch.int16)[0, 0] = -1  # the sentinel's bits
    gates[1, 1] = float("nan")
    h, *_ = _layer_of(gates, r).forward(gates, r, save=True)
    assert (h[:, 0].isnan().all(), h[1:, 1].isnan().all()) == (True, True)
    assert (h[:, 2].isfinite().all(), h[0, 1].isfinite().all()) == (True, True)


def test_a_gru_of_blocks_whose_third_gate_is_in_both_halves_of_tiles(monkeypatch):
    """Of 16 units: three blocks have no fewer for 45."""
    cuda(monkeypatch, cupy_plan(True, 1, multiprocessors=3))
    check((3, 9, 3, 45), "gru ragged resets", "cupy", torch.float16, seeds=1)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    T, B, H = 70_000, 64, 128
    gates = torch.zeros(T, B, 4 * H, dtype=torch.float16, device="cuda")  # 2.3e9 elements
    gates[-1, -1] = 1
    r = _given("cuda", torch.float16, 1, B, H)[1]
    g = r.inputs
    zeros = recurrence(gates, weight_hh=0 * g.weight_hh, h0=0 * g.h0, c0=0 * g.c0)
    h, *_ = _layer_of(gates, zeros).forward(gates, zeros, save=False)
    one = torch.ones((), device="cuda")
    last = one.sigmoid() * (one.sigmoid() * one.tanh()).tanh()
    torch.testing.assert_close(h[-1, -1], last.half().expand(H), rtol=1e-3, atol=1e-3)
    assert (h[-1, :-1] == 0).all()


def test_tf32_rounds_the_weights_where_tensor_cores_would_cut_them_off(monkeypatch, host_or_card):
    """The same bits as from weights that were rounded before, but not from weights that were cut off."""
    cuda(monkeypatch, CUPY_PLANS["kept/1"], host_or_card)
    gates, r = _given(host_or_card, torch.float32, H=9)
    words = r.inputs.weight_hh.view(torch.int32)
    found = []
    for weights in (words, (words + 0x1000) & -0x2000, words & -0x2000):
        given = r._replace(inputs=r.inputs._replace(weight_hh=weights.view(torch.float32)))
        layer, own = _layer_of(gates, given, "tf32"), gates.clone()
        h, _, _, c = layer.forward(own, given, save=True)
        found.append(torch.stack([h.sum(), layer.backward(h, None, None, own, c, given).dgates.sum()]))
    assert torch.equal(found[0], found[1])
    assert (found[0] != found[2]).all()


# What no order of turns shows is no check of the order: faults of the exchange are planted, which must be detected.
# Those of formulas and indices are planted by `make mutants`.

FAULTS = {  # the part, the text that is replaced, and by what
    "h of the wrong step": ("cooperative", "time_of(step - 1, its_length, reverse)", "step < 2 ? T : step - 2"),
    "a warp takes another's part of K": ("products", "x.await(polling);\n        float", "x.await(polling);\n        "
                                        "x.quad[0].x = lane.warp == 1 ? x.quad[0].y : x.quad[0].x;\n        float"),
    "a stale word is taken for new": ("exchange", "return most != SENTINEL;", "return true;"),
    "partial sums of another step": ("exchange", "missing |= (word[n] & 1) != phase;",
                                     "missing |= word[n] == SENTINEL;"),
    "published too early": ("cooperative", "const unsigned word = pack<E>(h_next);",
                            "const unsigned word = pack<E>(h_next);\nstore_relaxed_if(in_batch & "
                            "unit % PER_WORD<E> == 0, h + at.row * W + unit / PER_WORD<E>, word ^ 0x8000);"),
    "a missing barrier": ("products", "odd[tile][2 + n]};\n        __syncthreads();", "odd[tile][2 + n]};"),
}  # fmt: skip
READ_FAULTS = {
    "a missing barrier": ("products", "= sums[n][s];\n        __syncthreads();", "= sums[n][s];"),
    "a warp reads before all have laid down": ("products", "x.quad[chunk];\n            barrier_of_warp();",
                                               "x.quad[chunk];"),
}  # fmt: skip


QUICK = {None, "h of the wrong step", "a stale word is taken for new", "a missing barrier", "published too early"}


@pytest.mark.parametrize(("faults", "change"), [
    pytest.param(faults, fault, id=f"{name}-{fault}", marks=() if fault in QUICK else pytest.mark.deep)
    for name, faults in (("kept", FAULTS), ("read", READ_FAULTS)) for fault in (*faults, None)
])  # fmt: skip
def test_a_planted_fault_is_detected(monkeypatch, faults, change):
    changes = {}
    if change is not None:
        part, text, fault = faults[change]
        found = source.texts()[part]
        assert found.count(text) == 1, f"{part}: {text}"
        changes[part] = found.replace(text, fault)
    # In registers by one group of blocks, which computes two batch tiles.
    choose, dtype, size = cupy_plan(True, 4, multiprocessors=12), torch.float16, (5, 9, 3, 33)
    if faults is READ_FAULTS:
        choose, dtype, size = CUPY_PLANS["read/4"], torch.float32, (3, 9, 3, 75)

    def is_detected(seed: int) -> bool:
        cuda(monkeypatch, choose, seeds=itertools.repeat(seed), changes=changes)
        try:
            check(size, "ragged resets reverse", "cupy", dtype, seeds=1)
        except AssertionError:
            return True
        except RuntimeError as error:  # words that never come
            return "timed out" in str(error)
        return False

    seeds = range(300 if change else 2)  # in few of them a warp gets far ahead
    found = any(map(is_detected, seeds))
    with contextlib.suppress(RuntimeError):  # where a launch also timed out
        timeouts.check()
    assert found == (change is not None)


def test_a_launch_whose_blocks_are_not_all_there_ends_and_is_reported(monkeypatch):
    """As if the card held one block less than it says."""
    gates, r = _given("cpu", torch.float16, H=33)
    plan = CUPY_PLANS["kept/4"](Problem(2, 3, 33, torch.float16), launch.card_of(gates.device), False)
    lacking = replace(plan, grid=(plan.grid[0] - 1, 1))
    cuda(monkeypatch, lambda *_: lacking)
    with few_polls("cooperative_forward", 1 << 7):
        _layer_of(gates, r).forward(gates, r, save=False)
    with pytest.raises(RuntimeError, match="cooperative_forward timed out at step 1 on cpu"):
        timeouts.raise_if_timed_out(gates.device)


def test_blocks_that_timed_out_remember_it_where_nobody_sees_the_error_word(monkeypatch):
    """Another thread may clear it, in host memory, before the launch ends: later waits take one look each."""
    count = "store_to_host(error + 2, load_from_host(error + 2) + 1);"
    text = source.texts()["exchange"].replace("store_to_host(error, step + 1);", "")
    changes = {"exchange": text.replace("if (lost) return false;", f"if (lost) return false;\n{count}")}
    plan = CUPY_PLANS["kept/4"](Problem(2, 3, 33, torch.float16), Card(80, 16), False)
    lacking, polls = replace(plan, grid=(plan.grid[0] - 1, 1)), []
    cuda(monkeypatch, lambda *_: lacking, changes=changes)
    for steps in (3, 12):
        gates, r = _given("cpu", torch.float16, T=steps, H=33)
        word = timeouts.error_word(gates.device, "cooperative_forward")
        word[2] = 0
        with few_polls("cooperative_forward", 1 << 7):
            _layer_of(gates, r).forward(gates, r, save=False)
        polls.append(int(word[2]))
    assert 0 < polls[1] < 1.5 * polls[0], "four times as many steps"
