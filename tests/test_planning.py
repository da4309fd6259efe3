"""Plans for cards that are not here: what is chosen, that it fits, and the estimated time of a step."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpu_lstm.__main__ import main
from gpu_lstm.kernels.cards import KB, Card
from gpu_lstm.kernels.cupy_lstm import planning as cupy
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_lstm import planning
from gpu_lstm.kernels.triton_lstm.choose import candidates, plans
from gpu_lstm.kernels.triton_lstm.features import MOST_ROWS
from gpu_lstm.kernels.triton_lstm.planning import (
    DEVICES,
    INTERPRETER,
    Cooperative,
    Held,
    Plan,
    Pointwise,
    Resident,
    Step,
    expected,
)
from gpu_lstm.kernels.triton_lstm.pointwise import pointwise_plan
from gpu_lstm.kernels.triton_lstm.step import held_plans, split_plans, step_plan

H100, BF16 = DEVICES["h100"], torch.bfloat16
RESIDENT, COOPERATIVE, STEP, POINTWISE = "resident", "cooperative", "step", "pointwise"
PROBLEMS = [
    Problem(steps, batch, hidden, dtype, precision="tf32", side_by_side=directions)
    for steps, batch, hidden, dtype, directions in itertools.product(
        (1, 128), (1, 7, 16, 100, 256), (1, 33, 64, 128, 200, 768, 1024, 1800, 4096), (BF16, torch.float32), (1, 2)
    )
]
both_ways = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@both_ways
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_plan_covers_the_problem_and_fits_the_card_and_the_fastest_comes_first(device, backward):
    for problem in PROBLEMS:
        proposed = plans(problem, device, backward)
        seconds = []
        for plan in proposed:
            times = problem.side_by_side // plan.side_by_side if plan.family.name == COOPERATIVE else 1
            seconds.append(times * expected(problem, device, plan, backward).seconds)
        assert seconds == sorted(seconds)
        of_step = [plan for plan in proposed if isinstance(plan.family, Step) and plan.family.parts == 1]
        assert of_step == [step_plan(problem, device, backward)], "what always works is always there"
        for plan in proposed:
            assert plan.shared <= device.shared
            at_a_time = plan.programs * plan.groups * plan.rows * plan.units
            assert at_a_time * plan.tiles_per_program >= problem.batch * problem.hidden, (
                "every unit of every sequence has a tile"
            )
            if isinstance(plan.family, Step):
                assert plan.programs * plan.side_by_side <= max(device.multiprocessors, problem.side_by_side)
                continue
            assert plan.programs * plan.units >= problem.hidden, "every unit has a program"
            assert plan.rows * plan.groups * plan.tiles_per_program >= problem.batch, "every sequence has a tile"
            if isinstance(plan.family, Held):
                at_once = plan.programs * plan.groups * plan.side_by_side
                assert at_once <= plan.blocks * device.multiprocessors, "and so are these"
                assert plan.blocks * (plan.shared + KB) <= device.shared + KB, "and have the shared memory"
                assert 65536 // (32 * plan.num_warps * plan.blocks) >= 128, "registers"
            if isinstance(plan.family, Cooperative):
                at_once = plan.programs * plan.groups * plan.side_by_side
                assert at_once <= device.multiprocessors, "programs that wait for each other are resident at once"
                assert plan.programs % plan.family.partners == 0, "programs that share gates are all there"
                assert plan.side_by_side in (1, problem.side_by_side)
                assert plan.family.partners == 1 or backward


FAMILIES = {  # by hidden size
    "h100": {64: RESIDENT, 128: COOPERATIVE, 768: COOPERATIVE, 1024: COOPERATIVE, 1536: COOPERATIVE,
             2048: STEP},
    "b200": {1024: COOPERATIVE}, "a100": {1024: COOPERATIVE, 1536: STEP},
    "rtx4090": {64: RESIDENT, 128: COOPERATIVE}, "l4": {512: COOPERATIVE, 1024: STEP},
}  # fmt: skip


@pytest.mark.parametrize("device", FAMILIES)
@both_ways
def test_the_family_by_hidden_size(device, backward):
    for hidden, family in FAMILIES[device].items():
        first = plans(Problem(1024, 16, hidden, BF16), DEVICES[device], backward)[0]
        assert first.family.name == family, hidden


@both_ways
@pytest.mark.parametrize(("dtype", "precision"), [(BF16, "ieee"), (torch.float32, "tf32")])
def test_large_steps_are_products_by_cublas(dtype, precision, backward):
    """Of many sequences and units, also a single one; not where something is between products and cells."""
    for (batch, hidden), steps in itertools.product(((4096, 1024), (1024, 1024), (1024, 2048)), (1, 4)):
        problem = Problem(steps, batch, hidden, dtype, precision=precision)
        assert plans(problem, H100, backward)[0].family.name == POINTWISE
        for change in (dict(norms=(True, False, False)), dict(projected=hidden // 2, dropout_h=True)):
            assert POINTWISE not in [plan.family.name for plan in plans(problem._replace(**change), H100, backward)]


@pytest.mark.parametrize(("batch", "dtype", "options", "rows", "warps"), [
    (7, BF16, {}, 16, 4), (17, BF16, {}, 32, 4), (100, BF16, {}, MOST_ROWS, 4),
    (100, torch.float32, dict(precision="tf32"), MOST_ROWS, 4), (100, torch.float32, {}, MOST_ROWS // 2, 8),
    (100, BF16, dict(dropout_h=True), 32, 4), (100, torch.float32, dict(dropout_h=True), 16, 8),
])  # fmt: skip
def test_tiles_of_the_step_family(batch, dtype, options, rows, warps):
    """Fewer rows where a product has no tensor cores, or masks take registers; backward has one column, not four."""
    problem = Problem(9, batch, 64, dtype, **options)
    plan, back = (step_plan(problem, H100, backward) for backward in (False, True))
    # Of two stages 128 bytes for each row, and each column of each of four gates
    assert (plan.rows, plan.shared) == (rows, 2 * 128 * (rows + 64))
    assert back.shared == plan.shared - 2 * 128 * 3 * plan.units
    assert plan.num_warps == back.num_warps == warps
    tiles = -(-problem.batch // plan.rows) * (64 // plan.units)
    assert (plan.programs, plan.tiles_per_program) == (min(tiles, 132), -(-tiles // 132))


@both_ways
@pytest.mark.parametrize("change", [dict(projected=48), dict(dropout_h=True)], ids=str)
def test_a_projection_or_noise_has_the_plans_of_the_plain_cell(backward, change):
    """But for the step family, which has a projection in the time loop, and smaller tiles with noise."""
    for hidden in (64, 768):
        plain = Problem(128, 16, hidden, BF16)
        changed = plain._replace(**change)
        one, other = (
            [plan for plan in plans(problem, H100, backward) if not isinstance(plan.family, Step | Held)]
            for problem in (changed, plain)
        )
        assert one == other != []


@both_ways
def test_layer_norms_use_the_plans_of_the_plain_cell_unless_their_exchanges_are_too_dear(backward):
    def found(hidden, batch, norms):
        return plans(Problem(128, batch, hidden, BF16, norms=(norms,) * 3), H100, backward)

    def first(hidden, batch, norms):
        return found(hidden, batch, norms)[0]

    for hidden in (64, 768):  # perhaps not the first: with norms sums have no bank conflicts
        best, of_plain = first(hidden, 16, True), found(hidden, 16, False)
        alike = [plan for plan in of_plain if plan.family.name == best.family.name]
        assert (best.units, best.programs) in {(plan.units, plan.programs) for plan in alike}
        assert best.family.name == of_plain[0].family.name != STEP
    if not backward:
        assert (first(640, 288, False).family.name, first(640, 288, True).family.name) == (COOPERATIVE, STEP)


@pytest.mark.parametrize(("hidden", "batch", "tiles"), [
    (2048, 16, (16, 16, 8)), (1536, 64, (64, 16, 8)), (1024, 128, (64, 16, 8)), (768, 192, (64, 32, 4)),
    (768, 256, (64, 32, 4)),
])  # fmt: skip
def test_where_backward_splits_products_into_parts_of_k(hidden, batch, tiles):
    """First on an H100. Never forward, with more rounds, without tensor cores, or where a part is not read in words."""
    problem = Problem(128, batch, hidden, BF16)
    first, second = split_plans(problem, H100, True)
    assert ((first.rows, first.units, first.family.parts), plans(problem, H100, True)[0]) == (tiles, first)
    assert second in plans(problem, H100, True)
    assert split_plans(problem, H100, False) == []
    for change in (dict(projected=64), dict(norms=(False, True, False)), dict(dtype=torch.float32), dict(hidden=66)):
        assert split_plans(problem._replace(**change), H100, True) == []
    assert {plan.family.parts for plan in split_plans(problem._replace(hidden=hidden - 8), H100, True)} == {4}


@pytest.mark.parametrize(("hidden", "batch", "dtype", "backward", "tile"), [
    (256, 256, BF16, False, (16, 16, 4, 2)), (256, 512, BF16, False, (16, 32, 8, 2)),
    (256, 1024, BF16, False, (32, 32, 8, 2)), (256, 4096, BF16, False, (64, 32, 8, 2)),
    (512, 256, BF16, False, (32, 16, 8, 2)), (512, 1024, BF16, False, (64, 32, 16, 1)),
    (256, 4096, torch.float32, False, (64, 32, 16, 1)), (256, 512, BF16, True, (32, 16, 8, 2, 4)),
    (256, 1024, BF16, True, (32, 32, 8, 2, 2)), (512, 256, BF16, True, (32, 16, 8, 2, 4)),
    (512, 512, BF16, True, (32, 16, 8, 2, 4)), (256, 512, torch.float32, True, (32, 16, 8, 2, 4)),
])  # fmt: skip
def test_where_programs_hold_w_hh_in_shared_memory(hidden, batch, dtype, backward, tile):
    """First on an H100: rows, columns, warps, programs of a multiprocessor, parts. Never without wgmma, or room."""
    problem = Problem(128, batch, hidden, dtype, precision="tf32")
    first, *others = held_plans(problem, H100, backward)
    found = (first.rows, first.units, first.num_warps, first.blocks, first.family.parts)
    assert found == (*tile, 1)[:5]
    assert plans(problem, H100, backward)[0] == first
    assert len(others) <= 2
    assert held_plans(problem, DEVICES["b200"], backward) == []
    norms, noise = (False, True, False), dict(projected=64, dropout_h=True)
    exact = dict(dtype=torch.float32, precision="ieee")
    for change in (dict(norms=norms), noise, exact, dict(hidden=128), dict(hidden=520)):
        assert held_plans(problem._replace(**change), H100, backward) == []


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_no_plan_holds_two_blocks_of_64_units_with_more_than_256_rows_of_k(dtype):
    """Backward, where Triton's products read such an operand wrongly, see test_compile.py."""
    found, card = set(), dataclasses.replace(H100, multiprocessors=2 * H100.multiprocessors)
    for hidden, batch in itertools.product(range(132, 513, 4), (64, 256, 320, 384, 448, 512, 768, 4096)):
        problem = Problem(2, batch, hidden, dtype, precision="tf32")
        for device in (H100, card):
            proposed = plans(problem, device, True)
            held = [plan for plan in proposed if isinstance(plan.family, Held)]
            found |= {(plan.units * plan.family.parts, plan.family.k) for plan in held}
    assert (128, 256) in found
    assert [(units, k) for units, k in found if units > 64 and k > 256] == []


@pytest.mark.parametrize(("hidden", "backward", "tile", "clocks"), [
    (256, True, (16, 64, 8, 1), 64 * 2 * 18),  # of K, instructions side by side, clocks of each
    (256, False, (16, 16, 4, 1), 16 * 20), (512, False, (64, 32, 16, 1), 32 * 4 * 24),
    (256, False, (64, 32, 8, 1), 16 * 2 * 32), (512, True, (32, 32, 8, 2), 64 * 2 * 20),
])  # fmt: skip
def test_the_products_of_a_tile_that_holds_w_hh(hidden, backward, tile, clocks):
    """wgmma reads 64 rows of W_hh and 8 to 64 sequences from shared memory: 18 to 32 clocks for 32 bytes of K."""
    rows, units, warps, parts = tile
    k = hidden * (4 if backward else 1) // parts
    for dtype, size in ((BF16, 2), (torch.float32, 4)):
        problem = Problem(2, rows, hidden, dtype, precision="tf32")
        plan = Plan(Held(k, parts), rows, units, 4, 1, warps, shared=0, why="")
        products = expected(problem, H100, plan, backward).terms["products"] * H100.clock
        assert products == pytest.approx(clocks * size / 2)


def test_a_projection_with_noise_and_a_single_step_use_the_step_family():
    noisy = Problem(128, 16, 128, BF16, projected=64, dropout_h=True)
    for problem in (noisy, Problem(1, 16, 128, BF16)):
        assert [plan.family.name for plan in plans(problem, H100, False)] == [STEP]


def test_one_program_in_the_interpreter():
    """It runs programs one after another, so that none may wait for another."""
    for problem in PROBLEMS:
        (plan,) = candidates(problem, INTERPRETER, Pass())
        assert (plan.family.name, plan.programs * plan.groups) == (STEP, 1)


def test_a_plan_does_not_depend_on_the_number_of_steps():
    """So that another sequence length compiles nothing."""
    by_steps = [plans(Problem(steps, 16, 768, BF16), H100, True) for steps in (2, 3, 100_000)]
    assert by_steps[0] == by_steps[1] == by_steps[2]


LINES = Path(__file__).with_name("cycles.csv").read_text().splitlines()
CYCLES = list(csv.DictReader((line for line in LINES if not line.startswith("#")), restval="0"))


@pytest.mark.parametrize("row", CYCLES, ids=["-".join(list(row.values())[:6]) for row in CYCLES])
def test_the_models_agree_with_cycles_estimated_from_sass(row):
    """To 25 %, of whatever plan the simulation was of: cycles.csv says how it was made."""
    family, row = row["family"], {name: int(number) for name, number in row.items() if name != "family"}
    backward = bool(row["backward"])
    problem = Problem(1024, row["batch"], row["hidden"], BF16)
    if family == "cuda":
        found = cupy.plans(problem, Card(90, 132), backward)
        sizes = [row[name] for name in ("columns", "warps", "k", "parts")]
        (cycles,) = (plan.clocks for plan in found if [plan.units, plan.warps, plan.chunks, plan.partners] == sizes)
    else:
        family = {
            "resident": Resident(row["k"]), "cooperative": Cooperative(row["k"], row["parts"], row["ahead"] > 0),
            "pointwise": Pointwise(), "step": Step(row["k"], row["parts"]),
        }[family]  # fmt: skip
        if row["held"]:
            family = Held(row["k"], row["parts"], row["ahead"] > 0)
        sizes = (row[name] for name in ("rows", "columns", "programs", "groups", "warps"))
        plan = Plan(
            family, *sizes, shared=0, why="", num_stages=row["stages"], blocks=max(1, row["held"]),
            tiles_per_program=row["tiles_per_program"],
        )  # fmt: skip
        cycles = expected(problem, H100, plan, backward).seconds * H100.clock
    assert cycles == pytest.approx(row["cycles"], rel=0.25)


def test_the_terms_of_a_step():
    """Counted by hand: H=768, B=16, bf16 on an H100."""
    problem = Problem(1024, 16, 768, BF16)
    best, step = plans(problem, H100, False)[0], step_plan(problem, H100, False)
    assert (best.units, best.programs * best.groups) == (16, 96)
    found = expected(problem, H100, best, False)
    assert found.seconds == pytest.approx(sum(found.terms.values()))
    clocks = {term: seconds * H100.clock for term, seconds in found.terms.items()}
    assert clocks["products"] == pytest.approx(24 * 8 * 2)  # of a warp, their clocks, warps a scheduler
    in_shared = 8 * 32 * (64 + 4 * 4 * 8)  # bytes: products of 64 rows, and of four sums those of 8 warps
    assert clocks["instructions, shared memory, or words from L2"] == pytest.approx(in_shared / 128)
    narrow = expected(problem, H100, dataclasses.replace(best, units=12, programs=64), False).terms
    assert narrow["bank conflicts"] * H100.clock == pytest.approx(3 * 4 * 8)  # of three warps with cells
    assert clocks["exchange"] == pytest.approx(planning.EXCHANGE)
    alone = dataclasses.replace(best, family=dataclasses.replace(best.family, ahead=True))  # a plan for more sequences
    twice = expected(problem, H100, dataclasses.replace(alone, tiles_per_program=2), False)
    assert expected(problem, H100, alone, False).seconds == found.seconds
    turn = sum(clocks.values()) - planning.EXCHANGE
    assert twice.seconds * H100.clock == pytest.approx(2 * max(planning.TURN_AHEAD, turn))
    of_step = expected(problem, H100, step, False)
    assert of_step.terms["L2: weights, states"] * H100.clock == pytest.approx((16 + 64) * 768 * 2 / 64)  # 48 programs
    assert of_step.terms["grid-wide barriers"] * H100.clock == pytest.approx(planning.GRID_BARRIER)
    split = dataclasses.replace(step_plan(problem, H100, True), family=Step(64, 4))
    of_parts = expected(problem, H100, split, True).terms
    assert of_parts["L2: weights, states"] * H100.clock == pytest.approx((16 + 64) * 768 * 2 / 64)  # K is 768, too
    assert of_parts["grid-wide barriers"] * H100.clock == pytest.approx(2 * planning.GRID_BARRIER)
    sums = (2 * 4 * 4 + 10 * 2) * 16 * 16 / 64  # written and read, float32, four parts; what cells move besides
    assert of_parts["partial sums"] * H100.clock == pytest.approx(sums + planning.STEP_PART)
    projected = problem._replace(projected=64)
    twice = expected(projected, H100, step_plan(projected, H100, False), False)
    assert twice.terms["grid-wide barriers"] * H100.clock == pytest.approx(2 * planning.GRID_BARRIER)


@pytest.mark.parametrize(("dtype", "rate"), [(BF16, 2048), (torch.float32, 1024)])
def test_the_terms_of_a_step_by_a_product(dtype, rate):
    """Counted by hand: H=1024, on an H100, in bf16 and TF32."""
    for backward, bytes_of_cell in ((False, 10 * dtype.itemsize + 8), (True, 10 * dtype.itemsize + 12)):
        problem = Problem(4, 4096, 1024, dtype, precision="tf32")
        found = expected(problem, H100, plans(problem, H100, backward)[0], backward).terms
        products = 64 * 64 * (4096 if backward else 1024) / rate / 0.65  # clocks of a tile
        tiles = 8 if backward else 32  # of a multiprocessor: 64 times 16 or 64 of them
        assert found["product"] * H100.clock == pytest.approx(tiles * products)
        assert found["memory"] == pytest.approx(4096 * 1024 * bytes_of_cell / 3.35e12)
        assert found["launches"] == pytest.approx(4.4e-6)
        assert found["host, but in a CUDA graph"] == 0
        assert sum(found.values()) < 1.5 * 142e-6
        short = expected(problem._replace(batch=8, hidden=64), H100, pointwise_plan(problem), backward)
        assert short.seconds == pytest.approx(10e-6)
        few = expected(problem._replace(batch=64), H100, pointwise_plan(problem), backward).terms
        parts = 8 if backward else 2  # of K: 16 or 64 tiles, for 132 multiprocessors
        from_l2 = 4 * 1024**2 * dtype.itemsize / (28.7 * 132)
        assert few["product"] * H100.clock == pytest.approx(max(products / parts, from_l2))


def test_memory_bounds_what_is_otherwise_fast():
    problem = Problem(1024, 16, 64, BF16)
    slow = dataclasses.replace(H100, memory=1e9)
    found = expected(problem, slow, plans(problem, slow, False)[0], False)
    assert found.seconds == pytest.approx(16 * 64 * (9 * 2 + 4) / 1e9)


def test_a_real_card_with_and_without_its_rates():
    """Rates that are unknown or, as some cards report, 0 are those of the most similar card."""

    def device(**facts):
        named = dict(name=H100.name, major=9, minor=0, multi_processor_count=132) | facts
        return planning.card_with(SimpleNamespace(**named))

    rates = dict(clock_rate=1_755_000, memory_clock_rate=2_619_000, memory_bus_width=5120)
    plain, full = device(), device(**rates)
    unknown = [dict.fromkeys(rates, 0), rates | dict(memory_bus_width=0, clock_rate=0)]
    assert [plain, *(device(**facts) for facts in unknown)] == [H100] * 3
    assert (full.clock, full.memory) == (H100.clock, pytest.approx(H100.memory, rel=0.01))
    for problem in PROBLEMS:
        assert plans(problem, plain, True) == plans(problem, full, True) == plans(problem, H100, True)
    few = device(name="another", major=8, minor=9, multi_processor_count=46)
    assert few == dataclasses.replace(DEVICES["l4"], name="another", multiprocessors=46)


def test_the_plan_command(capsys):
    arguments = ["plan", "--hidden", "768", "--batch", "16", "--dtype", "bf16", "--device", "h100"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert ("cooperative" in printed, "expected, not measured" in printed) == (True, True)
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["forward"]
    seconds = pytest.approx(sum(plan["expected_terms"].values()))
    assert (plan["plan"]["family"], plan["expected_seconds"]) == ("cooperative", seconds)
