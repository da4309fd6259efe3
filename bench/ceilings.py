"""What the device can do at most, measured: bytes a second of a copy, operations a second of a product."""

import functools
from dataclasses import dataclass

import torch

from . import timing
from .cases import DTYPES, Case

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}
SECONDS = 0.5  # for each


@dataclass(frozen=True)
class Ceilings:
    """Of a device, for one dtype."""

    copy_bytes_per_s: float  # read and written
    product_flops_per_s: float

    def bound_s(self, case: Case) -> float:
        """The least seconds that a call can take: by its products or by what it has to move."""
        return max(case.operations() / self.product_flops_per_s, case.bytes_moved() / self.copy_bytes_per_s)


@functools.cache
def measured(dtype: str, device: str) -> Ceilings:
    """The ceilings for a dtype of `cases.DTYPES`, with torch's switches for float32 products as they are."""
    kind = torch.device(device).type
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    size = PRODUCT_SIZE[kind]
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    product = torch.empty_like(a)
    runs = {"copy": lambda _: target.copy_(source), "product": lambda _: torch.mm(a, b, out=product)}
    taken = timing.interleaved(runs, device, 2 * SECONDS)
    seconds = {name: min(rounds) for name, rounds in taken.items()}  # the best round: a ceiling is not exceeded
    return Ceilings(2 * COPY_BYTES[kind] / seconds["copy"], 2 * size**3 / seconds["product"])
