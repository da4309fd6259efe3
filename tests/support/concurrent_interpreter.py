"""Triton's interpreter with the programs of a grid side by side, each in a thread of its own.

The stock interpreter runs one program after another, so a kernel whose programs wait for each other would never end.
Here they run concurrently, in the same memory. At a memory operation one of these events may happen at random, as on a
GPU:

- A program pauses, so that others run ahead of it.
- A tile is loaded or stored in two parts, with a pause between them.
- A store becomes visible to other programs only after the next memory operation of its program. If that operation
  releases, or touches the same memory, the store is visible before it.

So a missing wait, a missing release, and a flag that covers too little give wrong results. Two faults are not detected:
loads that move before a wait that does not acquire, and a missing barrier among the threads of one program.
"""

import itertools
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import triton
import triton.language as tl
from memory_checks import ADDRESS
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from gpu_lstm.kernels.triton_rnn.parameters import in_tuples

SWITCH_INTERVAL = 1e-4  # seconds a thread may run before another one gets its turn; Python's own value is 5e-3
LONGEST_PAUSE = 1e-3  # seconds between two operations, or between the parts of one; most pauses are far shorter
LONGEST_DELAY = 5e-3  # seconds from a store until it is visible, long enough for other programs to look
# Operations of all programs without a store, after which none is expected; runs that work have taken 7,500.
MOST_IN_VAIN = 1_000_000


class ConcurrentRun:
    """Launches interpreted kernels in place of `launch.launch_kernel`.

    `seed` decides the order in which programs start, and everything that happens to them. At each memory operation
    something happens with probability `yield_rate`. The system schedules the threads, so a seed makes it likely, but
    not certain, that a failure recurs.
    """

    def __init__(self, seed=0, yield_rate=0.05):
        self.seed, self.yield_rate, self.launches = seed, yield_rate, 0

    def __call__(self, kernel, grid, **arguments):
        """Launch `kernel` and wait for its end. If a program raises, or if no program stores any more, all are stopped,
        and the error names the program."""

        launches = self.launches

        def run_all(converted):
            """Run the grid as Triton's launcher does. It is called once arguments are converted and the language is
            patched."""
            self.launches += 1
            self._run_all(kernel.__name__, tuple(grid), partial(kernel.rewrite(), **converted))
            return (0,)  # nothing is left to be run one after another

        kernel[run_all](**in_tuples(kernel, arguments))
        if self.launches == launches:
            raise RuntimeError(f"the interpreter of Triton {triton.__version__} did not ask for the grid")

    def _run_all(self, name, grid, body):
        grid += (1,) * (3 - len(grid))
        indices, seed = list(itertools.product(*map(range, grid))), (self.seed, self.launches)
        np.random.default_rng(seed).shuffle(indices)
        launch = _Launch()
        programs = [
            _Program(index, body, np.random.default_rng([*seed, *index]), self.yield_rate, launch) for index in indices
        ]
        with _concurrent_builder(grid):
            try:
                for program in programs:
                    program.start()
                while (running := list(filter(_Program.is_alive, programs))) and launch.in_vain <= MOST_IN_VAIN:
                    running[0].join(0.1)
            finally:
                launch.stop.set()
                for program in filter(_Program.is_alive, programs):
                    program.join()
        if launch.errors:
            index, error = launch.errors[0]
            raise InterpreterError(f"{name}, program {index}: {error!r}") from error
        if running:
            late = sorted(program.index for program in running)
            raise TimeoutError(
                f"{name}: no store in {MOST_IN_VAIN:,} operations; of {len(programs)} programs {late} run"
            )


@dataclass(eq=False)
class _Launch:
    """The state that the programs of a launch share."""

    in_vain: int = 0  # operations since the last store; with several threads a count may be lost
    stop: threading.Event = field(default_factory=threading.Event)
    errors: list[tuple[tuple[int, ...], BaseException]] = field(default_factory=list)


class _Stopped(BaseException):
    """Ends a program from within. It is not an Exception, since the interpreter would wrap it in its own."""


@dataclass(eq=False)
class _Program(threading.Thread):
    """One program of the grid, and the events at its memory operations."""

    index: tuple[int, ...]
    body: Callable[[], None]
    rng: np.random.Generator
    yield_rate: float
    launch: _Launch
    # A store that is not visible yet: its chunks, and the function that performs it.
    held: tuple[np.ndarray, Callable[[], None]] | None = None

    def __post_init__(self):
        super().__init__(daemon=True)

    def run(self):
        """Run the program. If it raises, its error is recorded, and all other programs are stopped."""
        try:
            self.body()
            self.perform_held()
        except _Stopped:
            pass  # the program ends as it was told; `_run_all` raises the launch's error
        except BaseException as error:
            self.launch.errors.append((self.index, error))
            self.launch.stop.set()

    def counts(self):
        """Count an operation, and end the program if it has been stopped."""
        if self.launch.stop.is_set():
            raise _Stopped
        self.launch.in_vain += 1

    def happens(self):
        return self.rng.random() < self.yield_rate

    def pause(self):
        time.sleep(LONGEST_PAUSE * self.rng.random() ** 4)

    def perform_held(self):
        held, self.held = self.held, None
        if held:
            held[1]()

    @contextmanager
    def operation(self, ptrs, releases=False):
        """Surround a memory operation. A store that was held back is performed after it, or before it where order
        requires."""
        self.counts()
        if self.held and (releases or np.isin(_chunks(ptrs), self.held[0]).any()):
            self.perform_held()
        if self.happens():
            self.pause()
        held, self.held = self.held, None
        yield
        if held:
            time.sleep(LONGEST_DELAY * self.rng.random())
            held[1]()

    def parts(self, mask):
        """Yield the mask of a load or store, sometimes in two parts."""
        if mask.data.size == 1 or not self.happens():
            yield mask
        else:
            half = self.rng.random(mask.data.shape) < 0.5
            yield interpreter.TensorHandle(mask.data & half, mask.dtype)
            self.pause()
            yield interpreter.TensorHandle(mask.data & ~half, mask.dtype)


def _chunks(ptrs):
    """Return the 16-byte chunks that pointers point into. Pointers of different types to the same memory have the same
    chunks."""
    return (ptrs.data & ADDRESS) >> np.uint64(4)


class _ConcurrentBuilder(interpreter.InterpreterBuilder):
    """The interpreter's builder while programs run side by side, in threads. Of the atomics it handles tl.atomic_add
    and the like."""

    grid_idx = property(lambda self: threading.current_thread().index)

    def binary_op(self, *args):
        threading.current_thread().counts()  # an endless loop need not touch memory
        return super().binary_op(*args)

    def create_masked_load(self, ptrs, mask, other, *policy, **named):
        program = threading.current_thread()
        with program.operation(ptrs):
            for part in program.parts(mask):
                other = super().create_masked_load(ptrs, part, other, *policy, **named)
        return other

    def create_masked_store(self, ptrs, value, mask, *policy):
        program, store = threading.current_thread(), super().create_masked_store
        with program.operation(ptrs):
            program.launch.in_vain = 0
            if program.happens():
                program.held = _chunks(ptrs), lambda: store(ptrs, value, mask, *policy)
            else:
                for part in program.parts(mask):
                    store(ptrs, value, part, *policy)

    def create_atomic_rmw(self, rmw_op, ptr, val, mask, sem, scope):
        program = threading.current_thread()
        with program.operation(ptr, releases="RELEASE" in sem.name):
            if val.data.any():  # adding zero is a read
                program.launch.in_vain = 0
            return super().create_atomic_rmw(rmw_op, ptr, val, mask, sem, scope)


@contextmanager
def prepared_once():
    """Prepare device functions at their first call in a launch, one thread at a time.

    The stock interpreter prepares them at each call. Preparing walks and fills the globals of a function's module.
    Doing it once for all functions of the module takes a fifth of a launch's time.
    """
    lock, bodies, modules, call = threading.Lock(), {}, set(), interpreter.InterpretedFunction.__call__

    def call_device_function(function, *args, **kwargs):
        with lock:
            if function.fn not in bodies:
                if function.fn.__module__ not in modules:
                    interpreter._patch_lang(function.fn)
                    modules.add(function.fn.__module__)
                bodies[function.fn] = function.rewrite()
        try:
            return bodies[function.fn](*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call_device_function
    try:
        yield
    finally:
        interpreter.InterpretedFunction.__call__ = call


def make_types_once():
    """From now on make the type of each shape once. The stock interpreter makes it at each operation."""
    block, tensor, facts = tl.block_type.__init__, tl.tensor.__init__, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in facts:
            block(self, element_ty, shape)
            facts[key] = vars(self)
        self.__dict__ = facts[key]

    def tensor_of_type(self, handle, type):
        if (found := facts.get(type.name)) is None:
            tensor(self, handle, type)
            facts[type.name] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, found

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor_of_type


@contextmanager
def _concurrent_builder(grid):
    """Make the interpreter safe for several threads, and restore everything afterwards."""
    # Many objects hold this builder, so its class changes and its identity does not.
    builder = interpreter.interpreter_builder
    switch_interval = sys.getswitchinterval()
    builder.set_grid_dim(*grid)
    try:
        builder.__class__ = _ConcurrentBuilder
        sys.setswitchinterval(SWITCH_INTERVAL)
        with prepared_once():
            yield
    finally:
        sys.setswitchinterval(switch_interval)
        builder.__class__ = interpreter.InterpreterBuilder
