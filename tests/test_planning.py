"""Plans for cards that are not here: what is chosen, that it fits, and what bounds a step."""

import json

import pytest
import torch

from gpu_lstm.__main__ import main
from gpu_lstm.kernels.triton_lstm.families import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, INTERPRETER, Family, Problem, expected_bound
from gpu_lstm.kernels.triton_lstm.step import step_plan

PROBLEMS = [
    Problem(steps, batch, hidden, dtype, precision="tf32", side_by_side=directions)
    for steps in (1, 128)
    for batch in (1, 7, 16, 100, 256)
    for hidden in (1, 33, 64, 128, 200, 768, 1024, 1800, 4096)
    for dtype in (torch.bfloat16, torch.float32)
    for directions in (1, 2)
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_plan_covers_the_problem_and_fits_the_card(device, backward):
    for problem in PROBLEMS:
        candidates = plans(problem, device, backward)
        assert candidates[-1] == step_plan(problem, backward), "the step family is the last resort"
        for plan in candidates:
            assert plan.shared <= device.shared
            assert plan.programs * plan.columns >= problem.hidden, "every unit has a program"
            assert plan.rows * plan.groups * plan.launches(problem.batch) >= problem.batch, "every sequence has a tile"
            if plan.family is Family.COOPERATIVE:
                assert plan.side_by_side in (1, problem.side_by_side)
                at_once = plan.programs * plan.groups * plan.side_by_side
                assert at_once <= device.multiprocessors, "programs that wait for each other are resident at once"
                assert plan.programs % 4 == 0 or not backward, "backward, programs come in quartets"


@pytest.mark.parametrize(
    ("device", "hidden", "family"),
    [
        ("h100", 64, Family.RESIDENT),
        ("h100", 128, Family.RESIDENT),
        ("h100", 129, Family.COOPERATIVE),
        ("h100", 768, Family.COOPERATIVE),
        ("h100", 1024, Family.COOPERATIVE),
        ("h100", 1536, Family.COOPERATIVE),
        ("h100", 2048, Family.STEP),
        ("b200", 1024, Family.COOPERATIVE),
        ("a100", 1024, Family.COOPERATIVE),
        ("a100", 1536, Family.STEP),
        ("rtx4090", 64, Family.RESIDENT),
        ("rtx4090", 128, Family.COOPERATIVE),
        ("l4", 512, Family.COOPERATIVE),
        ("l4", 1024, Family.STEP),
    ],
)
def test_the_family_by_hidden_size(device, hidden, family):
    problem = Problem(1024, 16, hidden, torch.bfloat16)
    assert [plans(problem, DEVICES[device], backward)[0].family for backward in (False, True)] == [family] * 2


def test_a_projection_and_a_single_step_take_the_step_family():
    for problem in (Problem(128, 16, 128, torch.bfloat16, projected=64), Problem(1, 16, 128, torch.bfloat16)):
        assert [plan.family for plan in plans(problem, DEVICES["h100"], False)] == [Family.STEP]


def test_no_program_waits_for_another_in_the_interpreter():
    families = {plan.family for problem in PROBLEMS for plan in plans(problem, INTERPRETER, False)}
    assert families == {Family.RESIDENT, Family.STEP}


def test_a_plan_does_not_depend_on_the_number_of_steps():
    """So that another sequence length compiles nothing."""
    by_steps = [plans(Problem(steps, 16, 768, torch.bfloat16), DEVICES["h100"], True) for steps in (2, 3, 100_000)]
    assert by_steps[0] == by_steps[1] == by_steps[2]


def test_the_bound_of_a_step():
    """Counted by hand: H=768, B=16, bf16 on an H100, by the best plan of the step family and of the cooperative."""
    problem, h100 = Problem(1024, 16, 768, torch.bfloat16), DEVICES["h100"]
    best, *_, step = plans(problem, h100, False)
    bound = expected_bound(problem, h100, best, False)
    assert bound.terms["memory: gates, states"] == pytest.approx(16 * 768 * (9 * 2 + 4) / 3.35e12)
    weights = 4 * 768 * 768 * 2 / best.programs  # bytes that a program holds
    assert bound.terms["shared memory: weights"] == pytest.approx(weights / (128 * 1.755e9))
    assert bound.seconds == max(bound.terms.values()) == bound.terms[bound.by]
    assert expected_bound(problem, h100, step, False).seconds > bound.seconds


def test_the_plan_command(capsys):
    arguments = ["plan", "--hidden", "768", "--batch", "16", "--dtype", "bf16", "--device", "h100"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cooperative" in printed
    assert "expected, not measured" in printed
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["forward"]
    assert plan["plan"]["family"] == "cooperative"
    assert plan["bounded_by"] in plan["expected_bound_seconds"]


def test_an_unknown_device_is_refused_with_those_known(capsys):
    assert main(["plan", "--hidden", "8", "--batch", "1", "--device", "tpu"]) == 2
    assert "known: h100, a100, l4, rtx4090, b200" in capsys.readouterr().err
