"""The CuPy backend. This module is its contract.Package, which needs no CuPy. launch.py is its contract.Launcher."""

import torch

from ..cache import Key

DEVICES, was_compiled, is_compiled = ("cuda",), None, None
DTYPES, IN_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32), ()
PACKAGES = ("cupy-cuda12x", "cupy-cuda13x")
_CUDA = "12" if (torch.version.cuda or "").startswith("12.") else "13"
NEEDS = f'CuPy and NVRTC: pip install "cupy-cuda{_CUDA}x[ctk]>=14.2"'  # as the extras of pyproject.toml


def made_by() -> Key:
    import cupy

    return {"cupy": cupy.__version__, "NVRTC": list(cupy.cuda.nvrtc.getVersion())}


def import_packages() -> None:
    import cupy

    cupy.cuda.nvrtc.getVersion()  # CuPy looks for NVRTC when it is first called
