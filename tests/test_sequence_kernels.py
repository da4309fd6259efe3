"""Programs and threads that wait for each other: broken exchanges and barriers are detected, and waits end."""

import contextlib
import dataclasses
import itertools
import threading
import time
from functools import partial

import interpreted
import oracle
import pytest
import torch
import triton
import triton.language as tl
from comparing import assert_as_good_as_torch, check, example
from interpreted import rounded_to_tf32
from places import INTERPRETED, ahead, cooperative, forget, held, parts, pointwise, resident, split, step
from standing_in import few_polls, recurrence

from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels.problem import problem_of
from gpu_lstm.kernels.triton_lstm import cooperative as cooperative_kernels
from gpu_lstm.kernels.triton_lstm import exchange, fragments, launch
from gpu_lstm.kernels.triton_lstm import step as step_kernels

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="compiled kernels hold their device functions"),
    pytest.mark.usefixtures("nan_in_fresh_memory"),
]
F32, F16 = torch.float32, torch.float16


def compare(given, dtype=F32, yardstick="reference") -> None:
    assert_as_good_as_torch(lambda seed: given, "triton", dtype, seeds=1, yardstick=yardstick)


def test_programs_of_a_norm_wait_for_each_other_where_every_step_is_reset(monkeypatch):
    """No step needs the h of others, but nobody may run ahead of one who has yet to read the numbers of his units."""
    cooperative(monkeypatch, units=4)
    look = interpreted.look

    def look_late(at, left, GROUPS, SIZE, *strides):
        if SIZE == 2 and threading.current_thread().index[0] == 0:
            time.sleep(0.1)
        return look(at, left, GROUPS, SIZE, *strides)

    monkeypatch.setattr(interpreted, "look", look_late)
    compare(example(4, 2, 3, 11, resets=1.0, norms=("c",)))


@pytest.mark.parametrize("family", [step, split, held, resident, cooperative], ids=lambda family: family.__name__)
def test_the_cell_is_kept_in_float32(monkeypatch, family):
    """c, saved and final, is that of a recurrence in float32; W_hh is zero, so that the rounding of h plays no part."""
    family(monkeypatch)
    steps, batch, hidden = 12, 3, 8
    given, lengths = example(steps, batch, 4 * hidden, hidden).rounded(F16), torch.tensor([steps, 5, 0])
    gates, h0, c0 = (t.float() for t in given.tensors[:3])
    tensors = [gates, h0, c0, torch.eye(4 * hidden), torch.zeros(4 * hidden, hidden)]
    _, _, expected, tape = oracle.layer(*(t.double().numpy() for t in tensors), lengths=lengths)
    r = recurrence(gates.half(), weight_hh=tensors[-1].half(), h0=h0.half(), c0=c0, lengths=lengths)
    layer = launch.layer_of(problem_of(r.given, False, "ieee"), gates.device)
    _, _, (c_n,), c = layer.forward(gates.half(), r, save=True)
    (unsaved,) = layer.forward(gates.half(), r, save=False)[2]
    found = [c_n, unsaved, *(c[t, b] for b, t, *_ in tape)]
    for ours, true in zip(found, [expected, expected, *(c_new for *_, c_new, _, _, _ in tape)], strict=True):
        torch.testing.assert_close(ours.double(), torch.from_numpy(true), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "bits"), [(F32, torch.int32), (F16, torch.int16)], ids=str)
def test_a_nan_in_the_data_is_not_waited_for(monkeypatch, dtype, bits):
    """A NaN is data, also one with the bit pattern that stands for data which is not there: in h0; the usual in x."""
    cooperative(monkeypatch, units=4)
    x, h0, c0, *weights = (None if t is None else t.to(dtype) for t in example(4, 3, 3, 8).tensors)
    h0.view(bits)[0, :2], x[1, 1, 0] = -1, float("nan")
    ours, _ = lstm_layer(x, weights, (h0, c0), backend="triton")
    theirs, _ = lstm_layer(x, weights, (h0, c0), backend="torch")
    torch.testing.assert_close(ours, theirs, equal_nan=True, atol=8 * torch.finfo(dtype).eps, rtol=0)
    assert not ours[:, 2].isnan().any()


# A broken exchange must be detected. Faults are plain functions: what calls them runs in the interpreter, where
# constants are numbers.
count_missing, exchange_pairs, pack = interpreted.count_missing, cooperative_kernels.exchange_pairs, exchange.pack


def announce_early(at, words, mask):
    tl.store(at, tl.zeros_like(words), mask=mask)  # the data come later
    tl.debug_barrier()
    exchange.publish(at, words, mask)


def missing_in_the_last_word(words, left, phase, SIZE, STRIDE):
    if phase is not None:  # where a word of the wrong phase keeps its partners waiting
        return count_missing(words, left, phase, SIZE, STRIDE)
    n = len(words) - 1
    return count_missing(words[n:], left - n // SIZE * STRIDE - n % SIZE, phase, 1, 1)


def any_phase(words, left, phase, SIZE, STRIDE):
    return count_missing(words, left, None, SIZE, STRIDE)


FAULTS = {  # where, the function, what stands in its place, norms
    "none": (interpreted, "count_missing", count_missing, ()),
    "published before the data": (cooperative_kernels, "publish", announce_early, ()),
    "no repeated load": (interpreted, "count_missing", lambda *_: 0, ()),
    "one word is looked at": (interpreted, "count_missing", missing_in_the_last_word, ()),
    "the phase is not looked at": (interpreted, "count_missing", any_phase, ()),
    "nor that of a norm of W_hh h": (interpreted, "count_missing", any_phase, ("hh",)),
    "nor that of a norm of c": (interpreted, "count_missing", any_phase, ("c",)),
}


@pytest.mark.deep
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_broken_exchange_is_detected(monkeypatch, fault, dtype):
    module, name, function, norms = FAULTS[fault]
    cooperative(monkeypatch, units=4, yield_rate=0.3)
    monkeypatch.setattr(module, name, function)

    def is_detected(seed: int) -> bool:
        try:
            compare(example(6, 3, 3, 8, norms=norms, seed=seed), dtype, "reference" if norms else "torch")
        except AssertionError:
            return True
        return False

    there = fault != "none"
    assert any(map(is_detected, range(12 if there else 1))) is there, "programs run in another order at each"


@pytest.mark.parametrize("projected", [0, 5])
def test_a_barrier_that_does_not_wait_is_detected(monkeypatch, projected):
    step(monkeypatch, yield_rate=0.3)
    monkeypatch.setattr(step_kernels, "grid_barrier", lambda arrivals_ptr, times, poll_limit, *_: poll_limit)
    with pytest.raises(AssertionError):
        check((5, 3, 3, 40, projected), "plain", "triton", F32, seeds=5)  # in one order or another


@pytest.mark.parametrize("after", ["products", "cells"])
def test_a_barrier_that_does_not_wait_after_half_of_the_rounds_is_detected(monkeypatch, after):
    """All count themselves in. By turns a round is one of products of parts of K, and one of cells."""

    def grid_barrier(arrivals_ptr, times, poll_limit, error_ptr, step):
        if int(times) % 2 == (after == "products"):
            exchange.arrive(arrivals_ptr, poll_limit)
            return poll_limit
        return exchange.grid_barrier(arrivals_ptr, times, poll_limit, error_ptr, step)

    split(monkeypatch, yield_rate=0.3)
    launch_with(monkeypatch, step_kernels, "grid_barrier", grid_barrier, "backward")
    with pytest.raises(AssertionError):
        check((5, 3, 3, 40), "plain", "triton", F32, seeds=5)  # in one order or another


wait_for_tile = step_kernels.wait_for_tile
FAULTS_OF_TILES = {  # of those that hold W_hh
    "no wait": lambda arrivals_ptr, batch_tile, times, poll_limit, *_: poll_limit,
    "a step too few": lambda arrivals_ptr, batch_tile, times, *given: wait_for_tile(
        arrivals_ptr, batch_tile, times - 1, *given),
    "of other sequences": lambda arrivals_ptr, batch_tile, *given: wait_for_tile(arrivals_ptr, 0, *given),
}  # fmt: skip


@pytest.mark.parametrize("force", [held, ahead, parts], ids=lambda force: force.__name__)
@pytest.mark.parametrize("fault", FAULTS_OF_TILES)
def test_a_tile_that_does_not_wait_for_those_of_its_sequences_is_detected(monkeypatch, fault, force):
    force(monkeypatch, yield_rate=0.3)
    monkeypatch.setattr(step_kernels, "wait_for_tile", FAULTS_OF_TILES[fault])
    with pytest.raises(AssertionError):
        check((5, 35 if force is ahead else 18, 3, 40), "plain", "triton", F32, seeds=5)  # in one order or another


FAULTS_OF_WORDS = {
    "halves in the other order": lambda x, DTYPE: (pack(x, DTYPE) << 16) | ((pack(x, DTYPE) >> 16) & 0xFFFF),
    "NaN for zero, which only units past H are": lambda x, DTYPE: pack(tl.where(x == 0.0, float("nan"), x), DTYPE),
    "high halves lost": lambda x, DTYPE: pack(x, DTYPE) & 0xFFFF,
}


@pytest.mark.parametrize("fault", FAULTS_OF_WORDS)
def test_a_fault_in_a_word_is_detected(monkeypatch, fault):
    cooperative(monkeypatch, units=8)
    monkeypatch.setattr(cooperative_kernels, "pack", FAULTS_OF_WORDS[fault])
    with pytest.raises(AssertionError):
        check((3, 3, 3, 13), "plain", "triton", F16, seeds=1)


def one_program_left_out(*given):
    (one, other, units), *rest = exchange_pairs(*given)
    is_first = tl.arange(0, one.shape[0]) % (one.shape[0] // 8) == 0
    return ((tl.where(is_first, 0.0, one), tl.where(is_first, 0.0, other), units), *rest)


def launch_with(monkeypatch, module, name, fault, kernels: str, around=lambda kernel: contextlib.nullcontext()) -> None:
    """A fault for the kernels of such names alone, which are launched within around(name)."""
    run = launch.launch_kernel

    def launch_kernel(kernel, grid, **given):
        if kernels not in kernel.__name__:
            return run(kernel, grid, **given)
        with monkeypatch.context() as patch, around(kernel.__name__):
            patch.setattr(module, name, fault)
            run(kernel, grid, **given)

    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm", ["hh", "c"])
def test_a_program_that_a_norm_leaves_out_is_detected(monkeypatch, norm, direction):
    cooperative(monkeypatch, units=4)
    launch_with(monkeypatch, cooperative_kernels, "exchange_pairs", one_program_left_out, direction)
    with pytest.raises(AssertionError):
        compare(example(3, 2, 3, 8, norms=(norm,)))


HELD_WAYS = itertools.product(("forward", "backward"), ("held", "ahead", "parts"))
FAULTS_OF_WAITS = {  # the module, the function, and what stands in its place
    "lstm_cooperative_forward_kernel": (cooperative_kernels, "publish", lambda *_: None),
    "lstm_cooperative_backward_kernel": (cooperative_kernels, "in_phase", lambda words, phase: words & -2),
    **dict.fromkeys(("lstm_step_forward_kernel", "lstm_step_backward_kernel", "lstm_step_backward_kernel split"), (
        step_kernels, "grid_barrier", lambda arrivals_ptr, times, *given: (
            exchange.grid_barrier(arrivals_ptr, times + 1, *given)))),
    **dict.fromkeys(itertools.starmap("lstm_step_{}_kernel {}".format, HELD_WAYS), (
        step_kernels, "wait_for_tile", lambda arrivals_ptr, batch_tile, times, *given: (
            wait_for_tile(arrivals_ptr, batch_tile, times + 1, *given)))),
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "projected"), [*((kernel, 0) for kernel in FAULTS_OF_WAITS), *(
    (kernel, 4) for kernel, (family, *_) in FAULTS_OF_WAITS.items() if family is step_kernels)])  # fmt: skip
def test_a_wait_that_times_out_ends_in_nan_and_is_reported(monkeypatch, kernel, projected):
    """Few polls for the faulty kernel alone: how many others need depends on who is scheduled when."""
    family, name, fault = FAULTS_OF_WAITS[kernel]
    kernel, _, how = kernel.partition(" ")
    given = [None if t is None else t.float().requires_grad_() for t in example(5, 3, 3, 8, projected).tensors]
    x, h0, c0, *weights = given
    call = partial(lstm_layer, x, weights, (h0, c0), backend="triton")

    def gradients(h):
        return torch.autograd.grad(h.sum(), (x, h0, c0))

    of_step = {"held": held, "ahead": ahead, "parts": parts, "split": split}.get(how, step)
    force = of_step if family is step_kernels else partial(cooperative, units=4)
    force(monkeypatch)
    h, states = call()
    right = h, *states, *gradients(h)
    launch_with(monkeypatch, family, name, fault, kernel, few_polls)
    h, states = call()
    forward, report = "forward" in kernel, pytest.raises(RuntimeError, match=rf"{kernel} timed out at step \d")
    if forward:
        with report:  # once
            gradients(h)
    found = (h, *states, *(() if forward else gradients(h)))
    for ours, true in zip(found, right):  # nothing is stale
        assert (ours.isnan() | (ours == true)).all()
    assert (found[0][-1] if forward else found[3][0]).isnan().all()
    monkeypatch.undo()
    forget()
    if not forward:
        with report:
            call()
    call()


@pytest.mark.parametrize("tiles_per_group", [1, 2])
@pytest.mark.parametrize(
    "family", [resident, cooperative, pointwise, step, split, held, ahead, parts], ids=lambda f: f.__name__
)
def test_a_plan_for_a_larger_batch_runs_a_smaller_one(monkeypatch, family, tiles_per_group):
    """Programs, or whole groups, have no sequence then; the last batch of an epoch runs so."""
    family(monkeypatch)
    choose_plan = launch.choose_plan

    def for_more(problem, *given):
        plan = choose_plan(problem._replace(batch=27), *given)
        return dataclasses.replace(plan, tiles_per_group=tiles_per_group)

    monkeypatch.setattr(launch, "choose_plan", for_more)
    check((4, 5, 3, 8), "ragged resets", "triton", torch.float32, seeds=1)


@triton.jit
def to_tf32_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, rounded_to_tf32(tl.load(x_ptr + at)))


def test_a_weight_is_rounded_to_the_nearest_tf32(device):
    """Ten bits after the point, ties away from zero; infinity and NaN stay."""
    ulp = 2.0**-10
    cases = {1 + 0.49 * ulp: 1.0, 1 + 0.5 * ulp: 1 + ulp, -1 - 0.5 * ulp: -1 - ulp, 3.0: 3.0, 0.0: 0.0,
             2 - 0.25 * ulp: 2.0, float("inf"): float("inf"), float("nan"): float("nan")}  # fmt: skip
    x, expected = (torch.tensor([*values], device=device) for values in (cases, cases.values()))
    y = torch.zeros_like(x)
    to_tf32_kernel[1,](x.view(torch.int32), y.view(torch.int32), N=len(cases))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def store_places(out_ptr, CHUNKS: tl.constexpr):
    sequence, byte = tl.arange(0, 8)[:, None], tl.arange(0, 64 * CHUNKS)[None, :]
    tl.store(out_ptr + sequence * (64 * CHUNKS) + byte, fragments.shared_place(sequence, byte, CHUNKS))


@pytest.mark.parametrize("chunks", [2, 4])
def test_words_have_places_of_their_own_in_shared_memory_quads_stay_whole_and_sequences_use_all_banks(chunks):
    place = torch.zeros(8, 64 * chunks, dtype=torch.int32, device="cpu" if INTERPRETED else "cuda")
    store_places[(1,)](place, chunks)
    assert place.flatten().sort().values.equal(torch.arange(place.numel(), dtype=torch.int32, device=place.device))
    quads = place.view(8, -1, 16)
    assert quads.equal(quads[:, :, :1] + torch.arange(16, dtype=torch.int32, device=place.device))
    banks = quads[:, :, 0] // 16 % 8  # quads of 4 banks, of which there are 32
    assert all(len(set(of_quad.tolist())) == 8 for of_quad in banks.T)
