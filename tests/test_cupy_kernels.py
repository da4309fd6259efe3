"""lstm.cu against the float64 oracle: every result and every gradient.

Without a GPU the very same source is compiled by g++ (host_cuda.py) and driven by the backend's own launcher. On a GPU:

    pytest tests/test_cupy_kernels.py --require-gpu
    compute-sanitizer --tool memcheck   python -m pytest tests/test_cupy_kernels.py -k cuda
    compute-sanitizer --tool racecheck  python -m pytest tests/test_cupy_kernels.py -k "cuda and sequence"
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import host_cuda
import pytest
import torch
from comparing import assert_as_good_as_torch, example
from test_kernels import VARIANTS, example_of
from torch import Tensor, nn

import gpu_lstm
from gpu_lstm import backends
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels.cupy_lstm import launch, source
from gpu_lstm.kernels.cupy_lstm.planning import shared_limit
from gpu_lstm.kernels.cupy_lstm.sequence import sequence_plan
from gpu_lstm.kernels.cupy_lstm.step import STEP_PLAN
from gpu_lstm.kernels.recurrence import Recurrence

SIZES = [  # (T, B, I, H), and how many problems of that size: more of the small, whose rounding errors vary more
    ((1, 1, 3, 1), 24),
    ((2, 3, 4, 5), 8),
    ((9, 1, 3, 5), 8),
    ((9, 3, 1, 16), 3),
    ((2, 17, 5, 33), 2),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> Iterator[str]:
    """Where the kernels run. On the CPU, memory from torch.empty is full of NaN."""
    if request.param == "cuda":
        yield "cuda"
        return
    monkeypatch.setattr(backends, "_cupy_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(launch, "launch_kernel", host_cuda.compiled_launcher())
    torch.use_deterministic_algorithms(True)
    yield "cpu"
    torch.use_deterministic_algorithms(False)


def _by_steps(r, dtype, backward):
    return STEP_PLAN


def _by_sequence(r, dtype, backward):
    plan = sequence_plan(r.hidden, dtype, shared_limit(r.c0.device), backward)
    assert plan is not None
    return plan


def _by_cluster(r, dtype, backward, blocks=8):
    """Forward; there is none backward."""
    return sequence_plan(r.hidden, dtype, shared_limit(r.c0.device), backward, 1 if backward else blocks)


FAMILIES = {"step": _by_steps, "sequence": _by_sequence}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "problems"), SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_result_and_gradient(monkeypatch, family, size, problems, variant, dtype, device):
    monkeypatch.setattr(launch, "choose_plan", FAMILIES[family])
    assert_as_good_as_torch(partial(example_of, size, variant), "cupy", dtype, device, problems)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projected", [1, 7, 32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_projection(projected, variant, dtype, device):
    assert_as_good_as_torch(partial(example_of, (5, 4, 3, 33, projected), variant), "cupy", dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", source.CLUSTER_SIZES)
@pytest.mark.parametrize("variant", ["plain", "ragged resets reverse"])
def test_clusters(monkeypatch, blocks, variant, dtype, device):
    major = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
    if major < 9 or (blocks == 16 and major > 9):
        pytest.skip("there are no clusters before sm_90, and those of 16 blocks are for sm_90 alone")
    monkeypatch.setattr(launch, "choose_plan", partial(_by_cluster, blocks=blocks))
    assert_as_good_as_torch(partial(example_of, (5, 5, 3, 18), variant), "cupy", dtype, device, seeds=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(64, 32, 128, 256), (33, 70, 100, 513), (100, 33, 64, 128)], ids=str)
def test_larger_sizes_on_a_gpu(size, variant, dtype):
    assert_as_good_as_torch(partial(example_of, size, variant), "cupy", dtype, "cuda")


def _layer(device: str, dtype=torch.float32, T=4, B=3, H=8) -> tuple[Tensor, Recurrence]:
    """gates and recurrence of layer_forward."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    recurrence = Recurrence(weight_hh=normal(4 * H, H), h0=normal(B, H), c0=normal(B, H, dtype=torch.float32))
    return normal(T, B, 4 * H), recurrence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_aligned_give_the_same_bits(monkeypatch, device, dtype):
    def moved(t: Tensor) -> Tensor:
        """The same, an element past an address that is a multiple of 16 bytes."""
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    monkeypatch.setattr(launch, "choose_plan", _by_steps)
    gates, r = _layer(device, dtype)
    moved_r = replace(r, weight_hh=moved(r.weight_hh), h0=moved(r.h0), c0=moved(r.c0))

    def results(gates, r, move):
        h, h_n, c_n, c = launch.layer_forward(gates, r, save=True)
        return gates, h, h_n, c_n, *launch.layer_backward(move(h), move(h_n), None, gates, move(c), r)

    assert all(map(torch.equal, results(moved(gates), moved_r, moved), results(gates.clone(), r, torch.clone)))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_zero_and_its_gates_are_left_alone(monkeypatch, family, device):
    monkeypatch.setattr(launch, "choose_plan", FAMILIES[family])
    gates, r = _layer(device)
    gates[2:, 1] = float("nan")
    gates[:, 2] = float("nan")
    r = replace(r, lengths=torch.tensor([4, 2, 0], device=device), reverse=True)
    h, h_n, c_n, c = launch.layer_forward(gates, r, save=True)
    for past_the_end in (h[2:, 1], h[:, 2], c[2:, 1], c[:, 2]):
        assert (past_the_end == 0).all()
    assert gates[2:, 1].isnan().all()
    assert torch.equal(h_n[2], r.h0[2])
    assert torch.equal(c_n[2], r.c0[2])
    dgates, dh0, dc0, _ = launch.layer_backward(h, h_n, c_n, gates, c, r)
    assert (dgates[2:, 1] == 0).all()
    assert (dgates[:, 2] == 0).all()
    assert torch.equal(dh0[2], h_n[2])
    assert torch.equal(dc0[2], c_n[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_h_without_save(monkeypatch, family, device):
    monkeypatch.setattr(launch, "choose_plan", FAMILIES[family])
    gates, r = _layer(device)
    saved = launch.layer_forward(gates.clone(), r, save=True)
    untouched = gates.clone()
    h, h_n, c_n, c = launch.layer_forward(gates, r, save=False)
    assert c.numel() == 0
    assert torch.equal(gates, untouched)
    assert all(map(torch.equal, (h, h_n, c_n), saved))


def test_an_empty_batch(device):
    gates, r = _layer(device, B=0)
    h, h_n, c_n, c = launch.layer_forward(gates, r, save=True)
    assert (h.shape, h_n.shape, c_n.shape, c.shape) == ((4, 0, 8), (0, 8), (0, 8), (4, 0, 8))
    assert launch.layer_backward(h, None, None, gates, c, r)[0].shape == gates.shape


def test_more_steps_than_a_grid_has_rows(monkeypatch, device):
    monkeypatch.setattr(launch, "choose_plan", _by_steps)
    h, h_n, *_ = launch.layer_forward(*_layer(device, T=66_000, B=1, H=1), save=False)
    assert torch.equal(h[-1], h_n)
    assert h.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_more_elements_than_32_bits_count(monkeypatch, family):
    monkeypatch.setattr(launch, "choose_plan", FAMILIES[family])
    T, B, H = 70_000, 64, 128
    gates = torch.zeros(T, B, 4 * H, dtype=torch.float16, device="cuda")  # 2.3e9 elements
    gates[-1, -1] = 1
    r = _layer("cuda", torch.float16, 1, B, H)[1]
    zeros = replace(r, weight_hh=0 * r.weight_hh, h0=0 * r.h0, c0=0 * r.c0)
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


# A check that cannot fail is no check: faults are planted in lstm.cu, and the comparison must see each.

FAULTS = {  # the text that is replaced, and by what
    "gates f and i swapped": ("cell.i = sigmoid(z_i);\n        cell.f = sigmoid(z_f);",
                              "cell.i = sigmoid(z_f);\n        cell.f = sigmoid(z_i);"),
    "cell gradient not carried": ("d.c_prev = dc * f;", "d.c_prev = 0.0f;"),
    "resets ignored": ("return resets != nullptr &&", "return false &&"),
    "always forward": ("return reverse && step < length ?", "return false ?"),
    "lengths ignored": ("lengths == nullptr ? T", "true ? T"),
    "row before is off by one": ("reverse ? time + 1 : time - 1", "time"),
}  # fmt: skip
SOURCE = source.SOURCE.read_text()
BARRIERS = [match.start() for match in re.finditer(r"__syncthreads\(\);|__cluster_barrier_wait\(\);", SOURCE)]


def _caught(monkeypatch, text: str, make_example, *families) -> list[bool]:
    """Whether the comparison sees a fault, by each family."""
    monkeypatch.setattr(backends, "_cupy_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(launch, "launch_kernel", host_cuda.launcher(text, torch.float32))
    caught = []
    for family in families:
        monkeypatch.setattr(launch, "choose_plan", family)
        try:
            assert_as_good_as_torch(make_example, "cupy", torch.float32)
            caught.append(False)
        except AssertionError:
            caught.append(True)
    return caught


@pytest.mark.parametrize(("text", "fault"), [*FAULTS.values(), ("", "")], ids=[*FAULTS, "none"])
def test_a_planted_fault_is_seen(monkeypatch, text, fault):
    assert not text or SOURCE.count(text) == 1
    make_example = partial(example_of, (5, 3, 3, 6), "ragged resets reverse")
    caught = _caught(monkeypatch, SOURCE.replace(text, fault), make_example, *FAMILIES.values())
    assert caught == [bool(text)] * 2


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda at: f"line {SOURCE.count(chr(10), 0, at) + 1}")
def test_a_missing_barrier_is_seen(monkeypatch, barrier):
    """The comparison sees that one __syncthreads, or the barrier of a cluster, is gone."""
    statement = SOURCE[barrier : SOURCE.index(";", barrier) + 1]
    text = SOURCE[:barrier] + SOURCE[barrier + len(statement) :]
    family = _by_cluster if "cluster" in statement else _by_sequence
    assert _caught(monkeypatch, text, partial(example_of, (6, 4, 3, 9), "plain"), family) == [True]
