"""Addresses outside of their tensors are detected, whatever lies there: in each family of kernels, both ways."""

import re

import host_cuda
import memory_checks
import places
import pytest
import torch
from places import KERNELS
from torch import Tensor, nn, tensor, zeros
from triton.runtime.errors import InterpreterError

import gpu_lstm
from gpu_lstm.kernels.cupy_rnn import launch as cupy
from gpu_lstm.kernels.triton_rnn import launch

pytestmark = [
    pytest.mark.skipif(not places.INTERPRETED, reason="compiled kernels have compute-sanitizer"),
    pytest.mark.usefixtures("exact_float32_products"),
]

B, I, H = 3, 2, 6
OUTSIDE = r"a \d+-byte (load|store|atomic|access) (begins|ends) \d+ bytes (before|past the end of) "
NOISE = dict(recurrent_dropout=0.5, zoneout=0.3)
PEEPHOLES, NORMS, GRU = dict(peepholes=True), dict(peepholes=True, layer_norm=True), dict(module=gpu_lstm.GRU)


def run(family: str, T: int = 2, H: int = H, module: type[nn.Module] = gpu_lstm.LSTM, **options) -> None:
    """A call and its gradients. The last sequence is the longest.

    At its end it is reset, so that kernels need everything that they are given.
    """
    torch.manual_seed(0)
    dtype = torch.float32
    layer = module(I, H, backend=KERNELS[family].backend, **options)
    lengths, resets = tensor([1, T, T]), zeros(T, B, dtype=torch.bool)
    resets[-1, -1] = True
    left = [zeros(1, T, B, width, dtype=dtype, requires_grad=True) for width in (options.get("proj_size", H), H)]
    left = left[:1] if module is gpu_lstm.GRU else left
    given = dict(lengths=lengths, resets=resets, reset_states=left if len(left) > 1 else left[0])
    y, state = layer(torch.randn(T, B, I, dtype=dtype), **given)
    torch.autograd.grad(sum(t.square().sum() for t in (y, *state)), [*layer.parameters(), *left])


# The last element of some is not needed: the error's is the host's, c of the last step is computed again.
@pytest.mark.parametrize(("family", "options", "unread"), [
    *((family, PEEPHOLES, "error_ptr") for family in ("step", "split/4", "held/ahead", "held/2", "cooperative/4/1/4")),
    ("resident", PEEPHOLES, ""), ("pointwise", PEEPHOLES | dict(T=3), "c_ptr"),
    *((family, GRU, "error_ptr") for family in ("step", "held/ahead", "held/2", "cooperative/4/1/4")),
    ("split/4", GRU | dict(H=8), "error_ptr"),  # whose 3H has four parts
    ("resident", GRU, ""), ("pointwise", GRU | dict(T=3), "c_ptr"),
    ("pointwise", NORMS | dict(T=3), "c_ptr"), ("pointwise", PEEPHOLES | dict(T=3, proj_size=5), "c_ptr"),
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


# Without zoneout products alone read h0.
@pytest.mark.parametrize(("options", "unread"), [
    (PEEPHOLES | NOISE, ""), (NORMS, "h0"), (PEEPHOLES | NOISE | dict(proj_size=5), ""), (GRU | NOISE, ""),
])  # fmt: skip
def test_each_buffer_in_cuda_that_is_one_element_short_is_detected(monkeypatch, options, unread):
    """All at once, as in Triton; in either kernel, since both are given all."""
    KERNELS["cupy"].force(monkeypatch)
    given, detected, bind = set(), set(), cupy.bind

    def note(kernel, name, said):
        assert re.search(rf"{OUTSIDE}{name} ", said)
        detected.add(name)

    def noted(part, backward, device, arguments):
        given.update(
            name.removesuffix("_ptr") for name, t in arguments.items() if isinstance(t, Tensor) and t.numel() > 1
        )
        return bind(part, backward, device, arguments)

    host_cuda.stand_in(monkeypatch, less=1, found=note)
    monkeypatch.setattr(cupy, "bind", noted)
    run("cupy", T=3, **options)
    assert (given & set(cupy.layout().names)) - detected == set(unread.split())
