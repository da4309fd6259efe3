"""The tensors of a case, the same for every provider, and what float64 says of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import VARIANTS, Case

CACHE_BYTES = 64 << 20  # more than the last-level cache of the cards and processors at hand
MOST_SETS = 8  # of x
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # of torch.nn.LSTM
NOISE_SEED = 0


@dataclass(frozen=True)
class Inputs:
    """What every provider of a case is given. Weights by the names of gpu_lstm.LSTM; D*L = R rows of states."""

    case: Case
    weights: dict[str, Tensor]
    xs: list[Tensor]  # each [T, B, I]; several where one would stay in the cache from call to call
    h0: Tensor  # [R, B, H]
    c0: Tensor  # [R, B, H]
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B] bool
    reset_states: tuple[Tensor, Tensor] | None  # h and c, each [R, T, B, H]; as stored, without gradients
    dy: Tensor  # [T, B, D*H], gradient of the output

    @classmethod
    def of(cls, case: Case, device: str) -> "Inputs":
        """Random tensors, the same for the same case wherever it runs."""
        T, B, H, D = case.steps, case.batch, case.hidden_size, case.directions

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape) * scale).to(device, case.torch_dtype)

        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            lstm = nn.LSTM(case.input_size, H, case.layers, bidirectional=D == 2).to(device, case.torch_dtype)
            least = 0 if case.sequences == "active" else 1
            lengths = torch.randint(least, T + 1, (B,)).index_fill(0, torch.tensor(0), T).to(device)
            resets = (torch.rand(T, B) < case.reset_rate).to(device)
            sets = min(MOST_SETS, math.ceil(CACHE_BYTES / (T * B * case.input_size * case.torch_dtype.itemsize)))
            xs = [normal(T, B, case.input_size) for _ in range(sets)]
            h0, c0 = (normal(case.layers * D, B, H, scale=0.5) for _ in range(2))
            weights, dy = lstm.requires_grad_(False).state_dict(), normal(T, B, D * H)
            for name in [name for name in weights if name.startswith("weight_hh")]:
                for kind, n in VARIANTS.get(case.variant, (None, {}))[1].items():
                    weights[name.replace("weight_hh", kind)] = normal(n * H, scale=0.1) + kind.startswith("gain")
            states: Any = [normal(len(h0), T, B, H, scale=0.5) for _ in range(2 * (case.variant == "reset_states"))]
        ragged = None if case.sequences == "full" else lengths
        return cls(case, weights, xs, h0, c0, ragged, resets if case.reset_rate else None, tuple(states) or None, dy)

    def packed(self, t: Tensor) -> PackedSequence:
        """t [T, B, *] with the lengths, packed."""
        assert self.lengths is not None
        return pack_padded_sequence(t, self.lengths.cpu(), enforce_sorted=False)

    def plain(self) -> "Inputs":
        """Without lengths, resets and variant."""
        weights = {name: t for name, t in self.weights.items() if name.rpartition("_l")[0] in WEIGHTS}
        return replace(self, case=self.case.plain(), weights=weights, lengths=None, resets=None, reset_states=None)


def seed_noise() -> None:
    """Before a call that is checked. Providers draw random numbers once a call, by torch's generator, as `_noise`."""
    torch.manual_seed(NOISE_SEED)


def results_in(dtype: torch.dtype, inputs: Inputs) -> dict[str, Tensor]:
    """Output, final states and, for training, every gradient of the first x, step by step: by torch.lstm_cell if plain.

    In float64 these are the truth, in the dtype of the case torch's own rounding. Nothing of gpu_lstm is used.
    """
    seed_noise()
    leaves = {"x": inputs.xs[0], "h0": inputs.h0, "c0": inputs.c0, **inputs.weights}
    leaves = {name: t.detach().to(dtype).requires_grad_(inputs.case.training) for name, t in leaves.items()}
    y, rows, finals = leaves["x"], list(zip(leaves["h0"], leaves["c0"])), list[list[Tensor]]()
    for layer in range(inputs.case.layers):
        outputs = []
        for suffix in ("", "_reverse")[: inputs.case.directions]:
            weights = [t for name, t in leaves.items() if name.endswith(f"_l{layer}{suffix}")]
            h, *final = _direction(inputs, y, rows, len(finals), weights)
            outputs.append(h)
            finals.append(final)
        y = torch.cat(outputs, dim=2)
    h_n, c_n = (torch.stack(state) for state in zip(*finals))
    results = {"output": y, "h_n": h_n, "c_n": c_n}
    if inputs.case.training:
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy.to(dtype))
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}
    return {name: t.detach() for name, t in results.items()}


def _direction(
    inputs: Inputs, x: Tensor, states: Sequence[tuple[Tensor, Tensor]], row: int, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [T, B, H] and final states of a layer in one direction, that of a `row` of the states."""
    (h, c), (factor, stays), lengths, steps = states[row], _noise(inputs), inputs.lengths, range(len(x))
    given = [each[row].to(x.dtype) for each in inputs.reset_states or ()]  # [T, B, H]
    reverse, outputs = row % inputs.case.directions == 1, [x] * len(x)  # of which every one is replaced
    for t in reversed(steps) if reverse else steps:
        boundary = t + reverse  # a reset there separates this step from the one before
        if inputs.resets is not None and boundary in steps:
            reset = (inputs.resets[boundary] & (True if lengths is None else boundary < lengths))[:, None]
            to: Any = [each[boundary] for each in given] or [0, 0]
            h, c = (torch.where(reset, *each) for each in zip(to, (h, c)))
        before = h, c
        h, c = _cell(inputs.case.variant, x[t], factor * h, c, weights)
        if stays:
            h, c = (torch.where(mask[t], *each) for mask, each in zip(stays, zip(before, (h, c))))
        outputs[t] = h
        if lengths is not None:
            valid = (t < lengths)[:, None]
            outputs[t] = torch.where(valid, h, 0)
            h, c = (torch.where(valid, *each) for each in zip((h, c), before))
    return torch.stack(outputs), h, c


def _noise(inputs: Inputs) -> tuple[Any, list[Tensor]]:
    """Of a layer in one direction: factors of h in the recurrent product [B, H]; where h and c stay, bool [T, B, H]."""
    case, like = inputs.case, inputs.h0[0]
    if case.variant == "recurrent_dropout":  # Gal & Ghahramani, 2016: one mask for all steps
        return F.dropout(torch.ones_like(like), VARIANTS[case.variant][0]), []
    if case.variant == "zoneout":  # Krueger et al., 2017
        size, p = (case.steps, *like.shape), VARIANTS[case.variant][0]
        return 1, [torch.rand(size, device=like.device) < p for _ in "hc"]
    return 1, []


def _cell(variant: str, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    weight_ih, weight_hh, bias_ih, bias_hh, *added = weights
    if variant == "peepholes":  # Gers & Schmidhuber, 2000
        i, f, g, o = (F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)).chunk(4, dim=1)
        of_i, of_f, of_o = added[0].chunk(3)
        after = (f + of_f * c).sigmoid() * c + (i + of_i * c).sigmoid() * g.tanh()
        return (o + of_o * after).sigmoid() * after.tanh(), after
    if variant == "layer_norm":  # Ba, Kiros & Hinton, 2016
        gain_ih, gain_hh, gain_c, bias_c = added
        of_x = F.layer_norm(F.linear(x, weight_ih), gain_ih.shape, gain_ih, bias_ih)
        of_h = F.layer_norm(F.linear(h, weight_hh), gain_hh.shape, gain_hh, bias_hh)
        i, f, g, o = (of_x + of_h).chunk(4, dim=1)
        after = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * F.layer_norm(after, gain_c.shape, gain_c, bias_c).tanh(), after
    return torch.lstm_cell(x, (h, c), weight_ih, weight_hh, bias_ih, bias_hh)
