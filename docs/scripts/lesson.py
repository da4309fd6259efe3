"""Run the lesson's notebook from its first cell to its last, and store it with its outputs.

python docs/scripts/lesson.py prints the seconds that each section took. The first cell of the notebook names the
longest sections.
"""

import base64
import io
import re
from collections import Counter
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "lstm_explained.ipynb"


def main() -> None:
    """Execute the notebook and store its outputs, without anything specific to this run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": NOTEBOOK.parent}}
    NotebookClient(notebook, timeout=300, resources=folder, coalesce_streams=True).execute()
    for section, seconds in taken(notebook).items():
        print(f"{seconds:5.1f} s  {section}")
    for cell in notebook.cells:
        cell.metadata.clear()  # it has the times of execution
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                data["image/png"] = base64.b64encode(smaller(base64.b64decode(data["image/png"]))).decode()
    notebook.metadata = NotebookNode(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"), language_info=dict(name="python")
    )
    nbformat.write(notebook, NOTEBOOK)


def taken(notebook: NotebookNode) -> Counter[str]:
    """Return the seconds that the cells of each section ran, by the section's title."""
    section, seconds = "imports", Counter()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            section = (re.findall("(?m)^## (.*)", cell.source) or [section])[-1]
        else:
            times = cell.metadata.execution
            begun, ended = (datetime.fromisoformat(times[name].rstrip("Z")) for name in (
                "iopub.status.busy", "shell.execute_reply"))  # fmt: skip
            seconds[section] += (ended - begun).total_seconds()
    return seconds


def smaller(png: bytes) -> bytes:
    """Return the picture in 256 colours, which takes a third of the size without a visible difference."""
    picture, kept = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    reduced = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    reduced.save(kept, "PNG", optimize=True)
    return kept.getvalue()


if __name__ == "__main__":
    main()
