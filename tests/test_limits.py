"""Tests of the tests: a fault of 1 % in any term exceeds the limits of comparing.judge, and roundings of float32 do
not. One of the tests that need a card runs on the CPU."""

import ast
import functools
import inspect
import random

import comparing
import numpy as np
import oracle
import pytest
import test_gpu
import torch
from cases import arrays_of, drawn
from places import KERNELS, by_interpreter
from standing_in import H100
from torch.utils._pytree import tree_leaves

F32, SEEDS = torch.float32, (5, 6)  # these calls have a reset before the second step
OF_A_LAYER = [f for f in ast.parse(inspect.getsource(oracle)).body
              if isinstance(f, ast.FunctionDef) and not {"stack", "cell", "named"} & {*f.name.split("_")}]  # fmt: skip
NO_TERMS = "1", "1.0", "1e-05", "t"
CASES = [  # cases of few elements, with every option of a layer
    ((2, 1, 3, 3, 2), "states dropout_h peepholes"), ((2, 1, 3, 3), "states expected norms peepholes"),
    ((2, 1, 3, 3), "gru states expected"), ((2, 1, 3, 3), "gru states dropout_h"), ((2, 1, 3, 3), "slstm dropout_h"),
]  # fmt: skip


def terms():
    """Return the terms of every sum, and the second factors of products, in the oracle's formulas of a layer."""
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
DRAWN = random.Random(0).sample(sorted(TERMS), 40)


def results(seed, kind=np.ndarray):
    """Return the results of all cases, in arrays of `kind`."""
    found = {}
    for size, words in CASES:
        arrays = arrays_of(*drawn(size, words, seed), {*words.split()}, seed, kind)
        found |= {f"{words}, {name}": t for name, t in arrays.items()}
    return found


TRUTHS = [functools.partial(results, seed) for seed in SEEDS]
limits = functools.cache(functools.partial(comparing.counted, TRUTHS, F32))
truth = functools.cache(lambda seed: results(seed))


def judged(monkeypatch, ours):
    """Judge our results beside a yardstick without errors. The limits of this problem are counted once."""
    monkeypatch.setattr(comparing, "counted", lambda *_: limits())
    errors = {name: [(np.asarray(our[name]) - true[name], 0 * true[name], true[name])
                     for our, true in zip(ours, map(truth, SEEDS))] for name in truth(SEEDS[0])}  # fmt: skip
    comparing.judge(errors, F32, "reference", TRUTHS, 2)


@pytest.mark.parametrize("term", DRAWN)
def test_a_fault_of_one_percent_in_any_term_is_detected(monkeypatch, term):
    node, field = TERMS[term]
    right, faulty = getattr(node, field), {**vars(oracle)}
    for counted in (*(functools.partial(truth, seed) for seed in SEEDS), limits):
        counted()  # compute and keep the results of the right formulas
    setattr(node, field, ast.BinOp(right, ast.Mult(), ast.Constant(1.01)))
    try:
        tree = ast.fix_missing_locations(ast.Module(OF_A_LAYER, []))
        exec(compile(tree, oracle.__file__, "exec"), faulty)
    finally:
        setattr(node, field, right)
    for function in OF_A_LAYER:
        monkeypatch.setattr(oracle, function.name, faulty[function.name])
    with pytest.raises(AssertionError, match="RMS error"):
        judged(monkeypatch, [results(seed) for seed in SEEDS])


@pytest.mark.parametrize("seed", range(5))
def test_roundings_are_no_faults_where_torch_rounds_luckily(monkeypatch, seed):
    """torch's errors are zero here. Errors of rounding are allowed, and an error sixteen times as large, of one result,
    is not."""
    rounding, name = comparing.rounding_as(F32, np.random.default_rng(1 + seed)), f"{CASES[0][1]}, h0"
    found = [results(seed, rounding) for seed in SEEDS]
    judged(monkeypatch, found)
    for of_seed, true in zip(found, map(truth, SEEDS)):
        of_seed[name] = true[name] + 16 * (np.asarray(of_seed[name]) - true[name])
    with pytest.raises(AssertionError, match=f"{name}: RMS error"):
        judged(monkeypatch, found)


@pytest.fixture
def rehearsed(monkeypatch):
    """Make tests of test_gpu.py run on the CPU, by plans for it, and without streams and graphs."""

    def captured(run):
        found = run()
        return found, lambda: [t.data.copy_(again) for t, again in zip(tree_leaves(found), tree_leaves(run()))]

    changes = dict(CARD="cpu", SIZE=(3, 9, 3), UNITS=dict.fromkeys(KERNELS, 9), card_of=lambda _: H100,
                   force=lambda patch, place: KERNELS[place].force(patch), captured=captured,
                   on_a_stream=lambda run: run())  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(test_gpu, name, value)


@by_interpreter
@pytest.mark.parametrize("words", ["slstm heads", "gru"])
def test_a_test_of_a_family_rehearsed(rehearsed, monkeypatch, words):
    test_gpu.test_every_family(monkeypatch, "cooperative/16/1/1", words, torch.float32)
