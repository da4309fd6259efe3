"""Launches on the CPU whose kernels' memory ends where it should: what is written past a tensor's end is an error.

A kernel gets copies of its tensors, each between margins of NaN, so that what is read there shows, too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_lstm.kernels.cupy_lstm import launch as cupy
from gpu_lstm.kernels.triton_lstm import launch as triton

LEAST = 4096  # bytes of a margin, which is as large as what it guards, so that a wrong size ends there
FILL = 0x7FFF  # int16 of which all repetitions are NaN, in every dtype, and no sentinel


def guard(monkeypatch) -> None:
    """All launches from now on."""
    for module in (triton, cupy):
        monkeypatch.setattr(module, "launch_kernel", within_bounds(module.launch_kernel))


def within_bounds(launch_kernel: Callable) -> Callable:
    """The same, with copies between margins; tensors of one memory are together in one."""

    def launch(kernel, *how, **arguments):
        blocks: dict[int, tuple[Tensor, Tensor, int, str]] = {}  # by address: memory, its block, margin, whose

        def moved(name: str, t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in blocks:
                own = torch.empty(0, dtype=torch.uint8).set_(storage)
                margin = -(-max(LEAST, len(own)) // 16) * 16
                block = torch.full((margin + len(own) // 2 + 1,), FILL, dtype=torch.int16).view(torch.uint8)
                block[margin : margin + len(own)] = own
                blocks[storage.data_ptr()] = own, block, margin, name
            _, block, margin, _ = blocks[storage.data_ptr()]
            start = margin // t.element_size() + t.storage_offset()
            return torch.empty(0, dtype=t.dtype).set_(block.untyped_storage(), start, t.shape, t.stride())

        given = {n: moved(n, a.detach()) if isinstance(a, Tensor) else a for n, a in arguments.items()}
        launch_kernel(kernel, *how, **given)
        for own, block, margin, name in blocks.values():
            fill = torch.full((len(block) // 2,), FILL, dtype=torch.int16).view(torch.uint8)
            intact, end = block == fill, margin + len(own)
            intact[margin:end] = True
            at = (~intact).nonzero().flatten() - margin
            who = getattr(kernel, "__name__", kernel)
            assert intact.all(), f"{who} wrote past {name}, which has {len(own)} bytes, from byte {int(at[0])}"
            own.copy_(block[margin:end])

    return launch
