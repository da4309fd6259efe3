"""The kernels in CUDA C++ as Python sees them: their text, their names, and the order of their parameters."""

import functools
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("cuda")
CELLS = ("lstm", "gru")  # of equations/
FILES = ("instructions", *(f"equations/{cell}" for cell in CELLS), "indexing", "exchange", "products", "cooperative")
"""Of the folder; each knows those before it."""

KERNELS = ("cooperative_forward", "cooperative_backward")
OPTIONS = ("-std=c++17",)
ELEMENTS = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def join(texts: dict[str, str]) -> str:
    """All files as one text, for which the compiler's messages still name file and line."""
    return "\n".join(f'#line 1 "{name}.cu"\n{text}' for name, text in texts.items())


@functools.cache
def texts() -> dict[str, str]:
    """The text of each file."""
    return {name: FOLDER.joinpath(f"{name}.cu").read_text() for name in FILES}


def found(pattern: str) -> str:
    """What a pattern's group matches in the text of all files."""
    match = re.search(pattern, join(texts()), re.DOTALL)
    assert match is not None
    return match[1]


def name_expression(kernel: str, dtype: torch.dtype, template: tuple[str | int, ...], present: Container[str]) -> str:
    """The C++ name of a kernel for one dtype, template arguments of a plan, and the optional arguments there are."""
    flags = (str(name in present).lower() for name in optional(kernel))
    return f"{kernel}<{', '.join((ELEMENTS[dtype], *map(str, template), *flags))}>"


@functools.cache
def optional(kernel: str) -> tuple[str, ...]:
    """The names of a kernel's optional arguments, in the order in which its template has a flag for each."""
    template = found(rf"template <([^>]*)>\s+__global__ void \w+\([^)]*\) {kernel}\(")
    return tuple(name.lower() for name in re.findall(r"WITH_(\w+)", template))


def present_in(kernel: str, arguments: dict[str, Any]) -> frozenset[str]:
    """The optional arguments that are neither None nor False."""
    return frozenset(name for name in optional(kernel) if arguments[name] is not None and arguments[name] is not False)


@functools.cache
def parameters(kernel: str) -> tuple[str, ...]:
    """The names of a kernel's parameters, in the order in which it declares them."""
    declared = re.sub("//.*", "", found(rf"\b{kernel}\((.*?)\) \{{"))
    return tuple(parameter.split()[-1] for parameter in declared.split(","))


def in_order(kernel: str, arguments: dict[str, Any]) -> list[Any]:
    """The arguments of a kernel in the order of its parameters.

    Raises:
        TypeError: some are missing, or the kernel has no such parameters.
    """
    names = parameters(kernel)
    if arguments.keys() != set(names):
        raise TypeError(f"{kernel} takes {', '.join(names)}; got {', '.join(arguments)}")
    return [arguments[name] for name in names]
