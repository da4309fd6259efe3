"""The public modules on every backend and family of kernels, against the NumPy oracle: tables of cases.

The tests call modules as users do. An LSTM or a GRU of one layer hands down states [1, B, H], one of several layers
[B, H]. Kernels on the CPU are checked for the tensors that they are given, and for the addresses that they read and
write (conftest.py).

Without a GPU the Triton kernels run in Triton's interpreter, and g++ compiles the kernels in CUDA C++. bfloat16
products are wrong in the interpreter, so bfloat16 is in test_gpu.py. On a GPU the Triton kernels are those that are
chosen there:

    pytest tests/test_layer.py --require-gpu
    compute-sanitizer --tool memcheck   python -m pytest tests/test_layer.py -k cuda
    compute-sanitizer --tool racecheck  python -m pytest tests/test_layer.py -k cuda
"""

from typing import NamedTuple

import pytest
import torch
from cases import check, drawn
from comparing import PLACES
from pairs import assert_identical, letters_of, results
from places import KERNELS, by_interpreter
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from gpu_lstm.execution import schedule
from gpu_lstm.kernels import by_steps
from gpu_lstm.kernels.problem import Problem

pytestmark = pytest.mark.usefixtures("exact_float32_products")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAN, INF = float("nan"), float("inf")

MIX, BACK, MOST = "ragged resets both", "ragged resets reverse", "ragged states peepholes both"
# A norm of a W_hh h that is almost zero multiplies every error, so its cases reset to given states.
OF_HH, OF_C, OF_ALL = "norm-hh no-bias ragged states", "norm-c no-bias ragged resets", "ragged states peepholes norms"
ONCE = "ragged states peepholes"
# Ways to build and to call a module. Kernels depend on little of them, so all are tested on the backends with the least
# work.
MODULES = ("", "deep both ragged resets", "both batch-first states", "batch-first state both", "no-bias resets",
           "stack ragged states both", "deep packed batch-first resets", "both packed", "no-hx deep",
           "layer states ragged both", "layer no-hx deep both", "stream deep no-hx",
           "stream stack batch-first", "stream resets", "stream stack resets batch-first")  # fmt: skip
# The tables have pairs of options, not all combinations.
# A line has places, a dtype, and rows. A row has a size and words, and before them the number of seeds if it is not 1.
# Small sizes, whose errors vary more, have more seeds.
TABLE = [
    ("reference", F64, (2, "T6 B4 I3 H5", *MODULES, "cell norms peepholes no-bias", "cell no-hx", "deep masks states",
                        f"{MOST} masks", f"{OF_ALL} both masks", f"{OF_ALL} expected", OF_HH, f"{OF_C} both",
                        "norms stream peepholes", "dropout_h both ragged", "zoneout_h deep states", "expected state",
                        "dropped_h deep both zoneout ragged resets", "weight_drop deep both masks",
                        "dropout deep both ragged", "dropout stack masks states",
                        "zoneout_c both ragged resets", "stream expected deep", "deep both norms peepholes ragged",
                        "stack norm-hh-c peepholes no-bias both states",
                        "layer norms peepholes states both"),
     (2, "T6 B4 I3 H5 P2", MIX, "deep both states", f"{MOST} masks", f"{MOST} expected", "layer both ragged states",
      "stream deep", "packed both"),
     (2, "T1 B4 I3 H5", "deep both ragged resets", "stack both ragged resets"),  # these start from zeros
     (2, "T1 B1 I1 H3", f"{MIX} masks", f"{OF_ALL} masks both", f"{MOST} expected deep", "unbatched both states",
      "cell"),
     (2, "T5 B1 I3 H4 P2", "unbatched both batch-first ragged states", "unbatched state",
      "unbatched deep no-hx resets")),
    ("reference torch", F64, (2, "T6 B4 I5 H5", "residual ragged", "residual resets")),
    ("reference", F64, (2, "T6 B4 I5 H5", "residual masks ragged", "residual masks state")),
    *((places, dtype, ("T9 B3 I3 H5 P5", "layer", "layer ragged resets", "layer no-grad"))  # torch's own has no P = H
      for places, dtype in (("reference", F64), ("triton numba", F32))),
    ("reference torch torch/two", F64, ("T5 B3 I4 H6", f"three-heads deep {MIX}", "heads stack both", "heads cell")),
    ("reference", F64, ("T5 B3 I4 H6", "heads states masks ragged", "heads layer deep", "heads stream")),
    # Batches of no sequences.
    *((places, dtype, ("T3 B0 I2 H4", "recompute", "deep both ragged resets", "residual ragged resets", "heads",
                        "cell"), ("T3 B0 I2 H4 P2", "ragged resets"))
      for places, dtype in (("reference torch", F64), ("triton numba", F32))),
    *((places, dtype, ("T3 B0 I2 H4", "peepholes norms masks ragged resets"))
      for places, dtype in (("reference", F64), ("triton numba", F32))),
    ("reference torch", F64, (2, "T6 B4 I3 H5", "weight_drop recompute", "weight_drop packed", "dropped_weights"),
     ("T6 B4 I5 H5", *(f"dropped_layers {words}" for words in ("deep", "stack", "residual")))),
    ("torch torch/two", F64, (2, "T6 B4 I3 H5", *(words for words in MODULES if "state" not in words)),
     (2, "T6 B4 I3 H5 P2", MIX, "deep packed", "both no-bias resets"), (2, "T1 B1 I1 H3", MIX, "cell", "unbatched"),
     (2, "T1 B4 I3 H5", "deep both ragged", "batch-first ragged resets no-hx")),
    # The chosen plans, on a GPU too: steps of one sequence, and more than one tile of 16 sequences and of 32 units.
    ("triton", F32, (4, "T1 B1 I3 H1", "", MIX), (2, "T2 B3 I4 H5", "both", "deep ragged resets"),
     (2, "T3 B3 I4 H5", "weight_drop recompute", "layer ragged states both", "chunks reverse ragged states no-grad"),
     (2, "T3 B4 I3 H33 P7", MIX), (2, "T3 B3 I3 H9", f"{OF_ALL} both recompute", f"{MOST} masks recompute"),
     ("T4 B3 I3 H4", "norms both ragged", "deep both masks peepholes", "chunks masks deep no-grad", "dropout deep",
      "stream deep batch-first", "stream resets no-hx"),
     ("T4 B18 I3 H40", "heads ragged resets both"), ("T1 B3 I3 H15", "three-heads")),
    ("triton", F16, ("T4 B5 I8 H40", MIX), ("T4 B3 I4 H20 P7", f"{MOST} masks")),
    # Several programs with a grid-wide barrier: three tiles, four tiles, and two tiles of units.
    ("step", F32, ("T3 B3 I3 H40", "", "no-hx deep states peepholes masks"), ("T1 B3 I3 H40", "both"),
     ("T3 B18 I3 H20 P33", "layer ragged resets both"), ("T3 B18 I3 H40", "heads ragged resets")),
    ("step", F16, ("T3 B3 I3 H40 P5", ONCE), ("T3 B3 I3 H15", f"three-heads {ONCE} masks")),
    # The same with a second barrier for products of parts of K. There are two tiles of sequences and of 64 units, or,
    # with P = 70, of h alone.
    ("split/4", F32, ("T3 B18 I3 H70", "ragged resets", "heads resets"),
     ("T3 B3 I3 H20 P70", "layer states peepholes")),
    # W_hh in shared memory: two groups, of which one has two tiles of sequences, and three programs.
    ("held", F32, ("T3 B35 I3 H18", BACK), ("T3 B18 I3 H15", "three-heads ragged resets")),
    ("held", F16, ("T3 B18 I3 H40", f"{ONCE} masks", f"heads {ONCE} masks"), ("T3 B3 I3 H18", "no-grad both")),
    ("held/ahead", F32, ("T3 B35 I3 H18", BACK), ("T3 B35 I3 H36", "heads ragged")),
    # Whole sequences in one launch of programs that are independent of each other.
    ("resident", F32, ("T3 B3 I3 H20 P7", "both resets"), (2, "T1 B1 I3 H1", MIX), ("T3 B11 I3 H33", "no-hx deep")),
    ("resident", F16, ("T3 B3 I3 H7", MIX), ("T4 B3 I3 H11", f"{ONCE} both"),
     ("T3 B11 I3 H22", "heads ragged states masks"), ("T3 B3 I3 H33", "three-heads")),
    # Programs that exchange words of one unit, or of two in half precision. There are 2 to 9 programs, backward 4 to
    # 12.
    ("cooperative/4/1/4", F32, ("T3 B3 I3 H36", ""), ("T3 B3 I3 H8", "chunks resets no-grad")),
    ("cooperative/4/1/4", F16, ("T4 B3 I3 H11", ONCE)),  # 3 and 4 programs; one of them has no units
    ("cooperative/8/2/4", F32, ("T3 B17 I3 H20", "ragged resets")),  # three batch tiles in two groups
    ("cooperative/8/1/4", F16, ("T3 B3 I3 H33", "ragged resets")),  # a row ends in half a word
    ("cooperative/8/2/4", F32, ("T3 B20 I3 H32", "heads ragged states masks")),  # each head has groups
    # The gates of a unit are in two pieces.
    ("cooperative/8/1/2", F16, ("T3 B3 I3 H32", "heads ragged states masks both")),
    # Backward has all gates of a unit in one program.
    ("cooperative/16/1/1", F16, ("T3 B3 I3 H33", BACK, f"three-heads {BACK}"), (2, "T3 B3 I3 H1", "")),
    ("cooperative/16/1/1", F32, ("T4 B3 I3 H11", f"{ONCE} masks")),
    # One launch a step, after a product.
    ("pointwise", F32, ("T3 B3 I4 H6", BACK), ("T3 B9 I3 H20 P7", "deep ragged"), ("T3 B4 I3 H300", ""),
     ("T3 B3 I3 H33", f"{ONCE} masks"), ("T3 B5 I3 H15", f"three-heads {BACK}")),
    ("pointwise", F16, ("T3 B3 I3 H40", "", f"heads {ONCE} masks"), ("T3 B5 I3 H20", f"{MOST} expected")),
    # Two launches a step, between which torch normalises c, or projects.
    ("pointwise cupy", F32, ("T3 B3 I3 H11", OF_HH, OF_C, f"{OF_ALL} masks", f"{OF_ALL} both expected"),
     ("T1 B3 I3 H11", f"{OF_ALL} no-grad"), ("T3 B5 I3 H9 P4", f"{MOST} masks", "expected ragged no-grad")),
    ("pointwise cupy", F16, ("T3 B3 I3 H11", f"{OF_ALL} both masks"), ("T3 B4 I3 H9 P4", f"{ONCE} masks")),
    # The loop for CPUs. Forms, options and chunks of calls are tested on its kernels. It has tiles of 128 units and of
    # 4 sequences. Where torch computes in the middle of a step, it runs by steps.
    ("numba", F32, (2, "T6 B4 I3 H5", *MODULES, "cell norms peepholes no-bias", "cell no-hx", "deep masks states",
                    OF_HH, f"{OF_C} both", "norms stream peepholes", "zoneout_h deep states",
                    "zoneout_c both ragged resets", "stream expected deep", "recompute both", "chunks no-grad",
                    "chunks deep states masks no-grad", "chunks deep both expected ragged no-grad",
                    "chunks norm-hh-c no-bias peepholes resets no-grad", "chunks reverse ragged states no-grad"),
     (2, "T6 B4 I5 H5", "residual ragged", "residual masks state", "residual dropped_h ragged", "residual dropout",
      "dropout weight_drop deep both masks", "weight_drop recompute", "weight_drop packed", "dropped_layers residual"),
     ("T6 B4 I3 H5 P2", "dropout deep"), (4, "T1 B1 I3 H1", "", MIX),
     ("T1 B9 I3 H7", "deep both"), ("T6 B4 I3 H5 P2", "chunks both masks states no-grad"),
     (2, "T5 B1 I3 H4 P2", "unbatched both batch-first ragged states", "unbatched deep no-hx resets"),
     ("T4 B5 I3 H130", MIX, f"{ONCE} masks recompute", f"{OF_ALL} both masks"), ("T3 B9 I16 H260", "ragged resets"),
     ("T3 B5 I3 H260", "heads states masks ragged"),
     ("T4 B9 I3 H15", f"three-heads {MOST} expected", "three-heads cell"),
     ("T4 B4 I3 H3", "three-heads"),  # heads of one unit
     ("T4 B5 I3 H9", f"{OF_ALL} both masks recompute", f"{OF_ALL} expected no-grad"),
     ("T3 B5 I3 H130 P7", f"layer {MIX}", "masks ragged recompute", "expected no-grad"), ("T3 B4 I3 H9 P140", "masks"),
     # Past the longest sequence nothing is computed.
     ("T11 B5 I3 H12", *(f"ragged {words}" for words in ("short both", "none both", "short four-heads", "none norms",
                                                        "short norms no-grad"))),
     # The loop multiplies x only where nothing else is in the gates: here W_hh h of the states is.
     ("T1 B4 I3 H6", "ragged states no-grad"), ("T5 B4 I3 H6", "ragged states no-grad")),
    # It computes half precision in float32.
    *(("numba", dtype, (3, "T9 B5 I3 H8", "deep both", "packed", "ragged states", "norms peepholes", "expected",
                        "no-grad", "residual", "cell", "recompute four-heads")) for dtype in (BF16, F16)),
    # The kernels in CUDA C++.
    ("cupy", F32, (4, "T2 B3 I4 H5", "", MIX, "ragged states both"), ("T5 B4 I3 H13 P7", MIX, "ragged states"),
     (2, "T5 B3 I4 H6", f"{MIX} recompute", "no-hx", "reverse ragged", "no-grad both"),
     ("T3 B4 I3 H300", ""), ("T4 B3 I3 H33", f"{ONCE} masks", "dropout_h both", "zoneout_c both", "zoneout_h states"),
     ("T4 B5 I3 H15", "three-heads", f"three-heads {MIX}"), ("T4 B5 I3 H20", f"heads {ONCE} masks"),
     ("T1 B3 I3 H1", "")),
    ("cupy", F32, ("T3 B4 I3 H9 P140", "masks")),
    ("cupy", F16, (3, "T5 B3 I3 H40", "", MIX, f"heads {ONCE} masks"), ("T4 B5 I3 H20", f"{MOST} expected")),
    ("cupy", BF16, (4, "T2 B3 I4 H5", "", "ragged states both"), (2, "T3 B3 I3 H9 P4", f"{MIX} recompute"),
     ("T5 B3 I3 H11", f"{OF_ALL} both")),
]  # fmt: skip
# More cases with `gru`, which the cases above without a layer norm do not reach.
MORE_GRUS = [
    ("reference", F64, (2, "T6 B4 I3 H5", "cell no-bias", "both ragged masks", "zoneout stack both")),
    ("triton", F32, ("T3 B3 I3 H9", "ragged no-bias recompute masks")),
    ("split/4", F32, ("T3 B18 I3 H72", "ragged resets", "three-heads ragged")),
    ("resident", F16, ("T3 B3 I3 H70", BACK)),
    ("numba", F32, (2, "T6 B4 I3 H5", "cell no-bias", "both ragged masks", "zoneout stack both", "recompute masks")),
    ("cupy", BF16, (2, "T2 B3 I4 H5", MIX)),
]
# Cases with `slstm`. Its reference computes the paper's c, n and m in other numbers.
SLSTMS = [
    ("reference", F64, (2, "T4 B3 I3 H8", "", "no-hx ragged", "no-bias heads", f"deep heads {MIX}", f"deep no-hx {MIX}",
                        "both packed", "batch-first", "stream deep", "layer no-bias", "dropout_h both ragged"),
     ("T4 B1 I3 H8", "unbatched both")),
    ("triton", F32, ("T4 B3 I3 H8", f"deep {MIX}", "layer heads", "no-hx no-bias dropout_h"),
     ("T1 B3 I3 H15", f"three-heads {MIX}")),
    ("step", F32, ("T3 B3 I3 H20", BACK), ("T3 B18 I3 H40", f"heads {BACK}")),
    ("split/4", F32, ("T3 B3 I3 H40", f"heads {BACK}")),
    ("held", F32, ("T3 B18 I3 H36", f"heads {BACK}")),
    ("held/ahead", F32, ("T3 B35 I3 H36", "heads ragged resets")),
    ("resident", F16, ("T3 B3 I3 H11", BACK)), ("resident", F32, ("T3 B9 I3 H22", f"heads {BACK}")),
    ("cooperative/8/2/4", F32, ("T3 B17 I3 H20", "ragged resets", "heads ragged resets")),
    ("cooperative/16/1/1", F16, ("T3 B3 I3 H33", f"three-heads {BACK}")),
    ("pointwise cupy", F32, ("T3 B3 I3 H9", BACK), ("T3 B3 I3 H15", f"three-heads {BACK}")),
    ("numba", F32, (2, "T4 B4 I3 H8", f"deep heads {MIX}", "both packed no-hx", "layer no-bias", "stream deep resets",
                    "dropout_h both ragged", "no-grad no-hx"),
     ("T4 B5 I3 H130", BACK), ("T3 B9 I3 H260", f"heads {BACK}"), ("T4 B1 I3 H15", "unbatched three-heads both"),
     ("T11 B5 I3 H12", "heads ragged short", "ragged none")),
    *(("numba", dtype, (3, "T9 B5 I3 H8", "heads")) for dtype in (BF16, F16)),
    ("cupy", F32, ("T4 B3 I3 H15", "no-grad no-hx")),
    ("cupy", F16, ("T4 B5 I3 H130", MIX)),
]  # fmt: skip
# Cases with pairs that the tables above lack, of place, dtype, cell, option, projection, single step and number of
# tiles.
DEEP = [
    ("triton", F32, ("T1 B17 I5 H33", "both"), (2, "T2 B1 I2 H130", ""), ("T3 B17 I3 H33", OF_ALL),
     ("T4 B4 I3 H33 P7", f"{MIX} expected", "dropout_h deep", "zoneout_h", "zoneout_c")),
    ("step", F32, ("T3 B1 I3 H20", "unbatched expected state")),
    ("split/4", F32, ("T1 B3 I3 H40", MIX)),
    ("split/8", F16, ("T5 B3 I3 H10", ONCE), ("T4 B18 I3 H40", f"{ONCE} masks", "gru ragged states masks")),
    ("held", F32, ("T4 B18 I3 H18 P7", "deep states"), ("T3 B3 I3 H18", "no-hx packed both")),
    ("held/ahead", F16, ("T4 B50 I3 H18", f"{ONCE} masks")),
    ("held/ahead", F32, ("T3 B3 I3 H18", "deep no-hx expected")),
    ("resident", F16, ("T5 B3 I3 H11", "peepholes states expected")),
    ("cooperative/4/1/4", F32, ("T5 B3 I3 H11 P5", "ragged states"), ("T12 B2 I2 H6", "ragged resets"),
     ("T5 B3 I3 H11", f"{MOST} masks")),
    ("cooperative/4/1/4", F16, ("T5 B3 I3 H11", "states peepholes expected")),
    ("cooperative/8/1/4", F32, ("T4 B3 I3 H20 P7", "packed")), ("cooperative/8/1/2", F32, ("T4 B3 I3 H20", ONCE)),
    ("cooperative/8/1/2", F16, ("T4 B9 I3 H33", "gru ragged resets")),
    ("cooperative/16/1/1", F32, ("T5 B3 I3 H11", "gru expected states")),
    ("cooperative/8/1/2", F32, ("T2 B3 I3 H86", "heads both peepholes")),  # several chunks, whose words lie apart
    ("cooperative/16/1/1", F32, ("T2 B3 I3 H140", "heads", "gru heads")),
]  # fmt: skip


class Case(NamedTuple):
    """Random calls in words of cases.py, at a place of places.py."""

    place: str
    dtype: torch.dtype
    seeds: int
    size: tuple[int, ...]  # T, B, I, H and maybe P
    words: str


def cases_of(table: list, cell: str = "") -> list[Case]:
    return [
        Case(place, dtype, seeds, tuple(int(each[1:]) for each in size.split()), f"{cell} {words}".strip())
        for places, dtype, *rows in table for place in places.split()
        for row in rows for seeds, size, *options in [(1, *row) if isinstance(row[0], str) else row]
        for words in options
    ]  # fmt: skip


def of_a_gru(case: Case) -> Case:
    """Return the same case without a projection and peepholes, which a GRU does not have."""
    words = [word for word in case.words.split() if word != "peepholes"]
    return case._replace(size=case.size[:4], words=" ".join(["gru", *words]))


LSTMS = cases_of(TABLE)
OF_FOUR_GATES = "split/4", "cooperative/8/1/2"  # these plans divide the four gates of a unit, and a GRU has three
CASES = [*LSTMS, *(of_a_gru(case) for case in LSTMS if "norm" not in case.words and case.place not in OF_FOUR_GATES)]
CASES += [*cases_of(MORE_GRUS, "gru"), *cases_of(SLSTMS, "slstm")]


def cases(*backends: str) -> pytest.MarkDecorator:
    """Return the cases of these backends or places, each once."""
    every = [(case, ()) for case in dict.fromkeys(CASES)] + [(case, pytest.mark.deep) for case in cases_of(DEEP)]
    return pytest.mark.parametrize("case", [
        pytest.param(case, marks=marks, id="-".join(map(str, case)).replace("torch.", ""))
        for case, marks in every if case.place.partition("/")[0] in backends
    ])  # fmt: skip


def every_result_and_gradient(monkeypatch: pytest.MonkeyPatch, case: Case, device: str = "cpu") -> None:
    backend, force = KERNELS[case.place]
    force(monkeypatch, **dict(device=device) if backend == "cupy" else {})
    if "chunks" in case.words:  # a chunk has two steps
        monkeypatch.setattr(schedule, "WORKSPACE", 2 * case.size[1] * 4 * case.size[3] * case.dtype.itemsize)
    check(case.size, case.words, backend, case.dtype, device, seeds=case.seeds)


fresh_memory_is_nan = pytest.mark.usefixtures("nan_in_fresh_memory")  # a result that nothing wrote is detected


@cases("torch", "reference")
def test_without_kernels(monkeypatch, case):
    every_result_and_gradient(monkeypatch, case)


@cases("triton")
def test_triton(monkeypatch, case, device):
    every_result_and_gradient(monkeypatch, case, device)


@fresh_memory_is_nan
@cases("numba")
def test_numba(monkeypatch, case):
    every_result_and_gradient(monkeypatch, case)


@by_interpreter
@fresh_memory_is_nan
@cases("step", "split", "held", "resident", "cooperative", "pointwise")
def test_a_family_of_triton(monkeypatch, case):
    every_result_and_gradient(monkeypatch, case)


@fresh_memory_is_nan
@cases("cupy")
def test_cuda(monkeypatch, case, host_or_card):
    every_result_and_gradient(monkeypatch, case, host_or_card)


@by_interpreter
@fresh_memory_is_nan
@pytest.mark.parametrize("place", ["pointwise", "cupy"])
def test_a_projection_that_is_much_smaller_stays_in_the_loop(monkeypatch, place):
    assert not by_steps.keeps_projection(Problem(2, 5, 9, F32, 3))
    monkeypatch.setattr(by_steps, "LEAST_SAVED", 0)
    assert by_steps.keeps_projection(Problem(2, 5, 9, F32, 3))
    assert not by_steps.keeps_projection(Problem(2, 5, 9, F32, 8))
    every_result_and_gradient(monkeypatch, Case(place, F32, 2, (4, 5, 3, 9, 3), MIX))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("words", ["", MIX, "deep ragged", "no-bias resets both", "ragged states both", "gru",
                                   "gru ragged states both"])  # fmt: skip
@pytest.mark.parametrize("size", [(64, 32, 128, 256), (33, 70, 100, 513), (50, 16, 64, 768)], ids=str)
def test_larger_sizes_in_cuda(size, words, dtype):
    check(size, words, "cupy", dtype, "cuda")


@pytest.mark.parametrize(("backend", "size", "words"), [
    ("torch", (2, 2, 2, 2, 1), MIX), ("reference", (2, 2, 2, 2), f"no-bias {MIX}"),
    ("reference", (2, 2, 2, 3, 2), "ragged states peepholes masks"), ("reference", (2, 2, 2, 2), "expected states"),
    ("reference", (2, 2, 2, 3), f"{OF_ALL} masks"), ("torch", (2, 2, 2, 2), f"gru {MIX}"),
    ("reference", (2, 2, 2, 2), "gru ragged states masks"), ("reference", (2, 2, 2, 4), "gru heads"),
    ("reference", (2, 2, 2, 4), "slstm heads"),
])  # fmt: skip
def test_second_derivatives_by_finite_differences(backend, size, words):
    module, (x, hx, rest) = everywhere(backend, words, F64, size)
    states = dict(hx=hx) | {name: rest.pop(name) for name in ("reset_states",) if name in rest}
    leaves, form = tree_flatten((dict(module.named_parameters()), states))

    def call(x, *leaves):
        torch.manual_seed(0)  # so that each call draws the same masks
        parameters, states = tree_unflatten(leaves, form)
        y, found = torch.func.functional_call(module, parameters, (x,), rest | states)
        return y, *tree_leaves(found)

    inputs = [t.detach().double().requires_grad_() for t in (x, *leaves)]
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


EVERYWHERE = [
    ("torch", "resets both", None), ("torch/two", "resets", None), ("cupy", "resets both", F16),
    ("cupy", "states peepholes norms zoneout", F32), ("reference", "states peepholes norms zoneout both", None),
    ("triton", "states peepholes zoneout", F16), ("torch", "gru resets both", None), ("torch/two", "gru resets", None),
    ("reference", "gru states zoneout both", None), ("triton", "gru states zoneout", F16),
    ("cupy", "gru resets both", F16), ("cupy", "gru states zoneout", F32),
    ("numba", "states peepholes zoneout both", None), ("numba", "states peepholes norms zoneout", None),
    ("numba", "gru states zoneout both", None), ("numba", "heads states zoneout", None),
    *(pytest.param(*case, marks=by_interpreter) for case in (
        ("resident", "states peepholes zoneout", None), ("cooperative/4/1/4", "states zoneout", F16),
        ("resident", "gru states zoneout", None), ("cooperative/4/1/4", "heads states zoneout", F16))),
    *(pytest.param(*case, marks=[by_interpreter, pytest.mark.deep]) for case in (
        ("cooperative/4/1/4", "gru states zoneout", F16), ("resident", "heads states zoneout", None),
        ("pointwise", "states peepholes zoneout both", F16), ("step", "states peepholes zoneout", None),
        ("cooperative/4/1/4", "states peepholes zoneout", None), ("pointwise", "gru states zoneout both", F16),
        ("step", "gru states zoneout", None))),
]  # fmt: skip


PAST_THE_LONGEST = "short states both", "none states both", "gru short both", "short norms", "short states four-heads"


def everywhere(place, words, dtype, size):
    backend = KERNELS[place].backend
    where = PLACES.get(backend, dict(device="cpu")) | ({} if dtype is None else dict(dtype=dtype))
    module, call = drawn(size, words, backend=backend)
    return module.to(**where), call


def nan_or_inf(t: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return t with NaN and infinity where `where` [T, B] is true."""
    return torch.where(where[..., None], torch.where(torch.rand(t.shape) < 0.5, NAN, INF).to(t), t)


@fresh_memory_is_nan
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize(("place", "words", "dtype"), [*EVERYWHERE, ("torch", "residual", None),
                                                       *(("numba", words, None) for words in PAST_THE_LONGEST),
                                                       ("reference", "residual resets", None)])  # fmt: skip
def test_padding_and_what_no_reset_leaves_change_no_bit(monkeypatch, place, words, dtype):
    """NaN and infinity stand there, also in the gradient of the output. The bits are the same, also without gradients,
    and the padding of results is zero."""
    KERNELS[place].force(monkeypatch)
    module, (x, hx, rest) = everywhere(place, f"ragged {words}", dtype, (5, 3, 3, 8))
    padding = torch.arange(5)[:, None] >= rest["lengths"]  # [T, B]

    def run(x, rest, garbage=False):
        def call(*given, **options):
            output, states = module(*given, **options)
            if garbage and output.requires_grad:
                output.register_hook(lambda g: nan_or_inf(g, padding.to(g.device)))
            return output, states

        return {name: t.cpu() for name, t in results(module, x, hx, call=call, **rest).items()}

    clean = run(x, rest)
    assert (clean["output"][padding] == 0).all()
    assert (clean["dx"][padding] == 0).all()
    with torch.no_grad():
        alone = run(x, rest)
    assert_identical(alone, {name: clean[name] for name in alone})
    left = {}
    if "reset_states" in rest:
        left["reset_states"] = tree_map(lambda t: nan_or_inf(t, padding | ~rest["resets"]), rest["reset_states"])
    assert_identical(run(nan_or_inf(x, padding), rest | left, garbage=True), clean)


@fresh_memory_is_nan
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("place", "words", "dtype"), EVERYWHERE)
def test_nan_does_not_pass_a_reset(monkeypatch, place, words, dtype):
    """NaN or infinity in x, h0 and c0 does not get into another sequence either. It changes no bit of numbers that do
    not follow it.

    torch's own LSTM is an exception: other episodes of these sequences are computed again, by other calls.
    """
    KERNELS[place].force(monkeypatch)
    module, (x, hx, rest) = everywhere(place, words, dtype, (5, 4, 3, 8))
    of_torch = place.startswith("torch")

    def same(ours, theirs):
        return torch.allclose(ours, theirs, rtol=0, atol=1e-14) if of_torch else torch.equal(ours, theirs)

    rest["resets"] = torch.zeros(5, 4, dtype=torch.bool)
    rest["resets"][[1, 3, 2, 4, 0], [0, 0, 1, 2, 3]] = True  # the last reset is before the first step

    def run():
        return {name: t.cpu() for name, t in results(module, x, hx, **rest).items()}

    clean = run()
    h, c = (tree_leaves(hx) * 2)[:2]  # of a GRU twice h
    # NaN within an episode, and in initial states of the first and of the last direction.
    x[1, 0, 1], h[0, 1], c[-1, 2] = NAN, NAN, INF
    h[0, 3], c[0, 3] = NAN, INF
    dirty = run()
    behind = torch.zeros(len(h), 5, 4, dtype=torch.bool)  # [D, T, B], true between a NaN and the reset
    behind[0, 1:3, 0], behind[0, :2, 1] = True, True
    if module.bidirectional:
        behind[1, 1, 0], behind[1, 4:, 2] = True, True
    else:
        behind[0, :4, 2] = True
    for d, (ours, theirs) in enumerate(zip(*(found["output"].split(8, dim=2) for found in (dirty, clean)))):
        assert (ours != theirs).any(2)[behind[d]].all()
        assert same(ours[~behind[d]], theirs[~behind[d]])
    assert dirty["dweight_hh_l0"].isnan().any()
    apart = ~behind.any(0)
    assert same(dirty["dx"][apart], clean["dx"][apart])
    letters = letters_of(module)
    assert all(same(dirty[f"{letter}0"], clean[f"{letter}0"]) for letter in letters)
    assert all(same(dirty[f"d{letter}0"][:, 3], clean[f"d{letter}0"][:, 3]) for letter in letters)
