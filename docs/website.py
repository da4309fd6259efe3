"""The pages as the site has them, see mkdocs.yml: python docs/website.py writes them into out/docs/.

They are those of docs/, as the first the README, and the lesson, which is a notebook. On GitHub they are read as they
are; here links to files that the site does not have go to the repository, formulas become MathML, which browsers show
by themselves, and 2^-10 has its exponent raised. What the docstrings have besides Google's sections is turned into
Markdown, too.
"""

import base64
import json
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from griffe import Extension, GriffeLoader, Module, Object
from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "out" / "docs"
LESSON = "examples/lstm_explained.ipynb"


def write() -> None:
    """All pages and what they show."""
    repository = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["repo_url"]
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py", "*.md", "theme", "__pycache__"))
    for source in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        name = "index.md" if source.name == "README.md" else source.name
        text = page(source.read_text(), source.relative_to(ROOT).as_posix(), repository)
        text = with_docstrings(text) if name == "api.md" else text
        (PAGES / name).write_text(text)
    text, pictures = lesson(json.loads((ROOT / LESSON).read_text()))
    (PAGES / "lesson.md").write_text(page(text, LESSON, repository))
    for number, picture in pictures.items():
        (PAGES / "pictures" / f"lesson_{number}.png").write_bytes(picture)


def lesson(notebook: dict[str, Any]) -> tuple[str, dict[int, bytes]]:
    """The Markdown of the notebook, and the pictures by the number of their cell.

    The last comment of a picture's cell says what it shows; a line that only draws is left out.
    """
    parts, pictures = [f"The notebook [{LESSON}]({posixpath.basename(LESSON)}) as a page."], {}
    for cell in notebook["cells"]:
        source, shown = "".join(cell["source"]), ""
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        outputs = [(output.get("data", {}), output.get("text")) for output in cell["outputs"]]
        draws = any("image/png" in data for data, _ in outputs)
        if draws:
            source, _, shown = source.rpartition("  # ")
        if not draws or "\n" in source:
            parts.append(f"```python\n{source}\n```")
        for data, text in outputs:
            if "image/png" in data:
                pictures[cell["execution_count"]] = base64.b64decode(data["image/png"])
                parts.append(f"![{shown}](../docs/pictures/lesson_{cell['execution_count']}.png)")
            else:
                parts.append(f"```text\n{''.join(text or data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def page(text: str, source: str, repository: str) -> str:
    """The Markdown of the file `source` as the site has it. Its code stays as it is."""

    def turned(match: re.Match[str]) -> str:
        code, shown, link, power, block, formula = match.groups()
        if code:
            return code
        if shown:
            return f'="{target(shown, source, repository)}"'
        if power:
            return f"<sup>{power}</sup>"
        if link:
            return f"]({target(link, source, repository)})"
        tex = (block or formula).replace("{aligned}", "{align*}")  # the converter does not know `aligned`
        tex = re.sub(r"\\log (?=[a-zA-Z0-9])", r"\\log\\,", tex)  # nor the space between a function and its argument
        # In a <span>, since a line that begins with a tag Markdown does not know would be a paragraph of its own.
        formula = convert(tex, display="block" if block else "inline")
        return f'<span class="formula">{formula}</span>' if block else f"<span>{formula}</span>"

    pattern = r"(```.*?```|`[^`]*`)|(?<=src|set)=\"([^\"]+)\""
    pattern += r"|\]\(([^)\s]+)\)|(?<=\w)\^(T|-?\d+)\b|\$\$(.+?)\$\$|\$([^$\n]+)\$"
    return re.sub(pattern, turned, text, flags=re.DOTALL).replace("<details>", '<details markdown="1">')


def target(link: str, source: str, repository: str) -> str:
    """Where a link in the file `source` leads: to a page or a picture of the site, else to a file of the repository."""
    if re.match(r"[a-z]+:|#", link):
        return link
    path, *anchor = re.split("(?=#)", link)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    path = "docs/index.md" if path == "README.md" else path
    path = "docs/lesson.md" if path == LESSON != source else path
    if path.startswith("docs/") and not path.endswith(".py"):
        path = path.removeprefix("docs/")
    else:
        path = f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
    return path + "".join(anchor)


def with_docstrings(text: str) -> str:
    """A list of names, "- `gpu_lstm.Stream` with `reset`: text", as what mkdocstrings replaces by their docstrings."""

    def described(match: re.Match[str]) -> str:
        name, members, says = match.groups()
        options = [f"members: [{(members or '').replace('`', '')}]", "show_if_no_docstring: true"]
        options += [f"heading: {says}"] * name.endswith(".forward")
        return "\n".join([f"\n::: {name}", "    options:", *(f"      {option}" for option in options)])

    return re.sub(r"(?m)^- `([\w.]+)`(?: with ([^:]*))?: (.*)$", described, text)


class Docstrings(Extension):
    """For griffe, which reads the docstrings: mkdocs.yml names it."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        if pkg.name == "gpu_lstm":  # the kernels are next to it in a checkout
            pkg.set_member("kernels", loader.load("kernels"))


def in_markdown(docstring: str) -> str:
    """The code of an example in a fence; a product, as in D*L, without emphasis."""

    def example(match: re.Match[str]) -> str:
        code = re.sub("^    ", "", match[1].rstrip(), flags=re.MULTILINE)
        return f"**Example**\n\n```python\n{code}\n```"

    docstring = re.sub(r"(?<=\w)\*(?=\w)", r"\*", docstring)
    docstring = re.sub(r"^Example::\n\n((?:    .*(?:\n|$)|\n)+)", example, docstring, flags=re.MULTILINE)
    return re.sub(r"::$", ":", docstring, flags=re.MULTILINE)


if __name__ == "__main__":
    write()
