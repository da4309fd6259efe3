"""The Numba backend, for CPUs: launch.py is its layer.Launcher. What is known without Numba, see layer.Package:"""

import hashlib
import platform

import torch

from .. import cache
from ..problem import Pass

DEVICES = ("cpu",)
IN_FLOAT32 = torch.float16, torch.bfloat16
DTYPES = *IN_FLOAT32, torch.float32
LOOPS = "forward", "backward"  # of steps.py
PACKAGES = "numba", "llvmlite"
OLDEST = 0, 61
NEEDS = f'Numba: pip install "numba>={OLDEST[0]}.{OLDEST[1]}"'


def made_by() -> cache.Key:
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


def name_of_folder() -> str:
    """The digest of everything that decides what Numba compiles: our sources and the facts of `made_by`.

    Numba itself sees neither an edit of an imported file nor another CPU that has the same name. It would also keep the
    functions once for each path that this package is installed at.
    """
    return hashlib.sha256(repr((cache.sources("kernels"), made_by())).encode()).hexdigest()[:16]


def is_compiled(pass_: Pass, for_any: bool = False) -> bool:
    folder = "*" if for_any else name_of_folder()
    of_loop = f"compiled/{folder}/__pycache__/*.{LOOPS[pass_.backward]}-*.nbi"
    return any(file for root in cache.folders() for file in root.glob(of_loop))
