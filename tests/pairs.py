"""A module of torch and ours with the same weights, and all that a call of either gives.

The truth is torch's module in float64 on the CPU, or the NumPy oracle. Weights and inputs are float32 numbers, so that
every backend starts from the same.
"""

import numpy as np
import oracle
import torch
from comparing import PLACES
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

import gpu_lstm

T, B, I, H = 4, 3, 3, 4
SIZES = [4, 2]  # of a StackedLSTM
KINDS = ("LSTM", "LSTMCell", "StackedLSTM")
LENGTHS = torch.tensor([2, 0, 4])
RESETS = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1]]).bool()  # [T, B], some in the padding


class Chain(nn.Module):
    """torch.nn.LSTM layers, each fed the output of the one before, called as a StackedLSTM is."""

    def __init__(self, input_size, hidden_sizes, bias=True, bidirectional=False) -> None:
        super().__init__()
        inputs = [input_size, *((1 + bidirectional) * size for size in hidden_sizes)]
        self.layers = nn.ModuleList(
            nn.LSTM(features, size, bias=bias, bidirectional=bidirectional)
            for features, size in zip(inputs, hidden_sizes)
        )
        self.hidden_sizes, self.bidirectional = hidden_sizes, bidirectional

    def forward(self, x: Tensor, hx: list | None = None) -> tuple[Tensor, list]:
        states = []
        for k, layer in enumerate(self.layers):
            x, state = layer(x, hx and (hx[k] if self.bidirectional else [s[None] for s in hx[k]]))
            states.append(state if self.bidirectional else tuple(s[0] for s in state))
        return x, states


def pair(kind: str, backend: str, **arguments) -> tuple[nn.Module, nn.Module]:
    """torch's module in float64, and gpu_lstm's of that kind, with the same weights."""
    cls = {"LSTM": nn.LSTM, "LSTMCell": nn.LSTMCell, "StackedLSTM": Chain}[kind]
    sizes = dict(hidden_sizes=SIZES) if kind == "StackedLSTM" else dict(hidden_size=H)
    arguments = dict(input_size=I) | sizes | arguments
    torch.manual_seed(1)
    theirs = cls(**arguments).double()
    ours = getattr(gpu_lstm, kind)(**arguments, backend=backend, **PLACES[backend])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random_inputs(module: nn.Module, *batch: int, seed: int = 2) -> tuple[Tensor, tuple | list]:
    """x and hx for a module, float32; unbatched without `batch`."""
    torch.manual_seed(seed)
    if isinstance(module, nn.RNNCellBase):
        x, shapes = (*batch, module.input_size), [(*batch, module.hidden_size)] * 2
        return torch.randn(x), tuple(map(torch.randn, shapes))
    time_and_batch = (*batch, T) if getattr(module, "batch_first", False) else (T, *batch)
    if isinstance(module, nn.RNNBase):
        rows = module.num_layers * (1 + module.bidirectional), *batch
        hx = torch.randn(*rows, module.proj_size or module.hidden_size), torch.randn(*rows, module.hidden_size)
        return torch.randn(*time_and_batch, module.input_size), hx
    rows = (2, *batch) if module.bidirectional else batch
    hx = [(torch.randn(*rows, size), torch.randn(*rows, size)) for size in module.hidden_sizes]
    return torch.randn(*time_and_batch, module.layers[0].input_size), hx


def results(module, x, hx=None, *, call=None, seed=0, **ragged) -> dict[str, Tensor]:
    """Output and final states, and the gradients of a random weighing of them by x, hx and every parameter."""
    parameters = dict(module.named_parameters())
    like = next(iter(parameters.values()))
    x, hx = tree_map_only(Tensor, lambda t: t.detach().to(like).requires_grad_(), (x, hx))
    ragged = {name: t.to(like.device) for name, t in ragged.items() if t is not None}
    torch.manual_seed(seed)
    found = (module if call is None else call)(x, *([] if hx is None else [hx]), **ragged)
    found = tree_leaves(found, is_leaf=lambda t: isinstance(t, PackedSequence))
    found = [t.data if isinstance(t, PackedSequence) else t for t in found]
    inputs = [x, *(tree_leaves(hx) if hx else ())]
    gradients = torch.autograd.grad(found, [*inputs, *parameters.values()], weighing(found))
    names = ["output"] * (len(found) % 2) + [f"{s}{k}" for k in range(len(found) // 2) for s in "hc"]  # a cell has none
    names += ["dx", *(f"d{s}{k}" for k in range(len(inputs) // 2) for s in "hc"), *(f"d{name}" for name in parameters)]
    return dict(zip(names, (t.detach() for t in (*found, *gradients)), strict=True))


def weighing(found: list) -> list[Tensor]:
    """Random gradients of the results of a call."""
    torch.manual_seed(3)
    return [torch.randn(tuple(t.shape)).to(t if isinstance(t, Tensor) else torch.float64) for t in found]


def truth(module, x, hx=None, *, lengths=None, resets=None, noises=None) -> dict[str, Tensor]:
    """What `results` of an LSTM or StackedLSTM, batched, should be: by the oracle, with `noises` [L][D] of a call."""
    names, layers = weights_of(module)

    def turned(t):  # between the user's layout and time-major
        return t.swapaxes(0, 1) if module.batch_first else t

    x = turned(x.double().numpy())
    states = zeros_for(layers, x.shape[1])
    if hx is not None:
        states = rows_of(module, [t.double().numpy() for t in tree_leaves(hx)])
    y, finals, tapes = oracle.stack(
        x, states, layers, lengths=lengths, resets=None if resets is None else turned(resets), noises=noises,
        residual=getattr(module, "residual", False),
    )  # fmt: skip
    found = [turned(y), *leaves_of(module, finals)]
    dy, *dfinals = (t.numpy() for t in weighing(found))
    dx, dstates, dweights = oracle.stack_gradients(tapes, turned(dy), rows_of(module, dfinals))

    of_states = [f"{s}{k}" for k in range(len(found) // 2) for s in "hc"]
    named = dict(zip(["output", *of_states, "dx"], [*found, turned(dx)]))
    if hx is not None:
        named |= {f"d{name}": t for name, t in zip(of_states, leaves_of(module, dstates))}
    flat_names, flat = ([t for layer in every for row in layer for t in row] for every in (names, dweights))
    of_weights = dict(zip(flat_names, flat))
    named |= {f"d{name}": of_weights[name] for name, _ in module.named_parameters()}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in named.items()}


def zeros_for(layers: list, batch: int) -> list[list[tuple]]:
    """The states (h0, c0) [L][D] that layers of these weights [L][D] begin with by default."""
    return [[(np.zeros((batch, w[1].shape[1])), np.zeros((batch, len(w[1]) // 4))) for w in layer] for layer in layers]


def weights_of(module: nn.Module) -> tuple[list, list]:
    """Names and values, float64 NumPy or None, of the five weights that a layer may have in a direction: [L][D][5]."""
    stacked = hasattr(module, "layers")
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    names = [
        [
            [f"layers.{k}.{kind}_l0{suffix}" if stacked else f"{kind}_l{k}{suffix}" for kind in kinds]
            for suffix in ("", "_reverse")[: 1 + module.bidirectional]
        ]
        for k in range(len(module.layers) if stacked else module.num_layers)
    ]
    values = {name: p.detach().cpu().double().numpy() for name, p in module.named_parameters()}
    return names, [[[values.get(name) for name in direction] for direction in layer] for layer in names]


def rows_of(module: nn.Module, leaves: list) -> list[list[tuple]]:
    """(h, c) [L][D], each [B, *], of a module's states in a flat list."""
    directions = range(1 + module.bidirectional)
    if hasattr(module, "layers"):
        pairs = zip(leaves[::2], leaves[1::2])
        return [[(h[d], c[d]) for d in directions] if module.bidirectional else [(h, c)] for h, c in pairs]
    pairs = list(zip(*leaves, strict=True))
    return [[pairs[k * len(directions) + d] for d in directions] for k in range(module.num_layers)]


def leaves_of(module: nn.Module, rows: list[list[tuple]]) -> list:
    """The reverse of `rows_of`."""
    if hasattr(module, "layers"):
        return [np.stack(t) if module.bidirectional else t[0] for layer in rows for t in zip(*layer)]
    return [np.stack(t) for t in zip(*(pair for layer in rows for pair in layer))]


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same to the last bit."""
    assert list(got) == list(expected)
    for name in got:
        assert torch.equal(got[name], expected[name]), name
