"""The kernels, compiled ahead of time for every architecture by compiling.py, without a GPU.

The tests read reports of the compiler, and in the PTX which instructions access the exchange, and in which order.
`python -m dev.compile_table --all` compiles all kernels.
"""

import dataclasses
import re
from itertools import groupby

import pytest
import triton

from dev.compile_table.report import Loop
from gpu_lstm.kernels.cells import CELLS
from gpu_lstm.kernels.triton_rnn import exchange

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
OLDER_TRITON = TRITON < (3, 9)
"""Older compilers take more registers and shared memory than is planned for. The launcher checks the compiled
kernel."""


@pytest.fixture(scope="module")
def rows(compiled):
    return compiled["rows"]


def _cell(row):
    return next((cell for cell in ("gru", "slstm") if cell in row["case"].lower()), "lstm")


LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
HELD = "resident", "cooperative"
MUST_NOT_BE = {  # faults that no row may have; `held`: the family always holds the weights on chip
    "it spills": lambda row, held: row["spills"],
    "more registers than a thread has": lambda row, held: row["registers"] > 255,
    "more than a block has": lambda row, held: -(-row["registers"] // 8) * 8 * row["threads"] > 65536,
    "more shared memory than the architecture has": lambda row, held: row["shared"] > LIMITS[row["architecture"]],
    "it does not fit": lambda row, held: not row["fits"],
    "other shared memory than was planned": lambda row, held: (
        (held or (row["plan"]["family"] == "held" and not OLDER_TRITON)) and row["shared"] != row["plan"]["shared"]
    ),
    "no tensor cores, and not exact": lambda row, _: (
        row["loop"] and not row["loop"]["products"] and "ieee" not in row["case"]
    ),
    "exact float32 by tensor cores": lambda row, _: row["tensor_core"] and "ieee" in row["case"],
    "products read weights elsewhere than they were stored": lambda row, _: row["misplaced"],
    "weights are loaded inside the time loop": lambda row, held: (
        (held or row["plan"]["family"] == "held") and row["weight_loads"]
    ),
    "no time loop, or one where a launch is a step": lambda row, _: (
        (row["loop"] is None) is not (row["plan"]["family"] == "pointwise")
    ),
    "more than one barrier a step": lambda row, held: held and row["loop"]["barriers"] > 1,
}


@pytest.mark.parametrize("fault", MUST_NOT_BE)
def test_no_kernel_has_this_fault(rows, fault):
    fault = MUST_NOT_BE[fault]
    assert [row for row in rows if fault(row, row["plan"]["family"] in HELD)] == []


def test_a_profiler_shows_the_cell_that_a_kernel_computes(rows):
    assert {_cell(row) for row in rows} == set(CELLS)
    for row in rows:
        assert row["in_profiles"] == f"{_cell(row)}_{row['kernel']}"


def test_programs_hold_weights_where_that_is_planned(rows):
    """Their products are by wgmma, and a multiprocessor has the registers of all its programs."""
    held = [row for row in rows if row["plan"]["family"] == "held"]
    assert {row["kernel"] for row in held} == {"held_forward_kernel", "held_backward_kernel"}
    for row in held:
        assert row["tensor_core"] == "wgmma.mma_async"
        assert row["registers"] * row["threads"] * row["plan"]["blocks"] <= 65536


def test_first_plans_that_once_spilled_do_not(compiled):
    """These are backward plans in TF32, with lengths and resets: GRUs of 300 and 320 units a head, and LSTMs of up to
    64."""
    assert [row for row in compiled["once_spilled"] if row["spills"] or not row["fits"]] == []


def test_products_read_held_weights_where_they_were_stored(compiled):
    """Every kind of plan that is proposed is checked, see dev/compile_table/triton_issue.md."""
    assert {row["tensor_core"] for row in compiled["held"]} == {"wgmma.mma_async"}
    assert [row for row in compiled["held"] if row["misplaced"]] == []


# The contents of a pass of the time loop on an H100, in bf16. Instructions are the most of Triton 3.9. Older versions
# may have 10 % more.
PLAIN, MANY = "B=16 H=768", "B=4096 H=128"
COUNTS = {
    ("cooperative_forward", PLAIN): Loop(330, barriers=1, products=24, shared=192, loads=10, stores=9),
    ("cooperative_backward", PLAIN): Loop(451, barriers=1, products=24, shared=48, loads=24, stores=6),
    ("resident_forward", MANY): Loop(400, barriers=1, products=32, shared=72, loads=16, stores=24),
    ("resident_backward", MANY): Loop(470, barriers=1, products=32, shared=288, loads=32, stores=16),
    ("cooperative_forward", f"{PLAIN} GRU"): Loop(268, barriers=1, products=18, shared=144, loads=9, stores=9),
    ("resident_forward", f"{MANY} GRU"): Loop(305, barriers=1, products=24, shared=72, loads=12, stores=24),
    ("resident_backward", f"{MANY} GRU"): Loop(336, barriers=1, products=24, shared=216, loads=28, stores=16),
}


@pytest.mark.parametrize(("kernel", "case"), COUNTS)
def test_the_counts_of_a_step(rows, kernel, case):
    facts = f"{kernel}_kernel", f"bfloat16 {case}", 90
    (row,) = (row for row in rows if (row["kernel"], row["case"], row["architecture"]) == facts)
    loop, expected = Loop(**row["loop"]), COUNTS[kernel, case]
    assert loop.instructions <= expected.instructions * (1.1 if OLDER_TRITON else 1)
    assert dataclasses.replace(loop, instructions=expected.instructions) == expected


def test_the_checks_can_fail(compiled):
    """The step family loads weights in the loop where it does not hold W_hh. A kernel with too few registers spills."""
    of_step = [row for row in compiled["rows"] if row["plan"]["family"] == "step"]
    assert any(row["weight_loads"] and row["loop"]["barriers"] > 1 for row in of_step)
    few, enough = compiled["with_32_registers"]
    assert (enough["spills"], enough["fits"], few["fits"]) == (0, True, False)
    assert few["spills"] > 0


def test_the_numbers_of_steps_and_sequences_are_never_specialised(compiled):
    """A kernel compiled for one T and B serves all: their values change no key of the compile cache."""
    assert len(compiled["parameters"]) == 10
    for name, (numbers, free) in compiled["parameters"].items():
        assert set(numbers) == set(free) == {"T", "B", *["step"] * ("pointwise" in name)}


MARKS = {"mma.sync": "product", "bar.sync": "barrier", "bar.red": "barrier", "POLL:": "poll", "bra POLL": "again"}
WAIT = ["poll", "load words", "again", "product", "barrier"]
PARTIALS = ["store partials", "poll", "load partials", "again"]
AHEAD = ["load words", *WAIT, "load words", "store words"]


@pytest.fixture(scope="module")
def kernels(compiled):
    """The kernels of each family: their names, PTX and pointers, and how many words a thread exchanges."""
    return compiled["exchange"]


def _addresses(kernel, *buffers):
    """Return the registers that hold an address in a buffer: every register computed from the pointer to it."""
    names = dict(enumerate(name.removesuffix("_ptr") for name in kernel["arguments"]))  # Triton's own parameters follow
    parameters = re.findall(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]", kernel["ptx"])
    found = {to: names[int(number)] for to, number in parameters if names.get(int(number)) in buffers}
    computed = re.findall(r"^\s*(?:add|sub|mad|mov|selp|cvta)[\w.]*\s+(%rd\d+), ([^;]*);", kernel["ptx"], re.M)
    while new := {
        to: found[register]
        for to, operands in computed
        for register in re.findall(r"%rd\d+", operands)
        if to not in found and register in found
    }:
        found |= new
    return found


def _events(kernel, *buffers):
    """Return (kind, instruction) of the exchange and of barriers, in the order of the text. "memory" is other global
    memory."""
    of, events = _addresses(kernel, *buffers), []
    for line in re.split(r"[;\n]", kernel["ptx"]):
        # cp.async has two addresses. The second one is in global memory.
        access = re.search(r"\b((ld|st|\w+)\.[\w.:]*global[\w.:]*)\s[^\[]*(?:\[[^\]]*\],\s*)?\[\s*(%rd\d+)", line)
        if access:
            kind = {"ld": "load", "st": "store"}.get(access[2], access[2])
            events.append((f"{kind} {of[access[3]]}" if access[3] in of else "memory", access[1]))
        events += [(kind, "") for text, kind in MARKS.items() if text in line]
    return events


def _of_words(kernel):
    """Return the faults of the exchange of words. Accesses must be strong, of one width, complete, and in order."""
    events = [event for event in _events(kernel, "words", "partials") if event[0] != "memory"]
    accesses = [(kind, text) for kind, text in events if text]
    problems = [text for _, text in accesses if not re.fullmatch(r"(ld|st)\.relaxed\.gpu\.global(\.v[24])?\.b32", text)]
    order = [kind for kind, _ in groupby(kind for kind, _ in events)]
    partials = PARTIALS * ("load partials" in kernel["words"])
    if order != (AHEAD if kernel["ahead"] else [*WAIT, *partials, "store words"]):
        problems.append(f"the order is {order}")
    if sum(kind == "barrier" for kind, _ in events) > 1:
        problems.append("more than one barrier a step")
    for wanted, count in kernel["words"].items():
        words = sum(int((re.search(r"\.v(\d)", text) or " 1")[1]) for kind, text in accesses if kind == wanted)
        if words != count:
            problems.append(f"{words} x {wanted}, not {count}")
    return problems


ARRIVE = "red", "atom"  # Triton's version decides which


def _of_barriers(kernel):
    """Return the faults of `grid_barrier`. Stores must precede its release, and loads must follow its acquire.

    Where W_hh is held, arriving and waiting lie apart, and nothing need follow a release.
    """
    events = [event for event in _events(kernel, "arrivals") if ".sys." not in event[1]]  # without the error word
    problems = []
    for n, (kind, text) in enumerate(events):
        if "arrivals" in kind:
            around = events[:n][::-1], events[n + 1 :]
            before, after = (next((kind for kind, _ in side if kind in ("barrier", "memory")), "") for side in around)
            released = kind.startswith(ARRIVE)
            if ("release" if released else "acquire") not in text:
                problems.append(f"{text} does not {'release' if released else 'acquire'}")
            if before == "memory" if released else after == "memory":
                problems.append(f"{text} without a barrier")
    rounds = kernel["rounds"]  # two, where products of parts of K are one round
    waits = rounds + (kernel["held"] and kernel["ahead"])  # a wait for the first tile, and one for the next tile
    for access, what, expected in (("load", "waits", waits), (ARRIVE, "arrivals", rounds)):
        count = sum(kind.startswith(access) and kind.endswith("arrivals") for kind, _ in events)
        if count != expected:
            problems.append(f"{count} {what}, not {expected}")
    return problems


PROBLEMS = {"cooperative": _of_words, "step": _of_barriers}


@pytest.mark.parametrize(("family", "count"), [("cooperative", 10), ("step", 7)])
def test_words_and_barriers_are_strong_and_in_order(kernels, family, count):
    found = {kernel["name"]: PROBLEMS[family](kernel) for kernel in kernels[family]}
    assert (len(found), {name: problems for name, problems in found.items() if problems}) == (count, {})


def test_the_only_program_of_a_head_waits_for_its_own_threads_alone(kernels):
    """The barrier follows the last store of a step, so that any thread can load what another one stored."""
    for kernel in kernels["alone"]:
        assert not re.search(r"\b(atom|red)\.|\.acquire\b", kernel["ptx"])
        found = re.findall(r"tt\.store|barrier|\n    }", kernel["ir"].partition("scf.for")[2])  # the loop ends
        assert found[-3:] == ["tt.store", "barrier", "\n    }"]


def test_the_instruction_for_tanh_is_that_of_a_gru_in_bfloat16(kernels):
    """The forward pass uses it for n. It is off by up to 2^-11, a quarter of bfloat16's last place."""
    using = [kernel["name"] for kernel in kernels["cooperative"] if "tanh.approx" in kernel["ptx"]]
    assert using == ["cooperative_forward_kernel bfloat16 B=16 H=768 GRU h100"]


def polling_loop(*sizes):
    text = exchange.polling_loop(*sizes)
    return getattr(text, "value", text)  # Triton 3.4 wraps the text


@pytest.mark.parametrize(("sizes", "words"), [
    ((2, 4, 64, 2), [0, 2, 64, 66]), ((3, 1, 7, 1), [0, 7, 14]), ((1, 4, 9, 4), [0])])  # fmt: skip
def test_words_are_loaded_from_where_they_lie_and_only_as_many_as_there_are(sizes, words):
    """Words lie in groups of neighbours, a stride apart. One load takes several words."""
    text = polling_loop(*sizes)
    places = [int(place) for place in re.findall(r"ld\.relaxed\.gpu\.[^\[]*\[\$\d+ \+ (\d+)\]", text)]
    counts = [int(count) for count in re.findall(r"setp\.gt\.s32 missing\d+, \$\d+, (\d+);", text)]
    assert (places, counts) == ([4 * word for word in words], words)


def test_only_the_first_poll_is_delayed():
    """The loop of the delay stands before the first poll, and a poll in vain does not go back to it."""
    labels_and_branches = r"^(?:DELAY|POLL|DONE):|(?<=bra )(?:DELAY|POLL|DONE)(?=;)"
    found = re.findall(labels_and_branches, polling_loop(3, 4, 128, 4), re.MULTILINE)
    assert found == ["DELAY:", "DELAY", "POLL:", "DONE", "POLL", "POLL", "DONE:"]


@pytest.mark.parametrize(("polls", "before", "after"), [
    (0, 100, 99), (0, 0, 0), (1, 0, 32), (5, 100, 132), (1, 4090, 4096), (0, -1, -1), (1, -1, -1)])  # fmt: skip
def test_a_wait_learns_its_delay(polls, before, after):
    """After a poll in vain the delay is two turns of its loop longer. Where words were there at once, it is a sixteenth
    of a turn shorter. The delay also records that a wait timed out, so that later waits do not poll."""
    text = polling_loop(1, 1, 1, 1)
    first, last = text.partition("setp.lt.s32 lost, $7, 0;")[1], text.partition("DONE:")[2]
    assert first, "the operands: the word, the next delay, and after five more this"
    assert "setp.eq.s32 lost, polls, polls;\nDONE:" in text, "after a timeout"
    assert text.index("@lost bra TIMED_OUT;") < text.index("add.s32 polls"), "and then it polls no more"
    values = {"polls": polls, "$7": before, "rest": 0, "lost": before < 0}
    for name, target, *given in re.findall(r"(\w+)[.\w]* ([$\w]+), ([$\w-]+), ([$\w-]+)(?:, (\w+))?;", last):
        a, b = (values[x] if x in values else int(x) for x in given[:2])
        values[target] = {"setp": a == b, "selp": a if values.get(given[2]) else b, "add": a + b,
                          "max": max(a, b), "min": min(a, b)}[name]  # fmt: skip
    assert values["$1"] == after
