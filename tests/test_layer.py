"""One layer in one direction on every backend and family of kernels, against the NumPy oracle: a table of cases.

Without a GPU the Triton kernels run in Triton's interpreter, where bfloat16 products are wrong (so bfloat16 is in
test_gpu.py), and those in CUDA C++ are compiled by g++. On a GPU:

    pytest tests/test_layer.py --require-gpu
    compute-sanitizer --tool memcheck   python -m pytest tests/test_layer.py -k cuda
    compute-sanitizer --tool racecheck  python -m pytest tests/test_layer.py -k cuda
"""

import dataclasses

import pytest
import torch
from comparing import DEVICE, MASKS, PLACES, check, example_of
from places import INTERPRETED, KERNELS, tf32

pytestmark = pytest.mark.usefixtures("exact_float32_products")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAN, INF = float("nan"), float("inf")

MIX = "ragged resets reverse"
MOST = "ragged states peepholes reverse"
TORCHS = ("plain", "reverse", "ragged", "ragged reverse", "resets", MIX, "no-bias ragged resets")
DIFFER = ("plain", MIX)
CELLS = ("plain", "reverse", "ragged resets", MIX, "no-bias ragged resets", "states", "ragged states reverse",
         "peepholes", MOST)  # fmt: skip
# With states to reset to, since the norm of a W_hh h that is almost zero multiplies every error.
OF_HH, OF_C, OF_ALL = "norm-hh no-bias ragged states", "norm-c no-bias ragged resets reverse", f"{MOST} norms"
NORMS = ("norms", OF_HH, OF_C, OF_ALL)
KEPT, READ = "4,17,3,33", "3,9,3,75"  # more tiles, and more rows, than blocks of CUPY_PLANS
WITH_NORMS, FAMILIES = "step resident cooperative/4/1/4", "step resident cooperative/4/1/4 pointwise"


def both(cells, noises=("masks",)) -> tuple[str, ...]:
    return tuple(f"{cell} {noise}" for cell in cells for noise in noises)


# Pairs of options, not products: each cell with all noise and with none, and each kind of noise with one cell.
NOISY = both([MIX], (*MASKS, "expected"))
FEWER = ("plain", "no-bias ragged resets", "states", MOST)  # that have all options of CELLS
TABLE = [  # places, dtype, and cases: how many problems, more of the small, whose errors vary more; sizes; options
    ("reference", F64, (3, "6,4,3,5", *CELLS, *NORMS, *NOISY, *both((*CELLS, *NORMS), ("masks", "expected"))),
     (2, "6,4,3,5,2", *CELLS, *NOISY, *both(FEWER, ("masks", "expected"))),
     (2, "1,1,1,3", MIX, *both((*FEWER, *NORMS)), f"{MOST} expected")),
    ("torch torch/two", F64, (3, "6,4,3,5 6,4,3,5,2", *TORCHS)), ("torch", F64, (3, "1,1,1,1 2,1,2,130", *DIFFER)),
    # The plans that are chosen, on a GPU too: steps of one sequence; more than one tile of 16 sequences and of 32 units
    ("triton", F32, (24, "1,1,3,1", *DIFFER), (8, "2,3,4,5", *TORCHS), (2, "3,3,3,9", f"{OF_ALL} recompute"),
     (2, "3,4,3,33,7", "plain", "ragged reverse", MIX, "no-bias ragged resets"),
     (2, "3,3,3,9", f"{MOST} masks recompute")),
    ("triton", F16, (2, "4,5,8,40", *DIFFER), (2, "4,3,4,20,7", *both([MOST], ("masks", "expected")))),
    ("triton read/4", F32, (2, "3,3,3,9,4", f"{MIX} recompute")),
    # Several programs with a grid-wide barrier: 3 tiles; 4 tiles, and 6 of h
    ("step", F32, (1, "4,3,3,40 3,18,3,20,33", *DIFFER)), ("step", F16, (1, "4,3,3,40 4,3,3,40,5", *both([MOST]))),
    # And with one more for products of parts of K: two tiles of sequences, and of 64 units; of h alone; a single step
    ("split/4", F32, (1, "3,18,3,70", *DIFFER), (1, "4,3,3,20,70", "plain", *both([MOST])), (1, "1,3,3,40", MIX),
     (1, "5,3,3,11", OF_HH, OF_C)),
    ("split/8", F16, (1, "4,18,3,40", *both([MOST], ("masks", "expected"))), (1, "5,3,3,10", OF_ALL)),
    # And with W_hh in shared memory: two groups, of which one has two tiles of sequences; and three programs
    ("held", F32, (1, "4,35,3,18 4,3,3,40", *DIFFER), (1, "4,18,3,18,7", "plain", MOST)),
    ("held", F16, (1, "4,18,3,40", *both([MOST], ("masks", "expected")))),
    ("held/2 held/4", F32, (1, "4,35,3,18", *DIFFER)), ("held/4", F16, (1, "4,18,3,40", f"{MOST} masks")),
    ("held/ahead", F32, (1, "4,35,3,18", *DIFFER)), ("held/ahead", F16, (1, "4,50,3,18", f"{MOST} masks")),
    # Whole sequences in one launch of programs that need nobody
    ("resident", F32, (2, "5,3,4,6", "ragged", MIX), (2, "4,3,3,20,7", "plain", "resets"), (4, "1,1,3,1", MIX),
     (1, "3,11,3,33", "plain"), (1, "4,2,3,60", MIX)),
    ("resident", F16, (1, "5,3,3,7 5,3,3,33,12", MIX), (1, "3,9,3,40", "plain")),
    # And of programs that exchange words of one unit, or of two in half precision: of 2 to 9, backward 4 to 12
    ("cooperative/4/1/4", F32, (2, "6,3,3,8", "ragged", "resets"), (1, "3,3,3,36", "plain"), (1, "12,2,2,6", MIX),
     (1, "6,3,3,11", OF_HH),  # 3 and 4, of which one has no units
     (1, "3,2,3,36", "norms")),  # more programs, 9, than threads of a row, 8
    ("cooperative/4/1/4", F16, (1, "3,9,3,20", "plain"), (1, "4,9,3,20", OF_HH),  # two batch tiles in one group
     (1, "5,3,3,20,7", "ragged")),
    ("cooperative/8/2/4", F32, (1, "3,17,3,20", MIX, OF_C)),  # three batch tiles in two groups
    ("cooperative/8/1/4", F32, (1, "4,3,3,20,7", "plain")),
    ("cooperative/8/1/4", F16, (1, "4,3,3,33 4,3,3,33,12", MIX), (1, "4,3,3,33", OF_C)),  # a row ends in half a word
    # Backward in one piece, and by two programs that share gates
    ("cooperative/16/1/1", F16, (1, "4,3,3,33 3,9,3,20", MIX)),
    ("cooperative/16/1/1", F32, (1, "5,3,3,20", "plain", OF_HH), (1, "4,9,3,36", OF_C)),
    ("cooperative/8/1/2", F16, (1, "4,9,3,33", MIX)), ("cooperative/8/1/2", F32, (1, "4,3,3,20", OF_ALL)),
    # And of a launch a step, after a product
    ("pointwise", F32, (2, "5,3,4,6 4,9,3,20,7", *DIFFER, "ragged"), (2, "3,4,3,300", *DIFFER),
     (2, "1,1,3,1 4,3,3,33", MIX, *both((*FEWER, "ragged", "reverse")), *NOISY)),
    ("pointwise", F16, (1, "5,3,3,40 3,9,3,33,12", *DIFFER, "reverse"),
     (1, "4,5,3,20", *both([MOST, "ragged states reverse"], ("masks", "expected")))),
    # What torch's LSTM has not, in every family
    ("resident cooperative/4/1/4", F16, (1, "5,3,3,11", "ragged states reverse masks", f"{MOST} expected")),
    ("resident cooperative/4/1/4 cooperative/16/1/1", F32, (1, "5,3,3,11", *both([MOST]))),
    (FAMILIES, F16, (1, "5,3,3,11", "states"), (1, "5,3,3,11,5", "peepholes")),
    (FAMILIES, F32, (1, "5,3,3,11", MOST), (1, "5,3,3,11,5", "ragged states reverse")),
    (WITH_NORMS, F16, (1, "5,3,3,11", OF_ALL)),
    # CUDA C++, with W_hh in registers and read at every step
    ("kept/4", BF16, (8, "2,3,4,5", *TORCHS, "ragged states reverse"), (2, "3,3,3,9,4", f"{MIX} recompute"),
     (3, "5,4,3,13,7 5,4,3,13,1", "ragged states reverse"), (1, KEPT, "ragged states reverse"), (2, KEPT, MIX)),
    ("kept/4", F16, (3, "5,4,3,13,7", *DIFFER, "no-bias ragged resets"), (2, KEPT, MIX)),
    ("kept/1", F16, (8, "2,3,4,5", *DIFFER), (1, KEPT, "plain", "ragged states reverse")),
    ("kept/2", F16, (2, KEPT, MIX)), ("read/1", F16, (2, READ, MIX)), ("read/4", BF16, (2, READ, MIX)),
    ("read/4", F32, (8, "2,3,4,5", *TORCHS, "ragged states reverse"), (1, READ, "plain", "ragged states reverse"),
     (3, "5,4,3,13,7", "reverse", "ragged", "ragged states reverse"), (3, "5,4,3,13,1", *DIFFER),
     (1, "2,1,2,520", "plain")),  # more words than are on their way at once
]  # fmt: skip
SLOW = [("triton", F32, (2, "1,17,5,33 2,1,2,130 3,4,3,33,1", *DIFFER), (1, "9,17,1,33 3,4,3,33,32", MIX),
         (1, "3,17,3,33", *both((*FEWER, *NORMS[1:])), "peepholes"),
         (1, "4,4,3,33,7", *both(FEWER), *NOISY))]  # fmt: skip


def cases(*backends: str) -> pytest.MarkDecorator:
    """The cases of these backends or places."""
    return pytest.mark.parametrize(("place", "dtype", "seeds", "size", "words"), [
        pytest.param(place, dtype, seeds, tuple(map(int, size.split(","))), words, marks=marks,
                     id=f"{place}-{dtype}-{size}-{words}".replace("torch.", ""))
        for table, marks in ((TABLE, ()), (SLOW, pytest.mark.slow)) for places, dtype, *rows in table
        for place in places.split() if place.partition("/")[0] in backends
        for seeds, sizes, *options in rows for size in sizes.split() for words in options
    ])  # fmt: skip


def every_result_and_gradient(monkeypatch, place, dtype, seeds, size, words, device="cpu", **how) -> None:
    backend, force = KERNELS[place]
    options = dict(device=device) if backend == "cupy" else {}
    if place.startswith("cooperative") and "norm" in words:
        options = dict(yield_rate=0.2)
    force(monkeypatch, **options)
    check(size, words, backend, dtype, device, seeds=seeds, **how)


forced = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernels are those that are chosen there")
fresh_memory_is_nan = pytest.mark.usefixtures("nan_in_fresh_memory")  # so that a result which nothing wrote is detected


@cases("torch", "reference")
def test_without_kernels(monkeypatch, place, dtype, seeds, size, words):
    every_result_and_gradient(monkeypatch, place, dtype, seeds, size, words)


@cases("triton")
def test_triton(monkeypatch, place, dtype, seeds, size, words, device):
    every_result_and_gradient(monkeypatch, place, dtype, seeds, size, words, device)


@forced
@fresh_memory_is_nan
@cases("step", "split", "held", "resident", "cooperative", "pointwise")
def test_a_family_of_triton(monkeypatch, place, dtype, seeds, size, words):
    every_result_and_gradient(monkeypatch, place, dtype, seeds, size, words)


@fresh_memory_is_nan
@cases("kept", "read")
def test_cuda(monkeypatch, place, dtype, seeds, size, words, host_or_card):
    every_result_and_gradient(monkeypatch, place, dtype, seeds, size, words, host_or_card)


@pytest.mark.parametrize("place", ["kept/4", "kept/1"])
def test_cuda_in_tf32(monkeypatch, place, host_or_card):
    tf32(monkeypatch, inputs=3)
    every_result_and_gradient(monkeypatch, place, F32, 2, (4, 17, 3, 33), MIX, host_or_card, yardstick="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("words", [*TORCHS, "ragged states reverse"])
@pytest.mark.parametrize("size", [(64, 32, 128, 256), (33, 70, 100, 513), (50, 16, 64, 768)], ids=str)
def test_larger_sizes_in_cuda(size, words, dtype):
    check(size, words, "cupy", dtype, "cuda")


@pytest.mark.parametrize(("projected", "words"), [
    (0, "no-bias ragged resets"), (2, f"{MOST} masks"), (2, f"{MOST} expected"), (0, f"{OF_ALL} masks"),
])  # fmt: skip
def test_second_derivatives_of_the_reference_by_finite_differences(projected, words):
    given = example_of((2, 2, 2, 3, projected), words, 0)
    every = *given.tensors, *given.reset_states

    def layer(*tensors):
        remaining = iter(tensors)
        return tuple(given.call("reference", [None if t is None else next(remaining) for t in every]))

    assert torch.autograd.gradgradcheck(layer, [t.requires_grad_() for t in every if t is not None])


NOISY_CELLS = f"{MOST} masks", "ragged states peepholes norms masks"
OTHERS = "torch", "torch/two", "kept/4", "read/4"
EVERYWHERE = [
    *((place, *case) for place in OTHERS for case in ((MIX, None), ("resets", F16))),
    *((place, *case) for place in ("reference", "triton") for case in zip(NOISY_CELLS, (None, F16))),
    *(pytest.param(place, NOISY_CELLS[0], F16, marks=forced) for place in FAMILIES.split()),
    *(pytest.param(place, NOISY_CELLS[1], None, marks=forced) for place in WITH_NORMS.split()),
]


def run(place, given, dtype=None):
    backend = KERNELS[place].backend
    dtype, device = dtype or PLACES.get(backend, dict(dtype=BF16))["dtype"], DEVICE if backend == "triton" else "cpu"
    return [None if t is None else t.detach().cpu() for t in given.run(backend, dtype, device)]


def identical(some, others) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(some, others, strict=True))


@fresh_memory_is_nan
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize(("place", "words", "dtype"), EVERYWHERE)
def test_padding_and_what_no_reset_leaves_change_no_bit(monkeypatch, place, words, dtype):
    """NaN and infinity there, of the output's gradient too: the same bits, as without gradients. Padding's are zero."""
    KERNELS[place].force(monkeypatch)
    given = example_of((5, 3, 3, 12), f"ragged {words}", 0)
    padding = torch.arange(5)[:, None] >= given.lengths  # [T, B]
    clean = run(place, given, dtype)
    assert (clean[0][padding] == 0).all()
    assert (clean[3][padding] == 0).all()
    with torch.no_grad():
        assert identical(run(place, given, dtype)[:3], clean[:3])
    unread = padding, padding, *[padding | ~given.resets] * 2
    for t, where in zip((given.tensors[0], given.output_gradients[0], *given.reset_states), unread):
        if t is not None:
            t[where] = torch.where(torch.rand(t.shape) < 0.5, NAN, INF)[where].double()
    assert identical(run(place, given, dtype), clean)


@fresh_memory_is_nan
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("place", "words", "dtype"), EVERYWHERE)
def test_nan_does_not_pass_a_reset(monkeypatch, place, words, dtype):
    """Nor into another sequence: x, h0 and c0 with NaN or infinity change no bit of what does not follow them."""
    KERNELS[place].force(monkeypatch)
    given = example_of((5, 4, 3, 12), words.replace("ragged ", "").replace("masks", "zoneout_h zoneout_c"), 0)
    given = dataclasses.replace(given, resets=torch.zeros(5, 4, dtype=torch.bool))
    given.resets[[1, 3, 2, 4, 0], [0, 0, 1, 2, 3]] = True  # the last before the first step
    dtype = None if place.startswith("torch") else dtype  # whose float16 on the CPU rounds otherwise next to NaN
    clean = run(place, given, dtype)
    first = 2 if given.reverse else 1  # step of an episode in the middle
    given.tensors[0][first, 0, 1], given.tensors[1][1, 0], given.tensors[2][2, 0] = NAN, NAN, INF
    if not given.reverse:
        given.tensors[1][3], given.tensors[2][3] = NAN, INF
    behind = torch.zeros(5, 4, dtype=torch.bool)  # [T, B] between NaN and the reset
    behind[1:3, 0] = True
    for b, reset in ((1, 2), (2, 4)):
        behind[slice(reset, None) if given.reverse else slice(reset), b] = True
    dirty = run(place, given, dtype)
    assert (dirty[0] != clean[0]).any(2)[behind].all()
    assert dirty[7].isnan().any(), "of weight_hh"
    for k in (0, 3):  # h and dx, in time
        assert torch.equal(dirty[k][~behind], clean[k][~behind])
    assert identical([*dirty[1:3], dirty[4][3], dirty[5][3]], [*clean[1:3], clean[4][3], clean[5][3]])
