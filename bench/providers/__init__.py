"""Whose LSTM runs a case. A file for each project, with its PROVIDERS by their names on the command line."""

from . import flashrnn, haste, keras_lstm, loops, ours, torch_lstm, torchrl_lstm
from .engine import Provider

YARDSTICK, OURS = "torch", "ours"
"""torch.nn.LSTM, which all are held to, and gpu_lstm as it chooses for itself."""

PROVIDERS: dict[str, Provider] = {
    **torch_lstm.PROVIDERS, **ours.PROVIDERS, **loops.PROVIDERS, **flashrnn.PROVIDERS, **haste.PROVIDERS,
    **torchrl_lstm.PROVIDERS, **keras_lstm.PROVIDERS,
}  # fmt: skip


def check(names: list[str]) -> None:
    """Raise unless there are providers of these names.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"unknown provider {name!r}; known: {', '.join(PROVIDERS)}")


def taking_part(names: list[str] | None, headline: bool) -> list[str]:
    """Who runs a case, the yardstick first: `names`, or by default all in the headline, else those for every case."""
    if names is None:
        names = [name for name, provider in PROVIDERS.items() if headline or provider.everywhere]
    return list(dict.fromkeys([YARDSTICK, *names]))
