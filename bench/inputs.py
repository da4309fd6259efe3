"""The tensors of a case, the same for every provider, and what float64 says of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Case

CACHE_BYTES = 64 << 20  # more than the last-level cache of the cards and processors at hand
MOST_SETS = 8  # of x
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class Inputs:
    """What every provider of a case is given. Weights by torch.nn.LSTM's names; D*L = R rows of states."""

    case: Case
    weights: dict[str, Tensor]
    xs: list[Tensor]  # each [T, B, I]; several where one would stay in the cache from call to call
    h0: Tensor  # [R, B, H]
    c0: Tensor  # [R, B, H]
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B] bool
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
            lengths = torch.randint(1, T + 1, (B,)).index_fill(0, torch.tensor(0), T).to(device)
            resets = (torch.rand(T, B) < case.reset_rate).to(device)
            sets = min(MOST_SETS, math.ceil(CACHE_BYTES / (T * B * case.input_size * case.torch_dtype.itemsize)))
            xs = [normal(T, B, case.input_size) for _ in range(sets)]
            h0, c0 = (normal(case.layers * D, B, H, scale=0.5) for _ in range(2))
            ragged = None if case.sequences == "full" else lengths
            weights = lstm.requires_grad_(False).state_dict()
            return cls(case, weights, xs, h0, c0, ragged, resets if case.reset_rate else None, normal(T, B, D * H))

    def packed(self, t: Tensor) -> PackedSequence:
        """t [T, B, *] with the lengths, packed."""
        assert self.lengths is not None
        return pack_padded_sequence(t, self.lengths.cpu(), enforce_sorted=False)

    def plain(self) -> "Inputs":
        """Without lengths and resets."""
        return replace(self, case=self.case.plain(), lengths=None, resets=None)


def results_in(dtype: torch.dtype, inputs: Inputs) -> dict[str, Tensor]:
    """Output, final states and, for training, every gradient of the first x, by torch.lstm_cell step by step.

    In float64 it is the truth, in the dtype of the case torch's own rounding. The inputs are those of the case, as
    they are; nothing of gpu_lstm takes part.
    """
    leaves = {"x": inputs.xs[0], "h0": inputs.h0, "c0": inputs.c0, **inputs.weights}
    leaves = {name: t.detach().to(dtype).requires_grad_(inputs.case.training) for name, t in leaves.items()}
    y, rows, finals = leaves["x"], zip(leaves["h0"], leaves["c0"]), []
    for layer in range(inputs.case.layers):
        outputs = []
        for suffix in ("", "_reverse")[: inputs.case.directions]:
            weights = [leaves[f"{kind}_l{layer}{suffix}"] for kind in WEIGHTS]
            h, *final = _direction(inputs, y, *next(rows), weights, reverse=suffix == "_reverse")
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
    inputs: Inputs, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [T, B, H] and final states of a layer in one direction."""
    steps, lengths, outputs = len(x), inputs.lengths, [x] * len(x)  # of which every one is replaced
    for t in reversed(range(steps)) if reverse else range(steps):
        boundary = t + 1 if reverse else t  # a reset there separates this step from the one taken before
        if inputs.resets is not None and boundary < steps:
            afresh = inputs.resets[boundary] & (True if lengths is None else boundary < lengths)
            h, c = (torch.where(afresh[:, None], 0, state) for state in (h, c))
        before = h, c
        h, c = torch.lstm_cell(x[t], before, *weights)
        outputs[t] = h
        if lengths is not None:
            valid = (t < lengths)[:, None]
            outputs[t] = torch.where(valid, h, 0)
            h, c = (torch.where(valid, *states) for states in zip((h, c), before))
    return torch.stack(outputs), h, c
