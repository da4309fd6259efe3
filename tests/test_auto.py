"""`auto` as on a card, through the modules: kernels are verified, raced and used, and the numbers are the oracle's.

The CPU counts as a card on which one plan is proposed; the interpreter runs its kernels, and of the race only the clock
is a stub.
"""

from unittest.mock import Mock

import pytest
import torch
from cases import check
from places import INTERPRETED, KERNELS
from standing_in import plans_are_verified_on_the_cpu

import gpu_lstm
from gpu_lstm.backends import verify
from gpu_lstm.dispatch import race
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans import choose

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="the CPU stands for a card, by the interpreter"),
    pytest.mark.usefixtures("nothing_cached", "exact_float32_products", "nan_in_fresh_memory"),
]


def raced(rivals, now):
    for call in rivals.values():
        call()
    return {name: [1e-3 if name == "triton" else 2e-3] * 9 for name in rivals}


@pytest.mark.filterwarnings("error:gpu_lstm", "error:a kernel failed")
@pytest.mark.parametrize(("place", "dtype", "size", "words"), [
    ("resident", torch.float16, (3, 9, 3, 8), "gru no-hx"), ("cooperative/4/1/4", torch.float32, (3, 3, 3, 8), "no-hx"),
    ("pointwise", torch.float32, (3, 3, 3, 8), "ragged states norms expected"),
    *(pytest.param(*case, marks=pytest.mark.deep) for case in (
        ("pointwise", torch.float16, (3, 3, 3, 8, 5), "ragged states masks peepholes"),
        ("pointwise", torch.float16, (3, 3, 3, 11), "ragged states norms expected both"),
        ("step", torch.float16, (3, 9, 3, 8), "gru states masks"),
        ("cooperative/4/1/4", torch.float16, (3, 9, 3, 8), "ragged states peepholes deep"))),
], ids=str)  # fmt: skip
def test_kernels_that_are_verified_and_win_the_race_give_right_numbers(monkeypatch, place, dtype, size, words):
    """Those of the plans of a place, which are all that is proposed."""
    KERNELS[place].force(monkeypatch)
    forced, verified = launch.choose_plan, Mock(side_effect=verify.verify)
    plans_are_verified_on_the_cpu(monkeypatch)
    monkeypatch.setattr(choose, "candidates", lambda problem, card, pass_: [forced(problem, None, pass_)])
    monkeypatch.setattr(verify, "verify", verified)
    monkeypatch.setattr(race, "race", raced)
    check(size, words, None, dtype, seeds=1)
    kernels = {(plan.family.name, layer.problem.batch, layer.problem.hidden, pass_.backward)
               for layer, pass_, _, plan in (each.args for each in verified.call_args_list)}  # fmt: skip
    family, (_, batch, _, hidden, *_) = place.partition("/")[0], size
    assert kernels == {(family, batch, hidden, False), (family, batch, hidden, True)}
    assert "triton" in [decision.backend.value for decision in race.decided.values()]
    gpu_lstm.check()
