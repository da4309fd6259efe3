"""Calls that a tracer makes of a module, with what is no tensor for an input."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence


def traced(module: nn.Module, input: Any, *hx: Any, **arguments: Any) -> Any:
    """What the call returns to a tracer; None: the call is as any other.

    For torch.fx a module is a leaf, as torch's own are: one node that calls it. torch.compile leaves calls with a
    PackedSequence to eager mode: its sizes are in a tensor on the host, so that a graph would break at each of them,
    and be made again for every T.
    """
    if isinstance(input, PackedSequence):
        # The flag, since torch 2.9 folds the function that reads it to True.
        if torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag:
            return _in_eager_mode(module, input, *hx, **arguments)
    elif isinstance(input, torch.fx.Proxy):
        arguments = {name: value for name, value in arguments.items() if value is not None}
        path = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
        return input.tracer.create_proxy("call_module", path, (input, *hx), arguments)
    return None


@torch._disable_dynamo  # the public torch.compiler.disable imports the compiler at once
def _in_eager_mode(module: nn.Module, *args: Any, **arguments: Any) -> Any:
    return module.forward(*args, **arguments)
