"""The limits of comparing.judge: a fault of 1 % in any term is beyond them, and float32's own roundings are not."""

import ast
import functools
import inspect
from types import ModuleType

import comparing
import numpy as np
import oracle
import pytest
import torch

F32 = torch.float32
OF_A_LAYER = [f for f in ast.parse(inspect.getsource(oracle)).body
              if isinstance(f, ast.FunctionDef)
              and not {"stack", "functions", "heads"} & {*f.name.split("_")}]  # fmt: skip
NO_TERMS = "1", "1.0", "1e-05", "t"
T, B, I, H, P = 2, 1, 3, 3, 2
INPUTS = dict(x=(T, B, I), h0=(B, P), c0=(B, H), weight_ih=(4 * H, I), weight_hh=(4 * H, P), bias_ih=(4 * H,),
              bias_hh=(4 * H,), weight_hr=(P, H), peephole=(3 * H,), gain_ih=(4 * H,), gain_hh=(4 * H,), gain_c=(H,),
              bias_c=(H,))  # fmt: skip
LEFT, GRADIENTS = dict(reset_h=(T, B, P), reset_c=(T, B, H)), dict(dh=(T, B, P), dh_n=(B, P), dc_n=(B, H))
OF_GRU = dict(h0=(B, H), weight_ih=(3 * H, I), weight_hh=(3 * H, H), bias_ih=(3 * H,), bias_hh=(3 * H,))
LEFT_OF_GRU, GRADIENTS_OF_GRU = dict(reset_h=(T, B, H)), dict(dh=(T, B, H), dh_n=(B, H))
NAMES = "h", "h_n", "c_n", *(f"d{name}" for name in (*INPUTS, *LEFT))
NAMES_OF_GRU = "h", "h_n", *(f"d{name}" for name in ("x", *OF_GRU, *LEFT_OF_GRU))
OF_SLSTM = dict(h0=(B, H), c0=(3, B, H), weight_hh=(4 * H, 1))  # each unit is a head
GRADIENTS_OF_SLSTM = dict(dh=(T, B, H), dh_n=(B, H), dc_n=(3, B, H))
NAMES_OF_SLSTM = "h", "h_n", "c_n", *(f"d{name}" for name in [*INPUTS][:7])


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


def results(seed: int, kind: type[np.ndarray] = np.ndarray, formulas: ModuleType = oracle) -> dict[str, np.ndarray]:
    """Results and gradients of an LSTM, a GRU and an sLSTM of few elements with every option that a layer has, in
    arrays of a kind."""
    generator = np.random.default_rng(seed)

    def random(name, shape):
        scale, mean = (0.3, 1) if "gain" in name else (shape[1] ** -0.5 if "weight" in name else 1, 0)
        return (mean + scale * generator.standard_normal(shape)).astype(np.float32).astype(float).view(kind)

    given, left, gradients = ({name: random(name, shape) for name, shape in each.items()}
                              for each in (INPUTS, LEFT, GRADIENTS))  # fmt: skip
    stays = dict(zoneout_h=np.full((T, B, P), 0.3), zoneout_c=np.full((T, B, H), 0.45))
    noise = stays | dict(dropout_h=np.array([[0.5, 1.5]]))
    *found, tape = formulas.layer(**given, **left, **noise, resets=np.ones((T, B), bool), reverse=True)
    found += formulas.layer_gradients(**given, **left, **noise, tape=tape, **gradients)
    named = dict(zip(NAMES, found, strict=True))

    of_slstm = {name: given[name] for name in [*INPUTS][:7]}
    of_slstm |= {name: random(name, shape) for name, shape in OF_SLSTM.items()}
    of_slstm["c0"][1] = np.abs(of_slstm["c0"][1]) + 1  # n
    *found, tape = formulas.slstm_layer(**of_slstm, reverse=True)
    gradients = {name: random(name, shape) for name, shape in GRADIENTS_OF_SLSTM.items()}
    found += formulas.slstm_layer_gradients(**of_slstm, tape=tape, **gradients)[:-2]
    named |= {f"{name} of an sLSTM": values for name, values in zip(NAMES_OF_SLSTM, found, strict=True)}

    given |= {name: random(name, shape) for name, shape in OF_GRU.items()}
    given = {name: given[name] for name in ("x", "h0", "c0", *list(OF_GRU)[1:])}
    left, gradients = ({name: random(name, shape) for name, shape in each.items()}
                       for each in (LEFT_OF_GRU, GRADIENTS_OF_GRU))  # fmt: skip
    noise = dict(zoneout_h=np.full((T, B, H), 0.3), dropout_h=np.array([[0.5, 1.5, 0.8]]))
    h, h_n, _, tape = formulas.gru_layer(**given, **left, **noise, resets=np.ones((T, B), bool), reverse=True)
    dx, dh0, _, *found = formulas.gru_layer_gradients(**given, **left, **noise, tape=tape, **gradients, dc_n=None)
    of_gru = zip(NAMES_OF_GRU, (h, h_n, dx, dh0, *found[:-1]), strict=True)
    return named | {f"{name} of a GRU": values for name, values in of_gru}


SEEDS = range(2)
TRUTHS = [functools.partial(results, seed) for seed in SEEDS]
limits = functools.cache(functools.partial(comparing.counted, TRUTHS, F32))
truth = functools.cache(lambda seed: results(seed))


def judged(monkeypatch, ours: list[dict], theirs: list[dict]) -> None:
    """By the limits of this problem, which are counted once."""
    monkeypatch.setattr(comparing, "counted", lambda *_: limits())
    errors = {name: [(np.asarray(our[name]) - true[name], their[name] - true[name], true[name])
                     for our, their, true in zip(ours, theirs, map(truth, SEEDS))] for name in truth(0)}  # fmt: skip
    comparing.judge(errors, F32, "reference", TRUTHS, T)


@pytest.mark.parametrize("term", TERMS)
def test_a_fault_of_one_percent_in_any_term_is_detected(monkeypatch, term):
    node, field = TERMS[term]
    faulty, right = ModuleType("faulty"), getattr(node, field)
    vars(faulty).update(vars(oracle))
    setattr(node, field, ast.BinOp(right, ast.Mult(), ast.Constant(1.01)))
    try:
        exec(compile(ast.fix_missing_locations(ast.Module(OF_A_LAYER, [])), oracle.__file__, "exec"), vars(faulty))
    finally:
        setattr(node, field, right)
    ours = [results(seed, formulas=faulty) for seed in SEEDS]
    with pytest.raises(AssertionError, match="RMS error"):
        judged(monkeypatch, ours, [*map(truth, SEEDS)])


@pytest.mark.parametrize("seed", range(10))
def test_roundings_are_no_faults_where_torch_rounds_luckily(monkeypatch, seed):
    """Whose errors are none at all here."""
    rounding = comparing.rounding_as(F32, np.random.default_rng(1 + seed))
    judged(monkeypatch, [results(seed, rounding) for seed in SEEDS], [*map(truth, SEEDS)])
