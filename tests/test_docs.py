"""Every page of the documentation runs: its examples, one after another."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "ci.md")  # that one has tests of its own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, example {number}", "exec"), names)


def links(page):
    """The files that a page links to, but for its examples."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:)([^)#]+)", text)


def test_every_page_is_linked_from_the_readme_and_every_link_leads_somewhere():
    pages = (ROOT / "docs").glob("*.md")
    assert {f"docs/{page.name}" for page in pages} <= set(links(ROOT / "README.md"))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path in links(page):
            assert (page.parent / path).exists(), (page.name, path)
