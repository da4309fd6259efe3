"""The CuPy backend: launch.py is its layer.Launcher. What is known of it without CuPy, see layer.Package:"""

import torch

DEVICES, RACED = ("cuda",), True
DTYPES = torch.float16, torch.bfloat16, torch.float32
PACKAGES = ("cupy-cuda12x", "cupy-cuda13x")
_EXTRA = "cupy12" if (torch.version.cuda or "").startswith("12.") else "cupy13"
NEEDS = f'CuPy and NVRTC: pip install ".[{_EXTRA}]" in a clone'


def import_packages() -> None:
    import cupy

    cupy.cuda.nvrtc.getVersion()  # CuPy looks for NVRTC when it is first called
