"""`make test-versions`: the kernels' tests on the oldest supported Triton, one in between, and the newest.

Each version lies in a folder of its own, before the environment's packages. test_compile.py compiles its whole table.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ROOT / ".venv-versions"
# The interpreters of the older two take an array of one element for a number, which NumPy 2.4 refuses.
VERSIONS = (["triton==3.4.0", "numpy<2.4"], ["triton==3.6.0", "numpy<2.4"], ["triton"])
TESTS = (
    "layer", "sequence_kernels", "slstm", "planning", "compile", "first_call", "plan_cache",
    "extremes", "contract",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the tests on every version, with further arguments for pytest. Returns 1 if any fails."""
    failed, lines = False, []
    for packages in VERSIONS:
        folder = FOLDERS / packages[0].replace("==", "-")
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "WHOLE_TABLE": "1"}
        if "==" not in packages[0] or not folder.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
            subprocess.run([*pip, *packages], check=True)
        python = [sys.executable, "-c", "import triton; print(triton.__version__)"]
        version = subprocess.check_output(python, env=environment, text=True).strip()
        pytest = [sys.executable, "-m", "pytest", "-n", "auto", *(f"tests/test_{name}.py" for name in TESTS)]
        run = subprocess.run([*pytest, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        print(run.stdout)
        lines.append(f"Triton {version}: {run.stdout.splitlines()[-1]}")
        failed |= run.returncode != 0
    print(*lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
