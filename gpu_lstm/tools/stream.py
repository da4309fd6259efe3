"""Run an LSTM, a GRU or an SLSTM on input that arrives in steps or chunks. The state is kept between calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.layer_loop import NOTHING
from ..call import roles
from ..call.checks import check_states, check_tensor
from ..kernels.private import assert_on_device, copy_all
from ..kernels.timeouts import raise_if_timed_out
from ..modules import GRU, LSTM, SLSTM, StackedGRU, StackedLSTM
from .convert import check_layers


class Stream:
    """Run `module` on a batch of endless sequences.

    The outputs together equal the output of a call with all steps, except for rounding. A Stream is for inference only.

    If the module is in float16 or bfloat16, the Stream holds the cell state in float32. The cell state is c of an LSTM,
    h of a GRU, and c, n and m of an SLSTM. On CUDA the first step is captured in a CUDA graph, which later steps
    replay. The step is captured again after a parameter was replaced by another tensor, but not after a change in
    place.

    Args:
        module: An LSTM, GRU, SLSTM, StackedLSTM or StackedGRU with one direction. If it has dropout, it must be in
            evaluation mode when it is called.
        batch: The number of sequences, N.
        hx: The initial states, as `module` accepts them for a batch. They are copied. Default: zeros

    Raises:
        TypeError: `module` is of none of these classes, `batch` is not an int, or hx does not have the form that
            `module` accepts.
        ValueError: `module` is bidirectional (the reverse direction would begin at the end), or `batch` is negative.
        RuntimeError: hx has another size, dtype or device than `module` accepts. A call of `module` raises the same
            text.

    Example::

        stream = gpu_lstm.Stream(lstm.eval(), batch=1)
        for x in sensor:        # each (1, I)
            y = stream(x)       # (1, H)
    """

    def __init__(self, module: LSTM | GRU | SLSTM | StackedLSTM | StackedGRU, batch: int, hx: Any = None) -> None:
        check_layers("Stream", module)
        if module.bidirectional:
            raise ValueError("Stream runs one direction, got bidirectional=True: the reverse one begins at the end")
        if not isinstance(batch, int):
            raise TypeError(f"batch should be of type int, got: {type(batch).__name__}")
        if batch < 0:
            raise ValueError(f"batch must not be negative, got {batch}")
        self.module, self.batch = module, batch
        with torch.inference_mode(False):  # so that the states can be updated inside and outside inference mode
            self._state = _held(self._accepted(None))  # in the form that `module` accepts and returns
        # One step as a CUDA graph. The tuple has the key of the capture, the x that the graph reads, the `active` that
        # it reads (or None), and a function that replays the graph and returns the output.
        self._graph: tuple[tuple, Tensor, Tensor | None, Callable[[], Tensor]] | None = None
        if hx is not None:
            self.state = hx

    def __repr__(self) -> str:
        return f"Stream({self.module!r}, batch={self.batch})"

    @property
    def state(self) -> Any:
        """A copy of the state after the last step, as `module` returns it. Set it to continue from another state."""
        return _each(torch.clone, self._state)

    @state.setter
    def state(self, hx: Any) -> None:
        self._update(_each(torch.clone, self._accepted(hx)))

    def _accepted(self, hx: Any) -> Any:
        """Return the states with which `module` would begin, checked as a call of `module` checks hx."""
        module = self.module
        if hx is not None and module._role is not roles.Stack and len(module._cell.states) == 2:
            check_states(hx, ("h_0", "c_0"))
        sizes = (self.batch, 1) if module.batch_first else (1, self.batch)
        step = next(module.parameters()).new_empty(*sizes, module.input_size)
        request = module._request(step, hx)
        return request.options.role.states_out(request.form, request.laid_out().states)

    def __call__(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """Run one step, x (N, I), or a chunk of T steps, (T, N, I) or with batch_first (N, T, I).

        Args:
            x: The input. For sequences that are not active, its numbers do not matter and may be NaN.
            active: bool (N,). Sequences where it is True advance. The others keep their state and output zeros.
                Default: all sequences advance.

        Returns:
            The output: (N, P) for a step, (T, N, P) or (N, T, P) for a chunk. P = H without a projection.

        Raises:
            TypeError: x or `active` is not a tensor.
            ValueError: x has a wrong rank or batch size, `active` has a wrong shape, dtype or device, or the module is
                in training mode and has dropout.
            RuntimeError: x has a wrong number of features, dtype or device. A call of `module` raises the same text.
        """
        check_tensor(x, "x")
        module = self.module
        batch_axis, chunk = (0, "(N, T, I)") if module.batch_first else (-2, "(T, N, I)")
        if x.dim() not in (2, 3) or x.shape[batch_axis] != self.batch:
            raise ValueError(f"expected (N, I) or {chunk} with N = {self.batch}, got {tuple(x.shape)}")
        if module.training and module._options().on:
            raise ValueError(f"the {type(module).__name__} drops out in training mode; call eval() on it first")
        if active is not None:
            self._check_for_each("active", active, torch.bool)
        with torch.no_grad() if torch.is_grad_enabled() else NOTHING:
            return self._replay(x, active) if x.dim() == 2 and on_cuda(x) else self._advance(x, active)

    def reset(self, which: Tensor | None = None) -> None:
        """Zero the states of all sequences, or only those where `which`, bool (N,), is True.

        A wrong `which` raises the same errors as a wrong `active` in a call.
        """
        if which is None:
            return self._update(_each(torch.zeros_like, self._state))
        self._check_for_each("which", which, torch.bool)
        self._update(_each(lambda t: t.masked_fill(which[:, None], 0), self._state))  # t is [L, N, *] or [N, *]

    def reorder(self, index: Tensor) -> None:
        """Let sequence n continue from the state of sequence index[n], as beam search needs it.

        Args:
            index: int64 or int32 (N,), with values from 0 to N - 1. A value may be repeated.

        Raises:
            TypeError: `index` is not a tensor.
            ValueError: `index` has a wrong shape, dtype, device or value. On CUDA a wrong value is an assertion on the
                device instead.
        """
        self._check_for_each("index", index, torch.int64, torch.int32)
        outside = ((index < 0) | (index >= self.batch)).any()
        if index.is_cuda:
            assert_on_device(~outside, f"Expected index from 0 to {self.batch - 1}")
        elif outside:
            raise ValueError(f"Expected index from 0 to {self.batch - 1}, got {index.tolist()}")
        self._update(_each(lambda t: t.index_select(-2, index), self._state))

    def _check_for_each(self, name: str, value: Tensor, *dtypes: torch.dtype) -> None:
        """Raise unless `value` is [N], of one of these dtypes, and on the device of the states."""
        check_tensor(value, name)
        if value.shape != (self.batch,) or value.dtype not in dtypes:
            dtype = str(dtypes[0]).removeprefix("torch.")
            raise ValueError(f"expected {dtype} of shape ({self.batch},), got {value.dtype} {tuple(value.shape)}")
        if value.device != (device := _tensors(self._state)[0].device):
            raise ValueError(f"Expected {name} on {device}, got {value.device}")

    def _advance(self, x: Tensor, active: Tensor | None) -> Tensor:
        """Run a step or a chunk, and update the states of the active sequences."""
        time_axis = 1 if self.module.batch_first else 0
        chunk = x if x.dim() == 3 else x[:, None] if time_axis else x[None]
        y, states = self.module(chunk, self._state)
        if active is not None:
            mask = active[:, None]  # [N, 1]
            y = torch.where(mask[:, None] if self.module.batch_first else mask, y, 0)
            states = _each(lambda after, before: torch.where(mask, after, before), states, self._state)
        self._update(states)
        return y if x.dim() == 3 else y.squeeze(time_axis)

    def _replay(self, x: Tensor, active: Tensor | None) -> Tensor:
        """Run a step by replaying its graph, and return a copy of the output.

        The step is captured first if parameters, options or the form of x have changed since the last capture. It is
        also captured if `active` is given and the graph reads none.
        """
        module, graph = self.module, self._graph
        key = x.shape, x.dtype, module._options(), tuple(p.data_ptr() for p in module.parameters())
        if graph is None or graph[0] != key or (graph[2] is None and active is not None):
            before, read = _each(torch.clone, self._state), (x.clone(), None if active is None else active.clone())
            try:
                graph = self._graph = key, *read, captured(lambda: self._advance(*read), x.device)
            finally:
                self._update(before)  # the warm-up steps have changed the states
        _, its_x, its_active, replay = graph
        raise_if_timed_out(x.device)  # an earlier replay may have timed out
        its_x.copy_(x)
        if its_active is not None:
            its_active.fill_(True) if active is None else its_active.copy_(active)
        return replay().clone()

    def _update(self, states: Any) -> None:
        """Set all states at once, so that an interrupt never leaves states of two different steps.

        On CUDA the states are written in place, since the graph reads them there.
        """
        before, after = _tensors(self._state), _tensors(states)
        if on_cuda(before[0]) or any([t.dtype is not new.dtype for t, new in zip(before, after)]):
            with torch.no_grad():
                copy_all(before, after)
        else:
            self._state = states


def on_cuda(x: Tensor) -> bool:
    """Whether steps are replayed from a CUDA graph. Tests without a GPU replace this function and `captured`."""
    return x.is_cuda


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Capture `step` on a CUDA device in a graph; return a function that replays the graph and returns the output."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(3):  # kernels are compiled, and workspaces allocated, before the capture
                    step()
        finally:
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # In mode "global" another thread would break the capture, for example by allocating memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = step()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


# The states of a module are a tensor or a tuple of tensors. The states of a stack are a list of these, one per layer.


def _each(function: Callable[..., Tensor], *states: Any) -> Any:
    """Apply `function` to the tensors at the same place of one or more states; return the results in the same form."""
    if isinstance(states[0], Tensor):
        return function(*states)
    return type(states[0])(_each(function, *each) for each in zip(*states))


def _tensors(states: Any) -> list[Tensor]:
    """Return all tensors of the states."""
    return [states] if isinstance(states, Tensor) else [t for each in states for t in _tensors(each)]


def _held(states: Any) -> Any:
    """Return copies of states in float32, or in float64 if they are float64.

    The first state of a tuple, h, keeps its dtype. It equals the last output, so float32 would add nothing.
    """
    if isinstance(states, list):
        return list(map(_held, states))
    if isinstance(states, tuple):
        return states[0].clone(), *map(_held, states[1:])
    return states.to(torch.promote_types(states.dtype, torch.float32), copy=True)
