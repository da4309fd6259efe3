"""The roundings on the way to a result in float32, counted: the oracle runs, and each of its operations rounds."""

import numpy as np

HALF = float(np.finfo(np.float32).eps) / 2
EXACT = np.negative, np.less, np.greater


def rounding_by(generator: np.random.Generator) -> type[np.ndarray]:
    """Arrays in float64, each of whose operations is wrong by a random part, at most a half, of float32's last place.

    What counts as more than one rounding: exp and tanh, two, since libraries compute them to a unit in the last place;
    and a sum of K terms, each of which is in up to K partial sums, sqrt(K), since roundings are independent.
    """

    def off(a, roundings: float = 1):
        return a * (1 + roundings * HALF * generator.uniform(-1, 1, np.shape(a)))

    class Rounding(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
            first, *others = (a.view(np.ndarray) if isinstance(a, Rounding) else a for a in inputs)
            if ufunc is np.matmul or method == "reduce":
                first = off(first, np.shape(first)[-1] ** 0.5)
            result = getattr(ufunc, method)(first, *others, **options)
            if ufunc not in EXACT:
                result = off(result, 2 if ufunc in (np.exp, np.tanh) else 1)
            if out is None:
                return np.asarray(result).view(Rounding)
            out[0].view(np.ndarray)[...] = result
            return out[0]

    return Rounding
