"""The Triton backend. This module is its contract.Package, and needs no Triton. launch.py is its contract.Launcher."""

import torch

from ..cache import Key, version_of

DEVICES, was_compiled, is_compiled = ("cuda",), None, None
DTYPES, IN_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32), ()
PACKAGES, NEEDS = ("triton",), "Triton: pip install triton"


def made_by() -> Key:
    return {"triton": version_of("triton")}


def import_packages() -> None:
    from . import launch  # noqa: F401
