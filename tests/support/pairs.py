"""A float64 module of torch and ours with the same weights, all results of a call of either, and the true results."""

from functools import partial
from itertools import chain

import numpy as np
import oracle
import torch
from comparing import PLACES, assert_same
from torch import Tensor, nn
from torch.func import vjp
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import gpu_lstm
from gpu_lstm.call.weights import NAMES

T, B, I, H = 4, 3, 3, 4
SIZES = [4, 2]  # units of the layers of a StackedLSTM
LENGTHS = torch.tensor([2, 0, 4])
RESETS = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1]]).bool()  # [T, B], some of them in the padding
RAGGED = dict(lengths=LENGTHS, resets=RESETS)


class Chain(nn.Module):
    """torch.nn.LSTM or GRU layers, each fed the output of the one before, called as a StackedLSTM or StackedGRU is."""

    def __init__(self, input_size, hidden_sizes, bidirectional=False, of=nn.LSTM, **options):
        super().__init__()
        sizes = zip([input_size, *((1 + bidirectional) * size for size in hidden_sizes)], hidden_sizes)
        self.layers = nn.ModuleList(of(*size, bidirectional=bidirectional, **options) for size in sizes)
        self.hidden_sizes, self.bidirectional = hidden_sizes, bidirectional

    def forward(self, x, hx=None):
        states = []
        for k, layer in enumerate(self.layers):
            given = hx and (hx[k] if self.bidirectional else tree_map(lambda s: s[None], hx[k]))
            x, state = layer(x, given)
            states.append(state if self.bidirectional else tree_map(lambda s: s[0], state))
        return x, states


def letters_of(module):
    """Return the letters of a layer's states: "hc" for an LSTM, "h" for a GRU, which has three rows a unit, and "hcnm"
    for an sLSTM."""
    if isinstance(module, gpu_lstm.SLSTM):
        return "hcnm"
    weight_hh = next(p for name, p in module.named_parameters() if "weight_hh" in name)
    return "h" if len(weight_hh) == 3 * weight_hh.shape[1] * getattr(module, "heads", 1) and len(weight_hh) else "hc"


def pair(kind, backend, **arguments):
    """Return torch's module in float64, and gpu_lstm's of that kind with the same weights.

    torch has no SLSTM, "LSTM heads" or "GRU heads". For these the first module is ours on the reference.
    """
    kind, *heads = kind.split()
    arguments |= dict(heads=2) if heads else {}
    if heads or kind == "SLSTM":
        cls = partial(getattr(gpu_lstm, kind), backend="reference")
    else:
        cls = partial(Chain, of=getattr(nn, kind[7:])) if kind.startswith("Stacked") else getattr(nn, kind)
    sizes = dict(hidden_sizes=SIZES) if kind.startswith("Stacked") else dict(hidden_size=H)
    arguments = dict(input_size=I) | sizes | arguments
    torch.manual_seed(1)
    theirs = cls(**arguments).double()
    ours = getattr(gpu_lstm, kind)(**arguments, backend=backend, **PLACES.get(backend, PLACES["triton"]))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def seeded(call, *arguments, **options):
    torch.manual_seed(7)
    return call(*arguments, **options)


def random_inputs(module, *batch, seed=2, steps=T):
    """Draw x and hx for a module, in float32. Without `batch` they are unbatched."""
    torch.manual_seed(seed)
    one_state = letters_of(module) == "h"
    if isinstance(module, nn.RNNCellBase):
        x, hx = torch.randn(*batch, module.input_size), torch.randn(2 - one_state, *batch, module.hidden_size)
        return x, hx[0] if one_state else tuple(hx)
    time_and_batch = (*batch, steps) if getattr(module, "batch_first", False) else (steps, *batch)
    if isinstance(module, nn.RNNBase):
        rows = module.num_layers * (1 + module.bidirectional), *batch
        h, c = torch.randn(*rows, module.proj_size or module.hidden_size), torch.randn(*rows, module.hidden_size)
        x = torch.randn(*time_and_batch, module.input_size)
        if letters_of(module) == "hcnm":
            n, m = torch.randn_like(c).exp(), torch.randn_like(c)
            n[:, 1:2] *= batch[0] < 3  # with three sequences or more, one begins with an empty state
            return x, (h, c, n, m)
        return x, h if one_state else (h, c)
    rows = (2, *batch) if module.bidirectional else batch
    hx = [tuple(torch.randn(2 - one_state, *rows, size)) for size in module.hidden_sizes]
    hx = [h for (h,) in hx] if one_state else hx
    return torch.randn(*time_and_batch, module.layers[0].input_size), hx


def states_left(module, hx, steps, a_step):
    """Draw random states to reset to, shaped as hx of a batch: one per step with `a_step`, else one per sequence."""

    def random(t):
        *lead, batch, features = t.shape
        time = [batch, steps] if module.batch_first else [steps, batch]
        return torch.randn(*lead, *(time if a_step else [batch]), features)

    torch.manual_seed(4)
    return tree_map_only(Tensor, random, hx)


def flat(found):
    """Return the tensors that a call returns."""
    leaves = tree_leaves(found, is_leaf=lambda t: isinstance(t, PackedSequence))
    return [t.data if isinstance(t, PackedSequence) else t for t in leaves]


def results(module, x, hx=None, *, call=None, seed=0, reset_states=None, **ragged):
    """Return the output, the final states, and the gradients of a random weighted sum of them by x, hx, reset_states
    and parameters.

    There are no gradients where the call records none. n of an sLSTM, which is 1, or 0 in an empty state, has none.
    """
    parameters = dict(module.named_parameters())
    like = next(iter(parameters.values()))
    given = x, hx, reset_states
    x, hx, left = tree_map_only(Tensor, lambda t: t.detach().to(like).requires_grad_(), given)
    ragged = {name: t.to(like.device) for name, t in ragged.items() if t is not None}
    ragged |= {} if left is None else dict(reset_states=left)
    torch.manual_seed(seed)
    found = flat((module if call is None else call)(x, *([] if hx is None else [hx]), **ragged))
    letters = letters_of(module)
    names = ["output"] * (len(found) > len(letters))  # a cell has no output
    names += names_of(found[len(names) :], letters)
    if not found[0].requires_grad:
        return dict(zip(names, found, strict=True))
    states, left = ([] if given is None else tree_leaves(given) for given in (hx, left))
    of = [(t, d) for t, d in zip(found, weighing(found), strict=True) if t.requires_grad]
    gradients = torch.autograd.grad([t for t, _ in of], [x, *states, *left, *parameters.values()], [d for _, d in of])
    names += ["dx", *names_of(states, letters, "d"), *names_of(left, letters, "dreset_")]
    names += [f"d{name}" for name in parameters]
    return dict(zip(names, (t.detach() for t in (*found, *gradients)), strict=True))


def names_of(states, letters, of=""):
    """Return names for tensors h, c, h, c, ... or h, h, ... of a GRU, or h, c, n, m, ... of an sLSTM."""
    return [f"{of}{s}{k}" for k in range(len(states) // len(letters)) for s in letters]


def assert_alike(ours, theirs, *batch, given=True, **how):
    """Check that both modules compute the same results and gradients, for a batch of that size, with states if
    `given`."""
    x, hx = random_inputs(ours, *batch)
    assert_same(*(results(module, x, hx if given else None, **how) for module in (ours, theirs)))


def weighing(found, dtype=None):
    """Draw random gradients for the results of a call. For the truth of a call in `dtype`, they are rounded to that
    dtype."""
    torch.manual_seed(3)
    return [torch.randn(tuple(t.shape)).to(t if dtype is None else dtype) for t in found]


def truth(module, x, hx=None, *, lengths=None, resets=None, reset_states=None, noises=None, reverse=False,
          kind=np.ndarray):  # fmt: skip
    """Return what `results` of a batched LSTM, GRU or stack should return, by the oracle, with the noise of the call
    that `noises_of` returns.

    With `reverse` the first direction is reverse, too. The oracle computes with arrays of `kind`.
    """
    (names, layers), letters = weights_of(module), letters_of(module)
    noises, factors, kept = noises or (None, None, ())
    if factors:
        layers = [[[w_ih, w_hh * f, *more] for (w_ih, w_hh, *more), f in zip(*each)] for each in zip(layers, factors)]
    layers = tree_map_only(np.ndarray, lambda a: a.view(kind), layers)

    def turned(t):  # converts between the user's layout and time-major
        return t.swapaxes(0, 1) if module.batch_first else t

    x = turned(x.double().numpy().view(kind))
    states = zeros_for(layers, x.shape[1], letters)
    if hx is not None:
        states = rows_of(module, [t.double().numpy().view(kind) for t in tree_leaves(hx)])
    if reset_states is not None:
        forms = [vjp(partial(each_step, module, len(x)), t.double()) for t in tree_leaves(reset_states)]
        left = rows_of(module, [t.numpy().view(kind) for t, _ in forms])
        noises = noises or [[{} for _ in layer] for layer in left]
        noises = [[of | dict(reset_h=h, reset_c=c) for of, (h, c) in zip(*layer)] for layer in zip(noises, left)]
    ragged = dict(lengths=lengths, resets=None if resets is None else turned(resets))
    residual = getattr(module, "residual", False)
    how = dict(noises=noises, kept=kept, residual=residual, reverse=reverse)
    y, finals, tapes = oracle.stack(x, states, layers, **ragged, **how)
    found = [turned(y), *leaves_of(module, finals)]
    dy, *dfinals = (t.double().numpy() for t in weighing(found, next(module.parameters()).dtype))
    dx, dstates, dweights, dleft = oracle.stack_gradients(tapes, turned(dy), rows_of(module, dfinals))
    for d, f in zip(chain(*dweights), chain(*factors or [])):
        d[1] *= f

    finals = found[1:]
    named = dict(zip(["output", *names_of(finals, letters), "dx"], [*found, turned(dx)]))
    if hx is not None:
        named |= zip(names_of(finals, letters, "d"), leaves_of(module, dstates))
    if reset_states is not None:
        for name, (_, pull), d in zip(names_of(finals, letters, "dreset_"), forms, leaves_of(module, dleft)):
            named[name] = pull(torch.from_numpy(np.asarray(d)))[0].numpy()
    of_weights = dict(zip(*([t for layer in every for row in layer for t in row] for every in (names, dweights))))
    for name, p in module.named_parameters():
        named[f"d{name}"] = of_weights[name]
        if "weight_hh" in name and p.shape != of_weights[name].shape:  # a module of heads
            rows = enumerate(of_weights[name])
            named[f"d{name}"] = np.stack([d[units_of_head(module, row, len(d))] for row, d in rows])
    return {name: torch.from_numpy(np.asarray(value, order="C")) for name, value in named.items()}


def noises_of(module, seed, steps=T, batch=B):
    """Return the noise that a call of an LSTM, GRU or stack draws after torch.manual_seed(seed).

    Returns:
        The masks [L][D] in the form of the oracle, the factors of each W_hh [L][D] or None, and the factors of the
        outputs of all layers but the last.

    The factors of W_hh come first, then the factors of h for dropout, and the masks of h and c that stay. In eval()
    there are only the rates of zoneout.
    """
    like, letters = next(module.parameters()), letters_of(module)
    torch.manual_seed(seed)
    rates = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout,) * 2

    def drawn(weight_hh):
        width, hidden = weight_hh.shape[1], len(weight_hh) // 4
        noise = {}
        if module.training and module.recurrent_dropout:
            noise["dropout_h"] = nn.functional.dropout(like.new_ones(batch, width), module.recurrent_dropout)
        for state, rate, size in zip(letters, rates, (width, hidden)):
            if rate and module.training:
                noise[f"zoneout_{state}"] = torch.rand(steps, batch, size, device=like.device) < rate
            elif rate:
                noise[f"zoneout_{state}"] = torch.full((steps, batch, size), rate, dtype=torch.float64)
        return {name: t.double().cpu().numpy() for name, t in noise.items()}

    layers, training, factors, kept = weights_of(module)[1], module.training, None, []
    if training and getattr(module, "weight_drop", 0):
        ones = [[like.new_ones(weight_hh.shape) for _, weight_hh, *_ in layer] for layer in layers]
        factors = tree_map(lambda t: nn.functional.dropout(t, module.weight_drop).double().cpu().numpy(), ones)
    masks = [[drawn(weight_hh) for _, weight_hh, *_ in layer] for layer in layers]
    for layer in layers[:-1] if training and module.dropout else ():
        mask = like.new_empty(steps, batch, len(layer) * layer[0][1].shape[1], dtype=torch.bool)
        kept.append(mask.bernoulli_(1 - module.dropout).double().cpu().numpy() / (1 - module.dropout or 1))
    return masks, factors, kept


def is_of_steps(module, t):
    """Return whether a batched state to reset to has one state per step, rather than one per sequence."""
    return t.dim() - int(not hasattr(module, "layers") or module.bidirectional) == 3


def each_step(module, steps, t):
    """Convert a state to reset to from the user's form to one per step, time-major."""
    if not is_of_steps(module, t):
        return t.unsqueeze(-3).expand(*t.shape[:-2], steps, *t.shape[-2:])
    return t.transpose(-2, -3) if module.batch_first else t


def zeros_for(layers, batch, letters="hc"):
    """Return the zero states (h0, c0) [L][D] for layers of these weights [L][D]. c0 includes an sLSTM's n and m."""
    lead, rows = (3,) if letters == "hcnm" else (), 3 if letters == "h" else 4

    def zeros(w):
        return np.zeros((batch, w[1].shape[1])), np.zeros((*lead, batch, len(w[1]) // rows))

    return [[*map(zeros, layer)] for layer in layers]


def weights_of(module):
    """Return the names and values of the weights that a layer may have in a direction, [L][D][10]. Values are float64
    NumPy or None."""
    form = "layers.{1}.{0}_l0{2}" if hasattr(module, "layers") else "{0}_l{1}{2}"
    suffixes = ("", "_reverse")[: 1 + module.bidirectional]
    count = len(module.layers) if hasattr(module, "layers") else module.num_layers
    names = [[[form.format(kind, k, suffix) for kind in NAMES] for suffix in suffixes] for k in range(count)]
    values = {name: p.detach().cpu().double().numpy() for name, p in module.named_parameters()}
    values = {name: dense(module, a) if "weight_hh" in name else a for name, a in values.items()}
    return names, [[[values.get(name) for name in direction] for direction in layer] for layer in names]


def units_of_head(module, row, hidden):
    """Return the columns of W_hh that belong to the head of a row."""
    size = hidden // getattr(module, "heads", 1)
    return slice(row % hidden // size * size, (row % hidden // size + 1) * size)


def dense(module, weight_hh):
    """Return W_hh of heads as a full matrix, with zeros between the heads."""
    if (heads := getattr(module, "heads", 1)) == 1:
        return weight_hh
    whole = np.zeros((len(weight_hh), heads * weight_hh.shape[1]))
    for row, of_head in enumerate(weight_hh):
        whole[row, units_of_head(module, row, whole.shape[1])] = of_head
    return whole


def rows_of(module, leaves):
    """Return (h, c) [L][D], each [B, *], from a flat list of a module's states. A GRU has (h, h). c of an sLSTM is [3,
    B, H]."""
    directions = range(1 + module.bidirectional)
    if letters_of(module) == "h":
        leaves = [t for leaf in leaves for t in (leaf, leaf)]
    if letters_of(module) == "hcnm":
        leaves = [leaves[0], np.stack(leaves[1:], 1).view(type(leaves[0]))]
    if hasattr(module, "layers"):
        pairs = zip(leaves[::2], leaves[1::2])
        return [[(h[d], c[d]) for d in directions] if module.bidirectional else [(h, c)] for h, c in pairs]
    pairs = list(zip(*leaves, strict=True))
    return [[pairs[k * len(directions) + d] for d in directions] for k in range(module.num_layers)]


def leaves_of(module, rows):
    """Reverse `rows_of`."""
    count = len(letters_of(module))
    if hasattr(module, "layers"):
        return [np.stack(t) if module.bidirectional else t[0] for layer in rows for t in [*zip(*layer)][:count]]
    found = [np.stack(t) for t in [*zip(*(pair for layer in rows for pair in layer))][:count]]
    return [found[0], *found[1].swapaxes(0, 1)] if count == 4 else found


def assert_identical(got, expected):
    """Check that tensors are the same to the last bit."""
    assert list(got) == list(expected)
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
