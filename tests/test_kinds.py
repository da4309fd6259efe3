"""The kernels that a kind of call gets, and that explain reports, are those for the tensors of the call."""

import dataclasses

import pytest
import torch
from standing_in import as_a_card, flat
from torch.nn.utils.rnn import pack_padded_sequence

import gpu_lstm
from gpu_lstm.call.prepare import prepare
from gpu_lstm.dispatch.kind import kind_of
from gpu_lstm.kernels.triton_lstm import choose, launch

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU stands for a card, by the interpreter"),
    pytest.mark.usefixtures("nothing_cached"),
]

X = torch.rand(5, 2, 2)
STATES = torch.rand(1, 2, 2), torch.rand(1, 2, 2)
RESETS = torch.rand(5, 2) < 0.3
RAGGED = dict(lengths=torch.tensor([5, 2]), resets=RESETS)
TO_STATES = dict(resets=RESETS, reset_states=STATES)
CASES = {  # arguments of an LSTM, and of its call
    "plain": ({}, {}), "float16": (dict(dtype=torch.float16), dict(x=X.half())), "projection": (dict(proj_size=1), {}),
    "layer norm, peepholes": (dict(layer_norm=True, peepholes=True), {}), "peepholes": (dict(peepholes=True), {}),
    "layer norm of W_ih x": (dict(layer_norm=("ih",)), {}), "recurrent dropout": (dict(recurrent_dropout=0.5), {}),
    "layer norm of c without bias": (dict(layer_norm=("c",), bias=False), {}),
    "zoneout": (dict(zoneout=(0.5, 0)), TO_STATES), "zoneout of c": (dict(zoneout=(0, 0.5)), TO_STATES),
    "lengths of int32": ({}, dict(lengths=torch.tensor([5, 2], dtype=torch.int32))),
    "packed": ({}, dict(x=pack_padded_sequence(X, [5, 2]))),
    "resets": ({}, dict(resets=RESETS)), "reset_states": ({}, TO_STATES),
    "one step": ({}, dict(x=X[:1], resets=RESETS[:1])),
    "both directions": (dict(bidirectional=True, num_layers=2), RAGGED),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["training", "eval", "no_grad"])
@pytest.mark.parametrize("case", CASES)
def test_a_kind_and_explain_name_the_kernels_that_run(monkeypatch, case, mode):
    """A plan's `why` is made to tell the problem that it is of."""
    launched, real, whys = as_a_card(monkeypatch), choose.plans, []

    def plans(problem, card, backward):
        return [dataclasses.replace(plan, why=f"{problem}, {backward}") for plan in real(problem, card, backward)]

    def recorded(way):
        run = getattr(launch.Prepared, way)
        return lambda prepared, *given: whys.append(prepared.plan.why) or run(prepared, *given)

    monkeypatch.setattr(choose, "plans", plans)
    for way in ("forward", "backward"):
        monkeypatch.setattr(launch.Prepared, way, recorded(way))
    arguments, given = CASES[case]
    lstm = gpu_lstm.LSTM(2, 2, backend="triton", **arguments).train(mode == "training")
    x, given = given.get("x", X), {name: t for name, t in given.items() if name != "x"}
    with torch.set_grad_enabled(mode != "no_grad"):
        kind = kind_of(prepare(lstm._options(), lstm._weights(), x, **given))
        before = gpu_lstm.explain(lstm, x, **given)
        y, *_ = flat(lstm(x, **given))
        if mode != "no_grad":
            y.float().sum().backward()
        after = gpu_lstm.explain(lstm, x, **given)
    problems = [kind.problem(row) for row in range(len(before.layers))]
    ways = ["forward", "backward"][: 1 + (mode != "no_grad")]
    assert [problem for *_, problem in launched] == (problems + problems[::-1])[: len(ways) * len(problems)]
    for told in (before, after):
        passes = [[d.passes[k].why for d in told.layers][:: 1 - 2 * k] for k in range(len(ways))]
        assert whys == [why for each in passes for why in each]
        assert told.launches == len(launched)


@pytest.mark.parametrize("name", ["gain_hh_l1", "bias_c_l0", "weight_peephole_l1"])
def test_all_layers_have_the_same_cell(name):
    """A kind of call, and so a route, has one cell: what is None in one layer alone would choose another's kernels."""
    lstm = gpu_lstm.LSTM(2, 2, 2, layer_norm=True, peepholes=True, backend="triton")
    lstm(X)  # the route that is cached
    setattr(lstm, name, None)
    with pytest.raises(RuntimeError, match=f"{name[:-3]} should be given in every layer and direction, or in none"):
        lstm(X)
