"""Addresses outside of their tensors are detected, whatever lies there: in each family of kernels, both ways."""

import re
from collections.abc import Callable
from functools import partial

import memory_checks
import places
import pytest
import torch
from places import CUPY_PLANS, KERNELS, cuda
from torch import Tensor, tensor, zeros
from triton.runtime.errors import InterpreterError

import gpu_lstm
from gpu_lstm.kernels.cupy_lstm import launch as cupy
from gpu_lstm.kernels.cupy_lstm import source
from gpu_lstm.kernels.triton_lstm import indexing, launch

pytestmark = [
    pytest.mark.skipif(not places.INTERPRETED, reason="compiled kernels have compute-sanitizer"),
    pytest.mark.usefixtures("exact_float32_products"),
]

B, I, H = 3, 2, 6
OUTSIDE = r"a \d+-byte (load|store|atomic) (begins|ends) \d+ bytes (before|past the end of) "
NOISE = dict(peepholes=True, recurrent_dropout=0.5, zoneout=0.3)
NORMS = dict(layer_norm=True)
FAMILIES = "step", "split/4", "held/ahead", "held/2", "resident", "cooperative/4/1/4", "pointwise"
CUDA = "kept/4", "read/4"
both_ways = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def run(family: str, before: Callable = lambda: None, backward: bool = False, T: int = 2, **options) -> None:
    """A call and its gradients, with something done `before` either. The last sequence is the longest.

    At its end it is reset, so that kernels need everything that they are given.
    """
    torch.manual_seed(0)
    dtype = torch.float16 if "kept" in family else torch.float32
    lstm = gpu_lstm.LSTM(I, H, backend=KERNELS[family].backend, dtype=dtype, **options)
    lengths, resets = tensor([1, T, T]), zeros(T, B, dtype=torch.bool)
    resets[-1, -1] = True
    left = [zeros(1, T, B, width, dtype=dtype, requires_grad=True) for width in (lstm.proj_size or H, H)]
    if not backward:
        before()
    y, state = lstm(torch.randn(T, B, I, dtype=dtype), lengths=lengths, resets=resets, reset_states=left)
    if backward:
        before()
    torch.autograd.grad(sum(t.square().sum() for t in (y, *state)), [*lstm.parameters(), *left])


# Functions of the interpreted kernels, and those that stand in their place.
cells_at, load_gates, sequences, time_of = (
    getattr(indexing, name) for name in ("cells_at", "load_gates", "sequences", "time_of")
)


def a_row_too_many(index, batch):
    return sequences(index, batch)._replace(in_batch=index < batch.B + 1)


def a_column_too_many(*given):
    cells = cells_at(*given)
    return cells._replace(at=cells.at + 1, gates_at=cells.gates_at + 1, state_at=cells.state_at + 1)


IN_TRITON = {
    "a row too many": ("sequences", a_row_too_many),
    "a column too many": ("cells_at", a_column_too_many),
    "a step too many": ("time_of", lambda *given: time_of(*given) + 1),
    "a mask left out": ("load_gates", lambda ptr, at, mask, *options: load_gates(ptr, at, mask | True, *options)),
}


@pytest.mark.parametrize("family", [*FAMILIES, *CUDA])
def test_without_a_fault(monkeypatch, family):
    KERNELS[family].force(monkeypatch)
    run(family)


@both_ways
@pytest.mark.parametrize("fault", IN_TRITON)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_in_triton_is_detected(monkeypatch, family, fault, backward):
    KERNELS[family].force(monkeypatch)
    with pytest.raises(InterpreterError, match=OUTSIDE):
        run(family, partial(monkeypatch.setattr, indexing, *IN_TRITON[fault]), backward)


IN_CUDA = {  # an argument of the launch, or a text of the source and what stands in its place
    "a row too many": "B",
    "a column too many": ("* H + unit;", "* H + unit + 1;"),
    "a step too many": "T",
    "a mask left out": ("load_if(valid, my_gates", "load_if(true, my_gates"),
    "a plain pointer": ("load_if(valid, my_gates + gate * H)", "valid ? my_gates[gate * H] : E{}"),
}


@both_ways
@pytest.mark.parametrize("fault", IN_CUDA)
@pytest.mark.parametrize("family", CUDA)
def test_a_fault_in_cuda_is_detected(monkeypatch, family, fault, backward):
    KERNELS[family].force(monkeypatch)
    run_kernel, planted = cupy.launch_kernel, IN_CUDA[fault]

    def launch_kernel(*given, **arguments):
        run_kernel(*given, **arguments | {planted: arguments[planted] + 1})

    def plant():
        if isinstance(planted, str):
            return monkeypatch.setattr(cupy, "launch_kernel", launch_kernel)
        text = source.parts()["cooperative"]
        assert planted[0] in text
        cuda(monkeypatch, CUPY_PLANS[family], changes={"cooperative": text.replace(*planted)})

    with pytest.raises(AssertionError, match="by no function" if fault == "a plain pointer" else OUTSIDE):
        run(family, plant, backward)


# The last element of some is not needed: the error's is the host's, c of the last step is computed again, and so is the
# scale of what a reset follows.
@pytest.mark.parametrize(("family", "options", "unread"), [
    ("step", NORMS, "error_ptr scale_hh_ptr"), ("step", dict(proj_size=5), "error_ptr"),
    ("split/4", {}, "error_ptr"), ("held/ahead", {}, "error_ptr"), ("held/2", {}, "error_ptr"),
    ("resident", NORMS, ""), ("cooperative/4/1/4", NORMS, "error_ptr"), ("pointwise", dict(T=3), "c_ptr"),
])  # fmt: skip
def test_each_buffer_in_triton_that_is_one_element_short_is_detected(monkeypatch, family, options, unread):
    """All tensors of all launches at once: what is detected is noted, and happens, since the memory is there."""
    KERNELS[family].force(monkeypatch)
    run_kernel, check, given, detected = launch.launch_kernel, memory_checks._check_each, set(), set()

    def note(*access):
        with pytest.raises(AssertionError, match=OUTSIDE) as caught:
            check(*access)
        detected.add(re.match(rf"(\w+): {OUTSIDE}(\w+) ", str(caught.value)).group(1, 5))

    def launch_kernel(kernel, grid, **arguments):
        tensors = {name: t.view(-1) for name, t in arguments.items() if isinstance(t, Tensor)}
        short = {name: t[:-1] for name, t in tensors.items() if len(t) > 1}  # one without elements has no address
        given.update((kernel.__name__, name) for name in short)
        run_kernel(kernel, grid, **arguments | short)

    monkeypatch.setattr(memory_checks, "_check_each", note)
    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)
    run(family, **NOISE | options)
    assert {name for _, name in given - detected} == set(unread.split())


def test_an_atomic_operation_outside_its_tensor_is_detected(monkeypatch):
    KERNELS["step"].force(monkeypatch)
    run_kernel = launch.launch_kernel

    def launch_kernel(*place, arrivals_ptr, **arguments):
        run_kernel(*place, arrivals_ptr=arrivals_ptr[1:], **arguments)

    with pytest.raises(InterpreterError, match="a 4-byte atomic ends 4 bytes past the end of arrivals_ptr "):
        run("step", partial(monkeypatch.setattr, launch, "launch_kernel", launch_kernel))


@pytest.mark.parametrize("family", CUDA)
def test_each_buffer_in_cuda_that_is_one_element_short_is_detected(monkeypatch, family):
    """Every tensor of every launch, but for the error, whose last element is the host's."""
    KERNELS[family].force(monkeypatch)
    run_kernel = cupy.launch_kernel

    def launch_kernel(*place, **arguments):
        for short, t in arguments.items():
            if isinstance(t, Tensor) and short != "error":
                own = {name: a.clone() if isinstance(a, Tensor) else a for name, a in arguments.items()}
                own[short] = own[short].view(-1)[:-1]
                with pytest.raises(AssertionError, match=rf"{OUTSIDE}{short} "):
                    run_kernel(*place, **own)
        run_kernel(*place, **arguments)

    monkeypatch.setattr(cupy, "launch_kernel", launch_kernel)
    run(family)
