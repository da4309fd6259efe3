"""The limits of comparing.judge: a fault of 1 % in any term is beyond them, and float32's own roundings are not."""

import ast
import functools
import inspect
import random
from types import ModuleType

import comparing
import numpy as np
import oracle
import pytest
import torch

F32, SEEDS = torch.float32, range(2)
OF_A_LAYER = [f for f in ast.parse(inspect.getsource(oracle)).body
              if isinstance(f, ast.FunctionDef) and not {"stack", "cell", "named"} & {*f.name.split("_")}]  # fmt: skip
NO_TERMS = "1", "1.0", "1e-05", "t"
T, B, I, H, P = 2, 1, 3, 3, 2
CELLS = "lstm", "gru", "slstm"


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
DRAWN = random.Random(0).sample(sorted(TERMS), 40)


def sizes_of(cell: str) -> tuple[dict, dict, dict]:
    """Of inputs, of what resets leave, and of gradients that are given."""
    rows, width = 3 * H if cell == "gru" else 4 * H, P if cell == "lstm" else H
    c = (3, B, H) if cell == "slstm" else (B, H)
    inputs = dict(x=(T, B, I), h0=(B, width), c0=c, weight_ih=(rows, I), weight_hh=(rows, width), bias_ih=(rows,),
                  bias_hh=(rows,))  # fmt: skip
    if cell == "lstm":
        inputs |= dict(weight_hr=(P, H), peephole=(3 * H,), gain_ih=(rows,), gain_hh=(rows,), gain_c=(H,), bias_c=(H,))
    left = {} if cell == "slstm" else dict(reset_h=(T, B, width), reset_c=(T, B, H))
    return inputs, left, dict(dh=(T, B, width), dh_n=(B, width), dc_n=c)


def results(seed: int, kind: type[np.ndarray] = np.ndarray, formulas: ModuleType = oracle) -> dict[str, np.ndarray]:
    """Results and gradients of an LSTM, a GRU and an sLSTM of few elements with every option that a layer has, in
    arrays of a kind."""
    generator, results = np.random.default_rng(seed), {}

    def random(name, shape):
        scale, mean = (0.3, 1) if "gain" in name else (shape[1] ** -0.5 if "weight" in name else 1, 0)
        return (mean + scale * generator.standard_normal(shape)).astype(np.float32).astype(float).view(kind)

    for cell in CELLS:
        given, left, gradients = ({name: random(name, shape) for name, shape in each.items()}
                                  for each in sizes_of(cell))  # fmt: skip
        noise, ragged = left | dict(dropout_h=np.array([[0.5, 1.5, 0.8][: given["h0"].shape[1]]])), {}
        if left:
            noise |= dict(zoneout_h=np.full(left["reset_h"].shape, 0.3), zoneout_c=np.full((T, B, H), 0.45))
            ragged = dict(resets=np.ones((T, B), bool))
        else:
            given["c0"][1] = np.abs(given["c0"][1]) + 1  # n
        *found, tape = formulas.layer(*given.values(), **noise, **ragged, reverse=True)
        found += formulas.layer_gradients(*given.values(), **noise, tape=tape, **gradients)
        names = "h", "h_n", "c_n", *(f"d{name}" for name in ("x", "h0", "c0", *oracle.NAMES, "reset_h", "reset_c"))
        results |= {f"{cell} {name}": t for name, t in zip(names, found, strict=True) if t is not None}
    return results


TRUTHS = [functools.partial(results, seed) for seed in SEEDS]
limits = functools.cache(functools.partial(comparing.counted, TRUTHS, F32))
truth = functools.cache(lambda seed: results(seed))


def judged(monkeypatch, ours: list[dict]) -> None:
    """Beside a yardstick without errors, by the limits of this problem, which are counted once."""
    monkeypatch.setattr(comparing, "counted", lambda *_: limits())
    errors = {name: [(np.asarray(our[name]) - true[name], 0 * true[name], true[name])
                     for our, true in zip(ours, map(truth, SEEDS))] for name in truth(0)}  # fmt: skip
    comparing.judge(errors, F32, "reference", TRUTHS, T)


@pytest.mark.parametrize("term", DRAWN)
def test_a_fault_of_one_percent_in_any_term_is_detected(monkeypatch, term):
    node, field = TERMS[term]
    faulty, right = ModuleType("faulty"), getattr(node, field)
    vars(faulty).update(vars(oracle))
    setattr(node, field, ast.BinOp(right, ast.Mult(), ast.Constant(1.01)))
    try:
        exec(compile(ast.fix_missing_locations(ast.Module(OF_A_LAYER, [])), oracle.__file__, "exec"), vars(faulty))
    finally:
        setattr(node, field, right)
    with pytest.raises(AssertionError, match="RMS error"):
        judged(monkeypatch, [results(seed, formulas=faulty) for seed in SEEDS])


@pytest.mark.parametrize("seed", range(5))
def test_roundings_are_no_faults_where_torch_rounds_luckily(monkeypatch, seed):
    """Whose errors are none at all here. Of one result sixteen times as large they are."""
    rounding, name = comparing.rounding_as(F32, np.random.default_rng(1 + seed)), "lstm h_n"
    found = [results(seed, rounding) for seed in SEEDS]
    judged(monkeypatch, found)
    for of_seed, true in zip(found, map(truth, SEEDS)):
        of_seed[name] = true[name] + 16 * (np.asarray(of_seed[name]) - true[name])
    with pytest.raises(AssertionError, match=f"{name}: RMS error"):
        judged(monkeypatch, found)
