"""The lesson as a page: python docs/lesson.py writes docs/lesson.md and its pictures from the stored notebook.

With --run it first executes the notebook from its first cell to its last and stores the outputs.
"""

import base64
import io
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

DOCS = Path(__file__).parent
NOTEBOOK = DOCS.parent / "examples" / "lstm_explained.ipynb"
PICTURES = DOCS / "pictures"
HEAD = """<!-- make lesson-page writes this page from examples/lstm_explained.ipynb: change it there. -->

The notebook [lstm_explained.ipynb](../examples/lstm_explained.ipynb) as a page."""


def run() -> None:
    """Execute the notebook and store its outputs, without anything specific to this run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": NOTEBOOK.parent}}
    client = NotebookClient(notebook, timeout=300, resources=folder, record_timing=False, coalesce_streams=True)
    client.execute()
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                data["image/png"] = base64.b64encode(smaller(base64.b64decode(data["image/png"]))).decode()
    notebook.metadata = NotebookNode(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"), language_info=dict(name="python")
    )
    nbformat.write(notebook, NOTEBOOK)


def smaller(png: bytes) -> bytes:
    """The picture in 256 colours: a third of the size, with no visible difference."""
    picture, kept = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    reduced = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    reduced.save(kept, "PNG", optimize=True)
    return kept.getvalue()


def page(notebook: NotebookNode) -> tuple[str, dict[str, bytes]]:
    """The Markdown, and the pictures by their path in docs/pictures; that of a trace is gates.png.

    The last comment of a picture's cell says what it shows; a line that only draws is left out.
    """
    parts, pictures = [HEAD], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(relink(cell.source))
            continue
        draws = any("image/png" in output.get("data", {}) for output in cell.outputs)
        source, _, shown = cell.source.rpartition("  # ") if draws else (cell.source, "", "")
        if not draws or "\n" in source:
            parts.append(f"```python\n{source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                path = "gates.png" if "heat_maps(" in cell.source else f"lesson/{cell.execution_count:02}.png"
                pictures[path] = base64.b64decode(data["image/png"])
                parts.append(f"![{shown}](pictures/{path})")
            else:
                text = output.get("text") or data["text/plain"]
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def relink(text: str) -> str:
    """Links lead from docs/, not from examples/."""
    text = re.sub(r"\]\((?!https?:|#|\.\./)", "](../examples/", text)
    return text.replace("](../docs/", "](")


def main() -> None:
    """Write the page again."""
    if "--run" in sys.argv[1:]:
        run()
    text, pictures = page(nbformat.read(NOTEBOOK, as_version=4))
    (DOCS / "lesson.md").write_text(text)
    shutil.rmtree(PICTURES / "lesson", ignore_errors=True)
    (PICTURES / "lesson").mkdir()
    for path, picture in pictures.items():
        (PICTURES / path).write_bytes(picture)


if __name__ == "__main__":
    main()
