"""gpu_lstm.LSTM: as it chooses for itself, and by each backend and each family of Triton kernels."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

import gpu_lstm

from .. import inside
from ..cases import VARIANTS
from ..inputs import Inputs
from .engine import Engine, Provider, Unable, expect, module_like_torchs

# Features of backends, more than torch.nn.LSTM's own. Backends that are not named here support every variant, too.
PLAIN = "layers", "directions", "ragged", "packed", "active", "resets"
SUPPORTED = {"torch": PLAIN, "cupy": (*PLAIN, "reset_states")}


def absent(backend: Any, device: str) -> str | None:
    """What gpu_lstm itself says of a backend."""
    try:  # an empty batch asks for the backend and runs no kernel
        gpu_lstm.LSTM(1, 1, backend=backend, device=device)(torch.zeros(1, 0, 1, device=device))
    except (ImportError, RuntimeError, TypeError) as error:
        return str(error)
    return None


def no_families(device: str) -> str | None:
    """A family is chosen inside of gpu_lstm, as it is in this checkout, and for a GPU."""
    if device == "cpu":
        return "a family of kernels is planned for a GPU"
    return absent("triton", device) if inside.INSIDE_IS_KNOWN else "no family can be chosen in another commit"


def build(backend: str | None, inputs: Inputs) -> Engine:
    """The module on one backend."""
    case = inputs.case
    expect(case, *SUPPORTED.get(backend or "auto", (*PLAIN, "reset_states", *VARIANTS)))
    on = {case.variant: VARIANTS[case.variant][0]} if case.variant in VARIANTS else {}
    lstm = module_like_torchs(gpu_lstm.LSTM, inputs, backend=backend, **on)
    given: dict[str, Any] = {"resets": inputs.resets, "lengths": None if case.sequences == "packed" else inputs.lengths}
    if inputs.reset_states is not None:  # which another commit may not accept
        given["reset_states"] = inputs.reset_states
    known = inside.INSIDE_IS_KNOWN and inputs.h0.is_cuda
    return replace(Engine.of(lstm, **given), kernels=lambda: (known and inside.families(case)) or None)


def build_family(family: str, inputs: Inputs) -> Engine:
    """The module on Triton kernels of one family, forward and backward."""
    first = inside.of_family(family)

    def choose(*problem):
        if (plan := first(*problem)) is None:
            raise Unable(f"no {family} kernel fits this card")
        return plan

    return replace(build("triton", inputs), kernels=lambda: None, within=inside.running(choose))


def build_stream(inputs: Inputs) -> Engine:
    """A step of a stream, which goes on from call to call; on CUDA by its own graph. The states are read each time."""
    expect(inputs.case, "layers", "active")
    if inputs.case.mode != "step":
        raise Unable("only for single steps")
    lstm: Any = module_like_torchs(gpu_lstm.LSTM, inputs)
    stream: Any = gpu_lstm.Stream(lstm, inputs.case.batch, (inputs.h0, inputs.c0))
    active = {} if inputs.lengths is None else {"active": inputs.lengths > 0}
    return Engine(lambda x, state: (stream(x[0], **active)[None], stream.state), dict(lstm.named_parameters()))


FAMILIES = "resident", "cooperative", "pointwise", "step"
PROVIDERS = {
    "ours": Provider(partial(build, None), everywhere=True, graphed=True),
    "ours-stream": Provider(build_stream, everywhere=True),
    "ours-triton": Provider(partial(build, "triton"), partial(absent, "triton"), graphed=True),
    **{f"ours-{name}": Provider(partial(build_family, name), no_families, graphed=True) for name in FAMILIES},
    "ours-cupy": Provider(partial(build, "cupy"), partial(absent, "cupy"), graphed=True),
    "ours-torch": Provider(partial(build, "torch"), graphed=True),
    "ours-reference": Provider(partial(build, "reference")),
}
