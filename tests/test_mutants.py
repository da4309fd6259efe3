"""The tool that plants faults: each is a fault, in code that computes, and somebody is asked about it."""

import ast
from pathlib import Path

import mutants
import pytest
from mutants import ROOT, Mutant, all_mutants, of_cuda, of_python, sample

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
    return -a * 2, b
'''


def _of(source: bytes, generate=of_python) -> set[tuple[str, str, str]]:
    return {(mutant.kind, mutant.old, mutant.new) for mutant in generate("a", source)}


def test_what_is_planted_and_what_is_left_alone():
    """Texts, decorators, annotations, assertions and errors are; so are arguments that change speed only."""
    assert _of(SOURCE) == {
        ("constant", "True", "False"),
        ("comparison", "a < b", "(a <= b)"),
        ("and, or", "a < b and not a", "(a < b or not a)"),
        ("sign, not", "not a", "(a)"),
        ("condition negated", "a < b and not a", "(not (a < b and (not a)))"),
        ("call left out", "g(a, x=1)", "pass"),
        ("argument left out", "g(a, x=1)", "(g(a))"),
        ("constant", "1", "2"),
        ("return of None", "-a * 2, b", "None"),
        ("element left out", "-a * 2, b", "((b,))"),
        ("element left out", "-a * 2, b", "((-a * 2,))"),
        ("arithmetic", "-a * 2", "(-a + 2)"),
        ("sign, not", "-a", "(a)"),
        ("constant", "2", "3"),
    }


def test_cuda_is_read_by_its_operators_and_numbers():
    source = b"// a < b\n#define A 1 + 1\ntemplate <int N>\nif (i < n && a == 2) x += y * z;  // 1 + 1\n"
    assert _of(source, of_cuda) == {
        ("in CUDA C++", old, new)
        for old, new in (("<", "<="), ("&&", "||"), ("==", "!="), ("2", "3"), ("+=", "-="), ("*", "+"))
    }


def test_every_fault_is_another_program_that_python_reads():
    sources = {}
    for mutant in sample(all_mutants(ROOT), 100, seed=1):
        source = sources.setdefault(mutant.path, (ROOT / mutant.path).read_bytes())
        planted = mutant.planted(source)
        assert planted != source
        if mutant.path.endswith(".py"):
            assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source)), mutant.name


def test_a_sample_is_the_same_by_its_seed_and_has_every_kind():
    possible = all_mutants(ROOT)
    first, again, other = (sample(possible, 30, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert {mutant.kind for mutant in first} == {mutant.kind for mutant in possible}
    assert sample(possible, 60, 0)[:30] == first, "a longer run goes on where a shorter one ended"


def test_who_is_asked_is_there():
    for file in (file for pattern in mutants.SOURCES for file in ROOT.glob(pattern)):
        for test in mutants.tests_of(str(file.relative_to(ROOT))):
            assert (ROOT / "tests" / f"test_{test.partition('::')[0]}.py").exists(), (file, test)
    for name in mutants.TESTS:
        assert list(ROOT.glob(f"{name}*")), name


def test_what_is_asked_of_a_file_is_noted_for_these_tests_only(tmp_path):
    for path in ("gpu_lstm/a.py", "tests/helper.py", "tests/test_a.py", "tests/test_b.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")

    def name() -> str:
        return mutants.without_a_fault(tmp_path, "a::one")

    names = [name()]
    (tmp_path / "tests" / "test_b.py").write_text("1")
    assert name() == names[0]
    for path in ("gpu_lstm/a.py", "tests/helper.py", "tests/test_a.py"):
        Path(tmp_path, path).write_text("1")
        names.append(name())
    assert len(set(names)) == 4


def test_a_fault_is_named_in_one_line():
    assert Mutant("a.py", 3, 4, "constant", 0, "f(\n  1)", "f(2)").name == "a.py:3:4: f( 1)  ->  f(2)"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("def test_it():\n    pass\n", ""),
        ("def test_it():\n    assert False\n", "a.py::test_it"),
        ("import nothing_of_this_name\n", "a.py"),
        ("import os\n\ndef test_it():\n    os.abort()\n", "a, killed by SIGABRT"),
        ("import time\n\ndef test_it():\n    time.sleep(60)\n", "time"),
        ("", None),
    ],
    ids=["passes", "fails", "cannot be imported", "crashes", "takes too long", "has no test"],
)
def test_a_failure_is_a_test_that_fails_and_nothing_else(tmp_path, capfd, body, found):
    """Where nobody could be asked nothing was caught."""
    worker = object.__new__(mutants.Worker)
    worker.tree = tmp_path
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(body)
    seconds = 2 if found == "time" else 60
    with capfd.disabled():  # a fork's output goes where the fork sends it
        if found is None:
            with pytest.raises(RuntimeError, match="a could not be asked"):
                worker.first_failure("a", seconds)
        else:
            assert worker.first_failure("a", seconds) == found
