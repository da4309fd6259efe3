"""`make test-versions`: run tests on other versions of Triton and torch, the oldest supported and the newest.

Each version has its own folder, which precedes the environment's packages. For a version of Triton the tests of kernels
run, and test_compile.py compiles its whole table. For a version of torch the core of the suite runs. The folders of
torch take some gigabytes.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ROOT / ".venv-versions"
OF_KERNELS = (
    "layer", "sequence_kernels", "slstm", "planning", "compile", "first_call", "plan_cache",
    "extremes", "contract",
)  # fmt: skip
CORE = "lstm", "compile", "graphs", "derivatives", "numba"
# The interpreters of the two older versions use an array of one element as a number, which NumPy 2.4 refuses.
VERSIONS = (
    (["triton==3.4.0", "numpy<2.4"], OF_KERNELS),
    (["triton==3.6.0", "numpy<2.4"], OF_KERNELS),
    (["triton"], OF_KERNELS),
    (["torch==2.9.1", "numpy<2.4"], CORE),
    (["torch"], CORE),
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the tests on every version, with further arguments for pytest. Return 1 if any test fails, else 0."""
    failed, lines = False, []
    for packages, tests in VERSIONS:
        name = packages[0].partition("==")[0]
        folder = FOLDERS / packages[0].replace("==", "-")
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        environment |= {"WHOLE_TABLE": "1"} if tests is OF_KERNELS else {}
        if "==" not in packages[0] or not folder.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder)]
            alone = ["--no-deps"] * (name == "triton")  # torch needs the Triton and the CUDA that it was built for
            subprocess.run([*pip, *alone, *packages], check=True)
        python = [sys.executable, "-c", f"import {name}; print({name}.__version__)"]
        version = subprocess.check_output(python, env=environment, text=True).strip()
        pytest = [sys.executable, "-m", "pytest", "-n", "auto", *(f"tests/test_{each}.py" for each in tests)]
        run = subprocess.run([*pytest, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        print(run.stdout)
        lines.append(f"{name} {version}: {run.stdout.splitlines()[-1]}")
        failed |= run.returncode != 0
    print(*lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
