"""The Numba backend, for CPUs: launch.py is its layer.Launcher. What is known without Numba, see layer.Package:"""

import platform

import torch

from ..cache import Key

DEVICES, RACED = ("cpu",), False
DTYPES = (torch.float32,)
PACKAGES = "numba", "llvmlite"
OLDEST = 0, 61
NEEDS = f'Numba: pip install "numba>={OLDEST[0]}.{OLDEST[1]}"'


def made_by() -> Key:
    import llvmlite.binding
    import numba

    return {
        "numba": numba.__version__, "llvmlite": llvmlite.__version__, "python": platform.python_version(),
        "cpu": llvmlite.binding.get_host_cpu_name(), "features": llvmlite.binding.get_host_cpu_features().flatten(),
    }  # fmt: skip


def import_packages() -> None:
    import numba

    if numba.version_info.short < OLDEST:
        raise ImportError(f"Numba {numba.__version__} is too old")
