"""Calls of a module while torch.fx or torch.compile traces it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate
from torch.nn.utils.rnn import PackedSequence

from ..kernels.private import fx_is_tracing, is_exporting, leave_out_of_graphs


def traced(module: nn.Module, input: Any, *hx: Any, **arguments: Any) -> Any:
    """Return the result of a call for a tracer. Return None if the call has to run like any other call.

    torch.fx treats the module as a leaf, as it treats torch's own modules: the graph has one node that calls it.
    torch.compile runs calls with a PackedSequence in eager mode. The sizes of a PackedSequence are in a tensor on the
    host. So a graph would break wherever a size is read, and would be compiled again for every T.
    """
    if isinstance(input, PackedSequence):
        if torch.compiler.is_compiling() and not is_exporting():
            return in_eager_mode(module.forward, input, *hx, **arguments)
    elif fx_is_tracing():
        leaves: list[Any] = []
        map_aggregate((input, hx, arguments), leaves.append)  # each may be a constant or a Proxy
        for leaf in leaves:
            if isinstance(leaf, torch.fx.Proxy):
                arguments = {name: value for name, value in arguments.items() if value is not None}
                path = leaf.tracer.path_of_module(module)  # type: ignore[attr-defined]
                return leaf.tracer.create_proxy("call_module", path, (input, *hx), arguments)
    return None


@leave_out_of_graphs
def in_eager_mode(call: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """Return the result of the call. torch.compile leaves the whole call in eager mode."""
    return call(*args, **arguments)
