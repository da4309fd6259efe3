"""The compile table as a page: python docs/kernels.py compiles the kernels and writes docs/kernels.md."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")
HEAD = """<!-- make kernels-page writes this page: change docs/kernels.py. -->

# What the kernels compile to

For an H100 (sm_90) in bfloat16, without a GPU, by Triton {triton} and NVRTC {nvrtc}. `python -m gpu_lstm kernels`
prints this for every architecture and dtype; its exit status is 1 if a kernel spills or does not fit.

[CONTRIBUTING.md](../CONTRIBUTING.md#reading-the-compile-table) says what the columns are. From `instructions` on they
count what one pass of the time loop does; where W_hh stays on chip, the last one is 0."""
FAMILIES = {  # by what the names of their kernels begin with
    "lstm_resident": "Resident: W_hh in the registers of one program",
    "lstm_cooperative": "Cooperative: W_hh in the registers of many programs",
    "lstm_pointwise": "Pointwise: a launch a step, next to a product by cuBLAS",
    "lstm_step": "Step: W_hh read from L2 at every step, or held in shared memory",
    "cupy": "CUDA C++, through CuPy",
}
TITLES = ("kernel", "case", "sm", "registers", "spills", "shared", "instructions", "barriers", "mma", "loads of W_hh")
NOTES = """In a case B is sequences, H hidden units, P projected features; *ragged*: with lengths, and resets to given
states, in reverse; *masks* and *rates*: with recurrent dropout and zoneout, in training and in `eval()`;
*peepholes*, *layer norm*: with those. Of the kernels in CUDA C++ those without `mma` read W_hh at every step."""


def compiled() -> list[dict]:
    """A row for each case and kernel.

    Raises:
        CalledProcessError: a kernel does not fit, or cannot be compiled.
    """
    command = [sys.executable, "-m", "gpu_lstm", "kernels", "--h100", "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def page(rows: Iterable[dict], versions: dict[str, str]) -> str:
    """The Markdown: a table for each family."""
    parts, families = [HEAD.format(**versions)], {title: [] for title in FAMILIES.values()}
    for row in rows:
        of_cupy = row["backend"] == "cupy"
        (title,) = (FAMILIES[key] for key in FAMILIES if ("cupy" if of_cupy else row["kernel"]).startswith(key))
        loop = row["loop"] or {}
        counts = [loop.get(name, "") for name in ("instructions", "barriers", "products")]
        cells = [
            f"`{row['kernel'].removesuffix('_kernel')}`", row["case"].removeprefix("bfloat16").strip(),
            row["architecture"], row["registers"], row["spills"], row["shared"], *counts,
            row["weight_loads"],
        ]  # fmt: skip
        families[title].append(f"| {' | '.join(map(str, cells))} |")
    for title, lines in families.items():
        head = [f"| {' | '.join(TITLES)} |", f"|---|---|{'--:|' * (len(TITLES) - 2)}"]
        parts += [f"## {title}", "\n".join([*head, *lines])]
    return "\n\n".join([*parts, NOTES]) + "\n"


if __name__ == "__main__":
    packages = {"triton": "triton", "nvrtc": "nvidia-cuda-nvrtc-cu12"}
    PAGE.write_text(page(compiled(), {name: importlib.metadata.version(it) for name, it in packages.items()}))
