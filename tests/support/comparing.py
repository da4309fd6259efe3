"""Limits of errors: results are as close to the float64 oracle as those of torch's own LSTM, or equal those of another
module within rounding."""

import numpy as np
import pytest
import torch

import gpu_lstm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS_HERE = "triton" if torch.cuda.is_available() else "numba"
"""The backend whose kernels are compiled on this machine. Tests of what lies above the kernels use it, since they need
no interpreter."""
PLACES = {  # dtype and device of a module's parameters, by backend
    "torch": {"dtype": torch.float64, "device": "cpu"},
    "reference": {"dtype": torch.float64, "device": "cpu"},
    "triton": {"dtype": torch.float32, "device": DEVICE},  # without a GPU the kernels run in Triton's interpreter
    "numba": {"dtype": torch.float32, "device": "cpu"},
}
BACKENDS = "torch", "reference", KERNELS_HERE
every_backend = pytest.mark.parametrize("backend", BACKENDS)
both_kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU"])
both_classes = pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.GRU])
both_ways = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
LARGE = 20_000  # elements of h
FEW = 64  # with fewer independent errors than this, the RMS is a matter of chance
# The condition of a second derivative, which has 4 passes behind it instead of 2, and sums of twice as many terms.
SECOND = 4
SIGMAS = {4: 4, 2: 2}  # how many sigmas of counted roundings are allowed, by the bytes of a number
OF_A_STEP = 22  # the number of roundings to half precision in a step
FAR = 1000  # times the allowed error: chance does not reach it, and a fault of 1 % in float32 exceeds it


def judge(errors, dtype, yardstick, truths, steps):
    """Check that the RMS error of every result and gradient is at most twice that of the yardstick in the same dtype.

    `errors` has, by name, (our error, their error, the truth) of each call. `truths` has a function for each call:
    truth(kind) returns the results by the oracle, which computes with arrays of `kind`.

    docs/testing.md explains the limit. An RMS below the unit in the last place of the largest element counts as that
    unit.

    In half precision the reference rounds only its results, whereas kernels also round h, the four gates and their
    gradients. A gate counts four times, since a slope s (1 - s) has twice the error of s. This makes 22 independent
    roundings a step. So sqrt(22 T) times the rounding error of the truth counts as the least error, where it is smaller
    than the unit, and where there are many elements. In half precision kernels round less than half as many numbers as
    the formulas have, and `counted` counts all of these.
    """
    limits: dict[str, tuple[float, float]] = {}
    for name, found in errors.items():
        for our_error, _, _ in found:
            assert np.isfinite(our_error).all(), f"{name}: not finite at {np.argwhere(~np.isfinite(our_error))[0]}"
        ours, theirs, true = (np.concatenate([parts[i].ravel() for parts in found]) for i in range(3))
        if not ours.size:  # a batch of no sequences
            continue
        least = torch.finfo(dtype).eps * np.abs(true).max(initial=0.0)
        if dtype.itemsize == 2:
            own = _rms(torch.from_numpy(true).to(dtype).double().numpy() - true)
            if yardstick == "torch":
                least = own
            elif ours.size >= FEW:
                least = min(least, (OF_A_STEP * steps) ** 0.5 * own)
            (leans, chance), (their_leans, _) = (_leaning(error, true, dtype) for error in (ours, theirs))
            assert abs(leans) <= max(0.25, 2 * abs(their_leans)) + chance, (
                f"{name}: errors are {leans:.2f} units in the last place away from zero on average "
                f"({yardstick}'s own {their_leans:.2f}): is something cut off, not rounded?"
            )
        allowed = 2 * max(_rms(theirs), least)
        small = len(truths) > 0 and next(iter(errors.values()))[0][2].size <= LARGE
        if small and allowed < _rms(ours) < FAR * allowed:
            limits = limits or counted(truths, dtype)
            rms, independent = limits[name]
            allowed = max(allowed, SIGMAS[dtype.itemsize] * rms) if independent < FEW else allowed
        worst = max((parts[0] for parts in found), key=lambda error: np.abs(error).max(initial=0.0))
        where = tuple(map(int, np.unravel_index(np.abs(worst).argmax(), worst.shape)))
        assert _rms(ours) <= allowed, (
            f"{name}: RMS error {_rms(ours):.3g}, allowed {allowed:.3g} ({yardstick}'s own {_rms(theirs):.3g}); "
            f"worst {worst[where]:.3g} at {where} of {worst.shape}"
        )


def counted(truths, dtype, draws=16):
    """Return, by name, the RMS error that roundings cause in a result, and the number of independent errors.

    The oracle rounds at random after each of its operations, so roundings add up as they do in a kernel.

    The RMS over draws is one sigma of an error. Four sigmas are allowed. A single error exceeds them once in 16,000
    cases, if it is normal and every rounding is as large as possible. The number of independent errors n follows from
    how much the mean square varies between draws: its variance is 2 / n of its own square if n normal errors decide it.
    With 64 errors on both sides, RMS errors differ by a factor of 2 in 5 of 10^8 cases.
    """
    generator, squares = np.random.default_rng(0), {}
    for truth in truths:
        exact = truth(np.ndarray)
        for draw in range(draws):
            for name, found in truth(rounding_as(dtype, generator)).items():
                error = np.asarray(found) - np.asarray(exact[name])
                squares.setdefault(name, [[] for _ in range(draws)])[draw].append(error.ravel() ** 2)
    of_draws = {name: np.array([np.concatenate(parts).mean() for parts in found]) for name, found in squares.items()}
    return {name: (float(found.mean() ** 0.5), float(2 * found.mean() ** 2 / max(found.var(), np.finfo(float).tiny)))
            for name, found in of_draws.items()}  # fmt: skip


EXACT = np.negative, np.less, np.greater


def rounding_as(dtype, generator):
    """Return a class of float64 arrays whose operations each have a random error of up to half a unit in the last place
    of `dtype`.

    In float32 some operations count as more than one rounding. exp and tanh count as two, since libraries compute them
    to a unit in the last place. A sum of K terms counts as sqrt(K), since each term is in up to K partial sums and
    roundings are independent. In half precision these are computed in float32 and rounded once.
    """
    half = dtype.itemsize == 2

    def off(a, roundings=1):
        return a * (1 + (1 if half else roundings) * torch.finfo(dtype).eps / 2 * generator.uniform(-1, 1, np.shape(a)))

    class Rounding(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
            first, *others = (a.view(np.ndarray) if isinstance(a, Rounding) else a for a in inputs)
            if (ufunc is np.matmul or method == "reduce") and not half:
                first = off(first, np.shape(first)[-1] ** 0.5)
            result = getattr(ufunc, method)(first, *others, **options)
            if ufunc not in EXACT and not (half and out):  # an operation in place is a sum over times and sequences
                result = off(result, 2 if ufunc in (np.exp, np.tanh) else 1)
            if out is None:
                return np.asarray(result).view(Rounding)
            out[0].view(np.ndarray)[...] = result
            return out[0]

    return Rounding


def _rms(error):
    return float(np.sqrt(np.mean(error**2))) if error.size else 0.0


def _leaning(error, true, dtype):
    """Return the mean error away from zero, in mean units in the last place, and 4 sigma of its chance variation."""
    if not error.size:
        return 0.0, 0.0
    info = torch.finfo(dtype)
    unit = np.mean(info.eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(true), info.tiny))))
    away = np.sign(true) * error / unit
    return float(away.mean()), float(4 * away.std() / np.sqrt(away.size))


def assert_same(ours, theirs, backend=None, equal_nan=False, condition=1):
    """Check that results are equal within rounding: 8 units in the last place of the larger of 1 and the largest
    element.

    The last place is that of the dtype which `backend` computed in, by default the dtype of our result. The 8 units are
    counted for modules like those of pairs.py. A gradient has T = 4 steps behind it in each of 2 layers and in both
    passes. A step has products of 7 terms in all and a cell of about 20 operations. These 432 roundings of 0.29 units,
    the RMS of a uniform one, make 6 units of 1 if none is damped, and gates' slopes are at most 1/4.

    `condition` is the factor by which rounding errors grow, for example in a layer norm, which divides by the deviation
    of a few numbers.
    """
    assert list(ours) == list(theirs)
    for name, true in theirs.items():
        scale = max(1.0, true.nan_to_num().abs().max().item() if true.numel() else 0.0)
        dtype = ours[name].dtype if backend is None else PLACES[backend]["dtype"]
        torch.testing.assert_close(
            ours[name].double().cpu(), true.double().cpu(), rtol=0, atol=8 * torch.finfo(dtype).eps * scale * condition,
            equal_nan=equal_nan, msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
