"""Plans: how the time loop is run, and by what blocks."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch

PACK = 16  # bytes that a thread reads or writes at once

Launch = Callable[..., None]
"""launch(kernel, dtype, grid, plan, **arguments): `launch.launch_kernel`."""


class Family(enum.Enum):
    """How the time loop is run."""

    STEP = "step"  # one launch a step, after a product by cuBLAS
    SEQUENCE = "sequence"  # one launch; a block walks whole sequences
    CLUSTER = "cluster"  # one launch; so does a cluster of blocks. Forward, and on request only


@dataclass(frozen=True)
class Plan:
    """A family with the size of its blocks."""

    family: Family
    threads: int  # of a block
    shared: int = 0  # bytes of a block
    blocks: int = 1  # that share W_hh


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have: on any GPU, where the device is none."""
    if device.type != "cuda":
        return 48 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
