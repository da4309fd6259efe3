"""A user's program that covers the public API. test_packaging.py checks it with mypy and pyright, and runs it."""

import contextlib
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import gpu_lstm
from gpu_lstm.call.choices import BackendName

State = tuple[Tensor, Tensor]
OfSLSTM = tuple[Tensor, Tensor, Tensor, Tensor]


class Tagger(nn.Module):
    def __init__(self, backend: BackendName | None = None) -> None:
        super().__init__()
        self.lstm = gpu_lstm.LSTM(6, 8, bidirectional=True, backend=backend, zoneout=(0.1, 0.0))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(x, lengths=lengths)
        logits: Tensor = self.head(y.relu())
        return logits


def shape(backend: BackendName) -> torch.Size:
    x, lengths = torch.randn(5, 3, 6), torch.tensor([5, 0, 4])
    lstm, stack = gpu_lstm.LSTM(6, 8, num_layers=2), gpu_lstm.StackedLSTM(6, [4, 5], backend=backend)
    zeros = x.new_zeros(2, 3, 8)
    output, (h, c) = lstm(x, (zeros, zeros), lengths=lengths)
    stacked, states = stack(x, [(x.new_zeros(3, n), x.new_zeros(3, n)) for n in stack.hidden_sizes])
    stacked, [(h1, _), (_, c2)] = stack(x, resets=x[..., 0] > 0, reset_states=states)
    stream = gpu_lstm.Stream(lstm, batch=3)
    step = stream(x[0], active=lengths > 0)
    stream.reorder(lengths.clamp(max=2))
    stream.state = stream.state
    return torch.stack([each.sum() for each in (output, h, c, stacked, h1, c2, step)]).shape


def types_of_calls(x: Tensor, packed: PackedSequence) -> None:
    """Assert the type of every public call's result, for type checkers and at run time."""
    lstm = gpu_lstm.LSTM(6, 8, backend=gpu_lstm.Backend.TORCH)
    stack, cell = gpu_lstm.StackedLSTM(6, [4, 5]), gpu_lstm.LSTMCell(6, 8)
    gru, grus = gpu_lstm.GRU(6, 8), gpu_lstm.StackedGRU(6, [4, 5])
    slstm = gpu_lstm.SLSTM(6, 8, heads=2)
    assert_type(slstm(x), tuple[Tensor, OfSLSTM])
    assert_type(slstm(packed)[0], PackedSequence)
    assert_type(gpu_lstm.functional.slstm_layer(x[..., :4], torch.zeros(4, 1)), tuple[Tensor, OfSLSTM])
    assert_type(gpu_lstm.trace(slstm, x).layers[0][0].share, Tensor)
    assert_type(lstm(x, resets=x[..., 0] > 0), tuple[Tensor, State])
    assert_type(lstm(packed), tuple[PackedSequence, State])
    assert_type(lstm.forward(x, resets=x[..., 0] > 0), tuple[Tensor, State])
    assert_type(lstm.forward(packed), tuple[PackedSequence, State])
    assert_type(gru.forward(x), tuple[Tensor, Tensor])
    assert_type(stack.forward(packed), tuple[PackedSequence, list[State]])
    assert_type(stack(x), tuple[Tensor, list[State]])
    assert_type(stack(packed), tuple[PackedSequence, list[State]])
    assert_type(cell(x[0]), State)
    assert_type(gru(x, torch.zeros(1, 3, 8)), tuple[Tensor, Tensor])
    assert_type(grus(packed), tuple[PackedSequence, list[Tensor]])
    assert_type(gpu_lstm.GRUCell(6, 8)(x[0]), Tensor)
    assert_type(gpu_lstm.compat.GRU(6, 8)(x), tuple[Tensor, Tensor])
    assert_type(gpu_lstm.functional.gru_layer(x, list(gru.parameters())), tuple[Tensor, Tensor])
    assert_type(gpu_lstm.compat.LSTM(6, 8)(x), tuple[Tensor, State])
    assert_type(gpu_lstm.functional.lstm_layer(x, list(lstm.parameters()), backend="torch"), tuple[Tensor, State])
    assert_type(gpu_lstm.Stream(lstm, batch=3)(x[0]), Tensor)
    assert_type(gpu_lstm.trace(lstm, x).layers[0][0].forget, Tensor)
    assert_type(gpu_lstm.trace(gru, x).layers[0][0].update, Tensor)
    assert_type(gpu_lstm.explain(lstm, x).seconds, dict[str, float] | None)
    assert_type(gpu_lstm.resets_from_dones(x[..., 0] > 0), Tensor)
    assert_type(gpu_lstm.convert(nn.LSTM(6, 8)), gpu_lstm.LSTM)
    assert_type(gpu_lstm.to_torch(lstm), nn.LSTM)
    assert_type(gpu_lstm.convert(nn.GRU(6, 8)), gpu_lstm.GRU)
    assert_type(gpu_lstm.to_torch(gru), nn.GRU)


def main() -> None:
    types_of_calls(torch.randn(5, 3, 6), pack_sequence([torch.randn(2, 6)]))
    tagger: Tagger = gpu_lstm.convert(Tagger("reference"))
    print(tagger(torch.randn(5, 2, 6), torch.tensor([5, 2])).shape)
    ours: gpu_lstm.LSTM = gpu_lstm.convert(nn.LSTM(6, 8))
    theirs: nn.LSTM = gpu_lstm.to_torch(ours)
    mixed: nn.Sequential = gpu_lstm.to_torch(nn.Sequential(gpu_lstm.LSTMCell(2, 3), theirs))
    read: gpu_lstm.LSTM = gpu_lstm.keras.forget_bias(gpu_lstm.keras.keras_init(ours))
    with gpu_lstm.backend("torch"), gpu_lstm.racing("read"):
        print(shape("reference"), len(mixed), read.hidden_size)
        print(dataclasses.asdict(gpu_lstm.explain(ours, torch.randn(5, 2, 6)))["backend"])
    with contextlib.suppress(ValueError):  # the module has no cell of xlstm or TiRex
        cells: int = gpu_lstm.use_for_slstm(tagger)
        print(cells)
    gpu_lstm.check()


if __name__ == "__main__":
    main()
