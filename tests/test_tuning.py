"""Autotuning picks the fastest plan, caches it by card and version, and stays out of graph captures."""

import dataclasses
import logging

import pytest
import torch
from standing_in import H100

import gpu_lstm
from gpu_lstm.kernels import cache
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_lstm import autotune, choose, launch
from gpu_lstm.kernels.triton_lstm.choose import plans
from gpu_lstm.kernels.triton_lstm.planning import Family

PROBLEM = Problem(256, 16, 768, torch.bfloat16)
CUDA = torch.device("cuda", 0)


def _chosen(problem, backward):
    launch.forget()  # as another process would
    cache._read.cache_clear()
    return launch.layer_of(problem, CUDA).prepared(Pass(backward)).plan


def test_the_fastest_plan_is_found_and_used_from_then_on(an_h100, monkeypatch):
    """As if the widest tiles of the cooperative family were the fastest."""

    def seconds(plan, call=None):
        return 1000 * (plan.family is Family.STEP) - plan.columns

    before = _chosen(PROBLEM, False)
    monkeypatch.setattr(autotune, "time_plan", seconds)
    fastest = autotune.autotune(PROBLEM, CUDA)
    assert set(fastest) == {"forward", "backward"}
    assert fastest["forward"] == min(plans(PROBLEM, H100, False), key=seconds) != before
    layer = launch.layer_of(PROBLEM, CUDA)
    assert layer.chosen(Pass()) == (fastest["forward"], True), "without a launch"
    assert layer.prepared(Pass()).plan == fastest["forward"], "in this process, too"
    assert _chosen(PROBLEM._replace(steps=2, reverse=True), False) == fastest["forward"]
    assert _chosen(PROBLEM, True) == fastest["backward"]


def test_a_log_line_for_each_plan_says_how_far_it_is(an_h100, monkeypatch, caplog):
    proposed = plans(PROBLEM, H100, False)
    monkeypatch.setattr(autotune, "time_plan", lambda plan, call: 1.2345)
    monkeypatch.setattr(autotune, "recorded_launches", lambda problem, which, plan: plan)
    monkeypatch.setattr(autotune, "why_it_does_not_fit", lambda plan: "it spills" if plan == proposed[0] else None)
    with caplog.at_level(logging.INFO, "gpu_lstm"):
        autotune.autotune(PROBLEM, CUDA)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("forward")]
    for number, (plan, line) in enumerate(zip(proposed, lines, strict=True), start=1):
        named = f"{number} of {len(proposed)}: {plan.family.value} {plan.rows}x{plan.columns}"
        assert line == f"forward, plan {named}: {'it spills' if number == 1 else '1.23 ms'}"


@pytest.mark.parametrize("change", [dict(programs=1), dict(groups=9), dict(tiles_per_group=7), dict(rows=16)], ids=str)
def test_a_plan_in_a_file_that_nobody_proposes_is_not_used(an_h100, change):
    """Its numbers may fit no problem, and its kernel was verified with others."""
    best, other, *_ = choose.plans(PROBLEM, H100, False)
    choose.keep_measured(PROBLEM, H100, False, other)
    assert _chosen(PROBLEM, False) == other
    choose.keep_measured(PROBLEM, H100, False, dataclasses.replace(other, **change))
    assert _chosen(PROBLEM, False) == best


def test_not_while_a_graph_is_captured(an_h100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        autotune.autotune(PROBLEM, CUDA)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match="times kernels on a CUDA device, and torch finds none here"):
        gpu_lstm.autotune(8, 2)
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1|runs on CUDA tensors"):
        gpu_lstm.autotune(8, 2, device="cpu")
    with pytest.raises(TypeError, match="supports float16, bfloat16 and float32"):
        gpu_lstm.autotune(8, 2, dtype=torch.float64, device="cpu")
