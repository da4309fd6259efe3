"""Calls that a tracer makes of a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate
from torch.nn.utils.rnn import PackedSequence

from ..kernels.private import fx_is_tracing, is_exporting, leave_out_of_graphs


def traced(module: nn.Module, input: Any, *hx: Any, **arguments: Any) -> Any:
    """What the call returns to a tracer; None: the call is as any other.

    For torch.fx a module is a leaf, as torch's own are: one node that calls it. torch.compile leaves calls with a
    PackedSequence to eager mode: its sizes are in a tensor on the host, so that a graph would break at each of them,
    and be made again for every T.
    """
    if isinstance(input, PackedSequence):
        if torch.compiler.is_compiling() and not is_exporting():
            return in_eager_mode(module.forward, input, *hx, **arguments)
    elif fx_is_tracing():
        leaves: list[Any] = []
        map_aggregate((input, hx, arguments), leaves.append)  # any of them may be a constant
        for leaf in leaves:
            if isinstance(leaf, torch.fx.Proxy):
                arguments = {name: value for name, value in arguments.items() if value is not None}
                path = leaf.tracer.path_of_module(module)  # type: ignore[attr-defined]
                return leaf.tracer.create_proxy("call_module", path, (input, *hx), arguments)
    return None


@leave_out_of_graphs
def in_eager_mode(call: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """What the call returns; torch.compile leaves out all of it."""
    return call(*args, **arguments)
