"""Examples of one layer in one direction, and the comparison of a backend with the float64 oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from roundings import rounding_as
from torch import Tensor

from gpu_lstm.backends import autograd, fused, kernels, reference
from gpu_lstm.call.choices import Backend
from gpu_lstm.call.modes import modes, recurrent_precision
from gpu_lstm.call.noise import Noise
from gpu_lstm.call.sequences import Traversal
from gpu_lstm.call.weights import Weights
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels.problem import problem_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = {  # of a module's parameters, by backend
    "torch": {"dtype": torch.float64, "device": "cpu"},
    "reference": {"dtype": torch.float64, "device": "cpu"},
    "triton": {"dtype": torch.float32, "device": DEVICE},  # without a GPU in Triton's interpreter
}
BACKENDS = tuple(PLACES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
LARGE = 20_000  # elements of h
FEW = 64  # independent errors, of which the RMS is a matter of chance
SECOND = 4  # the condition of a second derivative: of 4 passes, not 2, and of sums of twice as many terms
SIGMAS = {4: 4, 2: 2}  # of counted roundings that are allowed, by the bytes of a number
OF_A_STEP = 22  # roundings to half precision
FAR = 1000  # times what is allowed: further than chance goes, and nearer than a fault of 1 % in float32
RAGGED = "lengths", "resets"
DEFAULTS = dict(bias=True, ragged=False, resets=0.0, states=False, peepholes=False, norms=(), noise=(), reverse=False,
                recompute=False)  # fmt: skip
NAMES = ("h", "h_n", "c_n", "dx", "dh0", "dc0", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", "dweight_hr",
         "dweight_peephole", "dgain_ih", "dgain_hh", "dgain_c", "dbias_c", "dreset_h", "dreset_c")  # fmt: skip
MASKS = ("dropout_h", "zoneout_h", "zoneout_c")
OPTIONS = {  # of `example`, by the words that cases are written in; the first five are all that torch's own LSTM runs
    "plain": {}, "reverse": dict(reverse=True), "ragged": dict(ragged=True), "resets": dict(resets=0.4),
    "no-bias": dict(bias=False),
    "states": dict(resets=0.4, states=True), "peepholes": dict(peepholes=True), "norms": dict(norms=("ih", "hh", "c")),
    **{f"norm-{norm}": dict(norms=(norm,)) for norm in ("hh", "c")},
    "masks": dict(noise=MASKS), **{name: dict(noise=(name,)) for name in MASKS}, "expected": dict(noise="expected"),
    "recompute": dict(recompute=True)}  # fmt: skip
OF_TORCH = list(OPTIONS)[:5]


def one_layer(x, state, weights, *, lengths, resets, reset_states, reverse, backend, noise, recompute):
    """lstm_layer, where masks are given or gates recomputed as only modules do."""
    traversal = Traversal(lengths, resets, False, None if reset_states is None else [reset_states])
    traversal = traversal.backwards() if reverse else traversal
    given = x, state, Weights(*weights), traversal, Noise(*(noise.get(name) for name in MASKS))
    if backend == "reference":
        return reference.run_layer(*given)
    problem = problem_of(fused.inputs_of(*given), reverse, recurrent_precision(x.dtype))
    of_kernels = given[0], tuple(t[None] for t in state), *given[2:]  # states [1, B, *]
    layer = kernels.layer_of(Backend(backend), problem, x.device)
    h, final = autograd.run_layer(layer, *of_kernels, recompute, modes(x))
    return h, tuple(t[0] for t in final)


@dataclass
class Example:
    """One layer, one direction: float64 inputs, output gradients, and the oracle's results for them."""

    tensors: list[Tensor | None]  # x, h0, c0 and the weights, in the order of lstm_layer's
    lengths: Tensor | None
    resets: Tensor | None
    reverse: bool
    output_gradients: list[Tensor]  # of h, h_n, c_n
    reset_states: tuple[Tensor | None, Tensor | None] = (None, None)  # h [T, B, P], c [T, B, H] that resets leave
    noise: dict[str, Tensor] = field(default_factory=dict)  # by MASKS: factors [B, P], bool [T, B, P] and [T, B, H];
    # or the two last as probabilities, []
    recompute: bool = False

    def rounded(self, dtype: torch.dtype) -> "Example":
        """The same example with all its numbers representable in `dtype`."""

        def through(t):
            return None if t is None else t.to(dtype).double()

        lists = {name: [*map(through, getattr(self, name))] for name in ("tensors", "output_gradients", "reset_states")}
        noise = {name: through(t) if name == "dropout_h" else t for name, t in self.noise.items()}
        return replace(self, noise=noise, **lists)

    def truth(self, kind: type[np.ndarray] = np.ndarray) -> list[np.ndarray | None]:
        """Results and gradients in the order of NAMES, from the NumPy oracle, which computes with arrays of a kind."""
        given = *self.tensors, *self.reset_states
        *inputs, reset_h, reset_c = (None if t is None else t.numpy().view(kind) for t in given)
        x, h0, c0, *_ = inputs
        sizes = dict(zip(MASKS, (h0.shape, (len(x), *h0.shape), (len(x), *c0.shape))))
        noise = {name: np.broadcast_to(t.double().numpy(), sizes[name]) for name, t in self.noise.items()}
        noise |= dict(reset_h=reset_h, reset_c=reset_c)
        *results, tape = oracle.layer(*inputs, lengths=self.lengths, resets=self.resets, reverse=self.reverse, **noise)
        dh, dh_n, dc_n = (g.numpy() for g in self.output_gradients)
        return [*results, *oracle.layer_gradients(*inputs, tape=tape, dh=dh, dh_n=dh_n, dc_n=dc_n, **noise)]

    def named_truth(self, kind: type[np.ndarray]) -> dict[str, np.ndarray | None]:
        """The same by NAMES."""
        return dict(zip(NAMES, self.truth(kind)))

    def truth_for(self, device: str) -> list[np.ndarray | None]:
        """The same; for a large example on a GPU by the float64 reference there, since NumPy's loops would be slow."""
        if device == "cpu" or self.output_gradients[0].numel() <= LARGE:
            return self.truth()
        found = self.run("reference", torch.float64, device)
        return [None if t is None else t.detach().cpu().numpy() for t in found]

    def call(self, backend: str, tensors: list[Tensor | None]) -> list[Tensor]:
        """h, h_n and c_n from gpu_lstm for `tensors` (those of the example, then reset_states), unconverted."""
        x, h0, c0, *weights, reset_h, reset_c = tensors
        options = dict(reverse=self.reverse, backend=backend)
        options["reset_states"] = None if reset_h is None else (reset_h, reset_c)
        options |= {name: t if t is None else t.to(x.device) for name, t in vars(self).items() if name in RAGGED}
        noise = {n: t.to(x.device, x.dtype if n == "dropout_h" else t.dtype) for n, t in self.noise.items()}
        if not noise and not self.recompute:
            h, state = lstm_layer(x, weights, (h0, c0), **options)
        else:  # users ask modules for these
            h, state = one_layer(x, (h0, c0), weights, noise=noise, recompute=self.recompute, **options)
        return [h, *state]

    def run(self, backend: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
        """Results and, if autograd is on, gradients in the order of NAMES, from gpu_lstm in `dtype` on `device`."""
        given = *self.tensors, *self.reset_states
        tensors = [None if t is None else t.detach().to(device, dtype, copy=True).requires_grad_() for t in given]
        found = self.call(backend, tensors)
        if torch.is_grad_enabled():
            torch.autograd.backward(found, [g.to(device, dtype) for g in self.output_gradients])
        return [*found, *(None if t is None else t.grad for t in tensors)]


def example(T: int, B: int, I: int, H: int, P: int = 0, *, seed: int = 0, **options) -> Example:
    """A random example with these options.

    ragged: lengths from 0 to T, both among them where B allows. resets: their rate; they leave states, not zeros, with
    `states`. norms: what is normalised, of "ih", "hh" and "c". noise: which of MASKS, each element a coin toss; or
    "expected", as in eval().
    """
    assert options.keys() <= DEFAULTS.keys()
    has, generator = SimpleNamespace(**DEFAULTS | options), torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    width = P or H
    tensors = [
        normal(T, B, I), normal(B, width), normal(B, H),
        normal(4 * H, I, scale=I**-0.5), normal(4 * H, width, scale=width**-0.5),
        *(normal(4 * H) if has.bias else None for _ in range(2)), normal(P, H, scale=H**-0.5) if P else None,
    ]  # fmt: skip
    lengths = torch.randint(0, T + 1, (B,), generator=generator) if has.ragged else None
    if has.ragged:
        lengths[0], lengths[-1] = 0, T
    resets = torch.rand(T, B, generator=generator) < has.resets if has.resets else None
    output_gradients = [normal(T, B, width), normal(B, width), normal(B, H)]
    left = (normal(T, B, width), normal(T, B, H)) if has.states else (None, None)
    tensors.append(normal(3 * H) if has.peepholes else None)
    sizes = dict(ih=4 * H, hh=4 * H, c=H)
    tensors += [1 + normal(size, scale=0.3) if norm in has.norms else None for norm, size in sizes.items()]
    tensors.append(normal(H) if has.bias and "c" in has.norms else None)
    noise = dict(zoneout_h=torch.tensor(0.3), zoneout_c=torch.tensor(0.45))
    if has.noise != "expected":
        dropped, h, c = (torch.rand(*size, generator=generator) for size in ((B, width), (T, B, width), (T, B, H)))
        tosses = dict(zip(MASKS, ((dropped < 0.7).double() / 0.7, h < 0.3, c < 0.45)))
        noise = {name: tosses[name] for name in MASKS if name in has.noise}
    return Example(tensors, lengths, resets, has.reverse, output_gradients, left, noise, has.recompute)


def example_of(size: tuple[int, ...], words: str, seed: int) -> Example:
    """A random example of (T, B, I, H) or (T, B, I, H, P) with OPTIONS in words: "ragged resets reverse"."""
    return example(*size, seed=seed, **{k: v for word in words.split() for k, v in OPTIONS[word].items()})


def check(size: tuple[int, ...], words: str, backend: str, dtype: torch.dtype, device: str = "cpu", **how) -> None:
    """Every result and gradient of such examples: in float64 to 1e-12, else as good as torch's or the reference's."""
    if dtype is not torch.float64:
        yardstick = "torch" if set(words.split()) <= set(OF_TORCH) else "reference"
        how = dict(yardstick=yardstick) | how
        return assert_as_good_as_torch(partial(example_of, size, words), backend, dtype, device, **how)
    for seed in range(how.pop("seeds", 3)):
        given = example_of(size, words, seed)
        for name, true, our in zip(NAMES, given.truth(), given.run(backend, dtype), strict=True):
            if true is not None:
                torch.testing.assert_close(our.detach(), torch.from_numpy(true), rtol=1e-12, atol=1e-12, msg=name)


Errors = dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]  # by NAMES, of each example: ours, theirs, truth


def assert_as_good_as_torch(
    make_example: Callable[[int], Example], backend: str, dtype: torch.dtype, device="cpu", seeds=3, yardstick="torch"
) -> None:
    """Every result and gradient of `seeds` examples, so that one lucky rounding decides nothing; see `judge`.

    `yardstick`: another backend than torch's LSTM, where that does not support the example.
    """
    errors: Errors = {}
    examples = [make_example(seed).rounded(dtype) for seed in range(seeds)]
    for given in examples:
        runs = (given.run(name, dtype, device) for name in (backend, yardstick))
        for name, true, our, their in zip(NAMES, given.truth_for(device), *runs):
            if true is not None:
                our_error, their_error = (t.detach().double().cpu().numpy() - true for t in (our, their))
                errors.setdefault(name, []).append((our_error, their_error, true))
    judge(errors, dtype, yardstick, [given.named_truth for given in examples], len(examples[0].tensors[0]))


Truth = Callable[[type[np.ndarray]], dict[str, np.ndarray | None]]
"""truth(kind): the results of an example, by the oracle, which computes with arrays of a kind."""


def judge(
    errors: Errors, dtype: torch.dtype, yardstick: str = "torch", truths: Sequence[Truth] = (), steps: int = 1
) -> None:
    """The RMS error of every result and gradient is at most twice that of the yardstick in the same dtype.

    An RMS below the unit in the last place of the largest element counts as that unit; in half precision, where
    torch's LSTM rounds at every step as the kernels do, below the RMS of the truth's own rounding. The reference rounds
    results alone: kernels also round h and, of four gates, their gradients and themselves, whose roundings count four
    times, since a slope s (1 - s) has twice the error of s; with the result, 22 independent roundings in each of T
    steps. So sqrt(22 T) times the truth's own counts, where that is less and over many elements. And errors must not be
    biased, as they are where results are truncated, not rounded.

    Where a few errors decide the yardstick's RMS, it is chance: now and then one library rounds them all luckily.
    There results may be wrong by 4 times what `counted` makes of the roundings on the way to the `truths`, or by 2
    times in half precision, where kernels round less than half as many numbers as the formulas have.
    """
    limits: dict[str, tuple[float, float]] = {}
    for name, found in errors.items():
        for our_error, _, _ in found:
            assert np.isfinite(our_error).all(), f"{name}: not finite at {np.argwhere(~np.isfinite(our_error))[0]}"
        ours, theirs, true = (np.concatenate([parts[i].ravel() for parts in found]) for i in range(3))
        least = torch.finfo(dtype).eps * np.abs(true).max(initial=0.0)
        if dtype.itemsize == 2:
            own = _rms(torch.from_numpy(true).to(dtype).double().numpy() - true)
            if yardstick == "torch":
                least = own
            elif truths and ours.size >= FEW:
                least = min(least, (OF_A_STEP * steps) ** 0.5 * own)
            (leans, chance), (their_leans, _) = (_leaning(error, true, dtype) for error in (ours, theirs))
            assert abs(leans) <= max(0.25, 2 * abs(their_leans)) + chance, (
                f"{name}: errors are {leans:.2f} units in the last place away from zero on average "
                f"({yardstick}'s own {their_leans:.2f}): is something cut off, not rounded?"
            )
        allowed = 2 * max(_rms(theirs), least)
        small = next(iter(errors.values()))[0][2].size <= LARGE
        if truths and small and dtype is not torch.float64 and allowed < _rms(ours) < FAR * allowed:
            limits = limits or counted(truths, dtype)
            rms, independent = limits[name]
            allowed = max(allowed, SIGMAS[dtype.itemsize] * rms) if independent < FEW else allowed
        worst = max((parts[0] for parts in found), key=lambda error: np.abs(error).max(initial=0.0))
        where = tuple(map(int, np.unravel_index(np.abs(worst).argmax(), worst.shape)))
        assert _rms(ours) <= allowed, (
            f"{name}: RMS error {_rms(ours):.3g}, allowed {allowed:.3g} ({yardstick}'s own {_rms(theirs):.3g}); "
            f"worst {worst[where]:.3g} at {where} of {worst.shape}"
        )


def counted(truths: Sequence[Truth], dtype: torch.dtype, draws: int = 16) -> dict[str, tuple[float, float]]:
    """By name: the RMS error that the roundings on the way to a result make of it, and of how many errors.

    They are as many as the formulas have: the oracle rounds after each of its operations (roundings.py). So a K-long
    product counts sqrt(K), a step's cell about 20, and those of T steps, with what gates' slopes, cancellations and
    norms make of them, add up as they do in a kernel. They are random, hence independent, and no machine's own.

    The RMS over draws is one sigma of an error: 4 are allowed even for one, which passes them once in 16,000 if it is
    normal and every rounding as large as it can be. The number of independent errors follows from how much the mean
    square varies from draw to draw: by 2 / n of its own square, if n normal errors decide it. For two times 64 of them
    a factor of 2 between RMS errors is 5 in 10^8.
    """
    generator, squares = np.random.default_rng(0), {}
    for truth in truths:
        exact = truth(np.ndarray)
        for draw in range(draws):
            for name, found in truth(rounding_as(dtype, generator)).items():
                if found is not None:
                    error = np.asarray(found) - np.asarray(exact[name])
                    squares.setdefault(name, [[] for _ in range(draws)])[draw].append(error.ravel() ** 2)
    of_draws = {name: np.array([np.concatenate(parts).mean() for parts in found]) for name, found in squares.items()}
    return {name: (float(found.mean() ** 0.5), float(2 * found.mean() ** 2 / max(found.var(), np.finfo(float).tiny)))
            for name, found in of_draws.items()}  # fmt: skip


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2))) if error.size else 0.0


def _leaning(error: np.ndarray, true: np.ndarray, dtype: torch.dtype) -> tuple[float, float]:
    """The mean of errors away from zero, in mean units in the last place, and what chance explains of it: 4 sigma."""
    if not error.size:
        return 0.0, 0.0
    info = torch.finfo(dtype)
    unit = np.mean(info.eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(true), info.tiny))))
    away = np.sign(true) * error / unit
    return float(away.mean()), float(4 * away.std() / np.sqrt(away.size))


def assert_same(ours: dict, theirs: dict, backend: str | None = None, equal_nan=False, condition: float = 1) -> None:
    """Equal but for rounding: 8 units in the last place of the larger of 1 and the largest element.

    The last place is that of the dtype which `backend` computed in, by default that of our result. Counted for modules
    like those of pairs.py: in both passes a gradient has T = 4 steps behind it in each of 2 layers, a step has products
    of 7 terms in all and a cell of about 20 operations. These 432 roundings of 0.29 units (the RMS of a uniform one)
    make 6 units of 1, were none damped; but gates' slopes are at most 1/4. `condition`: the factor by which rounding
    errors grow, as in layer norms, which divide by the deviation of a few numbers.
    """
    assert list(ours) == list(theirs)
    for name, true in theirs.items():
        scale = max(1.0, true.nan_to_num().abs().max().item() if true.numel() else 0.0)
        dtype = ours[name].dtype if backend is None else PLACES[backend]["dtype"]
        torch.testing.assert_close(
            ours[name].double().cpu(), true.double().cpu(), rtol=0, atol=8 * torch.finfo(dtype).eps * scale * condition,
            equal_nan=equal_nan, msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
