"""The tool that plants faults: each is a fault, in code that computes, and tests run against it."""

import json
from functools import partial

import coverage
import mutants
import pytest
from mutants import of_cuda, of_python

SOURCE = b'''
"""A text with 1 < 2."""
@cache(3)
def f(a: int | None, b=True):
    """Another, 1 + 1."""
    assert a < 7
    if a < b and not a:
        raise ValueError(f"{a + 1}")
    warn("a", 1, stacklevel=2)
    g(a, x=1)
    a = g(a)
    return -a * 2, b
'''
PLANTED = {
    ("constant", "True", "False"), ("comparison", "a < b", "(a <= b)"),
    ("and, or", "a < b and not a", "(a < b or not a)"), ("sign, not", "not a", "(a)"),
    ("condition negated", "a < b and not a", "(not (a < b and (not a)))"), ("call left out", "g(a, x=1)", "pass"),
    ("argument left out", "g(a, x=1)", "(g(a))"), ("constant", "1", "2"), ("return of None", "-a * 2, b", "None"),
    ("element left out", "-a * 2, b", "((b,))"), ("element left out", "-a * 2, b", "((-a * 2,))"),
    ("arithmetic", "-a * 2", "(-a + 2)"), ("sign, not", "-a", "(a)"), ("constant", "2", "3"),
    ("statement left out", 'if a < b and not a:\n        raise ValueError(f"{a + 1}")', "pass"),
    ("statement left out", "a = g(a)", "pass"),
}  # fmt: skip
CUDA = b"// a < b\n#define A 1 + 1\ntemplate <int N>\nif (i < n && a == 2) x += y * z;  // 1 + 1\n"
OF_CUDA = ("<", "<="), ("&&", "||"), ("==", "!="), ("2", "3"), ("+=", "-="), ("*", "+")


@pytest.mark.parametrize(("generate", "source", "planted"), [
    (of_python, SOURCE, PLANTED), (of_cuda, CUDA, {("in CUDA C++", *swap) for swap in OF_CUDA}),
], ids=["Python", "CUDA C++"])  # fmt: skip
def test_what_is_planted_and_what_is_left_alone(generate, source, planted):
    """Left alone: texts, decorators, annotations, assertions, errors, and arguments that change speed only."""
    assert {(mutant.kind, mutant.old, mutant.new) for mutant in generate("a", source)} == planted


def test_the_statement_of_a_fault_is_all_of_its_lines_but_not_its_block_or_none_where_it_is_imported():
    source = b"d = 1\ndef f(x=3):\n    if (\n        a < x\n    ):\n        b = (2 +\n             c)"
    lines = {(mutant.old, mutant.first, mutant.last) for mutant in of_python("a", source)}
    assert {("1", 0, 0), ("3", 0, 0), ("a < x", 3, 5), ("2 +\n             c", 6, 7)} <= lines


def test_what_tests_and_their_processes_execute_is_recorded_and_those_that_are_chosen_run_alone(tmp_path, capfd):
    (tmp_path / "tests").mkdir()
    (tmp_path / "gpu_lstm").mkdir()
    (tmp_path / "gpu_lstm" / "a.py").write_text(
        "def one():\n    return 1\n\ndef two():\n    return 2\n\nif __name__ == '__main__':\n    one()\n"
    )
    (tmp_path / "tests" / "test_a.py").write_text(
        "import subprocess, sys\nsys.path.insert(0, 'gpu_lstm')\n\n"
        "def test_one():\n    subprocess.run([sys.executable, 'gpu_lstm/a.py'], check=True)\n\n"
        "def test_two():\n    import a\n    assert a.two() == 1\n"
    )
    folder, files = tmp_path / "recorded", ["tests/test_a.py"]
    with capfd.disabled():
        assert mutants.first_failure(tmp_path, files, 600, partial(mutants.Recording, folder)) == "a.py::test_two"
        one = partial(mutants.Chosen, ["tests/test_a.py::test_one"])
        assert mutants.first_failure(tmp_path, files, 600, one) == ""
    lines = {}
    for file in folder.glob("lines.*"):
        recorded = coverage.CoverageData(file)
        recorded.read()
        for line, tests in recorded.contexts_by_lineno(str(tmp_path / "gpu_lstm" / "a.py")).items():
            lines.setdefault(line, []).extend(tests)
    assert (lines[2], lines[5]) == (["tests/test_a.py::test_one"], ["tests/test_a.py::test_two"])
    assert list(json.loads((folder / "seconds.json").read_text())) == [
        f"tests/test_a.py::test_{n}" for n in ("one", "two")
    ]
