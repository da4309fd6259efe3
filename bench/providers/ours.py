"""gpu_lstm.LSTM, GRU and SLSTM: with their own choice of backend, with each backend, and as a stream of steps."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gpu_lstm

from ..cases import VARIANTS
from ..inputs import Inputs
from .engine import Engine, Provider, Unable, as_hx, expect, module_like_torchs

# Features of backends beyond torch.nn.LSTM's own. Backends that are not named here support every variant, too.
PLAIN = "layers", "directions", "ragged", "packed", "active", "resets", "gru"
SUPPORTED = {"torch": (*PLAIN, "heads")}


def absent(backend: Any, device: str) -> str | None:
    """Return gpu_lstm's own reason why a backend is unavailable; None if it is available."""
    try:  # a call with an empty batch selects the backend and runs no kernel
        gpu_lstm.LSTM(1, 1, backend=backend, device=device)(torch.zeros(1, 0, 1, device=device))
    except (ImportError, RuntimeError, TypeError) as error:
        return str(error)
    return None


def build(backend: str | None, inputs: Inputs) -> Engine:
    """Return the module with one backend.

    If Triton's kernels run, the engine names their families: "cooperative / step".
    """
    case = expect(inputs.case, *SUPPORTED.get(backend or "auto", (*PLAIN, "reset_states", *VARIANTS, "heads", "slstm")))
    on = {case.variant: VARIANTS[case.variant][0]} if case.variant in VARIANTS else {}
    on |= {"heads": case.heads} if case.heads > 1 else {}  # which another commit may not accept
    module: Any = module_like_torchs(gpu_lstm, inputs, backend=backend, **on)
    options: dict[str, Any] = {
        "resets": inputs.resets,
        "lengths": None if case.sequences == "packed" else inputs.lengths,
    }
    if inputs.reset_states is not None:  # which another commit may not accept
        options["reset_states"] = as_hx(inputs.reset_states)

    def families() -> str | None:
        x = inputs.packed(inputs.x) if case.sequences == "packed" else inputs.x
        try:
            return " / ".join(each.family for each in gpu_lstm.explain(module, x, **options).layers[0].passes) or None
        except AttributeError:  # another commit
            return None

    return replace(Engine.of(module, **options), kernels=families)


def build_stream(backend: str | None, inputs: Inputs) -> Engine:
    """Return a step of a Stream, which continues from call to call, on CUDA by its own graph.

    Each call reads the states.
    """
    if expect(inputs.case, "layers", "active", "gru").mode != "step":
        raise Unable("only for single steps")
    module: Any = module_like_torchs(gpu_lstm, inputs, backend=backend)
    stream: Any = gpu_lstm.Stream(module, inputs.case.batch, as_hx(inputs.states))
    active = {} if inputs.lengths is None else {"active": inputs.lengths > 0}

    def call(x: Tensor, state: object) -> tuple[Tensor, Any]:
        y, after = stream(x[0], **active), stream.state
        return y[None], after if isinstance(after, tuple) else (after,)

    return Engine(call, dict(module.named_parameters()))


PROVIDERS = {
    "ours": Provider(partial(build, None), everywhere=True, graphed=True),
    "ours-stream": Provider(partial(build_stream, None), everywhere=True),
    "ours-triton": Provider(partial(build, "triton"), partial(absent, "triton"), graphed=True),
    "ours-cupy": Provider(partial(build, "cupy"), partial(absent, "cupy"), graphed=True),
    "ours-numba": Provider(partial(build, "numba"), partial(absent, "numba")),
    "ours-torch": Provider(partial(build, "torch"), graphed=True),
    "ours-reference": Provider(partial(build, "reference")),
}
