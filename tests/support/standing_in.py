"""Stubbed cards: one that torch and the planner see, and the CPU as a card, whose kernels may be stubbed as well."""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import interpreted  # noqa: F401  # puts functions in the place of assembly
import torch

from gpu_lstm.call import prepare
from gpu_lstm.dispatch import route
from gpu_lstm.kernels import cache, cupy_rnn, memory, numba_rnn, timeouts, triton_rnn
from gpu_lstm.kernels.cards import Card
from gpu_lstm.kernels.layer import Layer
from gpu_lstm.kernels.problem import Inputs, Problem, Recurrence, in_the_loop, problem_of
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans import choose
from gpu_lstm.kernels.triton_rnn.plans.planning import DEVICES, INTERPRETER, Plan
from gpu_lstm.kernels.triton_rnn.plans.tiles import pointwise_plan
from gpu_lstm.verification import verify

CUDA, H100 = torch.device("cuda", 0), DEVICES["h100"]


def torch_finds(patch, card: Card = H100, **others: Any) -> None:
    """Stub torch.cuda so that cuda:0 is this card, current and idle. `others` are more answers, as functions or
    values."""
    major, minor = divmod(card.architecture, 10)
    properties = SimpleNamespace(name=card.name, major=major, minor=minor, multi_processor_count=card.multiprocessors,
                                 max_threads_per_multi_processor=2048)  # fmt: skip
    facts = dict(get_device_properties=properties, get_device_capability=(major, minor), get_device_name=card.name,
                 is_current_stream_capturing=False, device=contextlib.nullcontext())  # fmt: skip
    for name, answer in (facts | others).items():
        patch.setattr(torch.cuda, name, answer if callable(answer) else lambda *_, answer=answer, **__: answer)


def a_card(patch, card: Card = H100, **others: Any) -> None:
    """Make cuda:0 this card, also for planning. All kernels load on it, and nothing is launched."""
    torch_finds(patch, card, **others)
    for module in (launch, choose):
        patch.setattr(module, "card_of", lambda _: card)
    loaded = SimpleNamespace(shared=0, target=SimpleNamespace(arch=card.architecture))
    patch.setattr(choose, "load", lambda *_: SimpleNamespace(n_spills=0, metadata=loaded))
    patch.setattr(choose, "compile_all", lambda *_: None)
    patch.setattr(launch, "prepare_run", lambda *_: lambda: None)
    patch.setattr(launch, "error_word", lambda device, kernel, trial=False: None)


def the_cpu_is_a_card(patch) -> None:
    """Let `auto` give tensors on the CPU to the kernels for cards. They are interpreted, or compiled by g++."""
    for package, devices in ((triton_rnn, ("cpu",)), (cupy_rnn, ("cpu",)), (numba_rnn, ())):
        patch.setattr(package, "DEVICES", devices)
    patch.setattr(prepare, "only_torch_runs", lambda backend: False)


def plans_are_verified_on_the_cpu(patch) -> None:
    """Make the CPU a card on which the interpreter's plan is chosen as on any card: it is loaded, and verified with few
    steps."""
    patch.setattr(verify, "STEPS", 2)  # the interpreter is slow
    choose_plan = choose.choose_plan
    the_cpu_is_a_card(patch)
    torch_finds(patch)
    patch.setattr(launch, "choose_plan", lambda problem, _, *given: choose_plan(problem, CUDA, *given))
    patch.setattr(choose, "card_of", lambda _: INTERPRETER)
    patch.setattr(choose, "load", lambda *_: SimpleNamespace(n_spills=0))


def as_another_process() -> None:
    """Forget all decisions that are not in files."""
    for forget in (cache._read.cache_clear, cache.machine.cache_clear, route.forget):
        forget()


RESULTS = {
    False: ("h_ptr", "c_ptr", "h_n_ptr", "c_n_ptr", "h_next_ptr", "o_ptr", "v_ptr", "m_ptr"),
    True: ("dgates_ptr", "dc_ptr", "dh_total_ptr", "dh_from_zoneout_ptr", "dreset_h_ptr", "dreset_c_ptr", "dz_ptr",
           "o_ptr", "v_ptr", "m_ptr"),
}  # fmt: skip # results of kernels, forward and backward
SCRATCH = ("dh_next_ptr",)  # no product has written it before the last step


def stand_in(kernel, grid, **arguments):
    """Fill the results of a kernel with a number that depends on everything that it is compiled for and passed."""
    results = RESULTS["dgates_ptr" in arguments]
    given = {name: value for name, value in arguments.items() if name not in (*results, *SCRATCH)}
    tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
    compiled_for = {name: value for name, value in given.items() if name not in tensors}
    compiled_for |= {name: t.dtype for name, t in tensors.items()}
    number = zlib.crc32(repr((kernel.__name__, grid, sorted(map(str, compiled_for.items())))).encode()) / 2**32
    for name, t in tensors.items():
        if name == "gates_ptr":  # it arrives with numbers in it, and is not overwritten here
            t = t[..., : t.shape[-1] // 4 * arguments["S"].FROM_X]
        number = number / 2 + t.double().sum().sin().item() / 2
    for name in results:
        if arguments.get(name) is not None:
            arguments[name].fill_(number)


def recurrence(gates: torch.Tensor, **tensors: torch.Tensor) -> Recurrence:
    """Return the recurrence for `gates` [T, B, 4H]. A Layer reads neither x nor W_ih, which have no features here."""
    steps, batch, rows = gates.shape
    tensors |= {name: tensors[name].view(1, batch, tensors[name].shape[-1]) for name in ("h0", "c0")}
    return Recurrence(Inputs(x=gates.new_zeros(steps, batch, 0), weight_ih=gates.new_zeros(rows, 0), **tensors))


def assert_contract(layer: Layer, gates: torch.Tensor, r: Recurrence) -> None:
    """Check that a layer is given the tensors that its Problem describes, in the loop and outside of it."""
    p, steps = layer.problem, len(gates)
    assert gates.shape[:2] == (steps, p.batch)
    assert gates.shape[2] in (r.inputs.x.shape[2], 4 * p.hidden)  # x itself, where the loop multiplies it
    assert (p.steps == 1) <= (steps == 1)
    wanted = in_the_loop(p, steps)
    for name, like in wanted.items():
        t = getattr(r.inputs, name)
        assert (tuple(t.shape), t.dtype) == like, f"{name}: expected {like}, got {list(t.shape)} of {t.dtype}"
    more = {name for name in EVERY if name not in wanted and getattr(r.inputs, name) is not None}
    assert more <= ({"reset_h"} if p.reset_c else set()), "of which the Problem says nothing"


EVERY = in_the_loop(Problem(2, 1, 1, torch.float32, 1, lengths=torch.int64, resets=True, dropout_h=True, zoneout_h=0,
                            zoneout_c=0, reset_h=True, reset_c=True, weight_peephole=True, gain_hh=True, gain_c=True,
                            bias_c=True), 2)  # fmt: skip


def as_a_card(monkeypatch):
    """Make the CPU a card, with `stand_in` for its kernels. Return a list of the layers launched: (way, problem of its
    tensors)."""
    the_cpu_is_a_card(monkeypatch)
    monkeypatch.setattr(launch, "launch_kernel", stand_in)
    monkeypatch.setattr(memory._Checking, "on", False)  # it takes half of the time, and finds nothing in a stand-in
    monkeypatch.setattr(verify, "verify", lambda *_: None)
    launched = []

    def recorded(run, way, gates, recurrence):
        def wrapper(layer, *given):
            of_layer, given_to_it = layer.problem, given[recurrence].inputs
            facts = of_layer.cell, of_layer.reverse, of_layer.precision
            problem = problem_of(given_to_it._replace(x=given[gates]), *facts)
            problem = problem._replace(side_by_side=of_layer.side_by_side)
            launched.append((way, problem))
            # A chunk may have one step where the layer has several.
            assert of_layer == problem._replace(steps=of_layer.steps), "kernels for other tensors"
            return run(layer, *given)

        monkeypatch.setattr(Layer, way, wrapper)

    recorded(Layer.forward, "forward", 0, 1)
    recorded(Layer.backward, "backward", 3, 5)
    return launched


def plan_of(family: str, problem: Problem, backward: bool, card: Card = H100) -> Plan:
    """Return the first plan of a family of kernels, even where it is not proposed because it is slower.

    "split" is the step family, backward with products of parts of K. "held" is the step family backward in TF32, where
    W_hh of 64 units is too large.
    """
    if family == "held" and backward and problem.size == 4:
        family = "step"
    by_product = dataclasses.replace(pointwise_plan(problem.of_head, backward), heads=problem.heads)
    every, in_parts = [*choose.plans(problem, card, backward), by_product], family == "split" and backward
    family = "step" if family == "split" else family
    return next(p for p in every if p.family.name == family and (family != "step" or (p.family.parts > 1) == in_parts))


@contextlib.contextmanager
def few_polls(kernel: str, polls: int = 20, trial: bool = False) -> Iterator[None]:
    """Let a kernel on the CPU wait for this many polls, where it would otherwise wait for seconds."""
    word = timeouts.error_word(torch.device("cpu"), kernel, trial)
    before, word[1] = int(word[1]), polls
    yield
    word[1] = before
