"""The GPU tests and the benchmark on a card rented from Modal, for a maintainer with an account there.

    pip install modal && modal setup                       # once
    modal run .github/modal_tests.py                       # an L4
    GPU=H100 modal run .github/modal_tests.py --minutes 15

It is what gpu.yml does on a runner of one's own. Nobody has run it yet: only that it can be imported was checked.
"""

import os
import subprocess
import sys
from pathlib import Path

import modal

ROOT, REMOTE = Path(__file__).resolve().parents[1], Path("/root/gpu_lstm")
CARD = os.environ.get("GPU", "L4")  # as Modal names them: T4, L4, A100, H100, B200
LEFT_OUT = [".git", ".venv*", "**/__pycache__", ".*_cache", "out", "*.egg-info"]

image = (
    modal.Image.debian_slim(python_version="3.13")
    .apt_install("g++")
    .add_local_dir(str(ROOT), str(REMOTE), copy=True, ignore=LEFT_OUT)
    .run_commands(f"pip install --editable '{REMOTE}[gpu]'")  # with torch for CUDA, CuPy, pytest
)
app = modal.App("gpu-lstm-tests", image=image)


@app.function(gpu=CARD, timeout=3600)
def on_the_card(minutes: float) -> tuple[int, dict[str, bytes]]:
    """The exit status of `python -m bench gpu`, and the files that it wrote."""
    out = REMOTE / "out" / "gpu"
    command = [sys.executable, "-m", "bench", "gpu", "--minutes", str(minutes), "--out", str(out)]
    status = subprocess.run(command, cwd=REMOTE, check=False).returncode
    return status, {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@app.local_entrypoint()
def main(minutes: float = 8) -> None:
    status, files = on_the_card.remote(minutes)
    for name, content in files.items():
        path = ROOT / "out" / "modal" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    print(f"results: {ROOT / 'out' / 'modal'}")
    sys.exit(status)
