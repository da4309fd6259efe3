"""Lengths and resets: an LSTM or StackedLSTM with them gives the numbers of the NumPy oracle, on every backend."""

from functools import partial

import pytest
import torch
from comparing import PLACES, assert_same, every_backend
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pairs import LENGTHS, RAGGED, RESETS, B, T, assert_identical, pair, random_inputs, results, states_left, truth
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products")
PADDING = torch.arange(T)[:, None] >= LENGTHS  # [T, B]


@st.composite
def problems(draw, longest: int, most: int, left: bool):
    """A module's class and arguments, the form of its input, lengths [B] or None, resets [T, B] or None, whether hx.

    And, where resets may have states `left`, whether these are one per sequence, one per step, or zeros (None).
    """
    hidden, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    arguments = {name: draw(st.booleans()) for name in ("bias", "batch_first", "bidirectional")}
    cls = draw(st.sampled_from([gpu_lstm.LSTM, gpu_lstm.LSTM, gpu_lstm.StackedLSTM]))
    if cls is gpu_lstm.LSTM:
        layers, projected = draw(st.integers(1, 2)), draw(st.integers(0, hidden - 1))
        arguments |= dict(hidden_size=hidden, num_layers=layers, proj_size=projected)
    else:
        sizes = [hidden, draw(st.integers(1, 3))]
        widths = [inputs, *((1 + arguments["bidirectional"]) * size for size in sizes)]
        arguments |= dict(hidden_sizes=sizes, residual=any(map(int.__eq__, widths, widths[1:])) and draw(st.booleans()))
    form, steps = draw(st.sampled_from(["padded", "packed", "unbatched"])), draw(st.integers(1, longest))
    batch = 1 if form == "unbatched" else draw(st.integers(form == "packed", most))
    lengths = st.lists(st.integers(form == "packed", steps), min_size=batch, max_size=batch)
    lengths = lengths.map(lambda values: torch.tensor(values, dtype=draw(st.sampled_from([torch.int32, torch.int64]))))
    lengths = draw(lengths if form == "packed" else st.none() | lengths)
    if form == "packed":
        steps = int(lengths.max())
    flags = st.lists(st.booleans(), min_size=steps * batch, max_size=steps * batch)
    resets = draw(st.none() | flags.map(lambda values: torch.tensor(values, dtype=torch.bool).view(steps, batch)))
    left = draw(st.sampled_from(["a sequence", "a step", None])) if left and resets is not None else None
    build = partial(cls, inputs, **arguments)
    return build, form, steps, batch, lengths, resets, left, draw(st.booleans()), draw(st.integers(0, 2**16))


def check_against_the_oracle(backend, problem):
    build, form, steps, batch, lengths, resets, left, has_hx, seed = problem
    torch.manual_seed(seed)
    module = build(backend=backend).to(**PLACES[backend])
    first, (_, hx) = module.batch_first, random_inputs(module, batch, seed=seed)
    x = torch.randn(*((batch, steps) if first else (steps, batch)), module.input_size)
    batch_axis = -3 if first and left == "a step" else -2  # of what resets leave
    left = None if left is None else states_left(module, hx, steps, left == "a step")
    hx = hx if has_hx else None
    turned = resets.T if resets is not None and first else resets
    expected = truth(module, x, hx, lengths=lengths, resets=turned, reset_states=left)

    def by_packing(x, *hx, lengths, **ragged):
        packed = pack_padded_sequence(x, lengths.long().cpu(), batch_first=first, enforce_sorted=False)
        output, states = module(packed, *hx, **ragged)
        assert isinstance(output, PackedSequence)
        return pad_packed_sequence(output, batch_first=first)[0], states

    if form != "unbatched":
        call = by_packing if form == "packed" else None
        got = results(module, x, hx, call=call, lengths=lengths, resets=turned, reset_states=left)
    else:
        alone = tree_map(lambda t: t.squeeze(-2), hx) if has_hx else None
        ragged = dict(lengths=None if lengths is None else lengths[0], resets=None if resets is None else resets[:, 0])
        left = left and tree_map(lambda t: t.squeeze(batch_axis), left)
        got = results(module, x.squeeze(int(not first)), alone, reset_states=left, **ragged)
        expected = {name: t.view(got[name].shape) for name, t in expected.items()}
    assert_same(got, expected, backend)


@pytest.mark.parametrize(("backend", "examples", "longest", "most"), [
    ("torch", 150, 5, 4), ("reference", 200, 5, 4), ("triton", 12, 3, 3)])  # fmt: skip
def test_any_problem_gives_the_numbers_of_the_oracle(backend, examples, longest, most):
    phases = [Phase.generate] if backend == "triton" else settings().phases  # shrinking takes minutes

    @settings(max_examples=examples, deadline=None, derandomize=True, phases=phases)
    @given(problem=problems(longest, most, left=backend != "torch"))
    def check(problem):
        check_against_the_oracle(backend, problem)

    check()


@every_backend
@pytest.mark.parametrize(("kind", "arguments", "resets"), [
    ("LSTM", dict(bidirectional=True, proj_size=2), RESETS), ("StackedLSTM", dict(hidden_sizes=[3, 3]), None),
], ids=["LSTM", "StackedLSTM"])  # fmt: skip
def test_what_stands_in_the_padding_reaches_neither_results_nor_gradients(backend, kind, arguments, resets):
    _, ours = pair(kind, backend, **arguments)
    ours.residual = kind == "StackedLSTM"
    x, hx = random_inputs(ours, B)

    def call(garbage, x, hx, **ragged):
        """The output's gradient has the same garbage in the padding as x."""
        output, states = ours(x, hx, **ragged)
        output.register_hook(lambda g: g.masked_fill(PADDING.to(g.device)[:, :, None], garbage))
        return output, states

    clean = results(ours, x, hx, lengths=LENGTHS, resets=resets)
    assert clean["dx"][PADDING.to(clean["dx"].device)].count_nonzero() == 0
    for garbage in (float("nan"), float("inf")):
        dirty = x.masked_fill(PADDING[:, :, None], garbage)
        got = results(ours, dirty, hx, call=partial(call, garbage), lengths=LENGTHS, resets=resets)
        assert_identical(got, clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [["lengths"], ["resets"], ["lengths", "resets"]], ids=" and ".join)
def test_half_precision_holds_and_clears_whatever_the_gates_would(ragged, dtype):
    """On torch's own LSTM padding and resets shut gates that the biases open wide."""
    _, ours = pair("LSTM", "torch", bidirectional=True)
    x, hx = random_inputs(ours, B)
    for name, parameter in ours.named_parameters():
        if "bias" in name:
            parameter.data[: 2 * ours.hidden_size] = 20.0  # of gates i and f
    (x, hx), ragged = tree_map(lambda t: t.to(dtype), (x, hx)), {name: RAGGED[name] for name in ragged}
    found = truth(ours.to(dtype), x, hx, **ragged), results(ours, x, hx, **ragged)
    expected, got = ({name: t[name] for name in ("output", "h0", "c0", "dh0", "dc0", "dx")} for t in found)
    assert_same(got, expected)


def test_resets_are_dones_a_step_later():
    """Two rollouts, one after the other, are split where the episodes end."""
    torch.manual_seed(0)
    lstm, x = gpu_lstm.LSTM(3, 4), torch.randn(8, 1, 3)
    dones = torch.zeros(8, 1, dtype=torch.bool)
    dones[[2, 3, 6]] = True  # episodes: 0 to 2, 3, 4 to 6, 7
    expected = torch.cat([lstm(episode)[0] for episode in x.split([3, 1, 3, 1])])
    y, state = lstm(x[:4], resets=gpu_lstm.resets_from_dones(dones[:4]))
    rest, _ = lstm(x[4:], state, resets=gpu_lstm.resets_from_dones(dones[4:], first=dones[3]))
    torch.testing.assert_close(torch.cat([y, rest]), expected)
