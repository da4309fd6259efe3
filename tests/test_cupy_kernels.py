"""The kernels in CUDA C++ against the float64 oracle: every result and every gradient.

Without a GPU the very same source is compiled by g++ (host_cuda.py), its threads take turns in an order that a seed
decides, and the backend's own launcher drives it. On a GPU:

    pytest tests/test_cupy_kernels.py --require-gpu
    compute-sanitizer --tool memcheck   python -m pytest tests/test_cupy_kernels.py -k cuda
    compute-sanitizer --tool racecheck  python -m pytest tests/test_cupy_kernels.py -k cuda
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import host_cuda
import pytest
import torch
from comparing import assert_as_good_as_torch, example
from test_kernels import DIFFER_MOST, VARIANTS
from torch import Tensor, nn

import gpu_lstm
from gpu_lstm import backends, precision, reference
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels import timeouts as giving_up
from gpu_lstm.kernels.cupy_lstm import launch, source
from gpu_lstm.kernels.cupy_lstm.planning import Card, Plan, plans
from gpu_lstm.kernels.problem import Problem, Recurrence, problem_of

pytestmark = pytest.mark.usefixtures("exact_float32_products")
HALF = (torch.float16, torch.bfloat16)
VARIANTS = VARIANTS | {"states to reset to": dict(ragged=True, resets=0.3, reverse=True, states=True)}
FEW = (*DIFFER_MOST, "states to reset to")
SMALL = (2, 3, 4, 5)  # (T, B, I, H)
LARGE = {True: (4, 17, 3, 33), False: (3, 9, 3, 75)}  # of weights kept and read: more tiles and more rows than blocks


def example_of(size, variant, seed):
    return example(*size, **VARIANTS[variant], seed=seed)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> Iterator[str]:
    """Where the kernels run. On the CPU, memory from torch.empty is full of NaN."""
    if request.param == "cuda":
        yield "cuda"
        return
    monkeypatch.setattr(backends, "_cupy_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(launch, "launch_kernel", host_cuda.launcher())
    torch.use_deterministic_algorithms(True)
    yield "cpu"
    torch.use_deterministic_algorithms(False)


def _of_kind(
    kept: bool, parts: int, warps: int = 8, multiprocessors: int = 16
) -> Callable[[Problem, Card, bool], Plan]:
    """In the place of choose_plan: weights in registers or read, and so many blocks that share gates backward."""

    def choose(problem: Problem, card: Card, backward: bool) -> Plan:
        found = [
            plan
            for plan in plans(problem, Card(90, multiprocessors), backward)
            if (plan.chunks > 0, plan.warps) == (kept, warps) and (plan.parts == parts or not backward)
        ]
        return min(found, key=lambda plan: plan.clocks)

    return choose


def _kept(parts: int) -> Callable[[Problem, Card, bool], Plan]:
    return _of_kind(True, parts, warps=4)


# W_hh in registers, by all ways to share gates backward; and read at every step, by so few blocks that each takes
# several shares of rows.
READ = _of_kind(False, 4, multiprocessors=4)
KINDS = {"kept, 4": _kept(4), "kept, 2": _kept(2), "kept, 1": _kept(1), "read": READ, "read, 1": _of_kind(False, 1)}


@pytest.mark.parametrize(
    ("large", "variant"), [*((False, variant) for variant in VARIANTS), *((True, variant) for variant in FEW)]
)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("kept, 4", torch.bfloat16), ("kept, 1", torch.float16), ("read", torch.float32)], ids=str
)
def test_every_result_and_gradient(monkeypatch, kind, dtype, large, variant, device):
    monkeypatch.setattr(launch, "choose_plan", KINDS[kind])
    yardstick = "reference" if "states" in variant else "torch"
    size, problems = (LARGE["kept" in kind], 1) if large else (SMALL, 8)
    assert_as_good_as_torch(partial(example_of, size, variant), "cupy", dtype, device, problems, yardstick)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("kept, 4", dtype) for dtype in (torch.float32, *HALF)), ("kept, 2", torch.float16),
        ("kept, 1", torch.float32), ("read", torch.float32), ("read", torch.bfloat16), ("read, 1", torch.float16),
    ],
    ids=str,
)  # fmt: skip
def test_any_order_of_turns(monkeypatch, kind, dtype, seed, device):
    if device == "cpu":
        monkeypatch.setattr(launch, "launch_kernel", host_cuda.launcher(seed=seed))
    if "kept" in kind and dtype is torch.float32:
        monkeypatch.setattr(precision, "_cudnn_takes_tf32", lambda: True)
        monkeypatch.setattr(reference, "linear", _TF32.linear)
    monkeypatch.setattr(launch, "choose_plan", KINDS[kind])
    yardstick = "torch" if dtype in HALF or "read" in kind else "reference"
    make_example = partial(example_of, LARGE["kept" in kind], "ragged resets reverse")
    assert_as_good_as_torch(make_example, "cupy", dtype, device, 1, yardstick)


class _TF32:
    """The products of the reference, which takes those of a step as W_ih x + b, then W_hh h + b: the latter with
    operands cut to the 10 bits that tensor cores take."""

    taken = 0

    @classmethod
    def linear(cls, x: Tensor, w: Tensor, b: Tensor | None, gain: None) -> Tensor:
        cls.taken += 1
        return nn.functional.linear(x, w, b) if cls.taken % 2 else _CutLinear.apply(x, w) + (0 if b is None else b)


class _CutLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return _cut(x) @ _cut(w).T

    @staticmethod
    def backward(ctx, d):
        x, w = ctx.saved_tensors
        return _cut(d) @ _cut(w), d.T @ x


def _cut(t: Tensor) -> Tensor:
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) if t.dtype is torch.float32 else t


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    ("projected", "variant"), [*((7, variant) for variant in VARIANTS), *((1, variant) for variant in FEW)]
)
def test_projection(monkeypatch, projected, variant, dtype, device):
    monkeypatch.setattr(launch, "choose_plan", KINDS["read" if dtype is torch.float32 else "kept, 4"])
    yardstick = "reference" if "states" in variant else "torch"
    make_example = partial(example_of, (5, 4, 3, 13, projected), variant)
    assert_as_good_as_torch(make_example, "cupy", dtype, device, yardstick=yardstick)


def test_more_words_than_are_on_their_way_at_once(monkeypatch, device):
    monkeypatch.setattr(launch, "choose_plan", READ)
    assert_as_good_as_torch(partial(example_of, (2, 1, 2, 520), "plain"), "cupy", torch.float32, device, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(64, 32, 128, 256), (33, 70, 100, 513), (50, 16, 64, 768)], ids=str)
def test_larger_sizes_on_a_gpu(size, variant, dtype):
    yardstick = "reference" if "states" in variant else "torch"
    assert_as_good_as_torch(partial(example_of, size, variant), "cupy", dtype, "cuda", yardstick=yardstick)


def _layer(device: str, dtype=torch.float32, T=4, B=3, H=8) -> tuple[Tensor, Recurrence]:
    """gates and recurrence of layer_forward."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    recurrence = Recurrence(weight_hh=normal(4 * H, H), h0=normal(B, H), c0=normal(B, H, dtype=torch.float32))
    return normal(T, B, 4 * H), recurrence


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tensors_that_are_not_aligned_give_the_same_bits(device, dtype):
    def moved(t: Tensor) -> Tensor:
        """The same, an element past an address that is a multiple of 16 bytes."""
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    gates, r = _layer(device, dtype)
    moved_r = r._replace(weight_hh=moved(r.weight_hh), h0=moved(r.h0), c0=moved(r.c0))

    def results(gates, r, move):
        h, h_n, c_n, c = launch.layer_forward(gates, r, save=True)
        return gates, h, h_n, c_n, *launch.layer_backward(move(h), move(h_n), None, gates, move(c), r)

    found, expected = results(moved(gates), moved_r, moved), results(gates.clone(), r, torch.clone)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["kept, 4", "read"])
def test_padding_is_zero_and_its_gates_are_left_alone(monkeypatch, kind, device):
    monkeypatch.setattr(launch, "choose_plan", KINDS[kind])
    gates, r = _layer(device, torch.float16)
    gates[2:, 1] = float("nan")
    gates[:, 2] = float("nan")
    r = r._replace(lengths=torch.tensor([4, 2, 0], device=device), reverse=True)
    h, h_n, c_n, c = launch.layer_forward(gates, r, save=True)
    for past_the_end in (h[2:, 1], h[:, 2], c[2:, 1], c[:, 2]):
        assert (past_the_end == 0).all()
    assert gates[2:, 1].isnan().all()
    assert torch.equal(h_n[2], r.h0[2])
    assert torch.equal(c_n[2], r.c0[2])
    dgates, dh0, dc0, *_ = launch.layer_backward(h, h_n, c_n, gates, c, r)
    assert (dgates[2:, 1] == 0).all()
    assert (dgates[:, 2] == 0).all()
    assert torch.equal(dh0[2], h_n[2])
    assert torch.equal(dc0[2], c_n[2])


@pytest.mark.parametrize("kind", ["kept, 4", "read"])
def test_nothing_but_h_without_save(monkeypatch, kind, device):
    monkeypatch.setattr(launch, "choose_plan", KINDS[kind])
    gates, r = _layer(device, torch.float16)
    saved = launch.layer_forward(gates.clone(), r, save=True)
    untouched = gates.clone()
    h, h_n, c_n, c = launch.layer_forward(gates, r, save=False)
    assert c is None
    assert torch.equal(gates, untouched)
    assert all(map(torch.equal, (h, h_n, c_n), saved))


def test_a_nan_is_data_and_stays_in_its_sequence(monkeypatch, device):
    """Nobody waits for it for ever, although the fill is a NaN."""
    monkeypatch.setattr(launch, "choose_plan", KINDS["kept, 4"])
    gates, r = _layer(device, torch.float16)
    r.h0.view(torch.int16)[0, 0] = -1  # the fill's bits
    gates[1, 1] = float("nan")
    h, *_ = launch.layer_forward(gates, r, save=True)
    assert h[:, 0].isnan().all()
    assert h[1:, 1].isnan().all()
    assert h[:, 2].isfinite().all()
    assert h[0, 1].isfinite().all()


def test_an_empty_batch(device):
    gates, r = _layer(device, B=0)
    h, h_n, c_n, c = launch.layer_forward(gates, r, save=True)
    assert (h.shape, h_n.shape, c_n.shape, c.shape) == ((4, 0, 8), (0, 8), (0, 8), (4, 0, 8))
    assert launch.layer_backward(h, None, None, gates, c, r)[0].shape == gates.shape


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    T, B, H = 70_000, 64, 128
    gates = torch.zeros(T, B, 4 * H, dtype=torch.float16, device="cuda")  # 2.3e9 elements
    gates[-1, -1] = 1
    r = _layer("cuda", torch.float16, 1, B, H)[1]
    zeros = r._replace(weight_hh=0 * r.weight_hh, h0=0 * r.h0, c0=0 * r.c0)
    h, *_ = launch.layer_forward(gates, zeros, save=False)
    one = torch.ones((), device="cuda")
    last = one.sigmoid() * (one.sigmoid() * one.tanh()).tanh()
    torch.testing.assert_close(h[-1, -1], last.half().expand(H), rtol=1e-3, atol=1e-3)
    assert (h[-1, :-1] == 0).all()


def test_modules(device):
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 5, 2, bidirectional=True).to(device)
    ours = gpu_lstm.LSTM(3, 5, 2, bidirectional=True, backend="cupy").to(device)
    ours.load_state_dict(theirs.state_dict())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 2, 3, device=device)
    (y, _), (expected, _) = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(compiled(x)[0], expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for our, their in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(our.grad, their.grad)


def test_double_backward(device):
    def penalty(backend: str) -> list[Tensor]:
        given = example(4, 2, 3, 5, ragged=True, resets=0.3, reverse=True)
        tensors = [None if t is None else t.to(device, torch.float32).requires_grad_() for t in given.tensors]
        x, h0, c0, *weights = tensors
        y, _ = lstm_layer(
            x, weights, (h0, c0), lengths=given.lengths.to(device), resets=given.resets.to(device), reverse=True,
            backend=backend,
        )  # fmt: skip
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        return [t.grad for t in tensors if t is not None]

    for ours, theirs in zip(penalty("cupy"), penalty("reference")):
        torch.testing.assert_close(ours, theirs)


# A check that cannot fail is no check: faults are planted in the source, and the comparison must see each.

FAULTS = {  # the part, the text that is replaced, and by what
    "gates f and i swapped": ("cell", "cell.f = sigmoid(z_f);", "cell.f = sigmoid(z_i);"),
    "cell gradient not carried": ("cell", "d.c_prev = dc * f;", "d.c_prev = 0.0f;"),
    "resets ignored": ("indexing", "return resets != nullptr &&", "return false &&"),
    "always forward": ("indexing", "return reverse && step < length ?", "return false ?"),
    "lengths ignored": ("indexing", "lengths != nullptr ?", "false ?"),
    "row before is off by one": ("indexing", "reverse ? time + 1 : time - 1", "time"),
    "h of the wrong step": ("cooperative", "time_of(step - 1, its_length, reverse)", "step < 2 ? T : step - 2"),
    "weights' row is off by one": ("cooperative", "gate * H + unit : -1", "gate * H + (unit + 1) % H : -1"),
    "fragments swapped": ("products", "[0], quad.x, quad.y", "[0], quad.y, quad.x"),
    "rows of a tile swapped": ("products", "of[0][half] = quad.x", "of[0][1 - half] = quad.x"),
    "a warp takes another's part of K": ("products", "x.await(polling);\n        float", "x.await(polling);\n        "
                                        "x.quad[0].x = lane.warp == 1 ? x.quad[0].y : x.quad[0].x;\n        float"),
    "a stale word is taken for new": ("exchange", "return most != SENTINEL;", "return true;"),
    "partial sums of another step": ("exchange", "missing |= (word[n] & 1) != phase;",
                                     "missing |= word[n] == SENTINEL;"),
    "published too early": ("cooperative", "const unsigned word = pack<E>(h_next);",
                            "const unsigned word = pack<E>(h_next);\nstore_relaxed_if(in_batch & "
                            "unit % PER_WORD<E> == 0, h + at.row * W + unit / PER_WORD<E>, word ^ 0x8000);"),
    "one half of the parts for all turns": ("products", "(turn * WARPS + warp)", "warp"),
    "a missing barrier": ("products", "odd[tile][2 + n]};\n        __syncthreads();", "odd[tile][2 + n]};"),
    "what a reset leaves is not taken": ("cooperative", "load_if(valid & !at.continues, reset_c + at.row",
                                         "load_if(false, reset_c + at.row"),
}  # fmt: skip
READ_FAULTS = {
    "a missing barrier": ("products", "= sums[n][s];\n        __syncthreads();", "= sums[n][s];"),
    "a warp reads before all have laid down": ("products", "x.quad[chunk];\n            barrier_of_warp();",
                                               "x.quad[chunk];"),
    "shares of rows left out": ("cooperative", "if (!ONE) row += rows;", "row += H;"),
}  # fmt: skip


def _is_caught(monkeypatch, change: tuple[str, str, str] | None, choose, dtype, size, variant) -> bool:
    """Whether the comparison sees it in some order of turns."""
    changes = {}
    if change is not None:
        part, text, fault = change
        found = source.parts()[part]
        assert found.count(text) == 1, f"{part}: {text}"
        changes[part] = found.replace(text, fault)
    monkeypatch.setattr(backends, "_cupy_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(launch, "choose_plan", choose)
    for seed in range(4):
        monkeypatch.setattr(launch, "launch_kernel", host_cuda.launcher(changes, seed))
        try:
            yardstick = "reference" if "states" in variant else "torch"
            assert_as_good_as_torch(partial(example_of, size, variant), "cupy", dtype, seeds=1, yardstick=yardstick)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("fault", [*FAULTS, None])
def test_a_planted_fault_is_seen(monkeypatch, fault):
    variant = "states to reset to" if fault and "leaves" in fault else "ragged resets reverse"
    change = FAULTS[fault] if fault else None
    choose = _of_kind(True, 4, warps=4, multiprocessors=12)  # one group of blocks, which takes two batch tiles
    assert _is_caught(monkeypatch, change, choose, torch.float16, (5, 9, 3, 33), variant) == bool(fault)


@pytest.mark.parametrize("fault", [*READ_FAULTS, None])
def test_a_fault_where_weights_are_read_is_seen(monkeypatch, fault):
    change = READ_FAULTS[fault] if fault else None
    assert _is_caught(monkeypatch, change, READ, torch.float32, LARGE[False], "ragged resets reverse") == bool(fault)


def test_a_launch_whose_blocks_are_not_all_there_ends_and_is_told(monkeypatch):
    """As if the card held one block less than it says."""
    impatient = source.parts()["exchange"].replace("POLL_LIMIT = 1 << 22", "POLL_LIMIT = 1 << 7")
    monkeypatch.setattr(launch, "launch_kernel", host_cuda.launcher({"exchange": impatient}))
    gates, r = _layer("cpu", torch.float16, H=33)
    plan = KINDS["kept, 4"](problem_of(gates, r), launch.card_of(gates.device), False)
    launch.layer_forward(gates, r, save=False, plan=replace(plan, grid=(plan.grid[0] - 1, 1)))
    with pytest.raises(RuntimeError, match="lstm_cooperative_forward timed out at step 1 on cpu"):
        giving_up.raise_if_timed_out(gates.device)
