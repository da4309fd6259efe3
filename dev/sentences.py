"""Warn about sentences in a change that read like riddles: python dev/sentences.py, which `make lint` runs.

The script looks at docstrings, comments and Markdown. Only sentences on added lines count: lines that differ from the
merge base with main, or from HEAD~1 on main itself. It prints each suspect with its place and the reason, and always
ends with 0. A pattern finds a manner, not a fault: CONTRIBUTING.md has the rules, and a person decides.

    python dev/sentences.py --all README.md docs     # every sentence of these files and folders
"""

import argparse
import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

DETERMINER = "(an?|the|each|all|both|such|those|what|them|it)"
RULES = {
    rf"^(Of|By|From|To) {DETERMINER}\b": "it begins with a phrase; say what the subject does",
    r"^In (an?|such|those|all) \w+ [a-z]": "it may lack a subject; say who does what",
    r"^(What|Whose)\b": "it begins with a relative clause; name the thing",
    r"\b(that|those) of\b": '"that of" points at a thing; name it',
    r"\b(of|to|for|by|from|with|and|than) what\b|\bwhat (is|are|has|it|they|the|an?|was|were)\b": "name the thing",
    r";.*;": "two semicolons; make sentences",
    r"[,;] of an? \w+": '", of a ..." hangs in the air; give it a verb',
    r"\bso (do|does|are|is|has|have) (they|it|the|a)\b": "the word order is inverted",
    r"\bbut for\b": '"but for" reads as "if not for"; write "except"',
    r"[;:] None: ": 'write "or None if ..."',
}


def sentences(path: Path) -> Iterator[tuple[int, int, str]]:
    """The sentences of a file, each with its first and last line. Code, tables and headings are left out."""
    text = path.read_text()
    for first, lines in comments_and_docstrings(text) if path.suffix == ".py" else markdown(text):
        words = [(first + number, word) for number, line in enumerate(lines) for word in line.split()]
        sentence: list[tuple[int, str]] = []
        for place, (number, word) in enumerate(words):
            sentence.append((number, word))
            following = words[place + 1][1] if place + 1 < len(words) else None
            if following is None or (word[-1] in ".:?!" and following[:1].isupper()):
                yield sentence[0][0], number, " ".join(each for _, each in sentence)
                sentence = []


def comments_and_docstrings(source: str) -> Iterator[tuple[int, list[str]]]:
    """The paragraphs of a Python file: their first lines and their texts. Comments on neighbouring lines are one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            yield from paragraphs(node.body[0].lineno, text.splitlines()) if text else ()
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"# (type:|noqa|fmt:)", token.string):
            row, alone = token.start[0], token.line.lstrip().startswith("#")
            if comments and not (alone and row == comments[-1][0] + 1):
                yield comments[0][0], [text for _, text in comments]
                comments = []
            comments.append((row, token.string.lstrip("# ")))
    if comments:
        yield comments[0][0], [text for _, text in comments]


def markdown(text: str) -> Iterator[tuple[int, list[str]]]:
    """The paragraphs and list items of a page, without code, tables, headings and HTML."""
    text = re.sub(r"(?ms)^ *```.*?^ *```", lambda match: "\n" * match[0].count("\n"), text)
    lines = ["" if re.match(r"\||#|<|    |\[[^]]+\]:", line) else line for line in text.splitlines()]
    yield from paragraphs(1, lines)


def paragraphs(first: int, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Lines cut where one is empty, and before each item of a list."""
    begin = 0
    for number, line in enumerate([*lines, ""]):
        is_item = re.match(r"\s*([-*]|\d+\.) ", line)
        if (not line.strip() or is_item) and number > begin:
            yield first + begin, [re.sub(r"^\s*([-*]|\d+\.) ", "", each) for each in lines[begin:number]]
        if not line.strip():
            begin = number + 1
        elif is_item:
            begin = number


def git(*arguments: str) -> str:
    """The output of a git command; nothing if it fails, for example in a shallow clone."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout


def added() -> dict[str, set[int]]:
    """The numbers of the added lines by file, including files that git does not know yet."""
    head = git("rev-parse", "HEAD").strip()
    bases = [git("merge-base", "HEAD", name).strip() for name in ("main", "origin/main")]
    base = next((each for each in bases if each and each != head), "HEAD~1")
    found: dict[str, set[int]] = {}
    lines: set[int] = set()
    for line in git("diff", "--unified=0", "--no-color", "--no-ext-diff", base).splitlines():
        if line.startswith("+++ "):
            lines = found.setdefault(line.removeprefix("+++ ").removeprefix("b/"), set())
        elif match := re.match(r"@@ \S+ \+(\d+)(?:,(\d+))? @@", line):
            lines |= set(range(int(match[1]), int(match[1]) + int(match[2] or 1)))
    for name in git("ls-files", "--others", "--exclude-standard").splitlines():
        found[name] = set(range(1, 10**6))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="warn about sentences that read like riddles")
    parser.add_argument("--all", nargs="+", type=Path, help="look at all sentences of these files and folders")
    named = parser.parse_args().all
    every = [file for path in named or () for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    lines: dict[str, set[int] | None] = {str(file): None for file in every} if named else {**added()}
    total = suspects = 0
    for name, wanted in lines.items():
        path = Path(name)
        if path.suffix not in (".py", ".md") or not path.is_file():
            continue
        for first, last, sentence in sentences(path):
            if len(sentence.split()) < 3 or (wanted is not None and wanted.isdisjoint(range(first, last + 1))):
                continue
            total += 1
            reasons = [why for pattern, why in RULES.items() if re.search(pattern, sentence)]
            if reasons:
                suspects += 1
                print(f"{name}:{first}: {', '.join(reasons)}\n    {sentence}")
    print(f"sentences: {suspects} of {total} {'in these files' if named else 'on added lines'} are suspects")


if __name__ == "__main__":
    main()
