"""The Numba backend, for CPUs. This file is its contract.Package and imports no Numba. launch.py is its Launcher."""

import hashlib
import platform

import torch

from .. import cache
from ..problem import Pass

DEVICES = ("cpu",)
IN_FLOAT32 = torch.float16, torch.bfloat16
DTYPES = *IN_FLOAT32, torch.float32
LOOPS = "forward", "backward"  # of steps.py
MATMUL = "matmul"  # of steps.py, for gradients after the loop
PACKAGES = "numba", "llvmlite"
OLDEST = 0, 61
NEEDS = f'Numba: pip install "numba>={OLDEST[0]}.{OLDEST[1]}"'


def made_by() -> cache.Key:
    import llvmlite.binding
    import numba

    cpu, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES  # of NUMBA_CPU_NAME and NUMBA_CPU_FEATURES
    return {
        "numba": numba.__version__, "llvmlite": llvmlite.__version__, "python": platform.python_version(),
        "cpu": llvmlite.binding.get_host_cpu_name() if cpu is None else cpu,
        "features": llvmlite.binding.get_host_cpu_features().flatten() if features is None else features,
    }  # fmt: skip


def import_packages() -> None:
    import numba

    if numba.version_info.short < OLDEST:
        raise ImportError(f"Numba {numba.__version__} is too old")


def name_of_folder() -> str:
    """Return a digest of everything that decides what Numba compiles: our sources and the facts of `made_by`.

    Numba's own key misses an edit of an imported file, and another CPU of the same name. It contains the path of the
    source file, so that each installed copy of this package would be compiled again.
    """
    return hashlib.sha256(repr((cache.sources("kernels"), made_by())).encode()).hexdigest()[:16]


def was_compiled(pass_: Pass, folder: str = "*") -> bool:
    of_loop = f"compiled/{folder}/__pycache__/*.{LOOPS[pass_.backward]}-*.nbi"
    return any(file for root in cache.folders() for file in root.glob(of_loop))


def is_compiled(pass_: Pass) -> bool:
    return was_compiled(pass_, name_of_folder())
