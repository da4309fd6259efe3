"""Remove the noise from a sound with a GRU, frame by frame, while the sound arrives: python examples/denoise.py

The voice is synthetic. Every 16 ms the GRU finds the frequencies of the last 32 ms that are voice, and Stream keeps its
state. The script writes the noisy sound and then the clean one to out/denoise.wav, and draws both in out/denoise.png.
"""

import argparse
import wave
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import fold, mse_loss

import gpu_lstm

RATE, FRAME, HOP = 8000, 256, 128
SHOWN = 1.25  # kHz in the picture, which shows eight harmonics of a voice; above them there is only noise
WINDOW = torch.hann_window(FRAME).sqrt()  # applied twice: the squares add up to 1 where frames overlap


def voices(count: int, seconds: int) -> Tensor:  # [count, samples]
    pitch, turns = 100 + 100 * torch.rand(count, 1), torch.arange(seconds * RATE) / RATE + torch.rand(count, 1)
    phase = torch.cumsum(pitch * (1 + 0.3 * torch.sin(6.3 * turns)), 1) * 6.283185 / RATE
    return (5 * torch.cos(5 * turns)).sigmoid() * sum(torch.sin(k * phase) / k for k in range(1, 9))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = gpu_lstm.GRU(FRAME // 2 + 1, 64), nn.Linear(64, FRAME // 2 + 1)

    def forward(self, sound: Tensor, stream: gpu_lstm.Stream | None = None) -> Tensor:
        """Return samples [B, n] without most of their noise, n = FRAME + k HOP. The ends are faded."""
        spectrum = torch.fft.rfft(sound.unfold(1, FRAME, HOP) * WINDOW).transpose(0, 1)  # [T, B, frequencies]
        features = spectrum.abs().log1p()
        y = stream(features) if stream else self.gru(features)[0]
        pieces = torch.fft.irfft(spectrum * self.head(y).sigmoid()) * WINDOW  # [T, B, FRAME]
        return fold(pieces.permute(1, 2, 0), (1, sound.shape[1]), (1, FRAME), stride=(1, HOP)).flatten(1)  # overlapping


def main(updates: int = 40, out: Path = Path("out")) -> tuple[float, float]:
    """Train, and stream three seconds. Return how far the voice is above the noise in dB, before and after."""
    torch.manual_seed(0)
    optimiser = torch.optim.Adam((model := Denoiser()).parameters(), lr=3e-3)
    for _ in range(updates):
        voice = voices(8, 1)[:, : FRAME + 60 * HOP]
        loss = mse_loss(model(voice + torch.randn_like(voice)), voice)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    voice = voices(1, 3)[:, : FRAME + 180 * HOP]
    noisy, clean, stream = voice + torch.randn_like(voice), torch.zeros_like(voice), gpu_lstm.Stream(model.gru, batch=1)
    with torch.no_grad():
        for start in range(0, noisy.shape[1] - FRAME + 1, HOP):  # whenever HOP more samples have arrived
            frame = slice(start, start + FRAME)
            clean[:, frame] += model(noisy[:, frame], stream)  # now the first HOP of these samples are final
        torch.testing.assert_close(clean, model(noisy), rtol=0, atol=1e-5)  # as in one call
    before, after = (10 * (voice.norm() / (sound - voice).norm()).square().log10().item() for sound in (noisy, clean))
    print(
        f"voice over noise: {before:.1f} dB, denoised {after:.1f} dB; to see and to hear in {out}/denoise.png and .wav"
    )
    out.mkdir(parents=True, exist_ok=True)
    draw({f"before, {before:.1f} dB": noisy[0], f"after, {after:.1f} dB": clean[0]}, out / "denoise.png")
    with wave.open(str(out / "denoise.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        both = torch.cat([noisy[0], clean[0]])
        file.writeframes((both / both.abs().max() * 32767).short().numpy().tobytes())
    return before, after


def draw(sounds: dict[str, Tensor], path: Path) -> None:
    """Draw a spectrogram of each sound, up to the highest frequency of the voice."""
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    for axes, (title, sound) in zip(figure.subplots(1, 2, sharey=True), sounds.items()):
        spectrum = torch.fft.rfft(sound.unfold(0, FRAME, HOP) * WINDOW).abs().log10().T  # [frequencies, T]
        extent = 0, len(sound) / RATE, 0, RATE / 2000
        axes.imshow(spectrum, vmin=-1, vmax=2, origin="lower", aspect="auto", extent=extent, cmap="gray_r")
        axes.set(title=title, xlabel="s", ylim=(0, SHOWN))
    figure.axes[0].set_ylabel("kHz")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads do not help a model as small as this
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=40, help="default: %(default)s")
    main(**vars(parser.parse_args()))
