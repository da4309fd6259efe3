"""The roundings on the way to a result, counted: the oracle runs, and each of its operations rounds."""

import numpy as np
import torch

EXACT = np.negative, np.less, np.greater


def rounding_as(dtype: torch.dtype, generator: np.random.Generator) -> type[np.ndarray]:
    """Arrays in float64, each of whose operations is wrong by a random part, at most a half, of `dtype`'s last place.

    What counts as more than one rounding in float32: exp and tanh, two, since libraries compute them to a unit in the
    last place; and a sum of K terms, each of which is in up to K partial sums, sqrt(K), since roundings are
    independent. In half precision all of these are in float32, and are rounded once.
    """
    half = dtype.itemsize == 2

    def off(a, roundings: float = 1):
        return a * (1 + (1 if half else roundings) * torch.finfo(dtype).eps / 2 * generator.uniform(-1, 1, np.shape(a)))

    class Rounding(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
            first, *others = (a.view(np.ndarray) if isinstance(a, Rounding) else a for a in inputs)
            if (ufunc is np.matmul or method == "reduce") and not half:
                first = off(first, np.shape(first)[-1] ** 0.5)
            result = getattr(ufunc, method)(first, *others, **options)
            if ufunc not in EXACT and not (half and out):  # in place: a sum over times and sequences
                result = off(result, 2 if ufunc in (np.exp, np.tanh) else 1)
            if out is None:
                return np.asarray(result).view(Rounding)
            out[0].view(np.ndarray)[...] = result
            return out[0]

    return Rounding
