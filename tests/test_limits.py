"""The limits of comparing.judge: a fault of 1 % in any term is beyond them, and float32's own roundings are not."""

import ast
import functools
import inspect
from dataclasses import replace
from types import ModuleType

import comparing
import numpy as np
import oracle
import pytest
import torch
from comparing import NAMES, Example, counted, example_of, judge
from roundings import rounding_as

F32 = torch.float32
FORMULAS = ast.parse(inspect.getsource(oracle)).body
OF_A_LAYER = [f for f in FORMULAS if isinstance(f, ast.FunctionDef) and "stack" not in f.name]
NO_TERMS = "1", "1.0", "1e-05", "t"


def terms() -> dict[str, tuple[ast.AST, str]]:
    """The terms of every sum, and the second factors of products, in the oracle's formulas of a layer."""
    found = {}
    for function in OF_A_LAYER:
        for node in ast.walk(function):
            fields = ["value"] if isinstance(node, ast.AugAssign) else []
            if isinstance(node, ast.BinOp) and not isinstance(node.op, (ast.Div, ast.Pow)):
                fields = ["left", "right"][isinstance(node.op, (ast.Mult, ast.MatMult)) :]
            for field in fields:
                if (term := ast.unparse(getattr(node, field))) not in NO_TERMS:
                    found[f"{term} in {ast.unparse(node)}, {function.name}:{node.lineno}"] = node, field
    return found


TERMS = terms()


@functools.cache
def problem() -> tuple[list[Example], list[list]]:
    """Two examples of few elements with every option that a layer has; their truth."""
    found = []
    for seed in range(2):
        given = example_of((2, 1, 3, 3, 2), "states peepholes reverse norms expected", seed)
        given.resets[:] = True
        dropped = dict(dropout_h=torch.tensor([[0.5, 1.5]], dtype=torch.float64))
        found.append(replace(given, noise=given.noise | dropped).rounded(F32))
    return found, [given.truth() for given in found]


limits = functools.cache(lambda: counted([given.named_truth for given in problem()[0]], F32))


def judged(monkeypatch, ours: list[list], theirs: list[list]) -> None:
    """As `assert_as_good_as_torch` does, of results that are given."""
    monkeypatch.setattr(comparing, "counted", lambda *_: limits())
    errors: comparing.Errors = {}
    for found in zip(ours, theirs, problem()[1]):
        for name, our, their, true in zip(NAMES, *found):
            if true is not None:
                errors.setdefault(name, []).append((np.asarray(our) - true, their - true, true))
    judge(errors, F32, "reference", [given.named_truth for given in problem()[0]], 2)


@pytest.mark.parametrize("term", TERMS)
def test_a_fault_of_one_percent_in_any_term_is_detected(monkeypatch, term):
    node, field = TERMS[term]
    examples, truth = problem()
    faulty, right = ModuleType("faulty"), getattr(node, field)
    vars(faulty).update(vars(oracle))
    setattr(node, field, ast.BinOp(right, ast.Mult(), ast.Constant(1.01)))
    try:
        exec(compile(ast.fix_missing_locations(ast.Module(OF_A_LAYER, [])), oracle.__file__, "exec"), vars(faulty))
    finally:
        setattr(node, field, right)
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "oracle", faulty)
        ours = [given.truth() for given in examples]
    with pytest.raises(AssertionError, match="RMS error"):
        judged(monkeypatch, ours, truth)


@pytest.mark.parametrize("seed", range(10))
def test_roundings_are_no_faults_where_torch_rounds_luckily(monkeypatch, seed):
    """Whose errors are none at all here."""
    examples, truth = problem()
    rounding = rounding_as(F32, np.random.default_rng(1 + seed))
    judged(monkeypatch, [given.truth(rounding) for given in examples], truth)
