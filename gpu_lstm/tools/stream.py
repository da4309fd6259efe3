"""An LSTM that is fed as its input comes: one step or one chunk at a time, the state held between calls."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..call.checks import check_pair, check_pairs, check_tensor
from ..call.weights import State
from ..kernels.timeouts import raise_if_timed_out  # type: ignore[import-not-found]  # a folder next to gpu_lstm/
from ..modules import LSTM, StackedLSTM

States = State | list[State]


class Stream:
    """Runs `lstm` on a batch of sequences without end; its outputs are those of the whole sequence in one call.

    They are the same but for rounding, since a product of another size may be summed in another order. In float16 and
    bfloat16 the cell state is held in float32. Inference only: nothing is recorded for backward.

    On CUDA the first step is captured in a graph, and later ones replay it; it is captured again if a parameter is
    replaced, not if one is changed in place. One graph serves every `active`. Nothing waits for the device.

    Args:
        lstm: an LSTM or a StackedLSTM, in eval() if it has dropout; one direction.
        batch: sequences, N.
        hx: the initial states, as `lstm` accepts them for a batch; they are copied. Default: zeros

    Raises:
        TypeError: `lstm` is no gpu_lstm.LSTM or StackedLSTM, `batch` no int, or hx is not made of pairs of tensors.
        ValueError: it is bidirectional: its reverse direction begins at an end that a stream does not have; batch < 0.
        RuntimeError: hx of other sizes, of another dtype or on another device than `lstm` accepts.

    Example::

        stream = gpu_lstm.Stream(lstm.eval(), batch=1)
        for x in sensor:        # each (1, I)
            y = stream(x)       # (1, H)
    """

    def __init__(self, lstm: LSTM | StackedLSTM, batch: int, hx: States | None = None) -> None:
        if not isinstance(lstm, LSTM | StackedLSTM):
            raise TypeError(f"Stream takes an LSTM or a StackedLSTM, got {type(lstm).__name__}")
        if lstm.bidirectional:
            raise ValueError("Stream takes one direction, got bidirectional=True: the reverse one begins at the end")
        if not isinstance(batch, int):
            raise TypeError(f"batch should be of type int, got: {type(batch).__name__}")
        if batch < 0:
            raise ValueError(f"batch must not be negative, got {batch}")
        self.lstm, self.batch = lstm, batch
        self._state: list[State] = self._zeros()
        if hx is not None:
            self._update(self._checked(hx))
        self._graph: _StepGraph | None = None

    @property
    def state(self) -> States:
        """A copy of the state after the last step, as `lstm` returns it; cell states of half precision in float32.

        It can be set, to this copy or whatever hx may be: the stream goes on from there. Raises as for hx.
        """
        return self._as_given(_copied(self._state))

    @state.setter
    def state(self, hx: States) -> None:
        self._update(self._checked(hx))

    def __call__(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """Run one step, x (N, I), or a chunk of T steps, (T, N, I) or with batch_first (N, T, I).

        Args:
            x: the input; anything, NaN included, for sequences that are not active.
            active: bool (N,), which sequences advance; the others keep their state, and output zeros. Default: all.

        Returns:
            The output, (N, P) for a step, else as the chunk; P features, H without a projection.

        Raises:
            TypeError: x or `active` is no tensor.
            ValueError: x has another rank or batch; `active` another shape or dtype, or is on another device; the LSTM
                is in training mode and has dropout.
            RuntimeError: as `lstm`, for another number of features, dtype or device.
        """
        check_tensor(x, "x")
        batch_axis = 0 if x.dim() == 2 or self.lstm.batch_first else 1
        if x.dim() not in (2, 3) or x.shape[batch_axis] != self.batch:
            expected = "(N, T, I)" if self.lstm.batch_first else "(T, N, I)"
            raise ValueError(f"expected (N, I) or {expected} with N = {self.batch}, got {tuple(x.shape)}")
        drawn = (getattr(self.lstm, name) for name in ("dropout", "recurrent_dropout", "zoneout", "weight_drop"))
        if self.lstm.training and any(drawn):
            raise ValueError("the LSTM drops out in training mode; call eval() on it first")
        if active is not None:
            self._check_each("active", active, torch.bool)
        with torch.no_grad():
            if x.dim() == 3 or not on_cuda(x):
                return self._advance(x, active)
            if self._graph is None or not self._graph.fits(self.lstm, x, active):
                self._graph = _StepGraph(self, x, active)
            raise_if_timed_out(x.device)  # in the replays so far
            return self._graph(x, active)

    def reset(self, which: Tensor | None = None) -> None:
        """Zero the states of all sequences, or of those where `which`, bool (N,), is True.

        Raises:
            TypeError: `which` is no tensor.
            ValueError: it has another shape or dtype, or is on another device.
        """
        if which is None:
            self._update(self._zeros())
        else:
            self._check_each("which", which, torch.bool)  # states are [L, N, *] or [N, *]
            self._update([(h.masked_fill(which[:, None], 0), c.masked_fill(which[:, None], 0)) for h, c in self._state])

    def reorder(self, index: Tensor) -> None:
        """Let sequence n go on from the state of sequence index[n], as hypotheses of a beam search do.

        Args:
            index: int64 or int32 (N,), from 0 to N - 1; repeats are allowed.

        Raises:
            TypeError: `index` is no tensor.
            ValueError: it has another shape, dtype, device or values (on CUDA asserted on the device).
        """
        self._check_each("index", index, torch.int64, torch.int32)
        outside = (index < 0) | (index >= self.batch)
        if index.is_cuda:
            torch._assert_async(~outside.any(), f"Expected index from 0 to {self.batch - 1}")
        elif outside.any():
            raise ValueError(f"Expected index from 0 to {self.batch - 1}, got {index.tolist()}")
        self._update([(h.index_select(-2, index), c.index_select(-2, index)) for h, c in self._state])

    def _check_each(self, name: str, given: Tensor, *dtypes: torch.dtype) -> None:
        """Raise unless `given` has an element for each sequence, on the device of the states."""
        check_tensor(given, name)
        if given.shape != (self.batch,) or given.dtype not in dtypes:
            kind = str(dtypes[0]).removeprefix("torch.")
            raise ValueError(f"expected {kind} of shape ({self.batch},), got {given.dtype} {tuple(given.shape)}")
        if given.device != self._state[0][0].device:
            raise ValueError(f"Expected {name} on {self._state[0][0].device}, got {given.device}")

    def _advance(self, x: Tensor, active: Tensor | None) -> Tensor:
        """A step or a chunk of the sequences that are active; the states are updated in place."""
        time_axis = 1 if self.lstm.batch_first else 0
        of_chunk = x if x.dim() == 3 else x.unsqueeze(time_axis)
        y, after = self.lstm(of_chunk, self._as_given(self._state))  # type: ignore[arg-type]  # of the class that it is
        state = self._as_list(after)
        if active is not None:
            mask = active[:, None]  # [N, 1]
            y = torch.where(mask[:, None] if self.lstm.batch_first else mask, y, 0)
            state = [
                (torch.where(mask, h, h_before), torch.where(mask, c, c_before))
                for (h, c), (h_before, c_before) in zip(state, self._state)
            ]
        self._update(state)
        return y if x.dim() == 3 else y.squeeze(time_axis)

    @torch.no_grad()
    def _update(self, state: list[State]) -> None:
        """In place, where a graph finds them; all at once, so that an interrupt leaves the states of one step."""
        torch._foreach_copy_([t for pair in self._state for t in pair], [t for pair in state for t in pair])

    def _zeros(self) -> list[State]:
        lstm, like = self.lstm, next(self.lstm.parameters())
        dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
        if isinstance(lstm, StackedLSTM):
            sizes: list[tuple] = [((self.batch, size), (self.batch, size)) for size in lstm.hidden_sizes]
        else:
            rows = lstm.num_layers, self.batch
            sizes = [((*rows, lstm.proj_size or lstm.hidden_size), (*rows, lstm.hidden_size))]
        return [(like.new_zeros(h), like.new_zeros(c, dtype=dtype)) for h, c in sizes]

    def _checked(self, hx: States) -> list[State]:
        """hx as pairs, checked to have the sizes, dtype and device of the states."""
        if isinstance(self.lstm, StackedLSTM):
            check_pairs(hx, len(self.lstm.hidden_sizes))  # type: ignore[arg-type]
        else:
            check_pair(hx)  # type: ignore[arg-type]
        dtype = self._state[0][0].dtype
        for k, (held, given) in enumerate(zip(self._state, self._as_list(hx))):
            for name, ours, state in zip(("h", "c"), held, given):
                name = f"{name} of layer {k}" if isinstance(self.lstm, StackedLSTM) else f"{name}_0"
                check_tensor(state, name)
                if state.shape != ours.shape:
                    raise RuntimeError(f"Expected {name} of size {list(ours.shape)}, got {list(state.shape)}")
                if state.dtype not in (dtype, ours.dtype):
                    raise RuntimeError(f"Expected {name} of dtype {dtype}, got {state.dtype}")
                if state.device != ours.device:
                    raise RuntimeError(f"Expected {name} on {ours.device}, got {state.device}")
        return self._as_list(hx)

    def _as_given(self, state: list[State]) -> States:
        return state if isinstance(self.lstm, StackedLSTM) else state[0]

    def _as_list(self, states: States) -> list[State]:
        return cast(list[State], states if isinstance(self.lstm, StackedLSTM) else [states])


class _StepGraph:
    """One step as a CUDA graph that updates the stream's states in place: of all sequences, or with any `active`."""

    def __init__(self, stream: Stream, x: Tensor, active: Tensor | None) -> None:
        self._key = _key(stream.lstm, x)
        self._x = x.clone()
        self._active = None if active is None else active.clone()
        before = _copied(stream._state)
        try:
            self._replay = captured(lambda: stream._advance(self._x, self._active), x.device)
        finally:
            stream._update(before)  # warm-up steps do not count

    def fits(self, lstm: LSTM | StackedLSTM, x: Tensor, active: Tensor | None) -> bool:
        """Whether parameters, shape and dtype of x are those it was captured with, and it has a mask if needed."""
        return self._key == _key(lstm, x) and (active is None or self._active is not None)

    def __call__(self, x: Tensor, active: Tensor | None) -> Tensor:
        self._x.copy_(x)
        if self._active is not None:
            self._active.fill_(True) if active is None else self._active.copy_(active)
        return self._replay().clone()


def on_cuda(x: Tensor) -> bool:
    """Whether steps are replayed; tests replace it, and `captured`."""
    return x.is_cuda


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`step` on a CUDA device, captured in a graph; a call replays it."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(3):  # kernels are compiled and workspaces made before the capture
                    step()
        finally:
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


def _key(lstm: LSTM | StackedLSTM, x: Tensor) -> tuple:
    return x.shape, x.dtype, lstm.training, lstm.zoneout, tuple(parameter.data_ptr() for parameter in lstm.parameters())


def _copied(states: list[State]) -> list[State]:
    return [(h.detach().clone(), c.detach().clone()) for h, c in states]
