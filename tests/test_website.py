"""The site: what docs/website.py makes of links, formulas and docstrings; and the site as it is built, link by link."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
REPOSITORY = "https://example.org/r"


def load(path: Path):
    """A program as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


website, kernels = load(ROOT / "docs" / "website.py"), load(ROOT / "docs" / "kernels.py")


# The pages


@pytest.mark.parametrize(
    ("link", "source", "expected"),
    [
        ("docs/keras.md", "README.md", "keras.md"),
        ("docs/pictures/gates.png", "README.md", "pictures/gates.png"),
        ("CONTRIBUTING.md", "README.md", f"{REPOSITORY}/blob/main/CONTRIBUTING.md"),
        ("#performance", "README.md", "#performance"),
        ("https://example.org/a#b", "README.md", "https://example.org/a#b"),
        ("design.md#glossary", "docs/keras.md", "design.md#glossary"),
        ("../README.md", "docs/keras.md", "index.md"),
        ("../README.md#performance", "docs/keras.md", "index.md#performance"),
        ("../bench/results", "docs/keras.md", f"{REPOSITORY}/tree/main/bench/results"),
        ("../CONTRIBUTING.md#set-up", "docs/keras.md", f"{REPOSITORY}/blob/main/CONTRIBUTING.md#set-up"),
        ("drawings.py", "docs/keras.md", f"{REPOSITORY}/blob/main/docs/drawings.py"),
    ],
)
def test_links_stay_on_the_site_or_go_to_the_repository(link, source, expected):
    assert website.page(f"see [that\none]({link}).", source, REPOSITORY) == f"see [that\none]({expected})."


def test_code_stays_as_it_is():
    code = "`a[0](../x)`, `$x$`\n```python\ny = f[0](docs/x) # $5 $6\n```\n"
    assert website.page(code, "README.md", REPOSITORY) == code


def test_formulas_become_mathml_in_lines_and_on_their_own():
    line = website.page("the state $c_t$ of", "docs/lesson.md", REPOSITORY)
    inside = "<mrow><msub><mi>c</mi><mi>t</mi></msub></mrow>"
    assert re.fullmatch(rf'the state <span><math [^>]*display="inline">{inside}</math></span> of', line)
    rows = website.page("$$\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}$$", "docs/lesson.md", REPOSITORY)
    assert 'display="block"' in rows
    assert rows.count("<mtr>") == 2
    assert "&<" not in rows


def test_docstrings_in_markdown():
    docstring = "It computes::\n\n    a = b\n\nx is (D*L, N)."
    docstring += "\n\nExample::\n\n    a = 1\n\n    b = 2\n"
    assert website.in_markdown(docstring) == (
        "It computes:\n\n    a = b\n\nx is (D\\*L, N).\n\n**Example**\n\n```python\na = 1\n\nb = 2\n```"
    )


def test_a_table_of_kernels_has_a_row_for_each_in_its_family():
    loop = {"instructions": 300, "barriers": 1, "products": 18}
    row = dict(backend="triton", kernel="lstm_step_forward_kernel", case="bfloat16 B=2 H=3", architecture=90,
               registers=100, spills=0, shared=1024, loop=loop, weight_loads=7)  # fmt: skip
    rows = [row, row | {"backend": "cupy", "kernel": "lstm_cooperative_forward", "weight_loads": 0}]
    page = kernels.page(rows, {"triton": "1", "nvrtc": "2"})
    step, cupy = page.split("## Step")[1].split("## CUDA C++")
    assert "| `lstm_step_forward` | B=2 H=3 | 90 | 100 | 0 | 1024 | 300 | 1 | 18 | 7 |\n" in step
    assert "| `lstm_cooperative_forward` | B=2 H=3 | 90 | 100 | 0 | 1024 | 300 | 1 | 18 | 0 |\n" in cupy


def test_the_stored_table_of_kernels_has_every_case_and_nothing_that_spills():
    from gpu_lstm.kernels.triton_lstm import compile as compiler

    triton, _ = kernels.PAGE.read_text().split("## CUDA C++")
    rows = [line.strip("| ").split(" | ") for line in triton.splitlines() if line.startswith("| `")]
    stored = Counter((case, "backward" in kernel) for kernel, case, *_ in rows)
    assert stored == Counter((str(c).removeprefix("bfloat16 "), c.backward) for c in compiler.cases(quick=True))
    assert {row[4] for row in rows} == {"0"}
    assert {row[9] for row in rows if "lstm_step" not in row[0]} == {"0"}


# The site


@pytest.fixture
def checkout(tmp_path):
    """What the site is made of, where it can be changed."""
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bench", "examples", "gpu_lstm", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def build(folder: Path) -> subprocess.CompletedProcess:
    """As `make docs`."""
    subprocess.run([sys.executable, "docs/website.py"], cwd=folder, check=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


class Page(HTMLParser):
    """The names in a page, and where it leads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        self.targets += [given[key] for key in ("href", "src") if given.get(key)]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_every_link_in_it_leads_somewhere(checkout):
    done = build(checkout)
    assert done.returncode == 0, done.stdout
    assert "griffe:" not in done.stdout, done.stdout
    site = checkout / "out" / "site"
    pages = {path: Page(path) for path in site.rglob("index.html")}
    assert {path.parent.name for path in pages if path.parent != site} == {page.stem for page in PAGES}
    followed = Counter()
    for path, page in pages.items():
        for target in page.targets:
            if re.match("(https?|mailto|data):", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file.split("?")[0]).resolve() if file else path
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), (path, target)
            if anchor and anchor != "__skip":
                assert anchor in pages[there].names, (path, target)
            followed[there.suffix] += 1
    assert followed[".html"] > 500
    assert followed[".png"] > 20
    # No script, style or picture comes from elsewhere, and no formula is left.
    for path in pages:
        text = path.read_text()
        loaded = re.findall(r"<(?:script|img|link rel=\"?stylesheet\"?)[^>]*(?:src|href)=\"?(https?:[^\">]*)", text)
        assert not loaded, path
    lesson = (site / "lesson" / "index.html").read_text()
    assert lesson.count("<math") > 50
    assert "$" not in re.sub(r"<(pre|script|code).*?</\1>", "", lesson, flags=re.DOTALL)
    assert "(D*L, N, P) and (D*L, N, H)" in (site / "api" / "index.html").read_text()
    assert "resets_from_dones" in (site / "search.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "lines", "said"),
    [
        ("faq.md", "[x](nowhere.md) [x](design.md#nowhere) [x](../README.md#nowhere)", "3 issues found"),
        ("api.md", "\n::: gpu_lstm.nothing", "Could not collect 'gpu_lstm.nothing'"),
    ],
)
def test_what_leads_nowhere_stops_the_build(checkout, page, lines, said):
    with (checkout / "docs" / page).open("a") as file:
        file.write(f"\n{lines}\n")
    done = build(checkout)
    assert done.returncode != 0
    assert said in done.stdout
