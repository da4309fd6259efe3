"""Compiles kernels for the tests.

    python tests/support/compiling.py quick|usual|whole        # prints the facts that test_compile checks, as JSON

This is a process of its own, since kernels in the process of the tests may belong to Triton's interpreter. `make test`
compiles the kernels whose instructions are counted, and those that exchange words. `make test-deep` compiles every
variant, and so many cases that every pair of dtype, architecture and direction occurs. `make test-versions` compiles
more.
"""

import dataclasses
import itertools
import json
import re
import sys

import torch

from dev.compile_table import triton_kernels
from dev.compile_table.triton_kernels import PRECISIONS, Case, compile_for, problem_with
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn.launch import recorded_launches
from gpu_lstm.kernels.triton_rnn.parameters import names_of
from gpu_lstm.kernels.triton_rnn.plans.choose import plans
from gpu_lstm.kernels.triton_rnn.plans.planning import DEVICES, Held
from gpu_lstm.kernels.triton_rnn.plans.tiles import held_plans, split_plans, step_plan
from gpu_lstm.kernels.triton_rnn.threads import cooperative, resident
from gpu_lstm.kernels.triton_rnn.tiles import held, pointwise, step

QUICK, WHOLE = (how in sys.argv for how in ("quick", "whole"))
ARCHITECTURES = 80, 90, 100, 120  # sm_86 and sm_89 have the instructions of sm_80 and the shared memory of sm_120
STEP, PRODUCT = "B=64 H=130 ragged peepholes masks", "B=4096 H=1024"
IN_BOTH = [
    *(f"B=16 H={case}" for case in ("128", "768", "4096")), "B=512 H=256", "B=1024 H=256", "B=4096 H=128",
    "B=64 H=130 ragged rates", "B=64 H=130 ragged GRU masks", "B=16 H=64 ragged GRU masks",
    *(f"{case} GRU" for case in ("B=16 H=64", "B=16 H=768", "B=4096 H=128", "B=512 H=256", PRODUCT)),
    "B=16 H=768 sLSTM", "B=256 H=4x128 sLSTM", "B=16 H=4x256",
]  # fmt: skip
OF_H100 = {  # cases in bf16 on an H100, by whether they are backward
    False: [*IN_BOTH, "B=16 H=512", "B=16 H=64 ragged masks", "B=16 H=64 ragged peepholes masks",
            "B=16 H=768 ragged peepholes masks", f"{PRODUCT} ragged peepholes masks"],
    True: [*IN_BOTH, "B=16 H=1536", "B=16 H=64 ragged rates", "B=16 H=768 ragged rates", "B=16 H=768 peepholes",
           "B=256 H=4x256", "B=4096 H=128 ragged peepholes", f"{PRODUCT} ragged peepholes rates"],
}  # fmt: skip
SLOWER = {  # the cases that only the whole table has
    False: ["B=256 H=768", "B=16 H=1536", "B=16 H=768 peepholes", "B=64 H=768 ragged peepholes masks",
            "B=4096 H=128 ragged peepholes"],
    True: ["B=256 H=768", "B=16 H=512"],
}  # fmt: skip


def wanted(case):
    dtype, name = re.split(" (?=B=)", str(case))
    sm = case.card.architecture
    if sm not in ARCHITECTURES:
        return False
    if not WHOLE and (name == STEP or (name == PRODUCT and sm == 90)):
        # Every pair of direction, dtype and architecture occurs. Kernels without products depend little on the
        # architecture.
        kind = PRECISIONS.index((case.problem.dtype, case.problem.precision)) + ARCHITECTURES.index(sm)
        return case.backward == kind % 2
    if name == "B=16 H=768 ragged":
        return (dtype, sm) in (("float16", 120), ("float32 tf32", 120 if case.backward else 90))
    if WHOLE and (case.split or name.startswith((STEP, PRODUCT))):
        return True
    names = OF_H100[case.backward] + SLOWER[case.backward] * WHOLE
    return (dtype, sm) == ("bfloat16", 90) and (case.split or name in names)


def quick(case):
    p = case.problem
    small = (p.batch, p.hidden) == (16, 768) and not case.step and (p.cell != "slstm" or not case.backward)
    large = p.batch in (1024, 4096) and case.card.architecture == 90 and (p.hidden < 1024 or p.cell == "lstm")
    of_step = p.hidden == 4096 or (case.step and (p.batch, p.hidden, case.backward) == (16, 768, False))
    return p.dtype is torch.bfloat16 and not p.regularised and (small or large or of_step)


def as_json(rows):
    return [dataclasses.asdict(row) | {"fits": row.fits, "plan": row.plan.as_json()} for row in rows]


def with_32_registers():
    """Return the reports of a kernel whose threads may have 32 registers, and of the same kernel without that limit."""
    case = Case(Problem(2, 16, 64, torch.float32), False, triton_kernels.SEQUENCE_CARDS[0])
    plan = step_plan(case.problem, case.card, False)
    launch = recorded_launches(case.problem, Pass(), plan)[0]
    few = launch._replace(arguments=launch.arguments | dict(maxnreg=32))
    return as_json(triton_kernels.report(each, case, plan) for each in (few, launch))


def report_of_plan(problem, backward, plan):
    first, *_ = recorded_launches(problem, Pass(backward), plan)
    return triton_kernels.report(first, Case(problem, backward, DEVICES["h100"]), plan)


def kinds_of_held():
    """Return the reports of one plan for every kind of tile and of K that is proposed."""
    found = {}
    batches = 64, 256, 384, 512, 1024, 4096
    cells = ("lstm", torch.bfloat16), ("lstm", torch.float32), ("gru", torch.bfloat16)
    for (cell, dtype), backward, hidden, batch in itertools.product(cells, (False, True), (256, 384, 512), batches):
        problem = Problem(2, batch, hidden, dtype, precision="tf32", cell=cell)
        for plan in held_plans(problem, DEVICES["h100"], backward):
            found.setdefault((cell, dtype, backward, plan.rows, plan.units, plan.family.k), (problem, backward, plan))
    # Every second kind still has all pairs of facts.
    kinds = list(found.values())[:: 20 if QUICK else 1 if WHOLE else 2]
    with triton_kernels.ProcessPoolExecutor() as pool:
        return as_json(pool.map(report_of_plan, *zip(*kinds)))


def once_spilled():
    ragged = dict(precision="tf32", lengths=torch.int64, resets=True)
    gru = dict(cell="gru", heads=2, bias_hh=True, zoneout_h=0, zoneout_c=0)
    problems = [Problem(2, 64, 2 * units, torch.float32, **ragged, **gru) for units in (300, 320)]
    problems += [Problem(2, 256, 2 * units, torch.float32, **ragged, heads=2) for units in (48, 64)]
    chosen = [next(iter(plans(problem, DEVICES["h100"], True))) for problem in problems]
    with triton_kernels.ProcessPoolExecutor() as pool:
        return as_json(pool.map(report_of_plan, problems, [True] * len(problems), chosen))


def parameters():
    """Return, by kernel, the numbers that it takes, and the numbers whose values make no kernel of their own."""
    modules = cooperative, held, pointwise, resident, step
    kernels = {name: each for module in modules for name, each in vars(module).items()}
    return {
        name: [[n for names in names_of(kernel) for n in names if not n.endswith("_ptr")],
               [p.name for p in kernel.params if p.do_not_specialize]]
        for name, kernel in kernels.items() if name.endswith("_kernel")
    }  # fmt: skip


# The exchange between programs. One load takes four words of a row, two, or one.

BF16, F16 = torch.bfloat16, torch.float16
OF_WORDS = [  # a problem, a card, whether it is backward, and how many partners share the gates
    (Problem(2, 16, 768, BF16), "h100", False, 1), (Problem(2, 16, 768, BF16), "h100", True, 1),
    (Problem(2, 9, 100, BF16), "a100", False, 1), (Problem(2, 9, 100, BF16), "a100", True, 4),
    (Problem(2, 17, 33, F16), "h100", False, 1), (Problem(2, 17, 33, F16), "h100", True, 2),
    (Problem(2, 3, 33, torch.float32, 0, "tf32"), "h100", False, 1),
    (Problem(2, 999, 100, BF16), "h100", False, 1),  # a group has several batch tiles
    (Problem(2, 16, 768, BF16, cell="gru"), "h100", False, 1), (Problem(2, 16, 768, BF16, cell="gru"), "a100", True, 3),
]  # fmt: skip
OF_BARRIERS = [  # for the step family: a problem, a card, and whether it is backward
    (Problem(2, 3, 33, BF16), "a100", False), (Problem(2, 3, 33, BF16), "h100", True),
    (Problem(2, 16, 768, BF16), "h100", True),  # products in parts of K
    (Problem(2, 3, 128, BF16, heads=2), "h100", True),
    (Problem(2, 1024, 256, BF16), "h100", False), (Problem(2, 1024, 256, BF16), "h100", True),  # these hold W_hh
    (Problem(2, 1024, 512, BF16), "h100", False),  # and ask ahead
]  # fmt: skip
ALONE = [(Problem(2, 3, 32, BF16, heads=2), "h100", backward) for backward in (False, True)]  # a head has one program


def of_words(problem, card, backward, partners):
    proposed = [p for p in plans(problem, DEVICES[card], backward) if p.family.name == "cooperative"]
    plan = next(p for p in proposed if p.family.partners == partners)
    ahead = plan.family.ahead  # a look before the loop, and one for the next tile
    words = {"store words": 4 if backward else 1, "load words": 4 * plan.family.chunks * (3 if ahead else 1)}
    if partners > 1:
        words |= {"load partials": partners, "store partials": -(-partners * plan.units // (4 * plan.num_warps))}
    return exchanged(problem, card, backward, plan) | dict(words=words, ahead=ahead)


def of_barriers(problem, card, backward):
    of = problem, DEVICES[card], backward
    plan = [*held_plans(*of), *split_plans(*of)[: problem.hidden == 768], step_plan(*of)][0]
    holds = isinstance(plan.family, Held)
    rounds, ahead = 1 + (plan.family.parts > 1), holds and plan.family.ahead
    return exchanged(problem, card, backward, plan) | dict(held=holds, ahead=ahead, rounds=rounds)


def exchanged(problem, card, backward, plan):
    (launch,) = recorded_launches(problem, Pass(backward), plan)
    arguments = [n for names in names_of(launch.kernel) for n in names if launch.arguments[n] is not None]
    asm = compile_for(launch, DEVICES[card].architecture).asm
    name = f"{launch.kernel.__name__} {Case(problem, backward, DEVICES[card])} {card}"
    return dict(name=name, ptx=asm["ptx"], ir=asm["ttir"], arguments=arguments)


def exchange():
    with triton_kernels.ProcessPoolExecutor() as pool:
        found = dict(cooperative=pool.map(of_words, *zip(*OF_WORDS)), step=pool.map(of_barriers, *zip(*OF_BARRIERS)),
                     alone=pool.map(of_barriers, *zip(*ALONE)))  # fmt: skip
        return {family: list(each) for family, each in found.items()}


if __name__ == "__main__":
    sizes = (16, 4096, ""), (4096, 128, ""), (4096, 128, "ragged peepholes")
    more = [Case(problem_with(Problem(2, batch, hidden, torch.bfloat16), words), backward, DEVICES["h100"])
            for batch, hidden, words in sizes for backward in (False, True)]  # fmt: skip
    cases = [case for case in triton_kernels.cases(False) + more if wanted(case) and (not QUICK or quick(case))]
    found = dict(rows=as_json(triton_kernels.reports(cases)), held=kinds_of_held(), exchange=exchange())
    found |= dict(with_32_registers=with_32_registers(), parameters=parameters(), once_spilled=once_spilled())
    print(json.dumps(found))
