"""The compiled product of matrices, which computes gradients after the loop on a CPU."""

import ctypes
import os
import warnings
from unittest.mock import Mock

import pytest
import torch
from cases import check

import gpu_lstm
from gpu_lstm.kernels.numba_rnn import build, launch

pytest.importorskip("numba")

M, K, N = 2 * launch.TALL + 3, launch.DEEP + 30, 51


@pytest.fixture(autouse=True)
def every_product(monkeypatch):
    monkeypatch.setattr(launch, "LARGE", 1)
    launch.multiplies_right.cache_clear()
    yield
    launch.multiplies_right.cache_clear()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("words", ["both", "gru ragged resets", "slstm", "norms", "gru three-heads", "masks peepholes"])
def test_the_gradients_of_a_module_are_right(monkeypatch, words, threads):
    """There are 540 rows of x, more than DEEP, and 72 or 96 rows of weights, more than TALL."""
    assert launch.multiplies_right()
    monkeypatch.setattr(launch, "multiply", counted := Mock(side_effect=launch.multiply))
    torch.set_num_threads(threads)
    check((60, 9, 17, 24), words, "numba", torch.float32, seeds=1)
    assert counted.call_count >= 2


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("columns_of_a", [False, True])
@pytest.mark.parametrize("columns_of_b", [False, True])
@pytest.mark.parametrize("size", [(M, K, N), (64, 1, 1), (64, 16, 48), (65, launch.DEEP, 7), (70, 2 * launch.DEEP, 96)])
def test_a_product_is_as_right_as_torchs_and_its_bits_depend_on_neither_rows_nor_threads(
    size, columns_of_a, columns_of_b
):
    M, K, N = size
    a, b = torch.randn(M, K + 3)[:, :K], torch.randn(K, N + 5)[:, :N]
    a, b = a.T.contiguous().T if columns_of_a else a, b.T.contiguous().T if columns_of_b else b
    found, exact = [], a.double() @ b.double()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(launch.product(a, b))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], exact.float(), atol=K**0.5 * 1e-6, rtol=1e-5)
    assert (found[0] - exact).norm() <= 2 * (a @ b - exact).norm() + 1e-6 * exact.norm()
    assert torch.equal(launch.product(a[: launch.TALL], b), found[0][: launch.TALL])


def test_a_matrix_whose_rows_and_columns_are_apart_is_copied():
    a, b = torch.randn(M, 2 * K)[:, ::2], torch.randn(K, 3 * N)[:, ::3]
    torch.testing.assert_close(launch.product(a, b), (a.double() @ b.double()).float(), atol=K**0.5 * 1e-6, rtol=1e-5)


def shifted(address):
    """Compute the product, and write it a number further than it should be."""
    fields = ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))
    fields[list(launch.record.MATMUL.names).index("out")] += 4
    build.function(launch.MATMUL)(address)


@pytest.mark.parametrize(
    ("fault", "said"),
    [(lambda address: None, "wrong numbers"), (shifted, r"matmul wrote up to 4 bytes past the end of out \[131, 51\]")],
)
def test_a_product_that_is_wrong_is_not_used(monkeypatch, fault, said):
    """A gradient is right, and one warning says what happened."""
    gru = gpu_lstm.GRU(17, 24, backend="numba")
    gru(torch.randn(9, 9, 17))[0].sum().backward()
    launch.multiplies_right.cache_clear()
    run = build.run
    monkeypatch.setattr(build, "run", lambda function, at, count: (
        fault(at) if function is build.function(launch.MATMUL) else run(function, at, count)
    ))  # fmt: skip
    with pytest.warns(UserWarning, match=f"the compiled product of matrices fails on this CPU, .*: {said}"):
        check((60, 9, 17, 24), "gru", "numba", torch.float32, seeds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check((60, 9, 17, 24), "gru", "numba", torch.float32, seeds=1)
