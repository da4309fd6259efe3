"""The kernels' inline assembly as NumPy functions, for Triton's interpreter, which cannot run assembly.

Where kernels are interpreted, importing this module replaces the library's functions of the same names. Products are
exact in float32, whereas the library rounds weights to TF32.
"""

import itertools

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from gpu_lstm.kernels.triton_rnn import exchange, features
from gpu_lstm.kernels.triton_rnn.threads import cooperative, fragments, resident
from gpu_lstm.kernels.triton_rnn.tiles import held

FLOATS = {tl.float32: np.float32, tl.float16: np.float16}  # bfloat16 is wrong in the interpreter
rounded_to_tf32 = fragments.to_tf32


def _tensors(arrays, dtype):
    """Return a tuple of tensors [THREADS]."""
    return tuple(tl.tensor(TensorHandle(a.copy(), dtype), tl.block_type(dtype, [a.size])) for a in arrays)


def _elements(words, DTYPE):
    """Convert words [THREADS] to their elements [words, THREADS, elements of a word]."""
    words = np.stack([word.handle.data for word in words])[..., None]
    return words.view(FLOATS[DTYPE]).astype(np.float32)


def to_tf32(words):
    return words


def product(weights, x, DTYPE):
    a, b = _elements(weights, DTYPE), _elements(x, DTYPE)
    chunks, tiles, of_column = len(b) // 4, len(a) // len(b) // 2, 4 * a.shape[-1]
    # The axes of a: chunk, tile, word of a quad, half of a tile, warp, column, then quarter and element.
    a, b = a.reshape(chunks, tiles, 4, 2, -1, 8, of_column), b.reshape(chunks, 4, -1, 8, of_column)
    sums = np.einsum("ctkhwre,ckwse->thwrs", a, b).reshape(2 * tiles, -1, 4, 2)
    return _tensors((half[:, :, k].ravel() for half in sums for k in range(2)), tl.float32)


def sum_over_warps(products, rows, sequences, wanted, buffer, WARPS):
    by_warp = np.stack([product.handle.data for product in products]).reshape(-1, 2, 2, WARPS, 8, 4)
    total = by_warp.sum(axis=3).transpose(0, 1, 3, 4, 2).reshape(-1, 8)
    places = (tuple(t.handle.data for t in place) for place in zip(rows, itertools.cycle(sequences)))
    return _tensors((np.where(wanted.handle.data, total[place], np.nan) for place in places), tl.float32)


def to_shared(values, sequences, elements, buffer, CHUNKS):
    shared = np.zeros((8, 64 * CHUNKS), np.uint8).view(FLOATS[values[0].dtype])
    for value, *place in zip(values, itertools.cycle(sequences), elements):
        shared[tuple(t.handle.data for t in place)] = value.handle.data
    return shared


def take(shared, FIRST, COUNT, CHUNKS, WARPS):
    words = shared.view(np.int32).reshape(8, CHUNKS, 4, 4)[:, FIRST : FIRST + COUNT]  # column, chunk, quarter, word
    of_warp = words.transpose(1, 3, 0, 2).reshape(4 * COUNT, 32)
    return _tensors(np.tile(of_warp, WARPS), tl.int32)


def of_the_next_thread(x):
    return _tensors([x.handle.data.reshape(-1, 2)[:, ::-1].ravel()], tl.int32)[0]


def publish(word_ptr, words, mask):
    tl.store(word_ptr, words, mask=mask)


def look(words, GROUPS, SIZE, STRIDE, TOGETHER):
    offsets = (n // SIZE * STRIDE + n % SIZE for n in range(GROUPS * SIZE))
    return tuple(tl.load(words.first_ptr + n, mask=words.left > n, other=0, volatile=True) for n in offsets)


def collect(words, wait, seen, GROUPS, SIZE, STRIDE, TOGETHER):
    place, awaited = (words, GROUPS, SIZE, STRIDE, TOGETHER), (words.left, wait.phase, SIZE, STRIDE)
    found = seen or look(*place)
    lost = bool((wait.delay.handle.data < 0).all())
    polls, poll_limit = 0, 0 if lost else tl.load(wait.error_ptr + 1)
    while count_missing(found, *awaited) > 0 and polls < poll_limit:
        found, polls = look(*place), polls + 1
        if tl.load(wait.error_ptr, volatile=True) != 0:
            break
    if count_missing(found, *awaited) > 0 and not lost:
        tl.store(wait.error_ptr, wait.step + 1)
        lost = True
    there = ~are_missing(found, *awaited)
    found = _tensors(np.where(there, [word.handle.data for word in found], np.int32(-1)), tl.int32)
    return found, tl.zeros_like(wait.delay) - int(lost)


@triton.jit
def wait_for(arrivals, tile, times, poll_limit, step):
    arrivals_ptr, error_ptr, expected = arrivals.arrivals_ptr + tile, arrivals.error_ptr, times * tl.num_programs(0)
    arrived, polls = tl.atomic_add(arrivals_ptr, 0, sem="acquire"), 0
    while (arrived - expected < 0) & (polls < poll_limit):
        arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
        polls = tl.where(tl.load(error_ptr, volatile=True) != 0, poll_limit, polls + 1)
    failed = arrived - expected < 0
    tl.store(error_ptr, step + 1, mask=failed & (poll_limit > 0))
    return tl.where(failed, 0, poll_limit)


def count_missing(*awaited):
    return are_missing(*awaited).sum()


def are_missing(words, left, phase, SIZE, STRIDE):
    """Return, for each word, whether it is missing: [words, THREADS]."""
    words = np.stack([word.handle.data for word in words])
    n, phase = np.arange(len(words))[:, None], phase.handle.data if isinstance(phase, tl.tensor) else phase
    absent = words == -1 if phase is None else (words & 1) != phase
    return absent & (left.handle.data > n // SIZE * STRIDE + n % SIZE)


REPLACED = to_tf32, product, sum_over_warps, to_shared, take, of_the_next_thread, publish, look, collect, wait_for
for _module in (exchange, fragments, cooperative, resident, held):
    for _function in REPLACED:
        if features.INTERPRETED and hasattr(_module, _function.__name__):
            setattr(_module, _function.__name__, _function)
