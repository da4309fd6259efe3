"""The tool that plants faults: each is a fault, in code that computes, and tests run against it."""

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
