"""torch's own modules as a backend: weights in one buffer for cuDNN, and resets without synchronising with the device.

Parameters only claim to be on a GPU here. test_gpu.py tests how cuDNN uses the buffer.
"""

import copy
from unittest.mock import Mock

import pytest
import torch
from comparing import both_classes, both_kinds
from pairs import LENGTHS, RAGGED, RESETS, B, T, assert_identical, pair, random_inputs, results, truth
from places import two_copies
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from watching import Watched

import gpu_lstm
from gpu_lstm.backends import torch_rnn
from gpu_lstm.call import prepare
from gpu_lstm.kernels.cells import CELLS

BF16 = torch.bfloat16
SHAPES = [{}, dict(bias=False), dict(proj_size=2), dict(num_layers=2, bidirectional=True, proj_size=2, bias=False)]


def in_order(parameters):
    """Return all matrices, then all biases, in one tensor. Without biases cuDNN wants zeros in their place."""
    matrices, biases = ([p.detach().flatten() for p in parameters if p.dim() == n] for n in (2, 1))
    gates = max(map(len, parameters))
    zeros = torch.zeros(sum(gates for p in parameters if len(p) == gates)).to(matrices[0])
    return torch.cat([*matrices, *(biases or [zeros])])


def buffers(parameters):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters}
    return [torch.empty(0, dtype=parameters[0].dtype).set_(storage) for storage in storages.values()]


@pytest.fixture
def says_cuda(monkeypatch):
    """Every tensor claims to be on a GPU. torch's own flatten_parameters does not believe it."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    return monkeypatch


@pytest.mark.parametrize(("kind", "arguments"), [
    *(("LSTM", arguments) for arguments in SHAPES), ("GRU", {}), ("GRU", dict(num_layers=2, bias=False))],
    ids=str)  # fmt: skip
def test_bfloat16_parameters_are_put_into_one_buffer_and_stay_parameters(says_cuda, kind, arguments):
    lstm = getattr(gpu_lstm, kind)(3, 4, **arguments).to(BF16)
    others = getattr(nn, kind)(3, 4, **arguments, dtype=BF16)
    others.load_state_dict(lstm.state_dict())
    says_cuda.undo()
    own = list(lstm.parameters())
    assert torch.equal(*buffers(own), in_order(own))
    assert all(p.is_leaf and p.is_contiguous() and p.requires_grad for p in own)
    x = torch.randn(5, 2, 3, dtype=BF16)
    for _ in range(2):  # an optimizer changes the buffer, and a call reads it
        for module in (lstm, others):
            output, _ = module(x)
            output.float().square().sum().backward()
            torch.optim.SGD(module.parameters(), 0.1).step()
        assert all(map(torch.equal, lstm.parameters(), others.parameters()))
    assert torch.equal(*buffers(own), in_order(own))
    before, _ = lstm(x)
    lstm.weight_hh_l0 = nn.Parameter(torch.zeros_like(lstm.weight_hh_l0))
    assert not torch.equal(lstm(x)[0], before)


def test_what_is_not_packed(says_cuda):
    """torch packs other dtypes itself. Tied parameters are not packed by torch either."""
    tied = gpu_lstm.LSTM(4, 4, bias=False, dtype=BF16)
    tied.weight_hh_l0 = tied.weight_ih_l0
    for lstm in (tied, gpu_lstm.LSTM(4, 4)):
        before = [p.data_ptr() for p in lstm.parameters()]
        lstm.flatten_parameters()
        assert [p.data_ptr() for p in lstm.parameters()] == before


@pytest.mark.parametrize(("arguments", "tied"), [(SHAPES[1], True), (SHAPES[3], False)], ids=["tied", "deep"])
def test_weights_that_are_somebody_elses_are_packed_at_every_call(arguments, tied):
    weights = list(nn.LSTM(4, 4, **arguments).parameters())
    weights[1] = weights[0] if tied else weights[1]
    parts = torch_rnn.packed(weights)
    assert torch.equal(*buffers(parts), in_order(weights))
    assert all(map(torch.equal, parts, weights))
    random, own = [torch.randn_like(p) for p in parts], list(dict.fromkeys(weights))
    expected = torch.autograd.grad([weight * 1 for weight in weights], own, random)
    assert all(map(torch.equal, torch.autograd.grad(parts, own, random), expected))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("cell", "rows"), [("lstm", 16), ("gru", 12)])
def test_cudnn_is_given_one_buffer(monkeypatch, cell, rows, whole):
    called = Mock(side_effect=lambda x, hx, *rest: (x, *hx) if cell == "lstm" else (x, hx))
    monkeypatch.setattr(torch_rnn, cell, called)
    with FakeTensorMode():
        sizes = (rows, 3), (rows, 4), (rows,), (rows,)
        weights = [torch.empty(size, device="cuda") for size in sizes]
        if whole:
            weights = torch_rnn.packed(weights)
        state = torch.empty(1, 2, 4, device="cuda"), torch.empty(1, 2, 4, device="cuda")
        torch_rnn.stack(
            CELLS[cell], torch.empty(5, 2, 3, device="cuda"), state, [[torch_rnn.Weights(*weights)]], dropout=0.5
        )
    assert called.call_args.args[5] == 0.0, "in eval(), though cuDNN is told that there may be a backward"
    given = called.call_args.args[2]
    assert len({t.untyped_storage()._cdata for t in given}) == 1
    assert all(t is w for t, w in zip(given, weights)) == whole


@pytest.mark.parametrize(("cls", "ragged", "arguments"), [
    (gpu_lstm.LSTM, dict(lengths=LENGTHS), dict(num_layers=2, bidirectional=True)),
    (gpu_lstm.LSTM, dict(resets=RESETS), dict(proj_size=2)), (gpu_lstm.LSTM, RAGGED, dict(num_layers=2, dropout=0.5)),
    (gpu_lstm.GRU, RAGGED, dict(num_layers=2, bidirectional=True)),
], ids=["lengths", "resets", "both", "both, GRU"])  # fmt: skip
def test_lengths_and_resets_need_no_values(monkeypatch, cls, ragged, arguments):
    """A device without values, fake tensors, and a card do not need them."""
    lstm = cls(3, 4, **arguments, backend="torch")
    x = torch.randn(T, B, 3)

    def shapes(module, x, **given):
        found = tree_leaves(module(x, **given))
        gradients = torch.autograd.grad(found[0].sum(), list(module.parameters()))
        return [t.shape for t in (*found, *gradients)]

    expected = shapes(lstm, x, **ragged)
    meta = tree_map(lambda t: t.to("meta"), dict(ragged, x=x))
    assert shapes(copy.deepcopy(lstm).to("meta"), **meta) == expected
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert shapes(lstm, **tree_map(mode.from_tensor, dict(ragged, x=x))) == expected
    # On CUDA they are asserted on the device.
    monkeypatch.setattr("gpu_lstm.call.checks.check_lengths", lambda *given: None)
    # Operators that ask for a value, on the host or for a shape.
    asking = "_local_scalar_dense", "nonzero", "equal", "is_nonzero"
    with Watched(lambda operator, *_: operator.overloadpacket.__name__ in asking) as asked:
        assert shapes(lstm, x, **ragged) == expected
    assert asked.count == 0


@both_classes
def test_a_trace_is_right_for_other_resets_and_with_lengths_for_more_steps(cls):
    lstm, x = cls(3, 4, backend="torch").requires_grad_(False), torch.randn(T, B, 3)
    traced = torch.jit.trace(lambda x, r: lstm(x, resets=r)[0], (x, torch.zeros_like(RESETS)), check_trace=False)
    torch.testing.assert_close(traced(x, RESETS), lstm(x, resets=RESETS)[0])
    one_step = x[:1], torch.ones_like(LENGTHS)
    traced = torch.jit.trace(lambda x, lengths: lstm(x, lengths=lengths)[0], one_step, check_trace=False)
    torch.testing.assert_close(traced(x, LENGTHS), lstm(x, lengths=LENGTHS)[0])


@pytest.mark.parametrize(("cls", "added"), [(gpu_lstm.LSTM, 2), (gpu_lstm.GRU, 3)])
def test_rows_for_tensor_cores(monkeypatch, cls, added):
    """Features are added up to whole 16 bytes, or 128 elements where cuDNN could not keep W_hh on chip otherwise."""
    two_copies(monkeypatch)
    sizes = (torch.float32, 3, 3 + added), (BF16, 3, 8), (torch.float16, 128, 256), (BF16, 128, 136)
    for dtype, inputs, expected in sizes:
        stack = Mock(side_effect=lambda cell, x, state, *rest: (x[..., :4], state))
        monkeypatch.setattr(torch_rnn, "stack", stack)
        lstm = cls(inputs, 4, backend="torch", device="meta", dtype=dtype)
        lstm(torch.empty(T, B, inputs, device="meta", dtype=dtype), resets=RESETS.to("meta"))
        assert stack.call_args.args[1].shape == (T, 2 * B, expected)


NOT_FINITE = {  # values at places of x [T, B, I], h0 and c0 [2, B, H], and weights
    "at each end": {("x", 0, 0, 0): -torch.inf, ("x", 3, 2, 2): torch.inf},
    "of each sign": {("x", 1, 1, 0): torch.inf, ("x", 1, 1, 2): -torch.inf},
    "next to nan": {("x", 1, 0, 1): torch.inf, ("x", 1, 2, 1): torch.nan, ("x", 2, 0, 0): -torch.inf},
    "times zero": {("x", 1, 0, 1): torch.inf, ("weight_ih_l0", 5, 1): 0.0},
    "c0": {("c", 0, 1, 2): torch.inf, ("c", 1, 0, 2): torch.nan},
}  # fmt: skip


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 3, 4])], ids=["whole", "lengths"])
@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
@both_kinds
def test_what_is_not_finite_gives_in_an_episode_what_the_oracle_gives(monkeypatch, kind, on_host, case, lengths):
    """On a device infinite states, and infinities that make a NaN, are treated as NaN until the end of the episode."""
    _, ours = pair(kind, "torch", bidirectional=True)
    x, hx = tree_map(Tensor.double, random_inputs(ours, B))
    h, c = hx if kind == "LSTM" else (hx, hx)
    with torch.no_grad():
        for (name, *place), value in NOT_FINITE[case].items():
            (dict(x=x, h=h, c=c) | ours.state_dict())[name][tuple(place)] = value
    if not on_host:
        two_copies(monkeypatch)
    got = results(ours, x, hx, lengths=lengths, resets=RESETS)
    expected = truth(ours, x, hx, lengths=lengths, resets=RESETS)
    for name in expected if on_host else [name for name in ("output", "h0", "c0") if name in expected]:
        lost, of_torch = got[name].isnan(), expected[name].isnan()
        assert torch.equal(lost, of_torch) if on_host else (of_torch <= lost).all(), name
        there = (torch.where(lost, 0, t[name]) for t in (got, expected))
        torch.testing.assert_close(*there, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float32 cell state"])
def test_what_is_computed_again_has_the_dtypes_of_the_rest(how):
    lstm, (x, (h, c)) = gpu_lstm.LSTM(3, 4, backend="torch"), random_inputs(nn.LSTM(3, 4), B)
    if how != "autocast":
        lstm, x, h, c = lstm.to(BF16), x.to(BF16), h.to(BF16), c.to(BF16 if how == "bfloat16" else torch.float32)
    with torch.autocast("cpu", BF16, enabled=how == "autocast"):
        expected = tree_leaves(lstm(x, (h, c), **RAGGED))
        x[0, 0, 0] = torch.nan
        found = tree_leaves(lstm(x, (h, c), **RAGGED))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert found[0][0, 0].isnan().all()
    assert all(map(torch.equal, [t[:, 1:] for t in found], [t[:, 1:] for t in expected]))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize(("places", "steps"), [
    ([], T), ([(0, 1)], T), ([(0, 1), (2, 0)], T + 1), ([(2, 0), (2, 2)], T + 1), ([(1, 0), (2, 2), (3, 0)], T + 2),
])  # fmt: skip
@pytest.mark.parametrize("many", [B - 1, B])
@both_kinds
def test_on_the_host_resets_after_the_first_step_are_steps_of_one_call(
    monkeypatch, spy, kind, many, places, steps, lengths
):
    monkeypatch.setattr(prepare, "MANY", many)
    resets, stack = torch.zeros(T, B, dtype=torch.bool), spy(torch_rnn, "stack")
    for place in places:
        resets[place] = True
    _, ours = pair(kind, "torch")
    x, hx = random_inputs(ours, B)
    expected = truth(ours, x, hx, resets=resets, lengths=lengths)
    torch.testing.assert_close(results(ours, x, hx, resets=resets, lengths=lengths), expected, rtol=1e-9, atol=1e-12)
    if lengths is None:  # a reset past the end of a sequence has no effect
        assert [len(each.args[1]) for each in stack.call_args_list] == [steps]


def test_layers_of_a_stack_return_c_in_the_dtypes_in_which_it_was_given():
    stack, dtypes = gpu_lstm.StackedLSTM(3, [4, 4], backend="torch", dtype=BF16), [BF16, torch.float32]
    states = [(torch.zeros(B, 4, dtype=BF16), torch.zeros(B, 4, dtype=dtype)) for dtype in dtypes]
    assert [c.dtype for _, c in stack(torch.randn(T, B, 3, dtype=BF16), states)[1]] == dtypes


@both_kinds
@pytest.mark.parametrize("learns", [False, True])
def test_a_step_with_lengths_is_a_step_and_a_choice(monkeypatch, kind, learns):
    """NaN where a sequence has no step changes no result and no gradient."""
    module, found = getattr(gpu_lstm, kind)(3, 4, 2, backend="torch"), []
    x, hx = random_inputs(module, 4, steps=1)
    monkeypatch.setattr(torch_rnn, "layer_by_torch", None)  # this function would take one call a layer
    with torch.set_grad_enabled(learns):
        for x[0, 1::2] in (0.0, torch.nan):
            found.append(results(module, x, hx, lengths=torch.tensor([1, 0, 1, 0])))
    assert_identical(*found)
    assert not found[0]["output"][:, 1::2].any()
    for name, initial in zip(("h0", "c0"), tree_leaves(hx)):
        assert torch.equal(found[0][name][:, 1::2], initial[:, 1::2])
