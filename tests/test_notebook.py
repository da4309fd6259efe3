"""The lesson runs from its first cell to its last, and is stored as it ran."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
PATH = EXAMPLES / "lstm_explained.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(PATH, as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _kinds(cell):
    """What a cell put out: "stdout", or the formats in which something was displayed."""
    return {output["name"] if output.output_type == "stream" else frozenset(output.data) for output in cell.outputs}


def test_every_cell_runs_and_its_kinds_of_output_are_stored(stored, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel chooses its own
    examples = shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("out", "__pycache__"))
    executed = nbformat.read(examples / PATH.name, as_version=4)
    for cell in _code(executed):
        cell.outputs = []
    NotebookClient(executed, timeout=300, kernel_name="python3", resources={"metadata": {"path": examples}}).execute()
    for ran, kept in zip(_code(executed), _code(stored), strict=True):
        assert _kinds(ran) == _kinds(kept), ran.source


def test_outputs_are_stored_of_one_run_without_errors_or_warnings(stored):
    nbformat.validate(stored)
    cells = _code(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs), cell.source
        assert "stderr" not in _kinds(cell), cell.source
    drawn = [kinds for cell in cells for kinds in _kinds(cell) if "image/png" in kinds]
    assert len(drawn) >= 6


def test_nothing_of_the_machine_that_ran_it_is_stored(stored):
    assert PATH.stat().st_size < 600_000
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in stored.cells)  # among them times of execution
    for cell in _code(stored):
        texts = [output.get("text") or output.data["text/plain"] for output in cell.outputs]
        assert not any(re.search(r"/(tmp|home|root|Users)/|site-packages", text) for text in texts), cell.source


def test_relative_links_lead_to_files(stored):
    text = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert "../docs/looking_inside.md" in links
    missing = [link for link in links if not (EXAMPLES / link.partition("#")[0]).is_file()]
    assert not missing
