"""What a provider is, and helpers to build one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, util
from typing import Any

from torch import Tensor, nn

from ..cases import Case
from ..inputs import Inputs


class Unable(Exception):
    """Why a provider does not support a case."""


@dataclass(frozen=True)
class Engine:
    """A recurrent layer with the weights of the inputs: a callable, and leaves whose gradients are compared."""

    # x [T, B, I], (h0, c0) [R, B, H] to output [T, B, D*H], (h_n, c_n), as torch.nn.LSTM, of a GRU (h0,) to (h_n,),
    # of an sLSTM (h0, c0, n0, m0) to as many; None for a state not computed
    call: Callable[..., tuple[Any, Any]]
    parameters: dict[str, Tensor]  # leaves, in the layout of the engine
    to_torch: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # gradients, to torch's names and layout
    kernels: Callable[[], str | None] = lambda: None  # after a call, which kernels ran, if there is more than one kind

    @classmethod
    def of(cls, module: nn.Module, to_torch: Any = dict, **options: Any) -> "Engine":
        """The engine of a module that is called as torch's own is, with further keyword arguments."""

        def call(x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
            y, h_n = module(x, *state, **options)
            return y, (h_n,)

        one_state = getattr(module, "mode", "LSTM") == "GRU"  # other packages' have none
        return cls(call if one_state else partial(module, **options), dict(module.named_parameters()), to_torch)

    def named(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """The gradients of the parameters, by "d" and torch's names; a single bias stands for both of torch's."""
        named = self.to_torch(dict(zip(self.parameters, gradients)))
        return {"d" + name.replace("bias_l", f"bias_{of}_l"): named[name] for name in named for of in ("ih", "hh")}


@dataclass(frozen=True)
class Provider:
    build: Callable[[Inputs], Engine]  # raises Unable where it does not support a case
    absent: Callable[[str], str | None] = lambda device: None  # why it cannot run on a device at all; None if it can
    everywhere: bool = False  # runs every case; the others only the headline, or if named
    graphed: bool = False  # on CUDA also replayed from a graph


def expect(case: Case, *features: str) -> Case:
    """The case. Unable if it has others than these: "layers", "directions", "resets", "heads", its sequences etc."""
    has = ["layers"] * (case.layers > 1) + ["directions"] * (case.directions > 1) + ["resets"] * (case.reset_rate > 0)
    has += ["heads"] * (case.heads > 1)
    if beyond := {*has, case.sequences, case.variant, case.cell} - {*features, "full", "plain", "lstm"}:
        raise Unable(f"does not do {' or '.join(sorted(beyond))}")
    return case


def module_like_torchs(package: Any, inputs: Inputs, **options: Any) -> nn.Module:
    """A package's LSTM or GRU, with torch's arguments and parameters, and the weights of the inputs."""
    case, kind = inputs.case, getattr(package, inputs.case.cell.upper())
    options = {"device": inputs.x.device, "dtype": case.torch_dtype, **options}
    module = kind(case.input_size, case.hidden_size, case.layers, bidirectional=case.directions == 2, **options)
    module.load_state_dict(inputs.weights)
    return module.requires_grad_(case.training)


def as_hx(states: tuple[Tensor, ...] | list[Tensor]) -> Any:
    """As modules accept them: of a GRU one tensor."""
    return tuple(states) if len(states) > 1 else states[0]


def absence(package: str, install: str, device: str, cuda: bool = True) -> str | None:
    """Why another project's package cannot be used on a device, and how to install it; None if it can."""
    if cuda and not device.startswith("cuda"):
        return f"{package} needs CUDA for this"
    if util.find_spec(package) is None:
        return f"{package} is not installed: {install}"
    try:
        import_module(package)
    except (ImportError, OSError) as error:  # most often an extension built for another torch
        return f"{package} is installed but cannot be imported: {error}"
    return None
