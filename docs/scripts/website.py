"""Write the pages of the site into out/docs/. mkdocs.yml describes the site itself.

The pages are the README as the first page, the pages of docs/, and the lesson, which is a notebook. GitHub shows them
unchanged. For the site, links to files outside of it go to the repository. Formulas become MathML, which browsers show
by themselves, and the exponent in 2^-10 is raised. The parts of docstrings that are not Google's sections are turned
into Markdown, too.
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

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "out" / "docs"
LESSON = "examples/lstm_explained.ipynb"


def write() -> None:
    """Write all pages and their pictures."""
    repository = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["repo_url"]
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.md", "scripts", "theme"))
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
    """Return the Markdown of the notebook, and the pictures by the number of their cell.

    The last comment in a cell describes its picture. A cell of one line that only draws is left out.
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
    """Return the Markdown of the file `source` for the site. Its code is not changed."""

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
        tex = re.sub(r"\\log (?=[a-zA-Z0-9])", r"\\log\\,", tex)  # nor a space after a function's name
        # The formula is in a <span>, since Markdown makes a paragraph of a line that begins with an unknown tag.
        formula = convert(tex, display="block" if block else "inline")
        return f'<span class="formula">{formula}</span>' if block else f"<span>{formula}</span>"

    pattern = r"(```.*?```|`[^`]*`)|(?<=src|set)=\"([^\"]+)\""
    pattern += r"|\]\(([^)\s]+)\)|(?<=\w)\^(T|-?\d+)\b|\$\$(.+?)\$\$|\$([^$\n]+)\$"
    return re.sub(pattern, turned, text, flags=re.DOTALL).replace("<details>", '<details markdown="1">')


def target(link: str, source: str, repository: str) -> str:
    """Return the target of a link in the file `source`: a page or a picture of the site, or else a file on GitHub."""
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
    """Turn each item "- `gpu_lstm.Stream` with `reset`: text" into a block that mkdocstrings fills with docstrings."""

    def described(match: re.Match[str]) -> str:
        name, members, says = match.groups()
        options = [f"members: [{(members or '').replace('`', '')}]", "show_if_no_docstring: true"]
        options += [f"heading: {says}"] * name.endswith(".forward")
        return "\n".join([f"\n::: {name}", "    options:", *(f"      {option}" for option in options)])

    return re.sub(r"(?m)^- `([\w.]+)`(?: with ([^:]*))?: (.*)$", described, text)


class Docstrings(Extension):
    """An extension for griffe, which reads the docstrings. mkdocs.yml names it."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        if pkg.name == "gpu_lstm":  # the kernels are next to it in a checkout
            pkg.set_member("kernels", loader.load("kernels"))


def in_markdown(docstring: str) -> str:
    """Put code and tables into fences. Outside of these, escape products such as D*L, which would be emphasis."""

    def fenced(match: re.Match[str]) -> str:
        text, code = match[1], re.sub("^    ", "", match[2].rstrip(), flags=re.MULTILINE).replace(r"\*", "*")
        head, language = ("**Example**", "python") if text == "Example" else (f"{text}:", "text")
        return f"{head}\n\n```{language}\n{code}\n```\n\n"

    docstring = re.sub(r"(?<=\w)\*(?=\w)", r"\*", docstring)
    return re.sub(r"^(.*)::\n\n((?:    .*(?:\n|$)|\n)+)", fenced, docstring, flags=re.MULTILINE)


if __name__ == "__main__":
    write()
