"""The tensors of a case, which are the same for every provider, and the true results in float64."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import VARIANTS, Case

NOISE_SEED = 0  # set before a call that is checked; providers draw random numbers in the same order as `_noise`


@dataclass(frozen=True)
class Inputs:
    """The tensors that every provider of a case is given. States have R = D*L rows."""

    case: Case
    weights: dict[str, Tensor]  # by torch's names
    x: Tensor  # [T, B, I]
    states: tuple[Tensor, ...]  # each [R, B, H]: h0 for a GRU, h0 and c0 for an LSTM, h0, c0, n0 and m0 for an sLSTM
    lengths: Tensor | None  # [B]
    resets: Tensor | None  # [T, B] bool
    reset_states: tuple[Tensor, ...] | None  # h and c, each [R, T, B, H], without gradients
    dy: Tensor  # [T, B, D*H], gradient of the output

    @classmethod
    def of(cls, case: Case, device: str) -> "Inputs":
        """Return random tensors. They are the same for the same case on every machine."""
        T, B, H, D = case.steps, case.batch, case.hidden_size, case.directions
        held = {"gru": "h", "lstm": "hc", "slstm": "hcnm"}[case.cell]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape) * scale).to(device, case.torch_dtype)

        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            like = nn.GRU if case.cell == "gru" else nn.LSTM
            module = like(case.input_size, H, case.layers, bidirectional=D == 2).to(device, case.torch_dtype)
            least = 0 if case.sequences == "active" else 1
            lengths = torch.randint(least, T + 1, (B,)).index_fill(0, torch.tensor(0), T).to(device)
            resets = (torch.rand(T, B) < case.reset_rate).to(device)
            x = normal(T, B, case.input_size)
            states = tuple(normal(case.layers * D, B, H, scale=0.5) for _ in held)
            # If n is at least 1 at first, it stays at least 1, as FlashRNN's n always is.
            states = tuple(t.abs() + 1 if name == "n" else t for name, t in zip(held, states))
            weights, dy = module.requires_grad_(False).state_dict(), normal(T, B, D * H)
            for name in [name for name in weights if name.startswith("weight_hh")]:
                weights[name] = weights[name][:, : H // case.heads].clone()
                for kind, n in VARIANTS.get(case.variant, (None, {}))[1].items():
                    weights[name.replace("weight_hh", kind)] = normal(n * H, scale=0.1) + kind.startswith("gain")
            left = [normal(D * case.layers, T, B, H, scale=0.5) for _ in held * (case.variant == "reset_states")]
        ragged = None if case.sequences == "full" else lengths
        return cls(case, weights, x, states, ragged, resets if case.reset_rate else None, tuple(left) or None, dy)

    def packed(self, t: Tensor) -> PackedSequence:
        """Return t [T, B, *] packed by the lengths."""
        assert self.lengths is not None
        return pack_padded_sequence(t, self.lengths.cpu(), enforce_sorted=False)

    def plain(self) -> "Inputs":
        """Return the inputs of the same case without lengths, resets and variant."""
        torchs = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
        weights = {name: t for name, t in self.weights.items() if name.startswith(torchs)}
        return replace(self, case=self.case.plain(), weights=weights, lengths=None, resets=None, reset_states=None)


def results_in(dtype: torch.dtype, inputs: Inputs) -> dict[str, Tensor]:
    """Return results and gradients, computed step by step without gpu_lstm.

    In float64 they count as the truth. In another dtype they have torch's own rounding errors.
    """
    torch.manual_seed(NOISE_SEED)
    leaves = dict(zip(("x", "h0", "c0", "n0", "m0"), (inputs.x, *inputs.states))) | inputs.weights
    leaves = {name: t.detach().to(dtype).requires_grad_(inputs.case.training) for name, t in leaves.items()}
    y, *states = list(leaves.values())[: 1 + len(inputs.states)]
    finals = list[Any]()
    for layer in range(inputs.case.layers):
        for suffix in ("", "_reverse")[: inputs.case.directions]:
            weights = [t for name, t in leaves.items() if name.endswith(f"_l{layer}{suffix}")]
            finals.append(_direction(inputs, y, [each[len(finals)] for each in states], len(finals), weights))
        y = torch.cat([outputs for outputs, *_ in finals[-inputs.case.directions :]], dim=2)
    results = {"output": y} | named_finals(tuple(map(torch.stack, zip(*(last for _, *last in finals)))))
    if inputs.case.training:
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy.to(dtype))
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients) if name != "m0"}
    return {name: t.detach() for name, t in results.items()}


def named_finals(states: tuple[Any, ...]) -> dict[str, Any]:
    """Return the final states by name.

    For an sLSTM they are h, c / n and m + log n, since different c, n and m may describe the same state.
    """
    if len(states) == 4:
        h, (c, n, m) = states[0], (each.double() for each in states[1:])
        states = h, c / n, m + n.log()
    return dict(zip(("h_n", "c_n", "n_n"), states))


def dense(weight_hh: Tensor, heads: int) -> Tensor:
    """Return W_hh of heads, [n * H, H / heads], as [n * H, H] with zeros where a unit would read another head."""
    gates = weight_hh.unflatten(0, (-1, heads * weight_hh.shape[1]))
    return torch.cat([torch.block_diag(*gate.chunk(heads)) for gate in gates])


def blocks(weight_hh: Tensor, heads: int) -> Tensor:
    """Return W_hh of heads, [n * H, H / heads], from [n * H, H]: the reverse of `dense`."""
    gates = weight_hh.unflatten(0, (-1, heads, weight_hh.shape[1] // heads)).unflatten(3, (heads, -1))
    return gates.diagonal(dim1=1, dim2=3).movedim(3, 1).flatten(0, 2)


def _direction(inputs: Inputs, x: Tensor, state: Any, row: int, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs [T, B, H] and the final states of one layer in one direction, number `row` of the states."""
    (factor, stays), lengths, steps = _noise(inputs), inputs.lengths, range(len(x))
    weights = [weights[0], dense(weights[1], inputs.case.heads), *weights[2:]]
    left = [each[row].to(x.dtype) for each in inputs.reset_states or ()]  # [T, B, H]
    reverse, outputs = row % inputs.case.directions == 1, [x] * len(x)  # every element is replaced below
    for t in reversed(steps) if reverse else steps:
        boundary = t + reverse  # a reset there separates this step from the one before
        if inputs.resets is not None and boundary in steps:
            reset = (inputs.resets[boundary] & (True if lengths is None else boundary < lengths))[:, None]
            to: Any = [each[boundary] for each in left] or [0] * len(state)
            state = tuple(torch.where(reset, *each) for each in zip(to, state))
        before = state
        state = _cell(inputs.case, x[t], (factor * state[0], *state[1:]), weights)
        if stays:
            state = tuple(torch.where(mask[t], *each) for mask, each in zip(stays, zip(before, state)))
        outputs[t] = state[0]
        if lengths is not None:
            valid = (t < lengths)[:, None]
            outputs[t] = torch.where(valid, state[0], 0)
            state = tuple(torch.where(valid, *each) for each in zip(state, before))
    return torch.stack(outputs), *state


def _noise(inputs: Inputs) -> tuple[Any, list[Tensor]]:
    """Return the noise of one layer in one direction.

    It is the factors of h in the recurrent product, [B, H], and for h and c a bool [T, B, H]: where they stay
    unchanged.
    """
    variant, like = inputs.case.variant, inputs.states[0][0]
    if variant == "recurrent_dropout":  # Gal & Ghahramani, 2016: one mask for all steps
        return F.dropout(torch.ones_like(like), VARIANTS[variant][0]), []
    if variant == "zoneout":  # Krueger et al., 2017
        return 1, [torch.rand(len(inputs.x), *like.shape, device=like.device) < VARIANTS[variant][0] for _ in "hc"]
    return 1, []


def _cell(case: Case, x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
    if case.cell == "gru":
        return (torch.gru_cell(x, *state, *weights),)
    weight_ih, weight_hh, bias_ih, bias_hh, *added = weights
    h, c, *of_slstm = state
    if case.variant == "layer_norm":  # Ba, Kiros & Hinton, 2016
        gain_ih, gain_hh, gain_c, bias_c = added
        of_x = F.layer_norm(F.linear(x, weight_ih), gain_ih.shape, gain_ih, bias_ih)
        of_h = F.layer_norm(F.linear(h, weight_hh), gain_hh.shape, gain_hh, bias_hh)
        i, f, g, o = (of_x + of_h).chunk(4, dim=1)
        after = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * F.layer_norm(after, gain_c.shape, gain_c, bias_c).tanh(), after
    if not (added or of_slstm):
        return torch.lstm_cell(x, (h, c), *weights)
    i, f, g, o = (F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)).chunk(4, dim=1)
    if of_slstm:  # Beck et al., 2024
        n, m = of_slstm
        after = torch.maximum(F.logsigmoid(f) + m, i)
        i, f = (i - after).exp(), (F.logsigmoid(f) + m - after).exp()
        c, n = f * c + i * g.tanh(), f * n + i
        return o.sigmoid() * c / n, c, n, after
    of_i, of_f, of_o = added[0].chunk(3)  # peepholes: Gers & Schmidhuber, 2000
    after = (f + of_f * c).sigmoid() * c + (i + of_i * c).sigmoid() * g.tanh()
    return (o + of_o * after).sigmoid() * after.tanh(), after
