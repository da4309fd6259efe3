"""Programs and threads that wait for each other: waits end, states are exact, and words have places of their own."""

import dataclasses
import itertools

import interpreted
import oracle
import pytest
import torch
import triton
import triton.language as tl
from cases import check
from comparing import both_kinds
from interpreted import rounded_to_tf32
from pairs import pair, random_inputs
from places import INTERPRETED, KERNELS, by_interpreter, cooperative
from standing_in import few_polls, recurrence
from torch.utils._pytree import tree_leaves, tree_map

import gpu_lstm
from gpu_lstm.dispatch.route import forget
from gpu_lstm.kernels.layer import kept_layer
from gpu_lstm.kernels.problem import problem_of
from gpu_lstm.kernels.triton_rnn import exchange, launch
from gpu_lstm.kernels.triton_rnn.threads import cooperative as cooperative_kernels
from gpu_lstm.kernels.triton_rnn.threads import fragments
from gpu_lstm.kernels.triton_rnn.tiles import held as held_kernels

pytestmark = [
    by_interpreter,
    pytest.mark.usefixtures("nan_in_fresh_memory"),
]
F32, F16 = torch.float32, torch.float16


@pytest.mark.parametrize(("cell", "family"), [
    *itertools.product(("lstm", "gru"), ("step", "split/4", "held", "resident", "cooperative/4/1/4")),
    ("gru", "pointwise"),
])  # fmt: skip
def test_the_cell_and_h_of_a_gru_are_carried_in_float32(monkeypatch, cell, family):
    """Saved and final c of an LSTM, and h of a GRU, are those of a recurrence in float32, since W_hh is zero. The state
    is rounded only as an operand and as a result."""
    KERNELS[family].force(monkeypatch)
    steps, batch, hidden, rows = 6, 3, 8, 4 if cell == "lstm" else 3
    gates, h0, c0 = (torch.randn(steps, batch, 4 * hidden).half(), *torch.randn(2, batch, hidden).half())
    gates[:, :, rows * hidden :] = 0  # s of a GRU: x does not reach it, and h does not through a W_hh of zeros
    c0 = c0 if cell == "lstm" else h0
    lengths, weight_hh = torch.tensor([steps, 5, 0]), torch.zeros(rows * hidden, hidden)
    tensors = gates[:, :, : rows * hidden], h0, c0, torch.eye(rows * hidden), weight_hh
    out, h_n, c_n, tape = oracle.layer(*(t.double().numpy() for t in tensors), lengths=lengths)
    r = recurrence(gates, weight_hh=weight_hh.half(), h0=h0, c0=c0.float(), lengths=lengths)
    layer = kept_layer(launch, problem_of(r.inputs, cell, False, "ieee"), gates.device)
    _, _, (final,), c = layer.forward(gates.clone(), r, save=True)
    (unsaved,) = layer.forward(gates.clone(), r, save=False)[2]
    expected = c_n if cell == "lstm" else h_n
    of_steps = [(c[t, b], values[7] if cell == "lstm" else out[t, b]) for b, t, *values in tape]
    for ours, true in ((final, expected), (unsaved, expected), *of_steps):
        torch.testing.assert_close(ours.double(), torch.from_numpy(true), rtol=0, atol=2e-6)


@both_kinds
@pytest.mark.parametrize(("dtype", "bits"), [(F32, torch.int32), (F16, torch.int16)], ids=str)
def test_a_nan_in_the_data_is_not_waited_for(monkeypatch, kind, dtype, bits):
    """A NaN in h0 is data even if it has the bit pattern of missing data. In x there is a usual NaN."""
    cooperative(monkeypatch, units=4)
    theirs, ours = (module.to(dtype) for module in pair(kind, "triton", hidden_size=8))
    x, hx = tree_map(lambda t: t.to(dtype), random_inputs(ours, 3))
    tree_leaves(hx)[0].view(bits)[0, 0, :2], x[1, 1, 0] = -1, float("nan")
    found, expected = (module(x, hx)[0] for module in (ours, theirs))
    torch.testing.assert_close(found, expected, equal_nan=True, atol=8 * torch.finfo(dtype).eps, rtol=0)
    assert not found[:, 2].isnan().any()


def one_arrival_more(arrivals, tile, times, *given):
    return interpreted.wait_for(arrivals, tile, times + 1, *given)


# Faults are plain functions, since the code that calls them runs in the interpreter, where constants are numbers.
OF_BARRIERS, OF_TILES = ((module, "wait_for", one_arrival_more) for module in (exchange, held_kernels))
FAULTS_OF_WAITS = [  # how kernels are forced, the faulty one, and the fault
    ("cooperative/4/1/4", "cooperative_forward_kernel", (cooperative_kernels, "publish", lambda *_: None)),
    ("cooperative/4/1/4", "cooperative_backward_kernel",
     (cooperative_kernels, "in_phase", lambda words, phase: words & -2)),
    ("split/4", "step_backward_kernel", OF_BARRIERS),
    *(("step", f"step_{way}_kernel", OF_BARRIERS) for way in ("forward", "backward")),
    *((family, f"held_{way}_kernel", OF_TILES) for family in ("held", "held/ahead") for way in ("forward", "backward")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kernel", "fault", "kind"), [
    *((*each, "LSTM") for each in FAULTS_OF_WAITS), *((*FAULTS_OF_WAITS[k], "GRU") for k in (1, 5))])  # fmt: skip
def test_a_wait_that_times_out_ends_in_nan_and_is_reported(monkeypatch, family, kernel, fault, kind):
    """Only the faulty kernel has few polls. How many polls others need depends on the scheduler."""
    module = getattr(gpu_lstm, kind)(3, 8, backend="triton")
    x, hx = tree_map(torch.Tensor.requires_grad_, random_inputs(module, 3, steps=5))
    state = tree_leaves(hx)

    def gradients(h):
        return torch.autograd.grad(h.sum(), (x, *state))

    KERNELS[family].force(monkeypatch)
    h, states = module(x, hx)
    right, run = (h, *states, *gradients(h)), launch.launch_kernel

    def launch_kernel(each, grid, **given):
        if each.__name__ != kernel:
            return run(each, grid, **given)
        with monkeypatch.context() as patch, few_polls(kernel):
            patch.setattr(*fault)
            run(each, grid, **given)

    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)
    h, states = module(x, hx)
    forward, report = "forward" in kernel, pytest.raises(RuntimeError, match=rf"{kernel} timed out at step \d")
    if forward:
        with report:  # it is reported once
            gradients(h)
    found = (h, *states, *(() if forward else gradients(h)))
    for ours, true in zip(found, right):  # no number is stale
        assert (ours.isnan() | (ours == true)).all()
    assert (found[0][-1] if forward else found[1 + len(state)][0]).isnan().all()
    monkeypatch.undo()
    forget()
    if not forward:
        with report:
            module(x)
    module(x)


@pytest.mark.parametrize(("family", "tiles_per_program", "cell"), [
    *((family, 1, "") for family in ("cooperative/4/1/4", "resident", "pointwise", "step", "split/4", "held")),
    *((family, 2, "") for family in ("cooperative/4/1/4", "held", "held/ahead")),
    ("cooperative/4/1/4", 2, "gru "), ("held", 2, "gru "), ("resident", 1, "gru "),
])  # fmt: skip
def test_a_plan_for_a_larger_batch_runs_a_smaller_one(monkeypatch, family, tiles_per_program, cell):
    """Programs, or whole groups, may have no sequence then. The last batch of an epoch runs so."""
    KERNELS[family].force(monkeypatch)
    choose_plan = launch.choose_plan

    def for_more(problem, *given):
        plan = choose_plan(problem._replace(batch=27), *given)
        return dataclasses.replace(plan, tiles_per_program=tiles_per_program)

    monkeypatch.setattr(launch, "choose_plan", for_more)
    check((4, 5, 3, 8), f"{cell}ragged resets", "triton", F32, seeds=1)


@triton.jit
def to_tf32_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, rounded_to_tf32(tl.load(x_ptr + at)))


def test_a_weight_is_rounded_to_the_nearest_tf32(device):
    """Ten bits after the point remain, and ties round away from zero. Infinity and NaN stay."""
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
    banks = quads[:, :, 0] // 16 % 8  # a quad has 4 of the 32 banks
    assert all(len(set(of_quad.tolist())) == 8 for of_quad in banks.T)
