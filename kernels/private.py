"""Every private name of torch, Triton and Python that the library uses.

Comments say why a name is used, and how the library would behave without it. `-> b` names the public way b, which can
take its place. All names exist since torch 2.9, the oldest version that is supported, unless a comment gives another
version. If a name is gone, an ImportError says so at import, with the version of torch. tests/test_packaging.py checks
that no other file has a private name. Flags are read by functions, since an import would copy their values. The
functions for flags that every call reads are partials of getattr, which need no frame of Python.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.autograd.profiler as profiler
from torch import Tensor
from torch.autograd import forward_ad

NEWEST = "2.14"  # the newest torch with which the tests ran


@contextlib.contextmanager
def named_if_gone() -> Iterator[None]:
    """Run a block that reads private names. If one is gone, the error has the version of torch."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        tested = f"gpu_lstm is tested with torch 2.9 to {NEWEST}"
        raise ImportError(
            f"torch {torch.__version__} lacks a private name that gpu_lstm needs: {error}; {tested}"
        ) from error


def flag(owner: Any, name: str, *default: Any) -> Callable[[], Any]:
    """Return a function that reads a flag. Without a default the flag has to exist."""
    getattr(owner, name, *default)
    return partial(getattr, owner, name, *default)


with named_if_gone():
    from torch._C import _functorch
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
    from torch.fx import _symbolic_trace as fx
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    # These are read at every call, and the public way is slower:
    # -> os.environ.get, which raises and catches an error if the variable is not set
    environment: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
    fp32_precision = torch._C._get_fp32_precision_getter  # -> torch.backends.cudnn.rnn.fp32_precision, 20 times as slow
    any_autocast = torch._C._is_any_autocast_enabled  # -> torch.is_autocast_enabled(x.device.type)
    is_tracing = torch._C._is_tracing  # -> torch.jit.is_tracing()
    is_profiled = flag(profiler, "_is_profiler_enabled")  # -> record_function always, which costs microseconds

    # The public way does too much:
    # -> torch.compiler.disable, which imports the compiler, and with it Triton
    leave_out_of_graphs = torch._disable_dynamo
    is_exporting = flag(torch.compiler, "_is_exporting_flag")  # -> is_exporting(), which torch 2.9 folds to True
    # Since torch 2.14 each thread has this flag, before that the process had it. -> is_fx_tracing(), which logs a
    # warning
    of_thread = hasattr(fx, "_is_fx_tracing_tls")
    fx_is_tracing = flag(fx._is_fx_tracing_tls, "flag", False) if of_thread else flag(fx, "_is_fx_tracing_flag")
    load_kernel = lambda compiled: compiled._init_handles()  # -> compiled.run, which loads when it is read
    copy_all = torch._foreach_copy_  # -> one copy after another, with interrupts possible between them
    # -> the storage's data_ptr(), which FakeTensors lack; ONNX's exporter uses FakeTensors
    storage_of = lambda t: t.untyped_storage()._cdata

    # There is no public way. Without the names of functorch, calls inside torch.func's transforms would be refused:
    TransformType, current_transform = _functorch.TransformType, _functorch.peek_interpreter_stack
    transforms, level_of = retrieve_all_functorch_interpreters, _functorch.maybe_get_level
    is_wrapped, unwrapped = _functorch.is_functorch_wrapped_tensor, _functorch.get_unwrapped
    unwrapped_if_ended, is_batched = _functorch.unwrap_if_dead, _functorch.is_legacy_batchedtensor
    forward_level = flag(forward_ad, "_current_level")  # -1 if no dual_level is open
    # Without these, layers would be no operators under dispatch modes, a compat.LSTM in a model would be compiled, and
    # the user's hooks and function modes would act on our own computations:
    dispatch_modes, count_dispatch_modes = _get_current_dispatch_mode_stack, torch._C._len_torch_dispatch_stack
    compiler_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback  # None outside of compiled code
    hooks_are_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    WithoutTorchFunction = torch._C.DisableTorchFunction
    is_view = Tensor._is_view  # torch's autocast does not keep the cast of a view
    assert_on_device = torch._assert_async  # without it, a check would wait for the device
    # Without it, each rank would decide for itself.
    default_store = lambda: torch.distributed.distributed_c10d._get_default_store()


def constant_when_traced(function: Any) -> Any:
    """Mark a function whose result torch.compile takes as a constant.

    -> torch.compiler.assume_constant_result, which imports the compiler
    """
    function._dynamo_marked_constant = True
    return function


def saved_by_product(product: Any, weight: Tensor) -> Tensor:
    """Return `weight` as torch.matmul(..., weight) saved it for backward.

    Without it, the weight would be cast a second time.
    """
    return product.grad_fn._saved_vec if weight.dim() == 1 else product.grad_fn._saved_mat2


def autograd_inside_an_operator() -> Any:
    """Return a block in which autograd records inside the kernel of an operator.

    Without it, backward would compute each forward again.
    """
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(include, exclude & torch._C._after_autograd_keyset)
