"""StackedLSTM: layers of different sizes. The truth is a chain of torch.nn.LSTM layers, or the NumPy oracle."""

import copy
import itertools
import pickle
import re

import numpy as np
import oracle
import pytest
import torch
from comparing import BACKENDS, PLACES, assert_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products")
SIZES = [4, 2, 3]
T, B, I = 4, 3, 3
LENGTHS = torch.tensor([2, 4, 0])
RESETS = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 1]]).bool()  # [T, B]


def stacked(backend: str, sizes=SIZES, **kwargs) -> gpu_lstm.StackedLSTM:
    torch.manual_seed(0)
    return gpu_lstm.StackedLSTM(I, sizes, **kwargs, backend=backend).to(**PLACES[backend])


def chain_of_torch(stack: gpu_lstm.StackedLSTM) -> nn.ModuleDict:
    """torch.nn.LSTM layers in float64 with the same weights and parameter names."""
    wide = 2 if stack.bidirectional else 1
    chain = nn.ModuleDict(dict(layers=nn.ModuleList(
        nn.LSTM(features, size, bias=stack.bias, bidirectional=stack.bidirectional, dtype=torch.float64)
        for features, size in zip([I, *(wide * size for size in stack.hidden_sizes)], stack.hidden_sizes)
    )))  # fmt: skip
    chain.load_state_dict(stack.state_dict())
    return chain


def run_chain(chain: nn.ModuleDict, residual: bool = False, lengths: Tensor | None = None):
    """A call of the chain like one of a StackedLSTM; with lengths (above zero) layer by layer in packed sequences."""

    def call(x, hx):
        states = []
        for layer, (h, c) in zip(chain["layers"], hx, strict=True):
            initial = (h, c) if layer.bidirectional else (h[None], c[None])
            if lengths is None:
                y, (h, c) = layer(x, initial)
            else:
                y, (h, c) = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), initial)
                y, _ = pad_packed_sequence(y, total_length=len(x))
            x = x + y if residual and x.shape == y.shape else y
            states.append((h, c) if layer.bidirectional else (h[0], c[0]))
        return x, states

    return call


def random_inputs(stack, *batch: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """x [T, *batch, I] and hx, float32."""
    torch.manual_seed(1)
    rows = (2,) if stack.bidirectional else ()
    hx = [(torch.randn(*rows, *batch, size), torch.randn(*rows, *batch, size)) for size in stack.hidden_sizes]
    return torch.randn(T, *batch, I), hx


def results(module, x, hx=None, call=None, pack=None, **ragged) -> dict[str, Tensor]:
    """Output and states, and the gradients of a random weighing of them by x, hx and every parameter, float64."""
    parameters = dict(module.named_parameters())
    like = next(iter(parameters.values()))
    x, *states = (t.detach().to(like).requires_grad_() for t in (x, *(t for pair in hx or () for t in pair)))
    ragged = {name: value.to(like.device) for name, value in ragged.items()}
    y, finals = (module if call is None else call)(
        x if pack is None else pack(x), list(zip(states[::2], states[1::2])) or None, **ragged
    )
    outputs = [y.data if isinstance(y, PackedSequence) else y, *(t for pair in finals for t in pair)]
    torch.manual_seed(2)
    weights = [torch.randn(t.shape).to(t) for t in outputs]
    found = torch.autograd.grad(outputs, [x, *states, *parameters.values()], weights)
    names = [
        "output",
        *(f"state {k}" for k in range(len(outputs) - 1)),
        "dx",
        *(f"dhx {k}" for k in range(len(states))),
    ]
    names += [f"d{name}" for name in parameters]
    return dict(zip(names, (t.detach().cpu().double() for t in (*outputs, *found)), strict=True))


def zero_states(hx):
    return [tuple(torch.zeros_like(t) for t in pair) for pair in hx]


# The case that teaches


def test_teaching_case_four_units_on_one_step_of_six_features():
    x = torch.tensor([[[3.0, 2, 2, 2, 2, 2]]])  # (N = 1, T = 1, 6)
    stack = gpu_lstm.StackedLSTM(6, [4], batch_first=True)
    output, [(h, c)] = stack(x)
    assert output.shape == (1, 1, 4)
    assert h.shape == c.shape == (1, 4)
    expected_output, expected_states = by_the_oracle(stack, x)
    assert_within(output, expected_output)
    assert_within((h, c), expected_states[0])

    lstm = gpu_lstm.LSTM(6, 4, batch_first=True)
    lstm.load_state_dict(stack.layers[0].state_dict())
    output, (h_n, c_n) = lstm(x)
    assert output.shape == h_n.shape == c_n.shape == (1, 1, 4)
    assert_within(output, expected_output)
    assert_within((h_n[0], c_n[0]), expected_states[0])


def test_teaching_case_a_stack_of_four_and_five_units():
    x = torch.tensor([
        [[1.0, 2, 3, 4, 3, 2], [1, 2, 1, 1, 1, 2], [1, 2, 2, 2, 2, 2]],
        [[1.0, 2, 3, 4, 3, 2], [3, 2, 2, 1, 1, 2], [0, 0, 0, 0, 3, 2]],
    ])  # (N = 2, T = 3, 6)  # fmt: skip
    stack = gpu_lstm.StackedLSTM(6, [4, 5], batch_first=True)
    output, states = stack(x)
    assert output.shape == (2, 3, 5)
    assert [t.shape for pair in states for t in pair] == [(2, 4), (2, 4), (2, 5), (2, 5)]
    expected_output, expected_states = by_the_oracle(stack, x)
    assert_within(output, expected_output)
    for state, expected in zip(states, expected_states, strict=True):
        assert_within(state, expected)


def by_the_oracle(stack, x, hx=None, lengths=None, resets=None):
    """Output and [(h, c), ...] of a stack of one direction. x and output are batch-first if the stack is."""
    y = x.detach().cpu().double().numpy()
    y = y.swapaxes(0, 1) if stack.batch_first else y
    states = []
    for k, (layer, size) in enumerate(zip(stack.layers, stack.hidden_sizes, strict=True)):
        zeros = np.zeros((y.shape[1], size))
        h0, c0 = (zeros, zeros) if hx is None else (t.double().numpy() for t in hx[k])
        weights = [w.detach().cpu().double().numpy() for w in layer.parameters()]
        y, h, c, _ = oracle.layer(y, h0, c0, *weights, lengths=lengths, resets=resets)
        states.append((h, c))
    return y.swapaxes(0, 1) if stack.batch_first else y, states


def assert_within(got, expected, tolerance: float = 1e-6) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.detach().cpu().numpy(), b, rtol=0, atol=tolerance)


# A chain of torch's layers


@pytest.mark.parametrize(
    ("bidirectional", "bias", "given", "batch"),
    list(itertools.product([False, True], [True, False], [True, False], [(B,), ()])),
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_it_is_a_chain_of_layers(backend, bidirectional, bias, given, batch):
    stack = stacked(backend, bidirectional=bidirectional, bias=bias)
    x, hx = random_inputs(stack, *batch)
    compare_with_chain(stack, x, hx, given, backend)


@pytest.mark.parametrize(
    ("bidirectional", "batch", "given"), [(False, (B,), True), (True, (B,), False), (True, (), True)]
)
def test_it_is_a_chain_of_layers_on_triton(bidirectional, batch, given):
    stack = stacked("triton", sizes=[4, 2], bidirectional=bidirectional)
    x, hx = random_inputs(stack, *batch)
    compare_with_chain(stack, x, hx, given, "triton")


def compare_with_chain(stack, x, hx, given, backend):
    chain = chain_of_torch(stack)
    expected = results(chain, x, hx if given else zero_states(hx), call=run_chain(chain))
    if not given:
        expected = {name: t for name, t in expected.items() if not name.startswith("dhx")}
    assert_same(results(stack, x, hx if given else None), expected, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_first_turns_the_input_but_not_the_states(backend):
    stack = stacked(backend, sizes=[4, 2], bidirectional=True)
    x, hx = random_inputs(stack, B)
    chain = chain_of_torch(stack)
    expected = results(chain, x, hx, call=run_chain(chain))
    stack.batch_first = True

    def call(x, hx):
        output, states = stack(x.transpose(0, 1), hx)
        return output.transpose(0, 1), states

    assert_same(results(stack, x, hx, call=call), expected, backend)


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequence(backend, is_sorted):
    stack = stacked(backend, sizes=[4, 2], bidirectional=True)
    x, hx = random_inputs(stack, B)
    lengths = torch.tensor([4, 2, 1] if is_sorted else [2, 1, 4])

    def call(x, hx):
        output, states = stack(pack_padded_sequence(x, lengths, enforce_sorted=is_sorted), hx)
        assert isinstance(output, PackedSequence)
        return pad_packed_sequence(output, total_length=T)[0], states

    chain = chain_of_torch(stack)
    expected = results(chain, x, hx, call=run_chain(chain, lengths=lengths))
    assert_same(results(stack, x, hx, call=call), expected, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equal_sizes_are_a_deep_lstm(backend, bidirectional):
    stack = stacked(backend, sizes=[4, 4], bidirectional=bidirectional)
    deep = nn.LSTM(I, 4, num_layers=2, bidirectional=bidirectional, dtype=torch.float64)
    ours = gpu_lstm.LSTM(I, 4, num_layers=2, bidirectional=bidirectional, backend=backend, **PLACES[backend])
    for module in (deep, ours):
        weights = [w for layer in stack.layers for w in layer.parameters()]
        module.load_state_dict(dict(zip(module.state_dict(), weights, strict=True)))
    x, _ = random_inputs(stack, B)
    y, (h_n, c_n) = deep(x.double())
    for module in (stack, ours):
        output, states = module(x.to(**PLACES[backend]))
        if module is stack:
            states = [torch.cat(s) if bidirectional else torch.stack(s) for s in zip(*states)]
        got = dict(output=output, h=states[0], c=states[1])
        assert_same({n: t.detach().cpu().double() for n, t in got.items()},
                    {n: t.detach() for n, t in dict(output=y, h=h_n, c=c_n).items()}, backend)  # fmt: skip


def test_same_seed_gives_the_initial_weights_of_a_deep_lstm():
    torch.manual_seed(3)
    deep = nn.LSTM(3, 4, num_layers=3, bidirectional=True)
    torch.manual_seed(3)
    stack = gpu_lstm.StackedLSTM(3, [4, 4, 4], bidirectional=True)
    assert all(torch.equal(p, q) for p, q in zip(stack.parameters(), deep.parameters(), strict=True))


# States


@pytest.mark.parametrize(("bidirectional", "batch", "shapes"), [
    (False, (3,), [(3, 4), (3, 2)]), (True, (3,), [(2, 3, 4), (2, 3, 2)]),
    (False, (), [(4,), (2,)]), (True, (), [(2, 4), (2, 2)]),
])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_are_a_list_of_pairs_and_go_back_in(backend, bidirectional, batch, shapes):
    stack = stacked(backend, sizes=[4, 2], bidirectional=bidirectional)
    x, _ = random_inputs(stack, *batch)
    x = x.to(**PLACES[backend])
    output, states = stack(x)
    assert isinstance(states, list)
    assert [[t.shape for t in pair] for pair in states] == [[shape, shape] for shape in shapes]
    again, _ = stack(x, states)
    assert again.shape == output.shape
    if not bidirectional:  # two halves, the states of one given to the other, are the whole
        halves, hx = [], None
        for half in (x[:2], x[2:]):
            y, hx = stack(half, hx)
            halves.append(y)
        got = dict(output=torch.cat(halves), **{f"{k}{j}": t for k, pair in enumerate(hx) for j, t in enumerate(pair)})
        whole = dict(output=output, **{f"{k}{j}": t for k, pair in enumerate(states) for j, t in enumerate(pair)})
        assert_same({n: t.detach().cpu().double() for n, t in got.items()},
                    {n: t.detach().cpu().double() for n, t in whole.items()}, backend)  # fmt: skip


def test_pairs_may_be_lists():
    stack = stacked("torch")
    x, hx = random_inputs(stack, B)
    hx = [tuple(t.double() for t in pair) for pair in hx]
    assert torch.equal(stack(x.double(), hx)[0], stack(x.double(), tuple(list(pair) for pair in hx))[0])


# Lengths and resets


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_are_what_packed_sequences_have(backend):
    stack = stacked(backend, sizes=[4, 2], bidirectional=True)
    x, hx = random_inputs(stack, B)
    lengths = torch.tensor([2, 1, 4])
    chain = chain_of_torch(stack)
    expected = results(chain, x, hx, call=run_chain(chain, lengths=lengths))
    assert_same(results(stack, x, hx, lengths=lengths), expected, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_resets_give_the_numbers_of_the_oracle(backend):
    stack = stacked(backend)
    x, hx = random_inputs(stack, B)
    expected_output, expected_states = by_the_oracle(stack, x, hx, LENGTHS, RESETS)
    got = results(stack, x, hx, lengths=LENGTHS, resets=RESETS)
    expected = dict(
        output=expected_output, **{f"state {k}": s for k, s in enumerate(s for p in expected_states for s in p)}
    )
    assert_same({name: got[name] for name in expected}, {n: torch.from_numpy(a) for n, a in expected.items()}, backend)
    assert got["output"][2:, 0].count_nonzero() == 0
    assert got["output"][:, 2].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_lengths_and_resets_are_those_of_the_pieces(backend):
    """One sequence of 3 steps and a reset before the last: two calls of the chain."""
    stack = stacked(backend, sizes=[4, 2], bidirectional=True)
    x, hx = random_inputs(stack, 1)
    chain = chain_of_torch(stack)

    def pieces(x, hx):
        none = torch.tensor([0.0, 1.0]).double()[:, None, None]  # the reverse direction begins in the last piece
        first, first_states = run_chain(chain)(x[:2], [tuple(t * (1 - none) for t in pair) for pair in hx])
        last, last_states = run_chain(chain)(x[2:3], [tuple(t * none for t in pair) for pair in hx])
        states = [tuple(torch.stack([b[0], a[1]]) for a, b in zip(*pairs)) for pairs in zip(first_states, last_states)]
        return F.pad(torch.cat([first, last]), (0, 0, 0, 0, 0, 1)), states

    ragged = dict(lengths=torch.tensor([3]), resets=torch.tensor([[False], [False], [True], [True]]))
    assert_same(results(stack, x, hx, **ragged), results(chain, x, hx, call=pieces), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_and_packed_and_batch_first_take_lengths_and_resets_too(backend):
    stack = stacked(backend, sizes=[4, 2])
    x, _ = random_inputs(stack, B)
    x = x.to(**PLACES[backend])
    lengths, resets = torch.tensor([2, 1, 4], device=x.device), RESETS.to(x.device)
    output, _ = stack(x, lengths=lengths, resets=resets)
    alone, _ = stack(x[:, 0], lengths=lengths[0], resets=resets[:, 0])
    packed, _ = stack(pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False), resets=resets)
    stack.batch_first = True
    turned, _ = stack(x.transpose(0, 1), lengths=lengths, resets=resets.T)
    got = dict(alone=alone, packed=pad_packed_sequence(packed, total_length=T)[0], turned=turned.transpose(0, 1))
    expected = dict(alone=output[:, 0], packed=output, turned=output)
    assert_same(*({n: t.detach().cpu().double() for n, t in d.items()} for d in (got, expected)), backend)


# Dropout and residual connections


def test_dropout_of_equal_sizes_gives_the_numbers_of_torch():
    stack = stacked("torch", sizes=[4, 4, 4], dropout=0.5)
    deep = nn.LSTM(I, 4, num_layers=3, dropout=0.5, dtype=torch.float64)
    deep.load_state_dict(dict(zip(deep.state_dict(), stack.parameters(), strict=True)))
    x = random_inputs(stack, B)[0].double()
    outputs = []
    for module in (stack, deep):
        torch.manual_seed(5)
        outputs.append(module(x)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_everything_leaves_the_next_layer_without_input(backend):
    stack = stacked(backend, sizes=[4, 2], dropout=1.0)
    x, _ = random_inputs(stack, B)
    chain = chain_of_torch(stack)
    expected, _ = chain["layers"][1](torch.zeros(T, B, 4).double())
    output, states = stack(x.to(**PLACES[backend]))
    first, _ = chain["layers"][0](x.double())
    got = dict(output=output, first=states[0][0])
    assert_same({n: t.detach().cpu().double() for n, t in got.items()},
                dict(output=expected.detach(), first=first[-1].detach()), backend)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_off_in_eval(backend):
    stack = stacked(backend, sizes=[4, 2], dropout=0.9).eval()
    x, hx = random_inputs(stack, B)
    compare_with_chain(stack, x, hx, True, backend)


@pytest.mark.parametrize(("sizes", "bidirectional"), [([3, 3, 2, 2], False), ([3, 3], True)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_adds_where_widths_are_equal(backend, sizes, bidirectional):
    stack = stacked(backend, sizes=sizes, bidirectional=bidirectional, residual=True)
    x, hx = random_inputs(stack, B)
    chain = chain_of_torch(stack)
    got = results(stack, x, hx)
    assert_same(got, results(chain, x, hx, call=run_chain(chain, residual=True)), backend)
    assert (got["output"] - results(chain, x, hx, call=run_chain(chain))["output"]).abs().max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_with_nan_in_the_padding(backend):
    stack = stacked(backend, sizes=[3, 3], residual=True)
    x, hx = random_inputs(stack, B)
    lengths = torch.tensor([2, 1, 4])
    chain = chain_of_torch(stack)
    expected = results(chain, x, hx, call=_masked(run_chain(chain, residual=True, lengths=lengths), lengths))
    x[torch.arange(T)[:, None] >= lengths] = float("nan")
    got = results(stack, x, hx, lengths=lengths)
    assert got["output"][2:, 0].count_nonzero() == 0
    assert_same(got, expected, backend)


def _masked(call, lengths):
    """With zeros for what x has in the padding."""
    return lambda x, hx: call(torch.where((torch.arange(T)[:, None] < lengths)[:, :, None], x, 0), hx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_comes_after_the_sum(backend):
    stack = stacked(backend, sizes=[3, 3], residual=True, dropout=1.0)
    x, _ = random_inputs(stack, B)
    expected, _ = chain_of_torch(stack)["layers"][1](torch.zeros(T, B, 3).double())
    output, _ = stack(x.to(**PLACES[backend]))
    assert_same(dict(output=output.detach().cpu().double()), dict(output=expected.detach()), backend)


# The module


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    stack = stacked(backend, sizes=[4, 2], bidirectional=True)
    x, hx = random_inputs(stack, 0)
    compare_with_chain(stack, x, hx, True, backend)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_compute_the_same(copied):
    stack = stacked("reference", sizes=[3, 3], residual=True, dropout=0.5, bias=False)
    x, hx = random_inputs(stack, B)
    twin = copied(stack)
    assert repr(twin) == repr(stack)
    before, after = results(stack.eval(), x, hx), results(twin.eval(), x, hx)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_repr_names_what_is_not_default():
    assert gpu_lstm.StackedLSTM(3, [4, 2]).extra_repr() == "3, [4, 2]"
    stack = gpu_lstm.StackedLSTM(8, (4, 2), batch_first=True, bidirectional=True, residual=True, backend="reference")
    assert stack.extra_repr() == "8, [4, 2], batch_first=True, bidirectional=True, residual=True, backend='reference'"


def test_device_and_dtype_reach_every_layer():
    stack = gpu_lstm.StackedLSTM(3, [4, 2], device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in stack.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_it_computes_the_same(backend):
    stack = stacked(backend, sizes=[4, 2])
    x, hx = random_inputs(stack, B)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    assert_same(results(stack, x, hx, call=compiled), results(stack, x, hx), backend)


# Errors

zeros = torch.zeros


@pytest.mark.parametrize(("error", "text", "inputs"), [
    (ValueError, "StackedLSTM: Expected input to be 2D or 3D, got 1D instead", (zeros(3),)),
    (ValueError, "StackedLSTM: Expected input to be 2D or 3D, got 4D instead", (zeros(5, 2, 1, 3),)),
    (RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4", (zeros(5, 2, 4),)),
    (ValueError, "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). Convert input: "
     "input.to(torch.float32), or convert model: model.to(torch.float64)", (zeros(5, 2, 3).double(),)),
    (RuntimeError, "Expected sequence length to be larger than 0 in RNN", (zeros(0, 2, 3),)),
    (RuntimeError, "Expected hx of 2 pairs, one a layer, got 1", (zeros(5, 2, 3), [(zeros(2, 4), zeros(2, 4))])),
    (RuntimeError, "Expected h of layer 0 of size [2, 4], got [1, 2, 4]",
     (zeros(5, 2, 3), [(zeros(1, 2, 4), zeros(1, 2, 4)), (zeros(1, 2, 5), zeros(1, 2, 5))])),
    (RuntimeError, "Expected c of layer 1 of size [5], got [1, 5]",
     (zeros(5, 3), [(zeros(4), zeros(4)), (zeros(5), zeros(1, 5))])),
    (RuntimeError, "Expected c of layer 1 of size [2, 5], got [2, 4]",
     (zeros(5, 2, 3), [(zeros(2, 4), zeros(2, 4)), (zeros(2, 5), zeros(2, 4))])),
    (RuntimeError, "Expected h of layer 0 of size [2, 4], got [3, 4]",
     (zeros(5, 2, 3), [(zeros(3, 4), zeros(2, 4)), (zeros(2, 5), zeros(2, 5))])),
    (RuntimeError, "Input and hidden tensors are not the same dtype, found input tensor with torch.float32 and hidden "
     "tensor with torch.float64", (zeros(5, 2, 3), [(zeros(2, 4), zeros(2, 4)), (zeros(2, 5).double(), zeros(2, 5))])),
    (RuntimeError, "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden tensor "
     "at meta", (zeros(5, 2, 3), [(zeros(2, 4), zeros(2, 4)), (zeros(2, 5), zeros(2, 5, device="meta"))])),
    (RuntimeError, "Input and parameter tensors are not at the same device, found input tensor at meta and parameter "
     "tensor at cpu", (zeros(5, 2, 3, device="meta"),)),
], ids=lambda value: value[:60] if isinstance(value, str) else "")  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bad_calls(backend, error, text, inputs):
    stack = gpu_lstm.StackedLSTM(3, [4, 5], backend=backend)
    before = {name: t.clone() for name, t in stack.state_dict().items()}
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        stack(*inputs)
    assert all(torch.equal(t, before[name]) for name, t in stack.state_dict().items())
    assert stack(zeros(5, 2, 3))[0].shape == (5, 2, 5)


@pytest.mark.parametrize("pair", [(zeros(2, 4),), (zeros(2, 4), zeros(2, 4), zeros(2, 4))], ids=len)
def test_a_layer_takes_two_states(pair):
    with pytest.raises((RuntimeError, ValueError)):
        gpu_lstm.StackedLSTM(3, [4])(zeros(5, 2, 3), [pair])


@pytest.mark.parametrize(("error", "text", "arguments"), [
    (ValueError, "hidden_sizes must have at least one layer", dict(hidden_sizes=[])),
    (ValueError, "hidden_size must be greater than zero", dict(hidden_sizes=[4, 0])),
    (TypeError, "hidden_size should be of type int, got: float", dict(hidden_sizes=[4, 2.0])),
    (ValueError, "input_size must be greater than zero", dict(input_size=0)),
    (TypeError, "bias should be of type bool, got: int", dict(bias=1)),
    (TypeError, "batch_first should be of type bool, got: int", dict(batch_first=1)),
    (ValueError, "dropout should be a number in range [0, 1] representing the probability of an element being zeroed",
     dict(dropout=1.5)),
    (ValueError, "dropout should be a number in range [0, 1] representing the probability of an element being zeroed",
     dict(dropout=True)),
    (ValueError, "residual=True needs a layer whose output is as wide as its input, got inputs of [3, 4] and outputs "
     "of [4, 5] features", dict(residual=True)),
    (ValueError, "unknown backend 'gpu'; expected one of 'auto', 'triton', 'cupy', 'torch', 'reference'",
     dict(backend="gpu")),
], ids=lambda value: value[:60] if isinstance(value, str) else "")  # fmt: skip
def test_bad_arguments(error, text, arguments):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        gpu_lstm.StackedLSTM(**dict(input_size=3, hidden_sizes=[4, 5]) | arguments)


def test_dropout_of_one_layer_warns_as_torch_does():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer") as theirs:
        nn.LSTM(3, 4, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer") as ours:
        gpu_lstm.StackedLSTM(3, [4], dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
