"""Layers, directions and chunks of time side by side change no number; what is kept for backward is bounded."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm import chunks

STACKS = {
    "one layer": {},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "projection": {"num_layers": 2, "proj_size": 3},
}
RAGGED = {
    "lengths": torch.tensor([5, 3, 0]),
    "resets": torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) < 0.4,
}


def _ragged(lstm, kind):
    """The options of a call: none, lengths and resets, or also what these leave."""
    device, rows = lstm.weight_ih_l0.device, lstm.num_layers * (1 + lstm.bidirectional)
    options = {} if kind == "plain" else {name: tensor.to(device) for name, tensor in RAGGED.items()}
    if kind == "states":
        widths = lstm.proj_size or lstm.hidden_size, lstm.hidden_size
        options["reset_states"] = tuple(torch.randn(rows, 5, 3, width, device=device) for width in widths)
    return options


def _residual(device, **options):
    torch.manual_seed(0)
    return gpu_lstm.StackedLSTM(4, [4, 4], residual=True, device=device, backend="triton", **options)


def _results(lstm, x, **ragged):
    """Output, states and every gradient."""
    x = x.clone().requires_grad_()
    left = [t.requires_grad_() for t in ragged.get("reset_states", ())]
    y, (h, c) = lstm(x, **ragged)
    torch.autograd.backward([y, h, c], [torch.ones_like(t) for t in (y, h, c)])
    gradients = [t.grad for t in (x, *left, *lstm.parameters())]
    for t in (*left, *lstm.parameters()):
        t.grad = None
    return [y.detach(), h.detach(), c.detach(), *gradients]


def _stack(device, **options):
    torch.manual_seed(0)
    return gpu_lstm.LSTM(4, 6, device=device, backend="triton", **options)


@pytest.mark.parametrize("kind", ["plain", "ragged", "states"])
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_chunks_give_the_numbers_of_the_whole(monkeypatch, device, options, kind):
    lstm, x = _stack(device, **options), torch.randn(5, 3, 4, device=device)
    ragged = _ragged(lstm, kind)
    with torch.no_grad():
        whole = lstm(x, **ragged)
        monkeypatch.setattr(chunks, "WORKSPACE", 2 * 3 * 24 * 4)  # two steps
        pieces = lstm(x, **ragged)
    for a, b in zip((pieces[0], *pieces[1]), (whole[0], *whole[1])):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=5e-7)  # the input product may be blocked otherwise


def test_a_residual_connection_ends_with_each_sequence_in_every_chunk(monkeypatch, device):
    """What stands past the end, NaN here, is added in no chunk: neither the one where it ends, nor those after it."""
    stack, x = _residual(device), torch.randn(7, 4, 4, device=device)
    lengths = torch.tensor([7, 3, 0, 5], device=device)
    x = x.masked_fill(torch.arange(7, device=device)[:, None, None] >= lengths[:, None], float("nan"))
    with torch.no_grad():
        y, states = stack(x, lengths=lengths)
        monkeypatch.setattr(chunks, "WORKSPACE", 2 * 4 * 16 * 4)  # two steps
        in_chunks, chunk_states = stack(x, lengths=lengths)
    assert y.isfinite().all()
    torch.testing.assert_close((in_chunks, chunk_states), (y, states), rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize(
    ("options", "kind"), [*((name, "ragged") for name in STACKS), ("projection", "plain"), ("projection", "states")]
)
@pytest.mark.slow
def test_recompute_gives_the_same_gradients(monkeypatch, device, options, kind):
    options = STACKS[options]
    x = torch.randn(5, 3, 4, device=device)
    ragged = _ragged(_stack(device, **options), kind)
    kept = _results(_stack(device, **options), x, **ragged)
    again = _results(_stack(device, recompute=True, **options), x, **ragged)
    monkeypatch.setattr(chunks, "WORKSPACE", 2 * 3 * 24 * 4)
    in_chunks = _results(_stack(device, recompute=True, **options), x, **ragged)
    for other in (again, in_chunks):
        for a, b in zip(kept, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["forward", "both directions"])
def test_a_seed_drops_the_same_elements_whatever_the_chunks(monkeypatch, device, options):
    lstm = _stack(device, num_layers=3, dropout=0.5, recompute=True, **options)
    x = torch.randn(5, 3, 4, device=device)

    def run():
        torch.manual_seed(3)
        return _results(lstm, x)

    whole = run()
    monkeypatch.setattr(chunks, "WORKSPACE", 2 * 3 * 24 * 4)  # two steps
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    reference = gpu_lstm.LSTM(4, 6, 3, dropout=0.5, device=device, backend="reference", **options)
    reference.load_state_dict(lstm.state_dict())
    torch.manual_seed(3)
    torch.testing.assert_close(whole[0], reference(x)[0].detach(), rtol=1e-5, atol=2e-6)  # and whatever the backend


def _kept_elements(lstm, x) -> int:
    """Elements that autograd keeps, beside the input and the parameters; a float32 of a half-precision layer is one."""
    known = {t.untyped_storage().data_ptr() for t in (x, *lstm.parameters())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lstm(x)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_kept_for_backward(device, dtype):
    steps, batch, inputs, hidden = 20, 3, 8, 16
    x = torch.randn(steps, batch, inputs, dtype=dtype, device=device, requires_grad=True)
    for recompute, elements in ((False, 6 * hidden), (True, 2 * hidden)):
        lstm = gpu_lstm.LSTM(inputs, hidden, dtype=dtype, device=device, backend="triton", recompute=recompute)
        kept = _kept_elements(lstm, x)
        states = 4 * batch * hidden + 64  # h0 and c0
        assert elements * steps * batch <= kept <= elements * steps * batch + states


@pytest.mark.parametrize("kind", ["stack", "both directions"])
def test_every_layer_of_a_stack_recomputes(device, kind):
    x, options = torch.randn(3, 2, 4, device=device, requires_grad=True), dict(bidirectional=kind != "stack")
    kept = [_kept_elements(_residual(device, recompute=recompute, **options), x) for recompute in (False, True)]
    directions = 1 + options["bidirectional"]
    gates = 4 * (4 + 4) * directions * 3 * 2  # of all layers
    assert kept[0] - kept[1] == gates


class Allocations(TorchDispatchMode):
    """Bytes of each new tensor, largest first."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result

    def largest_first(self) -> list[int]:
        return sorted(self.sizes, reverse=True)


@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
@pytest.mark.slow
def test_a_long_sequence_takes_a_fixed_workspace(monkeypatch, device, options):
    """Without autograd only one chunk's pre-activations are there: beside outputs no tensor exceeds the workspace."""
    monkeypatch.setattr(chunks, "WORKSPACE", 2 * 24 * 4)  # two steps
    lstm, x = _stack(device, **options), torch.randn(17, 1, 4, device=device)
    with torch.no_grad(), Allocations() as allocations:
        y, _ = lstm(x)
    output = y.numel() * y.element_size()
    outputs = lstm.num_layers if lstm.bidirectional else 1
    largest = allocations.largest_first()
    assert largest[:outputs] == [output] * outputs
    assert largest[outputs] <= chunks.WORKSPACE < output
