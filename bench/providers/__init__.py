"""Whose LSTM runs a case. A file for each project, with its PROVIDERS by their names on the command line."""

from . import flashrnn, haste, keras_lstm, loops, ours, torch_lstm, torchrl_lstm
from .engine import Provider

YARDSTICK, OURS = "torch", "ours"  # torch.nn.LSTM, which all are compared with, and gpu_lstm as it chooses for itself
MODULES = torch_lstm, ours, loops, flashrnn, haste, torchrl_lstm, keras_lstm
PROVIDERS: dict[str, Provider] = {name: each for module in MODULES for name, each in module.PROVIDERS.items()}


def taking_part(names: list[str] | None, headline: bool) -> list[str]:
    """Who runs a case, the yardstick first: `names`, or by default all in the headline, else those for every case."""
    everybody = [name for name, provider in PROVIDERS.items() if headline or provider.everywhere]
    return list(dict.fromkeys([YARDSTICK, *(everybody if names is None else names)]))
