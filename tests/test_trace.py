"""Looking inside: gates and states of every step against the NumPy oracle, and their picture."""

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import gpu_lstm
from gpu_lstm.trace import Gates

T, B, I, H = 6, 3, 4, 5


def inputs(seed=0):
    torch.manual_seed(seed)
    return torch.randn(T, B, I, dtype=torch.float64)


def oracles_gates(lstm, x, suffix, reverse, lengths=None, resets=None, P=None):
    """What the oracle's tape says, [T, B, *] each, zero in padding."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") + (("weight_hr",) if P else ())
    weights = [getattr(lstm, f"{name}_{suffix}").detach().numpy() for name in names]
    zeros = torch.zeros(B, P or H).numpy(), torch.zeros(B, H).numpy()
    h, *_, tape = oracle.layer(x, *zeros, *weights, lengths=lengths, resets=resets, reverse=reverse)
    found = {field: torch.zeros(T, B, H, dtype=torch.float64) for field in Gates._fields}
    for b, t, _, _, _, i, f, g, o, c, _ in tape:
        for field, value in zip(("input", "forget", "candidate", "output", "cell"), (i, f, g, o, c)):
            found[field][t, b] = torch.from_numpy(value)
    found["hidden"] = torch.from_numpy(h)
    return found


RAGGED = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([6, 0, 3])},
    "resets": {"resets": torch.tensor([[0, 1, 0]] * 3 + [[1, 0, 0]] * 3).bool()},
}


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("proj_size", [0, 2])
def test_gates_are_the_oracles(backend, ragged, proj_size):
    ragged = RAGGED[ragged]
    lstm = gpu_lstm.LSTM(I, H, 2, bidirectional=True, proj_size=proj_size, backend=backend).double()
    x = inputs()
    trace = gpu_lstm.trace(lstm, x, **ragged)
    given = x.numpy()
    for k, directions in enumerate(trace.layers):
        outputs = []
        for d, gates in enumerate(directions):
            suffix = f"l{k}" + "_reverse" * d
            expected = oracles_gates(lstm, given, suffix, d == 1, **ragged, P=proj_size)
            for field, value in gates._asdict().items():
                torch.testing.assert_close(
                    value, expected[field], msg=lambda text, name=f"{suffix} {field}": f"{name}: {text}"
                )
            outputs.append(expected["hidden"])
        given = torch.cat(outputs, dim=2).numpy()
    torch.testing.assert_close(trace.output, torch.from_numpy(given))


def test_results_are_those_of_the_call():
    lstm = gpu_lstm.LSTM(I, H, 2, batch_first=True, bidirectional=True).double()
    x = inputs().transpose(0, 1)
    hx = torch.randn(4, B, H).double(), torch.randn(4, B, H).double()
    trace = gpu_lstm.trace(lstm, x, hx)
    output, states = lstm(x, hx)
    torch.testing.assert_close(trace.output, output)
    torch.testing.assert_close(trace.states, states)
    assert trace.layers[0][0].cell.shape == (T, B, H)  # time first


def test_other_inputs_and_modules():
    x = inputs()
    lstm = gpu_lstm.LSTM(I, H).double()
    packed = pack_padded_sequence(x, torch.tensor([2, 6, 4]), enforce_sorted=False)
    trace = gpu_lstm.trace(lstm, packed)
    padded = gpu_lstm.trace(lstm, x, lengths=torch.tensor([2, 6, 4]))
    torch.testing.assert_close(trace.layers[0][0].forget, padded.layers[0][0].forget)
    torch.testing.assert_close(trace.output.data, lstm(packed)[0].data)
    assert trace.lengths.tolist() == [2, 6, 4]

    unbatched = gpu_lstm.trace(lstm, x[:, 0])
    assert unbatched.output.shape == (T, H)
    torch.testing.assert_close(unbatched.layers[0][0].cell, gpu_lstm.trace(lstm, x[:, :1]).layers[0][0].cell)

    theirs = nn.LSTM(I, H).double()
    torch.testing.assert_close(gpu_lstm.trace(theirs, x).output, theirs(x)[0])
    assert type(theirs) is nn.LSTM

    stack = gpu_lstm.StackedLSTM(I, [H, I, I], residual=True).double()
    trace = gpu_lstm.trace(stack, x)
    torch.testing.assert_close(trace.output, stack(x)[0])
    assert [directions[0].cell.shape[2] for directions in trace.layers] == [H, I, I]
    with pytest.raises(TypeError, match="trace takes an LSTM or a StackedLSTM, got Linear"):
        gpu_lstm.trace(nn.Linear(2, 3), x)


def test_dropout_is_that_of_the_call():
    lstm = gpu_lstm.LSTM(I, H, 2, dropout=0.5, backend="reference").double()
    torch.manual_seed(5)
    output, _ = lstm(inputs())
    torch.manual_seed(5)
    torch.testing.assert_close(gpu_lstm.trace(lstm, inputs()).output, output)


class Traced(nn.Module):
    """A module whose call is a trace, for functional_call."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, lengths):
        return gpu_lstm.trace(self.lstm, x, lengths=lengths)


@pytest.mark.parametrize("field", Gates._fields)
def test_every_gate_is_differentiable(field):
    lstm = gpu_lstm.LSTM(I, 3, bidirectional=True).double()
    lengths = torch.tensor([6, 0, 3])

    names = [name for name, _ in lstm.named_parameters()]

    def call(x, *weights):
        trace = torch.func.functional_call(Traced(lstm), {f"lstm.{n}": w for n, w in zip(names, weights)}, (x, lengths))
        return tuple(getattr(direction, field) for direction in trace.layers[0])

    x = inputs().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in lstm.parameters())))


def test_the_picture_shows_one_sequence():
    lstm = gpu_lstm.LSTM(I, H, 2, bidirectional=True)
    trace = gpu_lstm.trace(lstm, inputs().float(), lengths=torch.tensor([6, 0, 3]))
    figure = trace.plot(2)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 4 * 6
    assert [axes.get_title() for axes in panels[:6]] == list(Gates._fields)
    assert panels[6].get_ylabel() == "layer 0, reverse\nunit"
    assert panels[-1].get_xlabel() == "step"
    shown = torch.tensor(panels[6 * 2 + 1].images[0].get_array().data)  # layer 1, forward: the forget gate
    torch.testing.assert_close(shown, trace.layers[1][0].forget[:3, 2].T.detach())
    with pytest.raises(ValueError, match="sequence 1 has no steps"):
        trace.plot(1)
    with pytest.raises(IndexError, match="sequence 3 of a batch of 3"):
        trace.plot(3)
