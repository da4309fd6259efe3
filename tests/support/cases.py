"""Test cases of the public modules, written in words such as "ragged resets both", and their comparison with the
float64 oracle.

A case is a module, a call, and a size such as "T6 B4 I3 H5", with P if there is a projection. By default the module is
a gpu_lstm.LSTM of one layer. The word "gru" makes it a GRU, and "slstm" an SLSTM. lstm_layer, LSTMCell and Stream
compute the same as a module with the same weights, so they are words, too.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from comparing import LARGE, judge
from pairs import (
    Chain,
    is_of_steps,
    letters_of,
    noises_of,
    random_inputs,
    results,
    rows_of,
    states_left,
    truth,
    weights_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import gpu_lstm
from gpu_lstm.functional import gru_layer, lstm_layer, slstm_layer
from gpu_lstm.kernels.problem import Inputs

OF_TORCH = {  # the words for arguments of a module that nn.LSTM has
    "deep": dict(num_layers=2), "both": dict(bidirectional=True), "batch-first": dict(batch_first=True),
    "no-bias": dict(bias=False),
}  # fmt: skip
ARGUMENTS = OF_TORCH | {  # and the words for our own arguments
    "recompute": dict(recompute=True), "peepholes": dict(peepholes=True), "norms": dict(layer_norm=True),
    "norm-hh": dict(layer_norm=("hh",)), "norm-c": dict(layer_norm=("c",)), "norm-hh-c": dict(layer_norm=("hh", "c")),
    "masks": dict(recurrent_dropout=0.3, zoneout=(0.3, 0.45)), "dropout_h": dict(recurrent_dropout=0.3),
    "dropped_h": dict(recurrent_dropout=1.0), "weight_drop": dict(weight_drop=0.5),
    "dropped_weights": dict(weight_drop=1.0), "dropout": dict(dropout=0.25), "dropped_layers": dict(dropout=1.0),
    "zoneout": dict(zoneout=(0.3, 0.45)), "zoneout_h": dict(zoneout=(0.3, 0.0)), "zoneout_c": dict(zoneout=(0.0, 0.45)),
    # The module is in eval(), where only zoneout acts.
    "expected": dict(recurrent_dropout=0.3, zoneout=(0.3, 0.45), weight_drop=0.5),
    "heads": dict(heads=2), "three-heads": dict(heads=3), "four-heads": dict(heads=4),
    "gru": {}, "slstm": {}, "stack": {}, "residual": {},  # these words choose GRU, SLSTM, StackedLSTM or StackedGRU
}  # fmt: skip
NOISE = {"masks", "zoneout", "dropout_h", "dropped_h", "zoneout_h", "zoneout_c", "expected", "weight_drop",
         "dropped_weights", "dropout", "dropped_layers"}  # fmt: skip
UNITS = 16  # the error that a yardstick may have, in units in the last place; in test_layer.py it is at most 8


def built(size, words, own=False, **how):
    """Build the module of a case. With `own` it is torch's module."""
    _, _, inputs, hidden, *projected = size
    table = OF_TORCH if own else ARGUMENTS
    how |= {name: value for word in words if word in table for name, value in table[word].items()}
    if "expected" in words and words & {"deep", "stack", "residual"}:
        how["dropout"] = 0.5
    kind = "GRU" if "gru" in words else "LSTM"
    if "slstm" in words:
        module = gpu_lstm.SLSTM(inputs, hidden, **{name: how[name] for name in how.keys() - {"recurrent_dropout"}})
        module.recurrent_dropout = how.get("recurrent_dropout", 0.0)
        return module
    if kind == "GRU" and "zoneout" in how:  # a GRU has one state, and one rate for it
        how["zoneout"] = max(how["zoneout"])
    stacked = partial(Chain, of=getattr(nn, kind)) if own else getattr(gpu_lstm, f"Stacked{kind}")
    if "residual" in words:
        return stacked(inputs, [hidden, hidden], residual=True, **how)
    if "stack" in words:
        return stacked(inputs, [hidden, hidden // 2 + 1], **how)
    cls, width = getattr(nn if own else gpu_lstm, kind), sum(projected)
    if kind == "GRU":
        return cls(inputs, hidden, **how)
    if not is_wide(size):
        return cls(inputs, hidden, proj_size=width, **how)
    module = cls(inputs, hidden, proj_size=1, **how)
    module.proj_size = width
    for name, _ in module.named_parameters():
        if name.startswith(("weight_hh", "weight_hr")):
            setattr(module, name, nn.Parameter(torch.empty((4 * hidden, width) if "hh" in name else (width, hidden))))
    return module


def yardstick_of(size, words):
    """Return the name of the yardstick and the module that measures errors: torch's own module, or our backend "torch"
    or "reference"."""
    own = {*OF_TORCH, "recompute", "chunks", "no-hx", "no-grad", "gru", "stack", *FORMS} - {"reverse"}
    is_of_torch = words <= own | {"reverse", "ragged", "resets", "residual"} and size[3] != sum(size[4:])
    backend = "torch" if is_of_torch else "reference"
    if words <= own and not is_wide(size):
        return backend, built(size, words, own=True)
    return backend, built(size, words, backend=backend)


def is_wide(size):
    """Return whether P >= H. Only lstm_layer accepts such a projection."""
    return size[3] <= sum(size[4:])


class Call(NamedTuple):
    """The arguments of a call of a module: x, hx, and the keyword arguments."""

    x: Tensor
    hx: Any
    rest: dict[str, Any]


def call_of(module, size, words, seed):
    """Draw a random call. Lengths are from 0 to T. Where B allows, one is 0 and one is T."""
    steps, batch, *_ = size
    x, hx = random_inputs(module, batch, seed=seed, steps=steps)
    rest: dict[str, Any] = {}
    if words & {"ragged", "packed"}:
        rest["lengths"] = torch.randint(int("packed" in words), steps + 1, (batch,))
        if batch > 1:
            rest["lengths"][0] = int("packed" in words)
        if batch > 1 or "packed" in words:
            rest["lengths"][-1] = steps
    if words & {"short", "none"}:  # no sequence has all steps
        rest["lengths"] = rest["lengths"] // 2 * ("short" in words)
    if words & {"resets", "state", "states"}:
        resets = torch.rand(steps, batch) < 0.4
        resets[0, -1:] |= batch > 2  # of the longest sequence: its states and gradients, too, end before the first step
        rest["resets"] = resets.T if module.batch_first else resets
    if words & {"state", "states"}:
        rest["reset_states"] = states_left(module, hx, steps, "states" in words)
    return Call(x, None if "no-hx" in words else hx, rest)


def packed(module, x, *hx, lengths, **rest):
    first = module.batch_first
    given = pack_padded_sequence(x, lengths.cpu(), batch_first=first, enforce_sorted=False)
    y, states = module(given, *hx, **rest)
    assert all(map(torch.equal, y[1:], given[1:])), "other sizes of batches, or another order"
    return pad_packed_sequence(y, batch_first=first)[0], states


def unbatched(module, x, *hx, lengths = None, resets = None,
              reset_states = None):  # fmt: skip
    """Call the module with its only sequence, without an axis for the batch."""
    axis = 0 if module.batch_first else 1

    def alone(t):
        return t.squeeze(-3 if is_of_steps(module, t) and module.batch_first else -2)

    left = tree_map_only(Tensor, alone, reset_states)
    lengths, resets = lengths if lengths is None else lengths[0], resets if resets is None else resets.squeeze(axis)
    given = dict(lengths=lengths, resets=resets, reset_states=left)
    y, states = module(x.squeeze(axis), *tree_map(lambda t: t.squeeze(-2), hx), **given)
    return y.unsqueeze(axis), tree_map(lambda t: t.unsqueeze(-2), states)


def by_layers(module, x, hx=None, *, reset_states=None, reverse=False, **ragged):
    """Compute the call by the functions, one layer and one direction at a time. With `reverse` the first direction is
    reverse, too."""
    parameters, finals, letters = dict(module.named_parameters()), [], letters_of(module)

    def of_row(states):
        return tree_map_only(Tensor, lambda t: t[len(finals)], states)

    for names in weights_of(module)[0]:
        outputs = []
        for d, own in enumerate(names):
            options = ragged | dict(reverse=reverse or d == 1, backend=module.backend, heads=module.heads)
            weights, state = [parameters.get(name) for name in own], of_row(hx)
            if letters == "hcnm":
                w_ih, w_hh, b_ih, b_hh, *_ = weights
                y, final = slstm_layer(x @ w_ih.T, w_hh, None if b_ih is None else b_ih + b_hh, state, **options)
            else:
                function, weights = (gru_layer, weights[:4]) if letters == "h" else (lstm_layer, weights)
                y, final = function(x, weights, state, reset_states=of_row(reset_states), **options)
            outputs.append(y)
            finals.append(tree_leaves(final))
        x = torch.cat(outputs, 2)
    states = tuple(torch.stack(t) for t in zip(*finals))
    return x, states[0] if letters == "h" else states


def by_cell(module, x, hx=None):
    """Compute the call by an LSTMCell or GRUCell with the same parameters, a step at a time."""
    options, is_lstm = dict(backend=module.backend, heads=module.heads), isinstance(module, gpu_lstm.LSTM)
    if is_lstm:
        options |= dict(peepholes=module.peepholes, layer_norm=module.layer_norm)
    cls = gpu_lstm.LSTMCell if is_lstm else gpu_lstm.GRUCell
    cell = cls(module.input_size, module.hidden_size, module.bias, x.device, x.dtype, **options)
    for name, parameter in module.named_parameters():
        setattr(cell, name.removesuffix("_l0"), parameter)
    state, outputs = tree_map_only(Tensor, lambda t: t[0], hx), []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(state[0] if is_lstm else state)
    return torch.stack(outputs), tree_map(lambda t: t[None], state)


def by_stream(module, x, hx=None, resets=None):
    """Compute the call by a Stream: a chunk of two steps first, a chunk of one, then single steps. With resets there
    are single steps alone."""

    def turned(t):
        return t.transpose(0, 1) if module.batch_first else t

    steps, parts = turned(x), []
    stream = gpu_lstm.Stream(module, steps.shape[1], hx)
    if resets is None:
        parts += [turned(stream(turned(chunk))) for chunk in (steps[:2], steps[2:3])]
    for t in range(3 * (resets is None), len(steps)):
        if resets is not None:
            stream.reset(turned(resets)[t])
        parts.append(stream(steps[t])[None])
    assert not any(part.requires_grad for part in parts)
    return turned(torch.cat(parts)), stream.state


FORMS: dict[str, Callable] = {
    "packed": packed, "unbatched": unbatched, "layer": by_layers, "cell": by_cell, "stream": by_stream,
    "reverse": partial(by_layers, reverse=True),
}  # fmt: skip


def with_random_parameters(module, seed):
    """Draw parameters. Products are as large as their factors and shut no gate, and gains are about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * values if "gain" in name else values * (p.shape[1] ** -0.5 if p.dim() == 2 else 1))
    return module


def drawn(size, words, seed=0, **how):
    """Return the module of a case with random parameters, and a random call of it."""
    named = {*words.split()}
    module = with_random_parameters(built(size, named, **how), seed).train("expected" not in named)
    return module, call_of(module, size, named, seed)


def check(
    size, words, backend, dtype, device = "cpu", seeds = 3,
    yardstick=None, first_seed=0,
):  # fmt: skip
    """Check every result and gradient of some random calls.

    In float64 an error may be 1e-12. In other dtypes it may be twice the error of the yardstick: torch's own module,
    where that can run the call, else our backend "torch" or "reference". The yardstick's own numbers must be right
    within some units in the last place. Otherwise a fault that it shares with the tested backend would not show.
    """
    named, errors, truths = set(words.split()), {}, []
    form = next((FORMS[word] for word in named if word in FORMS), None)
    their_form = form if named & {"packed", "reverse"} or is_wide(size) else None
    for seed in range(first_seed, first_seed + seeds):
        ours, call = drawn(size, words, seed, backend=backend)
        ours.to(device, dtype)
        found, true = result_of(ours, call, named, seed, form), truth_of(ours, call, named, seed)
        names = [name for name in true if name[0] != "d" or not named & {"stream", "no-grad"}]
        assert list(found) == names
        of_dtype = [t.dtype for name, t in found.items() if "slstm" not in named or name not in ("c0", "n0", "m0")]
        assert set(of_dtype) == {dtype}
        if dtype is torch.float64:
            for name in names:
                torch.testing.assert_close(found[name], true[name], rtol=1e-12, atol=1e-12, msg=name)
            continue
        truths.append(partial(arrays_of, ours, call, named, seed))
        if yardstick is None:
            kind, theirs = yardstick_of(size, named)
        else:
            kind, theirs = yardstick, built(size, named, backend=yardstick)
        theirs.to(device, dtype).load_state_dict(ours.state_dict())
        measured = result_of(theirs, call, named, seed, their_form)
        for name in names:
            our_error, their_error = (t[name].double().cpu().numpy() - true[name].numpy() for t in (found, measured))
            errors.setdefault(name, []).append((our_error, their_error, true[name].numpy()))
    if errors:
        for name, of_seeds in errors.items():
            assert_right(name, of_seeds, torch.finfo(dtype).eps if yardstick is None else 2.0**-10)
        judge(errors, dtype, kind, truths, size[0])


def assert_right(name, errors, last_place):
    """Check that the yardstick's errors are no larger than rounding makes them."""
    _, theirs, true = (np.concatenate([each[k].ravel() for each in errors]) for k in range(3))
    unit = last_place * np.abs(true).max(initial=1.0)
    assert np.abs(theirs).max(initial=0.0) <= UNITS * unit, f"{name} of the yardstick is wrong itself"


def result_of(module, call, words, seed, form):
    """Return every result and, unless the words say "no-grad", every gradient."""
    module.train(not words & {"expected", "stream"})
    x, hx, rest = call
    if seed % 2:  # slices of a larger tensor, which are not contiguous
        like = next(module.parameters())
        x, hx = tree_map_only(Tensor, lambda t: t.to(like).repeat_interleave(2, -1)[..., ::2], (x, hx))
    with torch.set_grad_enabled("no-grad" not in words):
        return results(module, x, hx, call=form and partial(form, module), seed=seed, **rest)


def arrays_of(module, call, words, seed, kind):
    return {name: t.numpy() for name, t in truth_of(module, call, words, seed, kind).items()}


def truth_of(module, call, words, seed, kind=np.ndarray):
    """Return what `result_of` should return, by the oracle, from the numbers in the module's dtype.

    The oracle computes with arrays of `kind`. For a large call on a GPU, the float64 reference on that GPU takes its
    place, since NumPy's loops would be slow.
    """
    like, reverse = next(module.parameters()), "reverse" in words
    exact = tree_map_only(Tensor, lambda t: t.to(like.dtype).double() if t.is_floating_point() else t, call)
    if like.is_cuda and exact.x.numel() > LARGE:
        twin = copy.deepcopy(module).double()
        twin.backend = "reference"
        found = result_of(twin, exact, words, seed, FORMS["reverse"] if reverse else None)
        return {name: t.cpu() for name, t in found.items()}
    sizes = exact.x.shape[1::-1] if module.batch_first else exact.x.shape[:2]
    noises = noises_of(module, seed, *sizes) if words & NOISE else None
    return truth(module, exact.x, exact.hx, noises=noises, reverse=reverse, kind=kind, **exact.rest)


def inputs_of(size, words, seed=0):
    """Return the tensors of a call of one layer in one direction, in float32, with states [B, *]."""
    named, (module, (x, hx, rest)) = set(words.split()), drawn(size, words, seed)
    absent = [[None]] * len(letters_of(module))
    left = tree_leaves(rest.pop("reset_states")) if "reset_states" in rest else absent
    (((h0, c0),),), (((reset_h, reset_c),),) = (rows_of(module, t) for t in (tree_leaves(hx), left))
    (names,), (((noise,),), *_) = weights_of(module)[0], noises_of(module, seed, *size[:2])
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    masks = {name: torch.from_numpy(a) for name, a in noise.items()}
    for name in masks.keys() & {"zoneout_h", "zoneout_c"}:
        masks[name] = masks[name].flatten()[0].float() if "expected" in named else masks[name].bool()
    if "gru" in named and "zoneout_h" in masks:  # the state c of a GRU is h
        masks["zoneout_c"] = masks["zoneout_h"]
    masks |= {name: t.float() for name, t in masks.items() if name == "dropout_h"}
    return Inputs(x, h0, c0, *map(parameters.get, names[0]), reset_h, reset_c, **masks, **rest)
