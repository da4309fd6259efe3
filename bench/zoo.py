"""Whole models with recurrent layers of torch.nn, small definitions with the sizes of the papers, and their inputs.

Each model is built from torch.nn alone, as its authors wrote it. So `gpu_lstm.convert` is the only change.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gpu_lstm


class Recogniser(nn.Module):
    """CRNN (Shi et al., 2015, arXiv:1507.05717): convolutions, then two BiLSTMs over the columns of a line of text."""

    def __init__(self) -> None:
        super().__init__()
        layers = list[nn.Module]()
        channels = 1
        for width, normed, pool in (
            (64, False, (2, 2)), (128, False, (2, 2)), (256, False, None), (256, False, (2, 1)),
            (512, True, None), (512, True, (2, 1)),
        ):  # fmt: skip
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=not normed)]
            layers += [nn.BatchNorm2d(width)] * normed + [nn.ReLU()]
            layers += [nn.MaxPool2d(pool)] if pool else []
            channels = width
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(512, 512, 2), nn.ReLU())
        self.lstm = nn.LSTM(512, 256, num_layers=2, bidirectional=True)
        self.scores = nn.Linear(512, 37)

    def forward(self, images: Tensor) -> Tensor:  # [B, 1, 32, 100]
        columns = self.convolutions(images).squeeze(2).permute(2, 0, 1)  # [24, B, 512]
        return self.scores(self.lstm(columns)[0])


class Listener(nn.Module):
    """A small Deep Speech 2 (Amodei et al., 2015, arXiv:1512.02595): a convolution, then four BiGRUs, for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(80, 256, 11, stride=2, padding=5)
        self.gru = nn.GRU(256, 256, num_layers=4, bidirectional=True, batch_first=True)
        self.scores = nn.Linear(512, 29)

    def forward(self, mels: Tensor) -> Tensor:  # [B, 80, 400]
        frames = self.convolution(mels).relu().mT  # [B, 200, 256]
        return self.scores(self.gru(frames)[0]).log_softmax(-1)


class Separator(nn.Module):
    """DPRNN (Luo et al., 2020, arXiv:1910.06379): BiLSTMs within chunks of frames and across them, six times."""

    def __init__(self, chunk: int = 100) -> None:
        super().__init__()
        self.chunk = chunk
        self.encoder, self.decoder = nn.Conv1d(1, 64, 16, 8), nn.ConvTranspose1d(64, 1, 16, 8)
        self.lstms = nn.ModuleList(nn.LSTM(64, 128, bidirectional=True) for _ in range(12))
        self.back = nn.ModuleList(nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64)) for _ in range(12))
        self.masks = nn.Linear(64, 2 * 64)

    def forward(self, wave: Tensor) -> Tensor:  # [B, 1, samples]
        frames = self.encoder(wave).relu()  # [B, 64, F]
        y = frames.unfold(2, self.chunk, self.chunk).permute(3, 2, 0, 1)  # [K, S, B, 64]
        for lstm, back in zip(self.lstms, self.back):
            y = (y + back(lstm(y.flatten(1, 2))[0]).view(y.shape)).transpose(0, 1).contiguous()
        masks = self.masks(y).sigmoid().unflatten(-1, (2, 64)).permute(2, 3, 4, 1, 0).flatten(3)  # [B, 2, 64, S K]
        heard = masks * frames[:, None, :, : masks.shape[3]]
        return self.decoder(heard.flatten(0, 1)).unflatten(0, (-1, 2))


class Recommender(nn.Module):
    """GRU4Rec (Hidasi et al., 2016, arXiv:1511.06939): a GRU of 100 units over the items of a session."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.gru, self.scores = nn.Embedding(2000, 100), nn.GRU(100, 100), nn.Linear(100, 2000)

    def forward(self, sessions: Tensor) -> Tensor:  # [T, B]
        return self.scores(self.gru(self.items(sessions))[0])


class Speaker(nn.Module):
    """Tacotron 2's decoder (Shen et al., 2018, arXiv:1712.05884): two LSTMCells of 1,024 units and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.prenet = nn.Sequential(nn.Linear(80, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.attention, self.decoder = nn.LSTMCell(256 + 512, 1024), nn.LSTMCell(1024 + 512, 1024)
        self.query, self.keys, self.energy = nn.Linear(1024, 128), nn.Linear(512, 128), nn.Linear(128, 1, bias=False)
        self.location = nn.Sequential(nn.Conv1d(1, 32, 31, padding=15), nn.Conv1d(32, 128, 1))
        self.mel = nn.Linear(1024 + 512, 80)

    def forward(self, text: Tensor, frames: int = 20) -> Tensor:  # [B, S, 512]
        B, S, _ = text.shape
        keys, mel, context = self.keys(text), text.new_zeros(B, 80), text.new_zeros(B, 512)
        weights, first, second, mels = text.new_zeros(B, S), None, None, []
        for _ in range(frames):
            first = self.attention(torch.cat([self.prenet(mel), context], 1), first)
            places = self.location(weights[:, None]).mT  # [B, S, 128]
            energies = self.energy((self.query(first[0])[:, None] + keys + places).tanh())[..., 0]
            weights = energies.softmax(1)
            context = (weights[:, None] @ text)[:, 0]
            second = self.decoder(torch.cat([first[0], context], 1), second)
            mels.append(mel := self.mel(torch.cat([second[0], context], 1)))
        return torch.stack(mels)


class Voice(nn.Module):
    """A speaker encoder (Wan et al., 2018, arXiv:1710.10467): three LSTMs, here of 256 units as in Resemblyzer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.embedding = nn.LSTM(40, 256, num_layers=3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:  # [B, T, 40]
        _, (h, _) = self.lstm(mels)
        return nn.functional.normalize(self.embedding(h[-1]).relu())


class Spotter(nn.Module):
    """A keyword spotter of two GRUs (Zhang et al., 2017, arXiv:1711.07128). In inference it hears a frame at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.scores = nn.GRU(40, 64, num_layers=2), nn.Linear(64, 12)

    def forward(self, frames: Tensor) -> Tensor:  # [T, B, 40]
        if self.training:
            return self.scores(self.gru(frames)[0][-1])
        h = None
        for frame in frames.split(1):
            y, h = self.gru(frame, h)
        return self.scores(y[-1])


def xlstm_stack() -> nn.Module:
    """Four blocks of the package xlstm (Beck et al., 2024, arXiv:2405.04517), the first and the third sLSTMs."""
    xlstm, layer = import_module("xlstm"), import_module("xlstm.blocks.slstm.layer")

    slstm = xlstm.sLSTMBlockConfig(slstm=layer.sLSTMLayerConfig(backend="vanilla", num_heads=4))
    blocks = dict(mlstm_block=xlstm.mLSTMBlockConfig(), slstm_block=slstm, num_blocks=4, slstm_at=[0, 2])
    return xlstm.xLSTMBlockStack(xlstm.xLSTMBlockStackConfig(context_length=64, embedding_dim=128, **blocks))


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    layers: str  # the recurrent layers, in words
    of_training: tuple[int, ...]  # the shape of an input
    of_inference: tuple[int, ...]
    inputs: Callable[[Any], Tensor] = torch.randn  # takes a shape
    converted: Callable[[Any], object] = gpu_lstm.convert  # converts the model in place


MODELS = {
    "text recogniser, CRNN": Model(Recogniser, "2 BiLSTMs of 256", (4, 1, 32, 100), (1, 1, 32, 100)),
    "speech recogniser, CTC": Model(Listener, "4 BiGRUs of 256", (4, 80, 400), (1, 80, 400)),
    "speech separator, DPRNN": Model(Separator, "12 BiLSTMs of 128", (1, 1, 8008), (1, 1, 8008)),
    "recommender, GRU4Rec": Model(Recommender, "a GRU of 100", (20, 128), (20, 1), partial(torch.randint, 2000)),
    "speech synthesis, decoder of Tacotron 2": Model(Speaker, "2 LSTMCells of 1,024", (8, 80, 512), (1, 80, 512)),
    "speaker encoder": Model(Voice, "3 LSTMs of 256", (16, 160, 40), (1, 160, 40)),
    "keyword spotter, streamed": Model(Spotter, "2 GRUs of 64", (98, 32, 40), (98, 1, 40)),
    "xLSTM stack": Model(
        xlstm_stack, "2 sLSTMs of 128 of 4 blocks", (4, 64, 128), (1, 64, 128), converted=gpu_lstm.use_for_slstm
    ),
}
