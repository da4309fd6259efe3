"""What the tests do on a card, without one: their tables, and one of them on the CPU."""

import contextlib

import pytest
import test_gpu
import torch
from places import INTERPRETED, KERNELS
from standing_in import H100, plan_of

from gpu_lstm.kernels.layer import Layer
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_rnn.plans import choose

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_family_runs_on_an_h100_with_both_cells(cell):
    for test in (test_gpu.test_the_headline, test_gpu.test_every_family, test_gpu.test_a_captured_graph_replays):
        assert test_gpu.every_cell.mark in test.pytestmark
    ragged = Problem(20, 9, 1, torch.float16, cell=cell, reverse=True, lengths=torch.int64, resets=True)
    forced = [(name, ragged._replace(hidden=hidden)) for name, hidden in test_gpu.FORCED]
    plans = [plan_of(name, problem, backward) for name, problem in forced for backward in (False, True)]
    assert {type(plan.family) for plan in plans} == choose.FAMILIES.keys()
    for name, (batch, hidden) in test_gpu.CHOSEN.items():
        plan, *_ = choose.plans(Problem(30, batch, hidden, torch.float16, cell=cell), H100, False)
        assert plan.family.name == name


def of_ours(words, units, dtype, batch=test_gpu.SIZE[1]):
    precision, heads = "tf32" if dtype is torch.float32 else "ieee", 4 if "four" in words else 1 + ("heads" in words)
    cell = next((cell for cell in ("gru", "slstm") if cell in words.split()), "lstm")
    ragged = dict(lengths=torch.int64, resets=True)
    return Problem(2, batch, heads * units, dtype, precision=precision, cell=cell, heads=heads, **ragged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["tf32", "bf16"])
def test_heads_and_the_slstm_run_by_every_family_of_an_h100_in_tf32_and_half_precision(dtype):
    """As they are forced; and as they are chosen."""
    for words in test_gpu.OF_OURS:
        problems = {family: of_ours(words, units, dtype) for family, units in test_gpu.UNITS.items()}
        plans = [plan_of(family, p, backward) for family, p in problems.items() for backward in (False, True)]
        assert {type(plan.family) for plan in plans} == choose.FAMILIES.keys()
    sizes = ((batch, H // 4 if heads else H, heads) for batch, H, heads in test_gpu.SIZES)
    problems = [of_ours(f"slstm {heads}", units, dtype, batch) for batch, units, heads in sizes]
    chosen = {choose.plans(p, H100, backward)[0].family.name for p in problems for backward in (False, True)}
    assert chosen == {"resident", "cooperative", "held"}


@pytest.fixture
def rehearsed(monkeypatch):
    """Tests of test_gpu.py run on the CPU, by plans that it can run: where there are no streams and no graphs."""

    def captured(run):
        found = run()
        return found, lambda: [t.data.copy_(again) for t, again in zip(found, run())]

    changes = dict(CARD="cpu", SIZE=(3, 9, 3), UNITS=dict.fromkeys(KERNELS, 9), card_of=lambda _: H100,
                   force=lambda patch, place: KERNELS[place].force(patch), captured=captured,
                   on_a_stream=lambda run: run())  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(test_gpu, name, value)


@pytest.mark.parametrize("fault", [False, True])
def test_a_test_of_heads_rehearsed(rehearsed, monkeypatch, fault):
    """That of a family which is right passes, and that of one with a fault fails."""
    forward = Layer.forward

    def of_the_unit_before(layer, gates, r, save):
        inputs = r.inputs._replace(weight_hh=r.inputs.weight_hh.roll(1, 0))
        return forward(layer, gates, r._replace(inputs=inputs), save)

    if fault:
        monkeypatch.setattr(Layer, "forward", of_the_unit_before)
    with pytest.raises(AssertionError, match=r"RMS error|away from zero") if fault else contextlib.nullcontext():
        test_gpu.test_every_family_of_heads_and_of_the_slstm(
            monkeypatch, "cooperative/16/1/1", "slstm heads", torch.float32
        )
