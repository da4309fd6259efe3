"""The Numba backend, for CPUs: launch.py is its layer.Launcher. What is known without Numba, see layer.Package:"""

import torch

DEVICES, RACED = ("cpu",), False
DTYPES = (torch.float32,)
PACKAGES = ("numba",)
OLDEST = 0, 61
NEEDS = f'Numba: pip install "numba>={OLDEST[0]}.{OLDEST[1]}"'


def import_packages() -> None:
    import numba

    if numba.version_info.short < OLDEST:
        raise ImportError(f"Numba {numba.__version__} is too old")
