"""Define a provider, and helpers to build one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, util
from typing import Any

from torch import Tensor, nn

from ..cases import Case
from ..inputs import Inputs


class Unable(Exception):
    """A provider does not support a case. The text says why."""


@dataclass(frozen=True)
class Engine:
    """A recurrent layer with the weights of the inputs: a callable, and the leaves whose gradients are compared."""

    # call(x [T, B, I], initial states [R, B, H] each) returns the output [T, B, D*H] and the final states. An LSTM has
    # the states (h, c), a GRU (h,), an sLSTM (h, c, n, m). A final state that is not computed is None.
    call: Callable[..., tuple[Any, Any]]
    parameters: dict[str, Tensor]  # the leaves, in the layout of the engine
    to_torch: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # turns gradients into torch's names and layout
    kernels: Callable[[], str | None] = lambda: None  # after a call: the kernels that ran, if there are several kinds

    @classmethod
    def of(cls, module: nn.Module, to_torch: Any = dict, **options: Any) -> "Engine":
        """Return the engine of a module that is called like torch's, with the keyword arguments `options`."""

        def call(x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
            y, h_n = module(x, *state, **options)
            return y, (h_n,)

        one_state = getattr(module, "mode", "LSTM") == "GRU"  # modules of other packages have no `mode`
        return cls(call if one_state else partial(module, **options), dict(module.named_parameters()), to_torch)

    def named(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the parameters by name, "d" and torch's name.

        A single bias counts as both of torch's.
        """
        named = self.to_torch(dict(zip(self.parameters, gradients)))
        return {"d" + name.replace("bias_l", f"bias_{of}_l"): named[name] for name in named for of in ("ih", "hh")}


@dataclass(frozen=True)
class Provider:
    build: Callable[[Inputs], Engine]  # raises Unable if it does not support a case
    absent: Callable[[str], str | None] = lambda device: None  # why it cannot run on a device; None if it can
    everywhere: bool = False  # whether it runs every case; the others run only the headline, unless named
    graphed: bool = False  # whether on CUDA it also runs as a replay of a graph


def expect(case: Case, *features: str) -> Case:
    """Return the case; raise Unable if it has a feature that is not in `features`.

    Features are "layers", "directions", "resets", "heads", and the names of sequences, variants and cells.
    """
    has = ["layers"] * (case.layers > 1) + ["directions"] * (case.directions > 1) + ["resets"] * (case.reset_rate > 0)
    has += ["heads"] * (case.heads > 1)
    if beyond := {*has, case.sequences, case.variant, case.cell} - {*features, "full", "plain", "lstm"}:
        raise Unable(f"does not do {' or '.join(sorted(beyond))}")
    return case


def module_like_torchs(package: Any, inputs: Inputs, **options: Any) -> nn.Module:
    """Return a package's LSTM or GRU that has torch's arguments and parameters, with the weights of the inputs."""
    case, kind = inputs.case, getattr(package, inputs.case.cell.upper())
    options = {"device": inputs.x.device, "dtype": case.torch_dtype, **options}
    module = kind(case.input_size, case.hidden_size, case.layers, bidirectional=case.directions == 2, **options)
    module.load_state_dict(inputs.weights)
    return module.requires_grad_(case.training)


def as_hx(states: tuple[Tensor, ...] | list[Tensor]) -> Any:
    """Return states as modules accept them: for a GRU one tensor, else a tuple."""
    return tuple(states) if len(states) > 1 else states[0]


def absence(package: str, install: str, device: str, cuda: bool = True) -> str | None:
    """Return why another project's package cannot be used on a device, and how to install it; None if it can."""
    if cuda and not device.startswith("cuda"):
        return f"{package} needs CUDA for this"
    if util.find_spec(package) is None:
        return f"{package} is not installed: {install}"
    try:
        import_module(package)
    except (ImportError, OSError) as error:  # most often, an extension was built for another torch
        return f"{package} is installed but cannot be imported: {error}"
    return None
