"""A process with a card that lacks only its driver. driver_stub.c replaces the driver, and everything above it is real.

    python tests/support/rehearsal.py NAME    # runs a function below; the last line is its result, as JSON

Tensors are on the CPU, and layers are told that they run on cuda:0. Kernels compute nothing.
"""

import ctypes
import dataclasses
import json
import os
import sys
import threading
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from standing_in import CUDA, H100, plan_of, torch_finds

from gpu_lstm.kernels import timeouts
from gpu_lstm.kernels.by_steps import parts_of
from gpu_lstm.kernels.layer import Layer, kept_layer
from gpu_lstm.kernels.problem import Pass, Problem
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.parameters import names_of
from gpu_lstm.kernels.triton_rnn.plans import choose
from gpu_lstm.verification import timing as times

ctypes.CDLL(f"{os.environ['TRITON_LIBCUDA_PATH']}/libcuda.so.1")  # Triton finds this library by its name from now on
CPU = torch.device("cpu")
STREAM = Mock(cuda_stream=0)
LOG = Path(os.environ["DRIVER_STUB_LOG"])


def be_a_card() -> None:
    """Stub torch.cuda as far as Triton's driver and the library need it."""
    torch_finds(pytest.MonkeyPatch(), dataclasses.replace(H100, name="a stub"), is_available=True, device_count=1,
                current_device=0, set_device=None, current_stream=lambda _=None: STREAM, synchronize=None)  # fmt: skip
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    timeouts._words[CPU] = timeouts._words[CUDA] = timeouts._Words(CPU)


def events() -> list[dict]:
    """Return the calls of the driver since the last time, except for the empty kernel."""
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    new = [json.loads(line) for line in lines[_seen[0] :]]
    _seen[0] = len(lines)
    return [event for event in new if event.get("kernel") != "empty_kernel"]


_seen = [0]


def compiled() -> int:
    """Return how many kernels Triton has compiled, in this process or another."""
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))


# The arguments of kernels


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
RAGGED = dict(lengths=torch.int64, resets=True, reset_h=True, reset_c=True, reverse=True)
MASKS, RATES = dict(dropout_h=True, zoneout_h=3, zoneout_c=3), dict(zoneout_h=0, zoneout_c=0)
TF32 = dict(precision="tf32")
CASES = [  # a family and its problem: each dtype and each option, forward and backward
    ("resident", Problem(2, 5, 32, F16)),
    ("resident", Problem(2, 5, 32, BF16, **RAGGED, **MASKS)),
    ("resident", Problem(2, 5, 32, F32, **RATES, **TF32)),
    ("cooperative", Problem(2, 5, 64, BF16, weight_peephole=True)),
    ("cooperative", Problem(2, 5, 64, F32, **RAGGED, **MASKS, **TF32)),
    ("cooperative", Problem(2, 5, 64, F16, **RATES)),
    ("pointwise", Problem(2, 5, 32, F32, **RAGGED, **MASKS)),
    ("pointwise", Problem(2, 5, 32, BF16, **RATES, weight_peephole=True)),
    ("pointwise", Problem(2, 5, 32, F32, **RAGGED, gain_hh=True, gain_c=True, bias_c=True)),
    ("step", Problem(2, 5, 32, F32)),
    ("held", Problem(2, 70, 256, BF16)),
    ("step", Problem(2, 5, 32, F16, **RAGGED, **RATES)),
    ("step", Problem(2, 5, 32, F32, **MASKS, **TF32, weight_peephole=True, lengths=torch.int32)),
    ("cooperative", Problem(2, 5, 64, BF16, **RAGGED, **MASKS, cell="gru")),
    ("step", Problem(2, 5, 32, F16, **RATES, cell="gru")),
]
WAITING = "cooperative", "step", "held"  # families whose programs wait for each other


def one_pass(problem: Problem, pass_: Pass, steps: int, layer: Layer) -> dict:
    """Run a pass. Return what the kernel must be passed, by the name of its parameter, and None where it is passed
    nothing."""
    gates, r = launch.call_of(problem._replace(steps=steps), CPU)
    named = {f"{name}_ptr": t for name, t in r.inputs._asdict().items()}
    named |= {"gates_ptr": gates, "T": steps, "B": problem.batch}
    if pass_.backward:
        h0, c0 = r.inputs.h0, r.inputs.c0
        dh, dh_n, saved = h0.new_zeros(steps, *h0.shape[1:]), h0.clone(), c0.new_zeros(steps, *c0.shape[1:])
        found = layer.backward(dh, dh_n, c0.clone(), gates, saved, r, of_h0=False)
        named |= dict(dh_ptr=dh, dh_n_ptr=dh_n, c_ptr=saved, dc_ptr=found.dc0, dh_total_ptr=found.dh_total)
        return named | dict(dreset_h_ptr=found.dreset_h, dreset_c_ptr=found.dreset_c)
    names = "h_ptr", "h_n_ptr", "c_n_ptr", "c_ptr"
    return named | dict(zip(names, layer.forward(gates, r, pass_.save)))


def arguments() -> list[dict]:
    """Run each case with two lengths of sequences, the second one twice. Return the driver's calls and the mistakes in
    them."""
    given, call, bind = [], launch.Kernel.__call__, launch.Kernel.bind

    def recorded(kernel, arguments):
        given.append((kernel._kernel, arguments))
        call(kernel, arguments)

    def bound(kernel, arguments):
        """Record the launches of a run that was bound after its kernel was loaded, which call no Kernel."""
        run, again = bind(kernel, arguments), kernel._compiled is not None

        def launched(**changed):
            given.extend([(kernel._kernel, arguments | changed)] * again)
            run(**changed)

        return launched

    launch.Kernel.__call__, launch.Kernel.bind = recorded, bound
    results = []
    for (family, problem), pass_ in product(CASES, (Pass(), Pass(True), Pass(save=False))):
        if not pass_.save and family != "resident":
            continue
        plan = plan_of(family, problem, pass_.backward)
        for steps in (5, 16, 16):  # lengths of which Triton may make different kernels
            if not results or results[-1]["steps"] != steps:
                layer = Layer(problem, CUDA, launch, trial=plan)
            before = compiled()
            given.clear()
            named = one_pass(problem, pass_, steps, layer)
            kernel, asked = given[0][0], events()
            named["error_ptr"] = launch.error_word(CUDA, kernel.__name__, True) if family in WAITING else None
            if kernel.__name__ == "cooperative_forward_kernel":
                named |= dict(h_ptr=None, c0_ptr=None)  # h is in the words, and c0 is in c_n beforehand
            launches = [event for event in asked if event["event"] == "launch"]
            mistakes = [] if len(given) == len(launches) else [f"{len(given)} launches became {len(launches)}"]
            mistakes += [m for (_, a), e in zip(given, launches) for m in _mistakes(kernel, a, e["arguments"], named)]
            results.append(dict(
                case=f"{kernel.__name__} {problem}", family=family, precision=f"{problem.dtype} {problem.precision}",
                steps=steps, size=[*plan.grid, 32 * plan.num_warps], launches=launches,
                loads=len(asked) - len(launches), compiled=compiled() - before, mistakes=mistakes,
                parts=len(parts_of(problem, pass_.backward)) if family == "pointwise" else 1,
            ))  # fmt: skip
    return results


def _mistakes(kernel: Any, given: dict, got: list[int], meant: dict) -> list[str]:
    """Compare the arguments that the library passed by name, and the driver got by position, with the meant ones."""
    runtime = [name for names in names_of(kernel) for name in names]
    names = [name for name in runtime if given.get(name) is not None]
    there = dict(zip(names, got))
    # Triton passes 0 for scratch memory.
    found = [] if len(got) >= len(names) and not any(got[len(names) :]) else [f"{names} became {got}"]
    for name in runtime:
        for value in (given.get(name), meant.get(name, given.get(name))):
            value = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if there.get(name) != value or (name.endswith("_ptr") and value == 0):
                found.append(f"{name} is {there.get(name)}, not {value}")
    return found


# The fastest plan


SMALL = Problem(2, 5, 32, BF16)
SECONDS = 3.0, 1.0, 2.0  # of a launch, by the plan's place in the order of proposals


def timing() -> dict[str, Any]:
    """Return the place of the chosen plan, how often each plan was launched, and whether the result was kept.

    The driver's log has the launches. For each of them the clock advances.
    """
    patch, clock, arguments_of = pytest.MonkeyPatch(), [0.0], launch.arguments_of
    patch.setattr(launch, "arguments_of", lambda p, device, pass_: arguments_of(  # there is no memory on cuda:0
        p, CPU if device == CUDA else device, pass_))  # fmt: skip
    patch.setattr(launch, "MOST_STEPS", 4)
    patch.setattr(times, "time", Mock(perf_counter=lambda: clock[0]))
    proposed, threads, launched = choose.plans(SMALL, choose.card_of(CUDA), False)[: choose.MOST], [], []
    sizes, compile_all = [[*plan.grid, 32 * plan.num_warps] for plan in proposed], choose.compile_all
    patch.setattr(choose, "compile_all", lambda *given: threads.append(threading.get_ident()) or compile_all(*given))

    def synchronize(_: Any = None) -> None:
        for event in events():
            if event["event"] == "launch":
                launched.append(place := sizes.index([*event["grid"], event["threads"]]))
                clock[0] += SECONDS[place]

    patch.setattr(torch.cuda, "synchronize", synchronize)
    layer = kept_layer(launch, SMALL, CUDA, lambda *_: None, times.timer)
    place = proposed.index(layer.prepared(Pass(), launch.call_of(SMALL, CPU)[1].inputs).plan)
    return dict(
        place=place, launched=[launched.count(each) for each in range(len(sizes))],
        kept=choose.measured_plan(SMALL, choose.card_of(CUDA), False) is not None,
        threads=len({*threads}), compiled=compiled() - 1,  # without the empty kernel
    )  # fmt: skip


def obstacle() -> str | None:
    """Return the reason why nothing can be launched."""
    return choose.launch_problem(CUDA, H100.architecture)


if __name__ == "__main__":
    be_a_card()
    print(json.dumps(globals()[sys.argv[1]]()))
