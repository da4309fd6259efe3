"""Plans for cards that are not here: the proposals fit the card, and their order is right."""

import dataclasses
import itertools
from math import prod
from types import SimpleNamespace

import pytest
import torch
from comparing import both_ways
from standing_in import H100

from gpu_lstm.kernels.cards import KB
from gpu_lstm.kernels.cells import CELLS
from gpu_lstm.kernels.problem import Problem
from gpu_lstm.kernels.triton_rnn.plans import planning
from gpu_lstm.kernels.triton_rnn.plans.choose import FAMILIES, MOST, always, plans
from gpu_lstm.kernels.triton_rnn.plans.planning import DEVICES, Cooperative, Held, Step, rank
from gpu_lstm.kernels.triton_rnn.plans.tiles import held_plans, split_plans, step_plan

BF16 = torch.bfloat16
RESIDENT, COOPERATIVE, STEP, POINTWISE = "resident", "cooperative", "step", "pointwise"
PROBLEMS = [
    Problem(steps, batch, hidden, dtype, precision="tf32", side_by_side=directions, cell=cell)
    for (steps, batch), hidden, dtype, directions, cell in itertools.product(
        ((128, 1), (128, 100), (128, 256), (1, 7)), (1, 33, 200, 768, 4096), (BF16, torch.float32), (1, 2), CELLS
    )
]
PROBLEMS += [  # heads of these units; there are more heads than any card has multiprocessors
    Problem(steps, batch, heads * units, dtype, side_by_side=directions, heads=heads)
    for heads, units, dtype, (steps, batch), directions in itertools.product(
        (2, 67, 300), (1, 128, 768), (BF16, torch.float32), ((128, 256), (1, 1)), (1, 2)
    )
]


@both_ways
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_plan_covers_the_problem_and_fits_the_card_and_they_come_by_rank(device, backward):
    for problem in PROBLEMS:
        proposed = plans(problem, device, backward)
        if problem.steps == 1:
            assert {plan.family.name for plan in proposed} <= {STEP, POINTWISE}, "nothing holds W_hh"
        elif problem.batch == 1:
            assert proposed == plans(problem._replace(steps=2), device, backward), "another length compiles nothing"
        order = [rank(problem, device, plan, backward) for plan in proposed]
        if problem.batch in (1, 256):  # other batches have the order of the next power of two, see test_first_call.py
            assert order == sorted(order)
        of_step = [plan for plan in proposed if isinstance(plan.family, Step) and plan.family.parts == 1]
        assert of_step == [step_plan(problem, device, backward)], "what always works is always there"
        for plan in proposed:
            assert plan.shared <= device.shared
            at_a_time = plan.programs * plan.groups * plan.rows * plan.units
            assert at_a_time * plan.tiles_per_program >= problem.batch * problem.columns, (
                "every unit of every sequence has a tile"
            )
            assert plan.grid[2] == problem.heads
            if FAMILIES[type(plan.family)].waits(problem, plan):
                assert problem.heads < 300, "of more heads than multiprocessors none waits for another"
                at_once = prod(plan.grid) * (plan.side_by_side // plan.heads)
                assert 0 < at_once <= plan.blocks * device.multiprocessors, "who waits is resident at once"
            if isinstance(plan.family, Step):
                continue
            assert plan.programs * plan.units >= problem.columns, "every unit has a program"
            assert plan.rows * plan.groups * plan.tiles_per_program >= problem.batch, "every sequence has a tile"
            if isinstance(plan.family, Held):
                assert plan.blocks * (plan.shared + KB) <= device.shared + KB, "they have the shared memory"
                assert 65536 // (32 * plan.num_warps * plan.blocks) >= 128, "registers"
            if isinstance(plan.family, Cooperative):
                assert plan.programs % plan.family.partners == 0, "programs that share gates are all there"
                assert CELLS[problem.cell].rows % plan.family.partners == 0, "and each has as many gates"
                assert plan.side_by_side in (problem.heads, problem.of_head.side_by_side)
                assert plan.family.partners == 1 or backward


@both_ways
def test_heads_have_the_plans_of_layers_side_by_side(backward):
    """Each head has a share of the card, and all have one launch. Four heads of 128 units rank before one of 512."""
    for batch, cell in itertools.product((1, 16, 64), CELLS):
        problem = Problem(128, batch, 512, BF16, cell=cell, heads=4)
        side_by_side = plans(Problem(128, batch, 128, BF16, cell=cell, side_by_side=4), H100, backward)
        proposed = plans(problem, H100, backward)
        assert [dataclasses.replace(plan, heads=1) for plan in proposed] == side_by_side
        assert RESIDENT in [plan.family.name for plan in proposed]
        both = problem, problem._replace(heads=1)
        in_heads, dense = (rank(p, H100, plans(p, H100, backward)[0], backward) for p in both)
        assert in_heads < dense
    # Where W_hh does not fit a share for each head of each layer, layers run one after another, and their heads at
    # once.
    for units, found in ((512, {4}), (1024, {2}), (1280, set())):
        large = plans(Problem(128, 1, 2 * units, BF16, side_by_side=2, heads=2), H100, backward)
        assert {plan.side_by_side for plan in large if plan.family.name == COOPERATIVE} == found
    for units, at_once in ((768, 2), (1536, 1)):  # two directions share the card, or go one after another
        assert plans(Problem(128, 16, units, BF16, side_by_side=2), H100, backward)[0].side_by_side == at_once


@both_ways
@pytest.mark.parametrize(("dtype", "precision"), [(BF16, "ieee"), (torch.float32, "tf32")])
def test_large_steps_are_products_by_cublas(dtype, precision, backward):
    """This holds for many sequences and units, also for a single step, and wherever torch computes in the middle of a
    step."""
    for (batch, hidden), steps in itertools.product(((4096, 1024), (1024, 1024), (1024, 2048)), (1, 4)):
        problem = Problem(steps, batch, hidden, dtype, precision=precision)
        assert plans(problem, H100, backward)[0].family.name == POINTWISE
        for change in (dict(gain_hh=True), dict(gain_c=True), dict(projected=hidden // 2, dropout_h=True)):
            small = problem._replace(batch=3, hidden=64, **change)
            for only in (problem._replace(**change), small, small._replace(batch=0)):
                assert plans(only, H100, backward) == [always(only, H100, backward)]
                assert always(only, H100, backward).family.name == POINTWISE


@both_ways
@pytest.mark.parametrize("change", [dict(projected=48), dict(dropout_h=True), dict(projected=48, zoneout_c=3)], ids=str)
def test_a_projection_or_noise_has_the_plans_of_the_plain_cell(backward, change):
    """The step family is different: it has smaller tiles with noise."""
    for hidden in (64, 768):
        plain = Problem(128, 16, hidden, BF16)
        both = (plans(problem, H100, backward) for problem in (plain, plain._replace(**change)))
        of_plain, others = (
            [plan for plan in proposed if not isinstance(plan.family, Step | Held)] for proposed in both
        )
        assert of_plain == others != []


@pytest.mark.parametrize(("hidden", "batch", "tiles"), [
    (384, 512, (64, 32, 4)), (1024, 128, (64, 16, 8)), (640, 256, (128, 16, 8)),
])  # fmt: skip
def test_where_backward_splits_products_into_parts_of_k(hidden, batch, tiles):
    """These plans were timed on an H100. They are not proposed forward, without tensor cores, or where a part is not
    read in words."""
    problem = Problem(128, batch, hidden, BF16)
    first, second = split_plans(problem, H100, True)
    assert tiles in [(plan.rows, plan.units, plan.family.parts) for plan in (first, second)]
    assert {first, second} < {*plans(problem, H100, True)[:MOST]}
    assert split_plans(problem, H100, False) == []
    for change in (dict(dtype=torch.float32), dict(hidden=66)):
        assert split_plans(problem._replace(**change), H100, True) == []
    assert {plan.family.parts for plan in split_plans(problem._replace(hidden=hidden - 8), H100, True)} == {4}


@pytest.mark.parametrize(("hidden", "batch", "dtype", "backward", "tile"), [
    (256, 256, BF16, False, (16, 16, 4, 2)), (256, 4096, BF16, False, (64, 32, 8, 2)),
    (512, 256, BF16, False, (32, 16, 8, 2)), (512, 1024, BF16, False, (64, 32, 16, 1)),
    (256, 4096, torch.float32, False, (64, 32, 16, 1)), (256, 1024, BF16, True, (32, 64, 8, 1)),
    (256, 512, BF16, True, (16, 64, 8, 1)),
])  # fmt: skip
def test_where_programs_hold_w_hh_in_shared_memory(hidden, batch, dtype, backward, tile):
    """These plans were timed on an H100: rows, columns, warps, and programs of a multiprocessor. They are not proposed
    without wgmma, or where they do not fit."""
    problem = Problem(128, batch, hidden, dtype, precision="tf32")
    found = {(plan.rows, plan.units, plan.num_warps, plan.blocks): plan for plan in held_plans(problem, H100, backward)}
    assert found[tile] in plans(problem, H100, backward)[:MOST]
    assert len(found) <= 3
    assert held_plans(problem, DEVICES["b200"], backward) == []
    for change in (dict(dtype=torch.float32, precision="ieee"), dict(hidden=128), dict(hidden=520)):
        assert held_plans(problem._replace(**change), H100, backward) == []


def test_a_real_card_with_and_without_its_rates():
    """Some cards report rates of 0. They, and unknown rates, are replaced by the rates of the most similar card."""

    def device(**facts):
        named = dict(name=H100.name, major=9, minor=0, multi_processor_count=132) | facts
        return planning.card_with(SimpleNamespace(**named))

    rates = dict(clock_rate=1_755_000, memory_clock_rate=2_619_000, memory_bus_width=5120)
    unknown = dict.fromkeys(rates, 0), rates | dict(memory_bus_width=0, clock_rate=0)
    assert [device(), *(device(**facts) for facts in unknown)] == [H100] * 3
    full = device(**rates)
    assert (full.clock, full.memory) == (H100.clock, pytest.approx(H100.memory, rel=0.01))
    few = device(name="another", major=8, minor=9, multi_processor_count=46)
    assert few == dataclasses.replace(DEVICES["l4"], name="another", multiprocessors=46)
