"""README, pages, examples and the lesson run, do what they say, and link to what is there."""

import importlib.util
import inspect
import pkgutil
import re
import shutil
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient

import gpu_lstm

ROOT = Path(__file__).parent.parent
EXAMPLES, README, PAGES = ROOT / "examples", ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
LESSON = EXAMPLES / "lstm_explained.ipynb"


def run_examples(page: Path, names: dict) -> int:
    """One after another; how many."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, example {number}", "exec"), names)
    return len(blocks)


# The lesson's page is made from the notebook, which runs below.
WITHOUT_EXAMPLES = (
    "api.md", "benchmarks.md", "ci.md", "compared.md", "design.md", "first_gpu_run.md", "kernels.md", "lesson.md",
    "testing.md", "versions.md",
)  # fmt: skip
WITH_EXAMPLES = [page for page in PAGES if page.name not in WITHOUT_EXAMPLES]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # test_graphs.py has inductor
    torch.manual_seed(0)
    assert run_examples(page, {}) > 0


def test_the_examples_of_the_readme_run():
    names = {"model": torch.nn.Sequential(torch.nn.LSTM(3, 4))}
    assert run_examples(README, names) >= 5
    found = [names[name] for name in ("output", "h1", "c1", "h2", "c2")]  # of the last example, as its comment says
    assert [tuple(t.shape) for t in found] == [(2, 3, 5), (2, 4), (2, 4), (2, 5), (2, 5)]
    assert type(names["model"][0]) is names["gpu_lstm"].LSTM


def load(path: Path):
    """A program as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_weather_beats_both_baselines_on_the_held_out_year(tmp_path):
    errors = load(EXAMPLES / "weather.py").main(out=tmp_path)
    ours = errors.pop("StackedLSTM")
    assert set(errors) == {"yesterday's value", "day-of-year mean"}
    for baseline in errors.values():
        assert ours.mae < baseline.mae
        assert ours.rmse < baseline.rmse
    assert (tmp_path / "weather.png").stat().st_size > 10_000


def links(text: str) -> list[str]:
    """The files that Markdown links to, but for its examples."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:)([^)#]+)", text)


def test_every_page_is_linked_from_the_readme_and_every_link_leads_somewhere():
    assert {f"docs/{page.name}" for page in PAGES} <= set(links(README.read_text()))
    texts = [(page, page.read_text()) for page in (README, *PAGES)]
    markdown = (cell.source for cell in lesson().cells if cell.cell_type == "markdown")
    texts.append((LESSON, "\n".join(markdown)))
    assert "../docs/looking_inside.md" in links(texts[-1][1])
    for page, text in texts:
        for path in links(text):
            assert (page.parent / path).exists(), (page.name, path)


def names_of(navigation) -> list[str]:
    """The pages that a navigation names."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [name for part in parts for name in names_of(part)]


def test_the_site_has_every_page_in_its_navigation_once():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = ["index.md", *(page.name for page in PAGES)]  # index.md is the README
    assert sorted(names_of(navigation)) == sorted(pages)


def test_the_page_of_the_api_has_every_public_name_once():
    page = (ROOT / "docs" / "api.md").read_text()
    described = [pkgutil.resolve_name(name) for name in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)]
    assert len(described) == len(set(described))
    named = [getattr(gpu_lstm, name) for name in gpu_lstm.__all__]
    modules = [value for value in named if inspect.ismodule(value)]
    assert modules == [gpu_lstm.compat, gpu_lstm.functional, gpu_lstm.keras]
    public = {value for value in named if not inspect.ismodule(value)}
    public |= {gpu_lstm.compat.LSTM, gpu_lstm.functional.lstm_layer}  # the rest of these modules is for our own
    public |= {
        value
        for name, value in vars(gpu_lstm.keras).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == "gpu_lstm.keras" and callable(value)
    } - {gpu_lstm.keras.Module}
    assert public <= set(described)


# The lesson


def lesson():
    return nbformat.read(LESSON, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell put out: "stdout", or the formats in which something was displayed."""
    return {output["name"] if output.output_type == "stream" else frozenset(output.data) for output in cell.outputs}


def answers(notebook):
    """The code of the exercises' folded answers."""
    folded = (re.findall(r"<details>(.*?)</details>", cell.source, flags=re.DOTALL) for cell in notebook.cells)
    return [re.search(r"```python\n(.*?)```", answer, flags=re.DOTALL)[1] for page in folded for answer in page]


@pytest.mark.slow
def test_every_cell_and_answer_of_the_lesson_runs_and_the_kinds_of_output_are_stored(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel chooses its own
    examples = shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("out", "__pycache__"))
    executed = lesson()
    for cell in code(executed):
        cell.outputs = []  # and one seed, and the smallest of three models, will do here; make lesson-page has them all
        cell.source = re.sub(r"for seed in range\(\d\)", "for seed in range(1)", cell.source)
        cell.source = cell.source.replace("for sizes in ([32, 16], [32], [16]):", "for sizes in ([16],):")
    executed.cells += map(nbformat.v4.new_code_cell, answers(executed))
    NotebookClient(executed, timeout=300, kernel_name="python3", resources={"metadata": {"path": examples}}).execute()
    kept = code(lesson())
    for ran, stored in zip(code(executed), kept):
        assert kinds(ran) == kinds(stored), ran.source
    assert sum(ran.source != stored.source for ran, stored in zip(code(executed), kept)) == 2


def test_the_lesson_is_stored_of_one_run_without_errors_and_without_the_machine_that_ran_it():
    stored = lesson()
    nbformat.validate(stored)
    cells = code(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs), cell.source
        assert "stderr" not in kinds(cell), cell.source
        texts = [output.get("text") or output.data["text/plain"] for output in cell.outputs]
        assert not any(re.search(r"/(tmp|home|root|Users)/|site-packages", text) for text in texts), cell.source
    assert sum("image/png" in kind for cell in cells for kind in kinds(cell)) >= 14
    assert LESSON.stat().st_size < 600_000
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in stored.cells)  # among them times of execution


def test_the_cells_of_the_lesson_are_short_and_say_what_their_pictures_show():
    for cell in code(lesson()):
        assert len(cell.source.splitlines()) <= 12, cell.source
        if any("image/png" in kind for kind in kinds(cell)):
            assert re.search(r"  # [A-Z].{20,}$", cell.source), cell.source


def test_the_lesson_has_five_exercises_whose_answers_check_themselves():
    found = answers(lesson())
    assert len(found) == 5
    assert all("assert " in answer for answer in found)


def test_the_page_of_the_lesson_is_made_from_the_notebook_as_it_is():
    text, pictures = load(PAGES[0].parent / "lesson.py").page(lesson())
    folder = PAGES[0].parent / "pictures"
    assert (folder.parent / "lesson.md").read_text() == text, "make lesson-page"
    kept = {path.relative_to(folder).as_posix(): path.read_bytes() for path in (folder / "lesson").iterdir()}
    assert kept | {"gates.png": (folder / "gates.png").read_bytes()} == pictures
    assert set(re.findall(r"pictures/(lesson/\S+?)\)", text)) == set(kept)
