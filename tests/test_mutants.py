"""The tool that plants faults: each is a fault, in code that computes, and tests run against it."""

import ast
import contextlib

import mutants
import pytest
from mutants import ROOT, all_mutants, of_cuda, of_python, sample

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


def test_a_sample_is_drawn_by_its_seed_of_every_kind_and_each_fault_is_another_program_that_python_reads():
    possible = all_mutants(ROOT)
    first = sample(possible, 30, seed=0)
    assert sample(possible, 30, seed=0) == first != sample(possible, 30, seed=1)
    assert {mutant.kind for mutant in first} == {mutant.kind for mutant in possible}
    longer = sample(possible, 60, seed=0)
    assert longer[:30] == first, "a longer run continues where a shorter one ended"
    for mutant in longer:
        source = (ROOT / mutant.path).read_bytes()
        planted = mutant.planted(source)
        assert planted != source
        if mutant.path.endswith(".py"):
            assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source)), mutant.name


def test_the_tests_that_are_run_exist_and_so_do_the_files_that_have_their_own():
    files = [file for pattern in mutants.SOURCES for file in ROOT.glob(pattern)]
    assert set(mutants.OWN) <= {file.stem for file in files}
    for file in files:
        for test in mutants.tests_of(str(file.relative_to(ROOT))):
            name, _, function = test.partition("::")
            assert f"def {function}" in (ROOT / "tests" / f"test_{name}.py").read_text(), (file, test)


ENDS = {
    "passes": ("def test_it():\n    pass\n", ""), "fails": ("def test_it():\n    assert False\n", "a.py::test_it"),
    "cannot be imported": ("import nothing_of_this_name\n", "a.py"),
    "crashes": ("import os\n\ndef test_it():\n    os.abort()\n", "a, killed by SIGABRT"),
    "takes too long": ("import time\n\ndef test_it():\n    time.sleep(60)\n", "time"), "has no test": ("", None),
}  # fmt: skip


@pytest.mark.parametrize(("body", "found"), ENDS.values(), ids=ENDS)
def test_a_failure_is_a_test_that_fails_and_nothing_else(tmp_path, capfd, body, found):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(body)
    raises = contextlib.nullcontext() if found is not None else pytest.raises(RuntimeError, match="a did not run")
    with capfd.disabled(), raises:  # a fork's output goes where the fork sends it
        assert mutants.first_failure(tmp_path, "a", 0.5 if found == "time" else 60) == found
