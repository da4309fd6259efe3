"""Addresses outside of their tensors are detected, whatever lies there: in each family of kernels, both ways."""

import re

import memory_checks
import places
import pytest
import torch
from places import CUPY_PLANS, KERNELS, cuda
from torch import Tensor, nn, tensor, zeros
from triton.runtime.errors import InterpreterError

import gpu_lstm
from gpu_lstm.kernels.cupy_rnn import launch as cupy
from gpu_lstm.kernels.cupy_rnn import source
from gpu_lstm.kernels.triton_rnn import launch

pytestmark = [
    pytest.mark.skipif(not places.INTERPRETED, reason="compiled kernels have compute-sanitizer"),
    pytest.mark.usefixtures("exact_float32_products"),
]

B, I, H = 3, 2, 6
OUTSIDE = r"a \d+-byte (load|store|atomic) (begins|ends) \d+ bytes (before|past the end of) "
NOISE = dict(recurrent_dropout=0.5, zoneout=0.3)
PEEPHOLES, NORMS, GRU = dict(peepholes=True), dict(peepholes=True, layer_norm=True), dict(module=gpu_lstm.GRU)
in_cuda = pytest.mark.parametrize("family", ["kept/4", "read/4"])


def run(family: str, T: int = 2, H: int = H, module: type[nn.Module] = gpu_lstm.LSTM, **options) -> None:
    """A call and its gradients. The last sequence is the longest.

    At its end it is reset, so that kernels need everything that they are given.
    """
    torch.manual_seed(0)
    dtype = torch.float16 if "kept" in family else torch.float32
    layer = module(I, H, backend=KERNELS[family].backend, dtype=dtype, **options)
    lengths, resets = tensor([1, T, T]), zeros(T, B, dtype=torch.bool)
    resets[-1, -1] = True
    left = [zeros(1, T, B, width, dtype=dtype, requires_grad=True) for width in (options.get("proj_size", H), H)]
    left = left[:1] if module is gpu_lstm.GRU else left
    given = dict(lengths=lengths, resets=resets, reset_states=left if len(left) > 1 else left[0])
    y, state = layer(torch.randn(T, B, I, dtype=dtype), **given)
    torch.autograd.grad(sum(t.square().sum() for t in (y, *state)), [*layer.parameters(), *left])


@in_cuda
def test_an_access_in_cuda_by_a_plain_pointer_is_detected(monkeypatch, family):
    text, checked = source.texts()["cooperative"], "load_if(valid, my_gates + gate * H)"
    assert checked in text
    KERNELS[family].force(monkeypatch)
    plain = text.replace(checked, "valid ? my_gates[gate * H] : E{}")
    cuda(monkeypatch, CUPY_PLANS[family], changes={"cooperative": plain})
    with pytest.raises(AssertionError, match="by no function"):
        run(family)


# The last element of some is not needed: the error's is the host's, c of the last step is computed again.
@pytest.mark.parametrize(("family", "options", "unread"), [
    ("step", NORMS, "error_ptr"), ("step", PEEPHOLES | dict(proj_size=5), "error_ptr"),
    ("split/4", PEEPHOLES, "error_ptr"), ("held/ahead", PEEPHOLES, "error_ptr"), ("held/2", PEEPHOLES, "error_ptr"),
    ("resident", NORMS, ""), ("cooperative/4/1/4", NORMS, "error_ptr"), ("pointwise", PEEPHOLES | dict(T=3), "c_ptr"),
    *((family, GRU, "error_ptr") for family in ("step", "held/ahead", "held/2", "cooperative/4/1/4")),
    ("split/4", GRU | dict(H=8), "error_ptr"),  # whose 3H has four parts
    ("resident", GRU, ""), ("pointwise", GRU | dict(T=3), "c_ptr"),
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

    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)
    with pytest.raises(InterpreterError, match="a 4-byte atomic ends 4 bytes past the end of arrivals_ptr "):
        run("step")


@in_cuda
@pytest.mark.parametrize("module", [gpu_lstm.LSTM, gpu_lstm.GRU])
def test_each_buffer_in_cuda_that_is_one_element_short_is_detected(monkeypatch, module, family):
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
    run(family, module=module)
