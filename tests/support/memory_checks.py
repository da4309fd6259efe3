"""Checks that interpreted kernels access only their tensors, as compute-sanitizer's memcheck does on a card.

The upper bits of a pointer, which no address uses, hold the number of the argument that the pointer comes from. Offsets
keep these bits. So memory behind a tensor counts as outside, even if it belongs to another tensor of the launch. Every
memory operation checks the addresses whose mask is on, and removes the number.
"""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

ADDRESS_BITS = 48
ADDRESS = np.uint64(2**ADDRESS_BITS - 1)
ARGUMENTS = 2**15  # with numbers of their own at any time, so few that a pointer remains a positive int64


@dataclass(frozen=True)
class Argument:
    """A tensor of a launch, in the form that the interpreter takes."""

    kernel: str
    name: str
    start: int  # the address with the number; the end has it, too
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def data_ptr(self):
        return self.start


_numbers = itertools.count()
_arguments: dict[int, Argument] = {}


def bytes_of(tensor):
    """Return the bytes from a tensor's first element to the end of its last one."""
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return tensor.itemsize * (steps + 1) if tensor.numel() else 0


def refusal(access, size, first, bytes_there, name, shape):
    """Return the message about an access that begins `first` bytes after the start of a tensor, or before it if
    negative."""
    where = f"begins {-first} bytes before" if first < 0 else f"ends {first + size - bytes_there} bytes past the end of"
    return f"a {size}-byte {access} {where} {name} {tuple(shape)}"


def _numbered(kernel, name, argument):
    if hasattr(argument, "_fields"):
        return type(argument)(*(_numbered(kernel, *each) for each in argument._asdict().items()))
    if not isinstance(argument, Tensor):
        return argument
    number = next(_numbers) % ARGUMENTS
    start = (number << ADDRESS_BITS) + argument.data_ptr()
    _arguments[number] = Argument(kernel, name, start, start + bytes_of(argument), argument.dtype, argument.shape)
    return _arguments[number]


def _number_arguments(executor, args, named):
    kernel = executor.fn.__name__
    positional = [_numbered(kernel, name, argument) for name, argument in zip(executor.arg_names, args)]
    return positional, {name: _numbered(kernel, name, argument) for name, argument in named.items()}


def checked(access, at, mask, size):
    """Return the addresses of pointers, after checking that they lie in their tensors where the mask is on."""
    touched = at[mask]
    if touched.size:
        first, last = int(touched.min()), int(touched.max())
        argument = _arguments.get(first >> ADDRESS_BITS)
        if argument is None or first < argument.start or last + size > argument.end:
            _check_each(access, touched, size)
    return at & ADDRESS


def _check_each(access, touched, size):
    """Check each address, since a tile may have pointers to several tensors."""
    for address in touched.tolist():
        argument = _arguments.get(address >> ADDRESS_BITS)
        assert argument is not None, f"a {size}-byte {access} at no tensor of the launch"
        first, bytes_there = address - argument.start, argument.end - argument.start
        said = refusal(access, size, first, bytes_there, argument.name, argument.shape)
        assert 0 <= first <= bytes_there - size, f"{argument.kernel}: {said}"


def check_interpreted_kernels():
    """Check every launch of this process from now on."""
    native = interpreter._interpreter

    def load(at, mask, other, dtype):
        return native.load(checked("load", at, mask, np.dtype(dtype).itemsize), mask, other, dtype)

    def store(at, value, mask):
        return native.store(checked("store", at, mask, value.itemsize), value, mask)

    def atomic_rmw(op, at, value, mask, order):
        return native.atomic_rmw(op, checked("atomic", at, mask, value.itemsize), value, mask, order)

    functions = {name: getattr(native, name) for name in dir(native)}
    functions |= dict(load=load, store=store, atomic_rmw=atomic_rmw)
    interpreter._interpreter = SimpleNamespace(**functions)
    interpreter.GridExecutor._init_args_hst = _number_arguments
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # tensors are on the CPU, where kernels write them
