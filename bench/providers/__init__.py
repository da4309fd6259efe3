"""The LSTMs that run a case. PROVIDERS has them by their names on the command line."""

from . import ours, packages, torchs
from .engine import Provider

YARDSTICK, OURS = "torch", "ours"  # torch.nn.LSTM, with which all are compared; gpu_lstm with its own choice of backend
YARDSTICKS = (YARDSTICK, "torch-flat")  # the faster one of the two counts
PROVIDERS: dict[str, Provider] = torchs.PROVIDERS | ours.PROVIDERS | packages.PROVIDERS


def taking_part(names: list[str] | None, headline: bool) -> list[str]:
    """Return the providers that run a case, the yardsticks first.

    They are `names`. Without names the headline has all providers, and other cases have those that run every case.
    """
    everybody = [name for name, provider in PROVIDERS.items() if headline or provider.everywhere]
    return list(dict.fromkeys([*YARDSTICKS, *(everybody if names is None else names)]))
