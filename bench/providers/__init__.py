"""The LSTMs that run a case, PROVIDERS by their names on the command line."""

from . import ours, packages, torchs
from .engine import Provider

YARDSTICK, OURS = "torch", "ours"  # torch.nn.LSTM, which all are compared with, and gpu_lstm as it chooses for itself
YARDSTICKS = (YARDSTICK, "torch-flat")  # the faster one counts
PROVIDERS: dict[str, Provider] = torchs.PROVIDERS | ours.PROVIDERS | packages.PROVIDERS


def taking_part(names: list[str] | None, headline: bool) -> list[str]:
    """Who runs a case, the yardsticks first: `names`, or by default all in the headline, else those for every case."""
    everybody = [name for name, provider in PROVIDERS.items() if headline or provider.everywhere]
    return list(dict.fromkeys([*YARDSTICKS, *(everybody if names is None else names)]))
