"""Who runs a case. One file a provider; each has

NAMES      its names on the command line; most have one, ours has one for each backend and family of kernels
EVERYWHERE those of its names that take part in every case; the others only in the headline, or if asked for
absent     why it cannot run here at all: not installed, no GPU; None if it can
build      an Engine that runs a problem; raises Unable where it does not do such a case
"""

from types import ModuleType

from . import (
    cell_loop,
    cleanrl_loop,
    compiled_loop,
    flashrnn,
    haste,
    keras_lstm,
    ours,
    torch_lstm,
    torch_packed,
    torchrl_lstm,
)

YARDSTICK = "torch"
"""The provider that all are held to: torch.nn.LSTM."""

_MODULES = (
    torch_lstm, ours, torch_packed, cell_loop, compiled_loop, cleanrl_loop, flashrnn, haste, torchrl_lstm, keras_lstm,
)  # fmt: skip
PROVIDERS: dict[str, ModuleType] = {name: module for module in _MODULES for name in module.NAMES}


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
        names = [name for name, module in PROVIDERS.items() if headline or name in module.EVERYWHERE]
    return list(dict.fromkeys([YARDSTICK, *names]))
