"""Layers, directions and chunks of time side by side change no number; memory kept for backward is bounded."""

from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from watching import Watched

import gpu_lstm
from gpu_lstm.backends import schedule
from gpu_lstm.call import modes
from gpu_lstm.dispatch.route import forget
from gpu_lstm.kernels import memory
from gpu_lstm.kernels.triton_rnn import launch

STACKS = {"one layer": {}, "both directions": dict(num_layers=2, bidirectional=True),
          "projection": dict(num_layers=2, proj_size=3)}  # fmt: skip


@pytest.fixture
def two_steps(monkeypatch):
    """two_steps(batch, hidden): from now on a chunk has two steps, in calls of a kind that was decided before, too."""

    def two_steps(batch: int, hidden: int) -> None:
        monkeypatch.setattr(schedule, "WORKSPACE", 2 * batch * 4 * hidden * 4)
        forget()

    return two_steps


def kept_elements(module, x) -> int:
    """Elements that autograd keeps, next to input and parameters; a float32 of a half-precision layer is one."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    return sum(count for place, count in kept.items() if place not in known)


@pytest.mark.parametrize(("cell", "dtype"), [("LSTM", torch.float32), ("LSTM", torch.float16), ("GRU", torch.float16)])
def test_what_is_saved_for_backward_and_less_where_every_layer_of_a_stack_recomputes(device, cell, dtype):
    how = dict(dtype=dtype, device=device, backend="triton")
    x = torch.randn(4, 3, 4, dtype=dtype, device=device, requires_grad=True)
    for recompute, elements in ((False, 6 * 4), (True, 2 * 4)):
        module = getattr(gpu_lstm, cell)(4, 4, recompute=recompute, **how)
        assert 0 <= kept_elements(module, x) - elements * 4 * 3 <= 4 * 3 * 4 + 64  # of h0 and c0
    kind = getattr(gpu_lstm, f"Stacked{cell}")
    stacks = (kind(4, [4, 4], bidirectional=True, recompute=again, **how) for again in (False, True))
    kept, less = (kept_elements(stack, x) for stack in stacks)
    assert kept - less == 2 * 2 * 4 * 4 * 4 * 3  # gates of both layers and directions


def allocated(call) -> list[int]:
    """The bytes of each storage that a call makes, without autograd."""
    sizes = []

    def note(_, *trees):
        given, new = ([t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in trees)
        known = {storage.data_ptr() for storage in given}
        sizes.extend(storage.nbytes() for storage in new if storage.data_ptr() not in known)

    with torch.no_grad(), Watched(note):
        call()
    return sizes


@pytest.mark.parametrize(("cell", "options"), [*(("LSTM", options) for options in STACKS.values()), ("GRU", {})],
                         ids=[*STACKS, "GRU"])  # fmt: skip
@pytest.mark.deep
def test_a_long_sequence_needs_a_fixed_workspace(monkeypatch, two_steps, device, cell, options):
    """Without autograd only one chunk's pre-activations are there: next to outputs no tensor exceeds the workspace."""
    two_steps(batch=1, hidden=6)
    monkeypatch.setattr(modes, "_dispatch_modes", lambda: 0)  # what is measured is a call that nobody watches
    monkeypatch.setattr(memory._Checking, "on", False)  # margins are memory, too
    if launch.INTERPRETED:
        monkeypatch.setattr(launch, "launch_kernel", _disable_current_modes()(launch.launch_kernel))  # which copies
    module = getattr(gpu_lstm, cell)(4, 6, device=device, backend="triton", **options)
    x = torch.randn(17, 1, 4, device=device)
    of_a_chunk, allocations = (allocated(lambda x=x: module(x)) for x in (x[:2], x))
    y, _ = module(x)
    output, outputs = y.numel() * y.element_size(), module.num_layers if module.bidirectional else 1
    weights = {size for size in of_a_chunk if size > schedule.WORKSPACE}  # W_hh W_hr, whatever T is
    largest = sorted((size for size in allocations if size not in weights), reverse=True)
    assert largest[:outputs] == [output] * outputs
    assert largest[outputs] <= schedule.WORKSPACE < output


@pytest.mark.parametrize(("cell", "half"), [("LSTM", True), ("LSTM", False), ("GRU", True)])
def test_cell_states_go_from_chunk_to_chunk_in_float32(two_steps, device, cell, half):
    module = getattr(gpu_lstm, cell)(4, 6, device=device, backend="triton")
    x, results = torch.randn(9, 3, 4, device=device), []
    module, x = (module.half(), x.half()) if half else (module, x)
    for _ in range(2):
        with torch.no_grad(), torch.autocast(device, torch.float16, enabled=not half):
            results.append(tree_leaves(module(x)))
        two_steps(batch=3, hidden=6)
    assert all(map(torch.equal, *results))
    assert results[1][-1].dtype is torch.float16


@pytest.mark.skipif(not launch.INTERPRETED, reason="launches are recorded in the interpreter")
@pytest.mark.parametrize(("recompute", "training", "steps"), [
    (True, True, [2, 2, 1]), (False, True, [5]), (False, False, [2, 2, 1]), (True, False, [2, 2, 1]),
])  # fmt: skip
def test_a_sequence_is_cut_into_chunks_wherever_its_gates_are_not_kept(
    monkeypatch, two_steps, recompute, training, steps
):
    """With recompute in training, too: its gates are temporary, forward."""
    launched = Mock(side_effect=launch.launch_kernel)
    monkeypatch.setattr(launch, "launch_kernel", launched)
    two_steps(batch=3, hidden=6)
    lstm = gpu_lstm.LSTM(4, 6, backend="triton", recompute=recompute)
    with torch.set_grad_enabled(training):
        lstm(torch.randn(5, 3, 4))
    assert [each.kwargs["T"] for each in launched.mock_calls] == steps
