"""torch.nn.LSTM and GRU, and the loops that people write for features that these lack."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cudnn.rnn import get_cudnn_mode
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..inputs import Inputs, blocks, dense
from .engine import Engine, Provider, Unable, as_hx, expect, module_like_torchs

NO_RESETS = "only for batches with resets"
CHUNK = 16  # steps that are compiled together; compiling unrolls them, so that it takes longer for more steps


def plain(inputs: Inputs) -> Engine:
    """Return torch's module:

    ATen on the CPU, cuDNN on CUDA. Heads become a W_hh that is zero outside of their blocks.
    """
    heads = expect(inputs.case, "layers", "directions", "packed", "gru", "heads").heads

    def of_hh(change: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: change(t, heads) if name.startswith("weight_hh") else t for name, t in tensors.items()}

    inputs = replace(inputs, weights=of_hh(dense, inputs.weights))
    return Engine.of(module_like_torchs(nn, inputs), partial(of_hh, blocks))


def flat(inputs: Inputs) -> Engine:
    """Return torch's module with its weights in one buffer.

    In bfloat16 torch does not put them into one buffer, so that cuDNN copies them at each call.
    """
    case, engine = inputs.case, plain(inputs)
    if case.torch_dtype is not torch.bfloat16 or not inputs.x.is_cuda:
        raise Unable("only for bfloat16 on CUDA: other weights are in one buffer anyway")
    sizes = case.input_size, get_cudnn_mode(case.cell.upper()), case.hidden_size, 0, case.layers
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(list(engine.parameters.values()), 4, *sizes, False, case.directions == 2)
    return engine


def head_loop(inputs: Inputs) -> Engine:
    """Return a loop over heads. Each has a torch.nn module with the rows of its units."""
    if (case := expect(inputs.case, "gru", "heads")).heads == 1:
        raise Unable("only for heads")
    one = replace(case, hidden_size=case.hidden_size // case.heads, heads=1)
    build = flat if inputs.x.is_cuda and case.torch_dtype is torch.bfloat16 else plain
    weights = {name: t.unflatten(0, (-1, case.heads, one.hidden_size)) for name, t in inputs.weights.items()}
    of_heads = [{name: t[:, n].flatten(0, 1) for name, t in weights.items()} for n in range(case.heads)]
    engines = [build(replace(inputs, case=one, weights=its)) for its in of_heads]
    leaves: Any = dict(enumerate(t for engine in engines for t in engine.parameters.values()))

    def call(x, state):
        parts = zip(*(each.chunk(case.heads, dim=2) for each in state))  # the states of each head
        outputs, finals = zip(*(engine.call(x, [t.contiguous() for t in part]) for engine, part in zip(engines, parts)))
        return torch.cat(outputs, dim=2), tuple(torch.cat(each, dim=2) for each in zip(*finals))

    def to_torch(gradients: dict[str, Tensor]) -> dict[str, Tensor]:  # the rows are ordered by gate, then by head
        parts = [t.unflatten(0, (-1, one.hidden_size)) for t in gradients.values()]
        return {name: torch.stack(parts[n :: len(weights)], 1).flatten(0, 2) for n, name in enumerate(weights)}

    return Engine(call, leaves, to_torch)


def packed(inputs: Inputs) -> Engine:
    """Return a call that packs a padded batch, runs the module, and pads the output."""
    expect(inputs.case, "layers", "directions", "ragged", "gru")
    if inputs.lengths is None:
        raise Unable("only for padded batches with lengths")
    engine, lengths = plain(inputs.plain()), inputs.lengths.cpu()  # packing needs them on the CPU

    def call(x, state):
        y, state = engine.call(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
        return pad_packed_sequence(y, total_length=inputs.case.steps)[0], state

    return Engine(call, engine.parameters)


class Loop(nn.RNNBase):
    """torch's module, called for every step. Its state is masked by `resets` [T, B], as in recurrent PPO."""

    def forward(self, x, state, resets, stored=None, in_pieces=False):  # type: ignore[override]
        """Run the loop. Resets set the state to zeros or to `stored` [L, T, B, H].

        With `in_pieces` the module is called once for all steps between any two resets.
        """
        outputs, keeps = [], (~resets).to(x.dtype)[..., None]  # [T, B, 1]
        begins = [0, *(1 + resets[1:].any(dim=1).nonzero()[:, 0]).tolist()] if in_pieces else range(len(x))
        for begin, end in itertools.pairwise((*begins, len(x))):
            state = tuple(keeps[begin] * each for each in state)
            if stored is not None:
                state = tuple(each + (1 - keeps[begin]) * left[:, begin] for each, left in zip(state, stored))
            y, after = super().forward(x[begin:end], as_hx(state))
            state = after if isinstance(after, tuple) else (after,)
            outputs.append(y)
        return torch.cat(outputs), state


class StepLoop(Loop, nn.LSTM): ...  # type: ignore[misc]


class GRULoop(Loop, nn.GRU): ...  # type: ignore[misc]


LOOPS = SimpleNamespace(LSTM=StepLoop, GRU=GRULoop)  # it stands for a package with these two modules


def masked_loop(inputs: Inputs, in_pieces: bool) -> Engine:
    """Return a Loop: step by step, as in CleanRL, or in pieces, as in rl_games.

    Each call reads where the pieces end.
    """
    if expect(inputs.case, "layers", "resets", "reset_states", "gru").reset_rate == 0:
        raise Unable(NO_RESETS)
    options = dict(resets=inputs.resets, stored=inputs.reset_states, in_pieces=in_pieces)
    loop = module_like_torchs(LOOPS, inputs)
    return Engine(partial(loop, **options), dict(loop.named_parameters()))


def padded_trajectories(inputs: Inputs) -> Engine:
    """Return a call that runs each of N trajectories as a separate padded sequence, as in rsl_rl.

    A trajectory goes from one reset to the next. The trajectories are found once, outside of the call.
    """
    expect(inputs.case, "layers", "resets", "gru")
    if inputs.resets is None:
        raise Unable(NO_RESETS)
    begins = inputs.resets.T.clone()  # [B, T]
    begins[:, 0], engine = True, plain(inputs.plain())
    lengths = begins.flatten().nonzero()[:, 0].diff(append=torch.tensor([begins.numel()], device=begins.device))  # [N]
    valid = torch.arange(inputs.case.steps, device=begins.device) < lengths[:, None]  # [N, T]
    firsts, keep = begins.flatten().cumsum(0)[:: begins.shape[1]] - 1, ~inputs.resets[0, :, None]  # [B], [B, 1]

    def call(x, state):
        padded = x.new_zeros(*valid.shape, x.shape[2])
        padded[valid] = x.transpose(0, 1).flatten(0, 1)
        start = [each.new_zeros(len(each), *lengths.shape, each.shape[2]) for each in state]
        start = [zeros.index_copy(1, firsts, keep * each) for zeros, each in zip(start, state)]
        y, _ = engine.call(padded.transpose(0, 1), start)
        return y.transpose(0, 1)[valid].view(*begins.shape, -1).transpose(0, 1), [None] * len(state)

    return Engine(call, engine.parameters, kernels=lambda: "without the last states")


def compiled_loop(inputs: Inputs) -> Engine:
    """Return the input product for all steps at once, then T / CHUNK calls of CHUNK compiled steps."""
    if expect(inputs.case).steps % CHUNK:
        raise Unable(f"T is no multiple of {CHUNK}")
    parameters = {name: t.detach().clone().requires_grad_(inputs.case.training) for name, t in inputs.weights.items()}
    weight_ih, weight_hh, bias_ih, bias_hh = parameters.values()

    @partial(torch.compile, fullgraph=True, dynamic=False)
    def steps(gates_x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor):  # gates_x: pre-activations [CHUNK, B, 4H]
        outputs = []
        for z in gates_x.unbind():
            i, f, g, o = (z + h @ weight_hh.T).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), h, c

    def call(x, state):
        ((h,), (c,)), outputs = state, []
        for gates_x in F.linear(x, weight_ih, bias_ih + bias_hh).split(CHUNK):
            y, h, c = steps(gates_x, h, c, weight_hh)
            outputs.append(y)
        return torch.cat(outputs), (h[None], c[None])

    return Engine(call, parameters)


PROVIDERS = {
    "torch": Provider(plain, everywhere=True, graphed=True),
    "torch-flat": Provider(flat, everywhere=True, graphed=True),
    "head-loop": Provider(head_loop, everywhere=True),
    "torch-packed": Provider(packed, everywhere=True),
    "compiled-loop": Provider(compiled_loop),
    "cleanrl-loop": Provider(partial(masked_loop, in_pieces=False), everywhere=True),
    "rl_games-pieces": Provider(partial(masked_loop, in_pieces=True), everywhere=True),
    "rsl_rl-padded": Provider(padded_trajectories, everywhere=True),
}
