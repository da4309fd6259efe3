"""lstm.cu as Python knows it: which kernels it has, what they are called in C++, and in which order they take what."""

import functools
import re
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("lstm.cu")
OPTIONS = ("-std=c++17",)
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}

KERNELS = (
    "lstm_step_forward",
    "lstm_step_project_forward",
    "lstm_step_project_backward",
    "lstm_step_backward",
    "lstm_sequence_forward",
    "lstm_sequence_backward",
)
CLUSTER_SIZES = (8, 16)  # blocks: as many as every device takes, and as many as some do
CLUSTER_KERNELS = tuple(f"lstm_cluster_forward<{blocks}>" for blocks in CLUSTER_SIZES)  # sm_90


def kernels_of(architecture: int) -> tuple[str, ...]:
    """The kernels that lstm.cu has on an architecture, 90 for sm_90."""
    return KERNELS + CLUSTER_KERNELS if architecture >= 90 else KERNELS


def name_expression(kernel: str, dtype: torch.dtype) -> str:
    """A kernel of lstm.cu for one dtype, in C++: "f<8>" for float32 is f<float, 8>."""
    name, _, rest = kernel.partition("<")
    return f"{name}<{ELEMENTS[dtype]}, {rest}" if rest else f"{name}<{ELEMENTS[dtype]}>"


@functools.cache
def parameters(kernel: str) -> tuple[str, ...]:
    """The names of a kernel's parameters, in the order in which lstm.cu declares them."""
    declared = re.search(rf"\b{kernel.partition('<')[0]}\((.*?)\) \{{", SOURCE.read_text(), re.DOTALL)
    assert declared is not None
    return tuple(parameter.split()[-1] for parameter in re.sub("//.*", "", declared[1]).split(","))


def in_order(kernel: str, arguments: dict[str, Any]) -> list[Any]:
    """The arguments of a kernel as it takes them.

    Raises:
        TypeError: some are missing, or the kernel has no such parameters.
    """
    names = parameters(kernel)
    if arguments.keys() != set(names):
        raise TypeError(f"{kernel} takes {', '.join(names)}; got {', '.join(arguments)}")
    return [arguments[name] for name in names]
