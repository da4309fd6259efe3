"""Addresses outside of their tensors are detected, whatever lies there: in each family of kernels, both ways."""

import re

import host_cuda
import memory_checks
import places
import pytest
from cases import built, call_of, with_random_parameters
from pairs import results
from places import KERNELS
from torch import Tensor
from triton.runtime.errors import InterpreterError

from gpu_lstm.kernels.cupy_rnn import launch as cupy
from gpu_lstm.kernels.triton_rnn import launch

pytestmark = [
    pytest.mark.skipif(not places.INTERPRETED, reason="compiled kernels have compute-sanitizer"),
    pytest.mark.usefixtures("exact_float32_products"),
]

OUTSIDE = r"a \d+-byte (load|store|atomic|access) (begins|ends) \d+ bytes (before|past the end of) "
SIZE, LONGER = (2, 3, 2, 6), (3, 3, 2, 6)  # T, B, I, H
PEEPHOLES, NORMS, GRU = "peepholes masks", "peepholes norms masks", "gru masks"


def run(family: str, words: str, size: tuple[int, ...]) -> None:
    """A call and its gradients. The last sequence is the longest.

    At its end it is reset, so that kernels need everything that they are given.
    """
    module = with_random_parameters(built(size, {*words.split()}, backend=KERNELS[family].backend), 0)
    x, hx, rest = call_of(module, size, {"ragged", "states"}, 0)
    rest["resets"].zero_()[-1, -1] = True
    results(module, x, hx, **rest)


# The last element of some is not needed: the error's is the host's, c of the last step is computed again.
@pytest.mark.parametrize(("family", "words", "size", "unread"), [
    *((family, PEEPHOLES, SIZE, "error_ptr")
      for family in ("step", "split/4", "held/ahead", "held/2", "cooperative/4/1/4")),
    ("resident", PEEPHOLES, SIZE, ""), ("pointwise", PEEPHOLES, LONGER, "c_ptr"),
    *((family, GRU, SIZE, "error_ptr") for family in ("step", "held/ahead", "held/2", "cooperative/4/1/4")),
    ("split/4", GRU, (2, 3, 2, 8), "error_ptr"),  # whose 3H has four parts
    ("resident", GRU, SIZE, ""), ("pointwise", GRU, LONGER, "c_ptr"),
    ("pointwise", NORMS, LONGER, "c_ptr"), ("pointwise", PEEPHOLES, (*LONGER, 5), "c_ptr"),
])  # fmt: skip
def test_each_buffer_in_triton_that_is_one_element_short_is_detected(monkeypatch, family, words, size, unread):
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
    run(family, words, size)
    assert {name for _, name in given - detected} == set(unread.split())


def test_an_atomic_operation_outside_its_tensor_is_detected(monkeypatch):
    KERNELS["step"].force(monkeypatch)
    run_kernel = launch.launch_kernel

    def launch_kernel(*place, arrivals_ptr, **arguments):
        run_kernel(*place, arrivals_ptr=arrivals_ptr[1:], **arguments)

    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)
    with pytest.raises(InterpreterError, match="a 4-byte atomic ends 4 bytes past the end of arrivals_ptr "):
        run("step", "", SIZE)


# Without zoneout products alone read h0.
@pytest.mark.parametrize(("words", "size", "unread"), [
    (PEEPHOLES, LONGER, ""), ("peepholes norms", LONGER, "h0"), (PEEPHOLES, (*LONGER, 5), ""), (GRU, LONGER, ""),
])  # fmt: skip
def test_each_buffer_in_cuda_that_is_one_element_short_is_detected(monkeypatch, words, size, unread):
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
    run("cupy", words, size)
    assert (given & set(cupy.layout().names)) - detected == set(unread.split())
