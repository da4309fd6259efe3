"""What the tests do on a card, without one: their tables, and one of them on the CPU."""

import pytest
import test_gpu
import torch
from places import INTERPRETED, KERNELS
from standing_in import H100, plan_of
from torch.utils._pytree import tree_leaves

from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_rnn.plans import choose

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here")


def of_ours(words, units, dtype, batch=test_gpu.SIZE[1]):
    precision, heads = "tf32" if dtype is torch.float32 else "ieee", 4 if "four" in words else 1 + ("heads" in words)
    cell = next((cell for cell in ("gru", "slstm") if cell in words.split()), "lstm")
    ragged = dict(lengths=torch.int64, resets=True)
    return Problem(2, batch, heads * units, dtype, precision=precision, cell=cell, heads=heads, **ragged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["tf32", "bf16"])
def test_every_family_of_an_h100_is_forced_and_some_are_chosen(dtype):
    """In TF32 and in half precision, for every cell, with and without heads."""
    for words in ("", "gru", *test_gpu.OF_OURS):
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
        return found, lambda: [t.data.copy_(again) for t, again in zip(tree_leaves(found), tree_leaves(run()))]

    changes = dict(CARD="cpu", SIZE=(3, 9, 3), UNITS=dict.fromkeys(KERNELS, 9), card_of=lambda _: H100,
                   force=lambda patch, place: KERNELS[place].force(patch), captured=captured,
                   on_a_stream=lambda run: run())  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(test_gpu, name, value)


@pytest.mark.parametrize("words", ["slstm heads", "gru"])
def test_a_test_of_a_family_rehearsed(rehearsed, monkeypatch, words):
    test_gpu.test_every_family(monkeypatch, "cooperative/16/1/1", words, torch.float32)
