"""The tensors of a case, the same for every provider, and what float64 says of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .cases import Case

CACHE_BYTES = 64 << 20  # more than the last-level cache of the cards and processors at hand
MOST_SETS = 8  # of inputs

Given = Tensor | PackedSequence
"""A batch in time-major order: [T, B, *], or for "packed" cases packed."""


@dataclass(frozen=True)
class Problem:
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
    def of(cls, case: Case, device: str) -> "Problem":
        """Random tensors, the same for the same case wherever it runs."""
        T, B, H, D = case.steps, case.batch, case.hidden, case.directions
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, case.torch_dtype)

        weights = {}
        for layer in range(case.layers):
            features = case.inputs if layer == 0 else D * H
            for suffix in ("", "_reverse")[:D]:
                weights[f"weight_ih_l{layer}{suffix}"] = normal(4 * H, features, scale=features**-0.5)
                weights[f"weight_hh_l{layer}{suffix}"] = normal(4 * H, H, scale=H**-0.5)
                weights[f"bias_ih_l{layer}{suffix}"] = normal(4 * H, scale=0.1)
                weights[f"bias_hh_l{layer}{suffix}"] = normal(4 * H, scale=0.1)
        lengths = resets = None
        if case.sequences != "full":
            lengths = torch.randint(1, T + 1, (B,), generator=generator)
            lengths[0] = T
            lengths = lengths.to(device)
        if case.reset_rate:
            resets = (torch.rand(T, B, generator=generator) < case.reset_rate).to(device)
        sets = min(MOST_SETS, math.ceil(CACHE_BYTES / (T * B * case.inputs * case.torch_dtype.itemsize)))
        return cls(
            case, weights, [normal(T, B, case.inputs) for _ in range(sets)],
            normal(case.layers * D, B, H, scale=0.5), normal(case.layers * D, B, H, scale=0.5),
            lengths, resets, normal(T, B, D * H),
        )  # fmt: skip

    def plain(self) -> "Problem":
        """Without lengths and resets."""
        return Problem(self.case.plain(), self.weights, self.xs, self.h0, self.c0, None, None, self.dy)

    def packed(self, x: Tensor) -> PackedSequence:
        """x [T, B, *] with the lengths, packed."""
        assert self.lengths is not None
        return pack_padded_sequence(x, self.lengths.cpu(), enforce_sorted=False)

    def given(self, x: Tensor) -> tuple[Tensor, Given]:
        """An input as it is handed to a provider, and the leaf in it whose gradient is taken."""
        training = self.case.run == "training"
        if self.case.sequences != "packed":
            leaf = x.detach().clone().requires_grad_(training)
            return leaf, leaf
        packed = self.packed(x)
        leaf = packed.data.detach().requires_grad_(training)
        return leaf, packed._replace(data=leaf)

    def padded(self, given: Given) -> Tensor:
        """[T, B, *] again."""
        if isinstance(given, PackedSequence):
            return pad_packed_sequence(given, total_length=self.case.steps)[0]
        return given


def results_in(dtype: torch.dtype, problem: Problem) -> dict[str, Tensor]:
    """Output, final states and, for training, every gradient of the first input, by torch.lstm_cell step by step.

    In float64 it is the truth, in the dtype of the case torch's own rounding. The inputs are those of the case, as
    they are; nothing of gpu_lstm takes part.
    """
    training = problem.case.run == "training"
    leaves = {"x": problem.xs[0], "h0": problem.h0, "c0": problem.c0, **problem.weights}
    leaves = {name: t.detach().to(dtype).requires_grad_(training) for name, t in leaves.items()}
    y, h_n, c_n = _stack(problem, leaves)
    named = {"output": y, "h_n": h_n, "c_n": c_n}
    if training:
        gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy.to(dtype))
        named |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}
    return {name: t.detach() for name, t in named.items()}


def _stack(problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    y, finals = leaves["x"], []
    for layer in range(problem.case.layers):
        directions = []
        for d, suffix in enumerate(("", "_reverse")[: problem.case.directions]):
            row = layer * problem.case.directions + d
            weights = [leaves[f"{w}_l{layer}{suffix}"] for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            h, state = _direction(problem, y, leaves["h0"][row], leaves["c0"][row], weights, d == 1)
            directions.append(h)
            finals.append(state)
        y = torch.cat(directions, dim=2)
    h_n, c_n = (torch.stack(state) for state in zip(*finals))
    return y, h_n, c_n


def _direction(
    problem: Problem, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    steps = len(x)
    outputs: list[Tensor] = [x] * steps  # every one is replaced
    for t in reversed(range(steps)) if reverse else range(steps):
        boundary = t + 1 if reverse else t  # a reset there separates this step from the one taken before
        if problem.resets is not None and boundary < steps:
            afresh = problem.resets[boundary]
            if problem.lengths is not None:
                afresh = afresh & (boundary < problem.lengths)
            h, c = torch.where(afresh[:, None], 0, h), torch.where(afresh[:, None], 0, c)
        h_next, c_next = torch.lstm_cell(x[t], (h, c), *weights)
        if problem.lengths is not None:
            valid = (t < problem.lengths)[:, None]
            outputs[t] = torch.where(valid, h_next, 0)
            h_next, c_next = torch.where(valid, h_next, h), torch.where(valid, c_next, c)
        else:
            outputs[t] = h_next
        h, c = h_next, c_next
    return torch.stack(outputs), (h, c)
