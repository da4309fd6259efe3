"""Plant single faults in the library, one at a time, and run the tests that should detect them.

    make mutants                      # 200 faults, drawn by a fixed seed
    make mutants MUTANTS="--count 50 --only kernels/triton_rnn"

First all tests run without a fault under coverage.py, which records the lines that each test executes. Then, for each
fault, the tests run that execute its statement, file by file. A worker plants faults in its own copy of the tree, never
in the checkout. Results go to files, a line for each fault, so that a run that was stopped can continue. Faults that
survived are planted again, since tests may have been added. docs/testing.md has the results of runs.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import coverage
import pandas as pd
import pytest
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
SOURCES = ("gpu_lstm/**/*.py", "kernels/**/*.py", "kernels/**/*.cu")
RESULTS = ROOT / "out" / "mutants"
# The time that tests may take with a fault: seconds, or a multiple of their time without one. The larger limit counts.
LEAST_SECONDS, TIMES_AS_LONG = 30, 4
WITHOUT_A_FAULT = 900  # seconds that a test file may take without a fault
START = 3  # seconds until a test file has been imported
IMPORTED = 0, 0  # the lines of a fault in CUDA C++, or in a statement that is executed when its file is imported
HOST = "tests/support/host_cuda.py"  # tests that execute it execute the kernels in CUDA C++


class Mutant(NamedTuple):
    """One fault: `new` replaces `old`, which begins at byte `start` of the file."""

    path: str
    line: int
    column: int
    kind: str
    start: int
    old: str
    new: str
    first: int  # the lines of its statement in a function, or IMPORTED
    last: int

    @property
    def name(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.path}:{self.line}:{self.column}: {old}  ->  {new}"

    def planted(self, source: bytes) -> bytes:
        """Return the file with the fault."""
        old = self.old.encode()
        assert source[self.start : self.start + len(old)] == old
        return source[: self.start] + self.new.encode() + source[self.start + len(old) :]


SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip
# Calls and arguments for texts, logs, speed and types. No result depends on them, so they are not mutated.
TALKS = {"print", "warn", "warn_once", "info", "warning", "debug", "error", "add_argument", "ArgumentParser",
         "add_parser", "named", "TypeVar", "cast", "NewType", "getLogger"}  # fmt: skip
SPEED = {"cache_modifier", "eviction_policy", "num_stages", "stacklevel", "do_not_specialize", "non_blocking", "flush",
         "help", "description", "why", "msg", "indent"}  # fmt: skip


def _called(node: ast.AST) -> str:
    function = node.func if isinstance(node, ast.Call) else node
    return getattr(function, "attr", getattr(function, "id", ""))


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below that are mutated.

    Texts, annotations, decorators, assertions and code for type checkers are not.
    """
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "type_comment", "type_params"):
            children = (c for c in (value if isinstance(value, list) else [value]) if isinstance(c, ast.AST))
            yield from (child for child in children if not _is_left_alone(child))


def _is_left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return True
        case ast.FunctionDef():
            return any(_called(decorator) == "overload" for decorator in node.decorator_list)
        case ast.ClassDef():
            return any("Protocol" in ast.unparse(base) for base in node.bases)
        case ast.If():
            return ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        case ast.Call():
            return _called(node) in TALKS
        case ast.Expr():  # a docstring, or a call of TALKS
            return isinstance(node.value, ast.Constant) or _is_left_alone(node.value)
        case ast.keyword():
            return node.arg in SPEED
    return False


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield the changes of a node: (kind, the node whose text is replaced, the new text)."""

    def swapped(kind: str, **fields):
        changed = copy.copy(node)
        vars(changed).update(fields)
        return kind, node, f"({ast.unparse(changed)})"

    match node:
        case ast.Compare():
            for k, operator in enumerate(node.ops):
                yield swapped("comparison", ops=[*node.ops[:k], SWAPS[type(operator)](), *node.ops[k + 1 :]])
        case ast.BinOp() if type(node.op) in SWAPS:
            yield swapped("arithmetic", op=SWAPS[type(node.op)]())
        case ast.BoolOp():
            yield swapped("and, or", op=SWAPS[type(node.op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign, not", node, f"({ast.unparse(node.operand)})"
        case ast.Constant(value=int() | float() as value):
            yield "constant", node, str(not value if isinstance(value, bool) else value + 1)
        case ast.Return(value=ast.AST()) if ast.unparse(node.value) != "None":
            yield "return of None", node.value, "None"
        case ast.Expr(value=ast.Call()):
            yield "call left out", node, "pass"
        case ast.Call(keywords=[_, *_]):
            for keyword in node.keywords:
                if keyword.arg is not None and keyword.arg not in SPEED:
                    yield swapped("argument left out", keywords=[k for k in node.keywords if k is not keyword])
        case ast.Tuple(ctx=ast.Load(), elts=[_, _, *_]) if not any(isinstance(e, ast.Slice) for e in node.elts):
            for k in range(len(node.elts)):
                yield swapped("element left out", elts=[*node.elts[:k], *node.elts[k + 1 :]])
        case ast.If(orelse=[]) | ast.For() | ast.AugAssign() | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement left out", node, "pass"
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in {
            getattr(n, "id", "") for n in ast.walk(value)
        }:
            yield "statement left out", node, "pass"
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.UnaryOp):
        yield "condition negated", node.test, f"(not ({ast.unparse(node.test)}))"


def _lines_of(statement: ast.stmt) -> tuple[int, int]:
    """Return the first and last line of a statement. A statement with a block ends before the block."""
    body = getattr(statement, "body", None) or getattr(statement, "cases", None)
    if body is None:
        return statement.lineno, statement.end_lineno
    return statement.lineno, max(statement.lineno, getattr(body[0], "lineno", statement.lineno + 1) - 1)


def of_python(path: str, source: bytes) -> Iterator[Mutant]:
    """Yield every possible fault of a Python file."""
    before = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]  # the bytes before each line
    nodes: list[tuple[ast.AST, tuple[int, int], bool]] = [(ast.parse(source), IMPORTED, False)]
    while nodes:
        node, lines, called = nodes.pop()
        lines = _lines_of(node) if called and isinstance(node, ast.stmt) else lines
        nodes += [(part, lines, called or isinstance(node, ast.FunctionDef)) for part in _parts(node)]
        for kind, at, new in _changes(node):
            start, end = before[at.lineno - 1] + at.col_offset, before[at.end_lineno - 1] + at.end_col_offset
            yield Mutant(path, at.lineno, at.col_offset, kind, start, source[start:end].decode(), new, *lines)


C_SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*",
           "%": "/", "&&": "||", "||": "&&", "+=": "-=", "-=": "+="}  # fmt: skip


def of_cuda(path: str, source: bytes) -> Iterator[Mutant]:
    """Yield every possible fault of a CUDA C++ file.

    Operators between blanks and numbers are changed, but not in comments, templates, assembly and the preprocessor.
    """
    start = 0
    for number, line in enumerate(source.decode().splitlines(keepends=True), start=1):
        code = line.partition("//")[0]
        if not re.search(r'template|"|^\s*[#/*]|static_assert', code):
            for found in re.finditer(r"(?<= )(<=?|>=?|[=!]=|[+\-*/%]|&&|\|\||[+-]=)(?= )|\b\d+\b(?![.\w])", code):
                old = found.group()
                for new in [C_SWAPS[old]] if old in C_SWAPS else [str(int(old) + 1)]:
                    at = start + len(line[: found.start()].encode())
                    yield Mutant(path, number, found.start(), "in CUDA C++", at, old, new, *IMPORTED)
        start += len(line.encode())


def all_mutants(root: Path) -> list[Mutant]:
    """Return every fault that could be planted."""
    found = []
    for file in sorted({file for pattern in SOURCES for file in root.glob(pattern)}):
        generate = of_cuda if file.suffix == ".cu" else of_python
        found += generate(str(file.relative_to(root)), file.read_bytes())
    return found


def sample(possible: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Return some of the possible faults, equally many of each kind if there are enough."""
    shuffled = random.Random(seed).sample(possible, len(possible))
    of_kinds = [[m for m in shuffled if m.kind == kind] for kind in sorted({m.kind for m in possible})]
    return [m for m in itertools.chain(*itertools.zip_longest(*of_kinds)) if m is not None][:count]


@cache  # one copy in each process
def own_copy(snapshot: Path) -> Path:
    """Return a copy of the tree in which this process plants faults.

    Test files run in forks of this process, which has imported torch.
    """
    tree = snapshot.with_name(f"{snapshot.name}-{os.getpid()}")
    shutil.copytree(snapshot, tree)
    os.environ |= dict(PYTHONPATH=str(tree), XDG_CACHE_HOME=str(tree / "out" / "cache"))
    os.environ |= dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    own = ROOT, ROOT / "dev", ROOT / "tests", ROOT / "tests/support"
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() not in own)]
    for name in ("hypothesis", "torch._dynamo", "triton.language"):
        importlib.import_module(name)
    return tree


@contextlib.contextmanager
def planted(tree: Path, mutant: Mutant) -> Iterator[None]:
    """A block within which the tree has the fault."""
    file = tree / mutant.path
    source, cached = file.read_bytes(), Path(importlib.util.cache_from_source(str(file)))
    try:
        file.write_bytes(mutant.planted(source))
        cached.unlink(missing_ok=True)  # Python would use it: it compares only the size, and the time in whole seconds
        yield
    finally:
        file.write_bytes(source)
        cached.unlink(missing_ok=True)


class Covered(NamedTuple):
    """The recorded run of the tests without a fault."""

    seconds: dict[str, float]  # the seconds of each test, by its name
    data: coverage.CoverageData  # the lines that each test executed

    def tests_of(self, mutant: Mutant) -> list[tuple[list[str], float]]:
        """Return the tests that execute a fault's statement, a list for each test file, and the seconds of each list.

        If the statement is executed when its file is imported, they are the tests that execute the file. Quick tests of
        a file come first, and files with many of them.
        """
        lines = self.data.contexts_by_lineno(HOST if mutant.path.endswith(".cu") else mutant.path)
        own = {name for n in range(mutant.first, mutant.last + 1) for name in lines.get(n, ()) if name}
        names = own or {name for names in lines.values() for name in names if name}
        by_file = itertools.groupby(sorted(names), key=lambda name: name.partition("::")[0])
        files = [sorted(tests, key=self.seconds.__getitem__) for _, tests in by_file]
        timed = [(tests, START + sum(map(self.seconds.__getitem__, tests))) for tests in files]
        return sorted(timed, key=lambda each: each[1] / len(each[0]))


class Recording:
    """A plugin of pytest. It records how long each test takes, and which lines the test and its processes execute.

    `folder` gets a file of coverage.py for each process, and a file of seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.seconds, self.folder, config = {}, folder, folder / "coverage.ini"
        folder.mkdir(parents=True)
        of = "".join(f"    {Path.cwd() / one}\n" for one in ("gpu_lstm/*", "kernels/*", HOST))
        self.config, self.text = config, f"[run]\nparallel = true\ndata_file = {folder}/lines\ninclude =\n{of}"
        config.write_text(self.text)
        self.coverage = coverage.Coverage(config_file=str(config))
        os.environ["COVERAGE_PROCESS_START"] = str(config)  # coverage.py starts in every process that has this variable
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self.config.write_text(f"{self.text}context = {item.nodeid.replace('$', '$$')}\n")
        self.coverage.switch_context(item.nodeid)
        start = time.monotonic()
        result = yield
        self.seconds[item.nodeid] = time.monotonic() - start
        return result

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        (self.folder / "seconds.json").write_text(json.dumps(self.seconds))


class Chosen(NamedTuple):
    """A plugin of pytest that runs only these tests, in this order."""

    names: list[str]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        place = {name: n for n, name in enumerate(self.names)}
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])


def without_a_fault(snapshot: Path, file: str, folder: Path) -> tuple[str, Path]:
    """Run a test file; return its first failure and the tree. The lines that each test executes go to `folder`."""
    tree = own_copy(snapshot)
    return first_failure(tree, file, WITHOUT_A_FAULT, partial(Recording, folder)), tree


def outcome(snapshot: Path, mutant: Mutant, files: list[tuple[list[str], float]]) -> dict:
    """Run the tests on a fault and return the result. `files` are the tests of each file, and their time without it."""
    tree, start, by = own_copy(snapshot), time.monotonic(), ""
    with planted(tree, mutant):
        for tests, seconds in files:
            file, limit = tests[0].partition("::")[0], max(LEAST_SECONDS, TIMES_AS_LONG * seconds)
            if by := first_failure(tree, file, limit, partial(Chosen, tests)):
                break
    result = {"": "survived", "time": "timed out"}.get(by, "caught")
    return {"result": result, "by": by, "seconds": round(time.monotonic() - start, 1)}


def first_failure(tree: Path, file: str, seconds: float, plugin: Callable[[], object]) -> str:
    """Run a test file; return the first failure, "time" if it takes too long, the crash of pytest, or an empty text."""
    log = tree / "out.log"
    child = multiprocessing.get_context("fork").Process(target=_pytest, args=(tree, log, file, plugin))
    child.start()
    child.join(seconds)
    ended = child.exitcode  # None if the child still runs
    with contextlib.suppress(ProcessLookupError):  # also processes that the tests have left running
        os.killpg(child.pid, signal.SIGKILL)
    if ended is None:
        return "time"
    if ended in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):  # a file may have only slow tests
        return ""
    text = log.read_text(errors="replace")
    if failed := re.search(r"^(?:FAILED|ERROR) tests/test_(.*?)(?: - .*)?$|^INTERNALERROR> (\w+: .*)$", text, re.M):
        return failed.group(1) or failed.group(2)
    if ended < 0:
        return f"killed by {signal.Signals(-ended).name}"
    raise RuntimeError(f"{file} did not run:\n{text[-2000:]}")  # for example, a package is missing


def _pytest(tree: Path, log: Path, file: str, plugin: Callable[[], object]) -> None:
    """Run pytest in a separate process group."""
    os.setsid()
    with log.open("w") as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    os.chdir(tree)
    options = ["-q", "-x", "-m", "not deep", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=line"]
    sys.exit(pytest.main([*options, file], plugins=[plugin()]))


def main() -> int:
    """Run the command line. Return 1 if fewer than 97 % of the faults were caught, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="faults to plant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path begins so")
    parser.add_argument("--kind", default="", help="kinds of faults that begin so")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree, listing = Path(folder, "tree"), ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        # A snapshot of tracked and new files, so that later edits of the checkout change no result.
        for name in subprocess.check_output(listing, cwd=ROOT, text=True).splitlines():
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            try:
                return run(tree, options, pool)
            finally:
                pool.shutdown(cancel_futures=True)


def covered(tree: Path, pool: Executor) -> Covered:
    """Return the run of the tests without a fault. It is recorded once for each state of sources and tests.

    Raise if a test fails.
    """
    files = sorted(file for folder in ("gpu_lstm", "kernels", "tests") for file in (tree / folder).rglob("*.*"))
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    data, seconds = RESULTS / f"{state}.coverage", RESULTS / f"{state}.json"
    known = coverage.CoverageData(data)
    if not seconds.exists():
        data.unlink(missing_ok=True)
        recorded, times = RESULTS / "recorded", {}
        shutil.rmtree(recorded, ignore_errors=True)
        tests = [str(file.relative_to(tree)) for file in files if file.match("tests/test_*.py")]
        asked = {pool.submit(without_a_fault, tree, test, (to := recorded / Path(test).stem)): to for test in tests}
        failures = []
        for done in track(as_completed(asked), "without a fault", total=len(asked)):
            failure, where = done.result()
            failures += [failure] if failure else []
            if (file := asked[done] / "seconds.json").exists():
                times |= json.loads(file.read_text())
            for file in asked[done].glob("lines.*"):
                part = coverage.CoverageData(file)
                part.read()
                known.update(part, map_path=lambda path, where=where: os.path.relpath(path, where))
        if failures:
            raise RuntimeError(f"fails without a fault: {', '.join(failures)}")
        seconds.write_text(json.dumps(times))
    known.read()
    return Covered(json.loads(seconds.read_text()), known)


def run(tree: Path, options: argparse.Namespace, pool: Executor) -> int:
    """Record the tests, plant the faults in copies of a tree, print the result, and return the exit status."""
    console, file = Console(highlight=False), RESULTS / "results.jsonl"
    every = all_mutants(tree)
    possible = [m for m in every if m.path.startswith(options.only) and m.kind.startswith(options.kind)]
    chosen = sample(possible, options.count, options.seed)
    console.print(f"{len(chosen)} of {len(possible)} faults, seed {options.seed}")
    file.touch()
    known = {entry["name"]: entry for entry in map(json.loads, file.read_text().splitlines())}  # the last entry counts
    jobs = [m for m in chosen if known.get(m.name, {}).get("result", "survived") == "survived"]
    tests = covered(tree, pool)
    asked = {pool.submit(outcome, tree, mutant, tests.tests_of(mutant)): mutant for mutant in jobs}
    for done in track(as_completed(asked), "planted", total=len(asked)):
        mutant = asked[done]
        about = dict(name=mutant.name, part=str(Path(mutant.path).parent), kind=mutant.kind)
        known[mutant.name] = about | done.result()
        with file.open("a") as results:
            results.write(json.dumps(known[mutant.name]) + "\n")
    rows = pd.DataFrame([known[mutant.name] for mutant in chosen], columns=["name", "part", "kind", "result"])
    for key in ("part", "kind"):
        console.print(pd.crosstab(rows[key], rows["result"], margins=True, margins_name="planted"))
    survivors = rows["name"][rows["result"] == "survived"]
    console.print(*(f"survived: {name}" for name in survivors), sep="\n", markup=False)
    return int(len(survivors) > 0.03 * len(rows))


if __name__ == "__main__":
    sys.exit(main())
