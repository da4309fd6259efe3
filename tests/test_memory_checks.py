"""Addresses outside of their tensors are detected, whatever lies there: by Triton's interpreter, and in CUDA C++."""

import re

import host_cuda
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
SIZE = 3, 3, 2, 6  # T, B, I, H
ALL = "peepholes masks"


def run(family: str, words: str, size: tuple[int, ...] = SIZE) -> None:
    """A call and its gradients. The last sequence is the longest. At its end it is reset, so that kernels need
    everything that they are given."""
    module = with_random_parameters(built(size, {*words.split()}, backend=KERNELS[family].backend), 0)
    x, hx, rest = call_of(module, size, {"ragged", "states"}, 0)
    rest["resets"].zero_()[-1, -1] = True
    results(module, x, hx, **rest)


@pytest.mark.parametrize(("family", "name", "said"), [
    *((family, "reset_c_ptr", "4-byte load ends 4") for family in ("resident", "pointwise", "step")),
    ("held/2", "weight_hh_ptr", "4-byte load ends 4"), ("cooperative/4/1/4", "gates_ptr", "4-byte load ends 4"),
    ("split/4", "h_ptr", "4-byte store ends 4"), ("resident", "dgates_ptr", "4-byte store ends 4"),
    ("step", "arrivals_ptr", "4-byte atomic ends 4"),
])  # fmt: skip
def test_a_tensor_that_is_one_element_short_is_detected_in_triton(monkeypatch, family, name, said):
    KERNELS[family].force(monkeypatch)
    run_kernel = launch.launch_kernel

    def launch_kernel(kernel, grid, **arguments):
        if isinstance(t := arguments.get(name), Tensor):
            arguments[name] = t.view(-1)[1:] if name == "arrivals_ptr" else t.view(-1)[:-1]
        run_kernel(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "launch_kernel", launch_kernel)
    with pytest.raises(InterpreterError, match=f"a {said} bytes past the end of {name} "):
        run(family, ALL)


# Without zoneout products alone read h0.
@pytest.mark.parametrize(("words", "size", "unread"), [
    (ALL, SIZE, ""), ("peepholes norms", SIZE, "h0"), (ALL, (*SIZE, 5), ""), ("gru masks", SIZE, ""),
])  # fmt: skip
def test_each_tensor_that_is_one_element_short_is_detected_in_cuda(monkeypatch, words, size, unread):
    """All at once, in either kernel, since both are given all: what is detected is noted, and happens."""
    KERNELS["cupy"].force(monkeypatch)
    given, detected, bind = set(), set(), cupy.bind

    def note(kernel, name, said):
        assert re.search(rf"a \d+-byte access (begins|ends) \d+ bytes (before|past the end of) {name} ", said)
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
