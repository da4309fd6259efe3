"""Examples, and the comparison of a backend with the float64 oracle."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch
from torch import Tensor

from gpu_lstm.backends import autograd, fused, kernels, reference
from gpu_lstm.call.choices import Backend
from gpu_lstm.call.modes import recurrent_precision
from gpu_lstm.functional import lstm_layer
from gpu_lstm.kernels.problem import problem_of
from gpu_lstm.call.noise import NO_NOISE, Noise
from gpu_lstm.call.sequences import Traversal
from gpu_lstm.call.weights import Weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = {  # of a module's parameters, by backend
    "torch": {"dtype": torch.float64, "device": "cpu"},
    "reference": {"dtype": torch.float64, "device": "cpu"},
    "triton": {"dtype": torch.float32, "device": DEVICE},  # without a GPU in Triton's interpreter
}
BACKENDS = tuple(PLACES)
LARGE = 20_000  # elements of h

NAMES = ("h", "h_n", "c_n", "dx", "dh0", "dc0", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", "dweight_hr",
         "dweight_peephole", "dgain_ih", "dgain_hh", "dgain_c", "dbias_c", "dreset_h", "dreset_c")  # fmt: skip


@dataclass
class Example:
    """One layer, one direction: float64 inputs, output gradients, and what the oracle says of them."""

    tensors: list[Tensor | None]  # x, h0, c0 and the weights, in the order of Weights
    lengths: Tensor | None
    resets: Tensor | None
    reverse: bool
    output_gradients: list[Tensor]  # of h, h_n, c_n
    noise: Noise = NO_NOISE
    reset_states: tuple[Tensor | None, Tensor | None] = (None, None)  # h [T, B, P], c [T, B, H] that resets leave

    def rounded(self, dtype: torch.dtype) -> "Example":
        """The same example with all its numbers representable in `dtype`."""

        def through(t):
            return None if t is None else t.to(dtype).double()

        return replace(
            self,
            tensors=[through(t) for t in self.tensors],
            output_gradients=[through(t) for t in self.output_gradients],
            noise=self.noise._replace(dropout_h=through(self.noise.dropout_h)),
            reset_states=tuple(map(through, self.reset_states)),
        )

    def truth(self) -> list[np.ndarray | None]:
        """Results and gradients in the order of NAMES, from the NumPy oracle."""
        inputs = [None if t is None else t.numpy() for t in self.tensors]
        steps = len(self.tensors[0])
        sizes = self.tensors[1].shape, (steps, *self.tensors[1].shape), (steps, *self.tensors[2].shape)
        noise = {
            name: None if t is None else np.broadcast_to(t.double().numpy(), size)
            for (name, t), size in zip(self.noise._asdict().items(), sizes)
        }
        left = (None if t is None else t.numpy() for t in self.reset_states)
        noise |= zip(("reset_h", "reset_c"), left)
        *results, tape = oracle.layer(*inputs, lengths=self.lengths, resets=self.resets, reverse=self.reverse, **noise)
        dh, dh_n, dc_n = (g.numpy() for g in self.output_gradients)
        return [*results, *oracle.layer_gradients(*inputs, tape=tape, dh=dh, dh_n=dh_n, dc_n=dc_n, **noise)]

    def truth_for(self, device: str) -> list[np.ndarray | None]:
        """The same; a large example on a GPU by the reference there, in float64, which test_layer holds to the oracle.

        NumPy's loops would take ten seconds for one.
        """
        if device == "cpu" or self.output_gradients[0].numel() <= LARGE:
            return self.truth()
        found = self.run("reference", torch.float64, device)
        return [None if t is None else t.detach().cpu().numpy() for t in found]

    def run(self, backend: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
        """The same from gpu_lstm, in `dtype` on `device`."""
        tensors = [
            None if t is None else t.to(device, dtype).requires_grad_() for t in (*self.tensors, *self.reset_states)
        ]
        x, h0, c0, *weights, reset_h, reset_c = tensors
        states = None if reset_h is None else (reset_h, reset_c)
        lengths = None if self.lengths is None else self.lengths.to(device)
        resets = None if self.resets is None else self.resets.to(device)
        if not self.noise.present():
            h, (h_n, c_n) = lstm_layer(
                x, weights, (h0, c0), lengths=lengths, resets=resets, reset_states=states, reverse=self.reverse,
                backend=backend,
            )  # fmt: skip
        else:  # users give probabilities, and to modules only
            dropout_h, *zoneouts = (None if t is None else t.to(device) for t in self.noise)
            noise = Noise(None if dropout_h is None else dropout_h.to(dtype), *zoneouts)
            traversal = Traversal(lengths, resets, False, None if states is None else [states])
            traversal = traversal.backwards() if self.reverse else traversal
            h, (h_n, c_n) = with_noise(backend, x, (h0, c0), Weights(*weights), traversal, noise)
        gradients = [g.to(device, dtype) for g in self.output_gradients]
        torch.autograd.backward([h, h_n, c_n], gradients)
        return [h, h_n, c_n, *(None if t is None else t.grad for t in tensors)]


def with_noise(backend, x, state, weights, traversal, noise):
    """A layer in one direction with the noise of a call, which users never give."""
    if backend == "reference":
        return reference.layer(x, state, weights, traversal, noise)
    r = fused.recurrence_of(
        fused.inputs_of(x, state, weights, traversal, noise), traversal.reverse, recurrent_precision(x.dtype)
    )
    layer = kernels.layer_of(Backend(backend), problem_of(x, r), x.device)
    return autograd.layer(layer, x, state, weights, traversal, noise, False)


def example(
    T: int,
    B: int,
    I: int,
    H: int,
    P: int = 0,
    *,
    bias=True,
    ragged=False,
    resets=0.0,
    states=False,
    peepholes=False,
    norms=(),
    reverse=False,
    seed=0,
) -> Example:
    """A random example.

    ragged: lengths from 0 to T, both among them where B allows. resets: their rate. states: they leave some, not zeros.
    norms: what is normalised, of "ih", "hh" and "c".
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    width = P or H
    tensors = [
        normal(T, B, I), normal(B, width), normal(B, H),
        normal(4 * H, I, scale=I**-0.5), normal(4 * H, width, scale=width**-0.5),
        normal(4 * H) if bias else None, normal(4 * H) if bias else None,
        normal(P, H, scale=H**-0.5) if P else None,
    ]  # fmt: skip
    lengths = None
    if ragged:
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        lengths[0] = 0
        lengths[-1] = T
    reset_mask = torch.rand(T, B, generator=generator) < resets if resets else None
    output_gradients = [normal(T, B, width), normal(B, width), normal(B, H)]
    left = (normal(T, B, width), normal(T, B, H)) if states else (None, None)
    tensors.append(normal(3 * H) if peepholes else None)
    sizes = dict(ih=4 * H, hh=4 * H, c=H)
    tensors += [1 + normal(size, scale=0.3) if norm in norms else None for norm, size in sizes.items()]
    tensors.append(normal(H) if bias and "c" in norms else None)
    return Example(tensors, lengths, reset_mask, reverse, output_gradients, reset_states=left)


def assert_as_good_as_torch(
    make_example: Callable[[int], Example],
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    seeds: int = 3,
    yardstick: str = "torch",
) -> None:
    """Every result and gradient: its RMS error is at most twice that of torch's own LSTM in the same dtype.

    Or that of another backend, the `yardstick`, where torch's LSTM does not take the example. Both are held against the
    oracle, over `seeds` examples, so that one lucky rounding of theirs decides nothing; an RMS below the unit in the
    last place of the largest element counts as that unit. In half precision, where torch's LSTM rounds h and dgates at
    every step as the kernels do, that floor is the RMS of the truth's own rounding. (The reference rounds only once.)
    And errors must not lean to one side, as they do where what is stored is cut off, not rounded to the nearest.
    """
    errors: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for seed in range(seeds):
        given = make_example(seed).rounded(dtype)
        runs = (given.run(name, dtype, device) for name in (backend, yardstick))
        results = zip(NAMES, given.truth_for(device), *runs)
        for name, true, our, their in results:
            if true is not None:
                our_error, their_error = (t.detach().double().cpu().numpy() - true for t in (our, their))
                assert np.isfinite(our_error).all(), f"{name}: not finite at {np.argwhere(~np.isfinite(our_error))[0]}"
                errors.setdefault(name, []).append((our_error, their_error, true))
    for name, found in errors.items():
        ours, theirs, true = (np.concatenate([parts[i].ravel() for parts in found]) for i in range(3))
        least = torch.finfo(dtype).eps * np.abs(true).max(initial=0.0)
        if dtype.itemsize == 2:
            if yardstick == "torch":
                least = _rms(torch.from_numpy(true).to(dtype).double().numpy() - true)
            (leans, chance), (their_leans, _) = (_leaning(error, true, dtype) for error in (ours, theirs))
            assert abs(leans) <= max(0.25, 2 * abs(their_leans)) + chance, (
                f"{name}: errors are {leans:.2f} units in the last place away from zero on average "
                f"({yardstick}'s own {their_leans:.2f}): is something cut off, not rounded?"
            )
        allowed = 2 * max(_rms(theirs), least)
        worst = max((parts[0] for parts in found), key=lambda error: np.abs(error).max(initial=0.0))
        where = tuple(map(int, np.unravel_index(np.abs(worst).argmax(), worst.shape)))
        assert _rms(ours) <= allowed, (
            f"{name}: RMS error {_rms(ours):.3g}, allowed {allowed:.3g} ({yardstick}'s own {_rms(theirs):.3g}); "
            f"worst {worst[where]:.3g} at {where} of {worst.shape}"
        )


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2))) if error.size else 0.0


def _leaning(error: np.ndarray, true: np.ndarray, dtype: torch.dtype) -> tuple[float, float]:
    """The mean of errors away from zero, in mean units in the last place, and what chance makes of it: 4 sigma."""
    if not error.size:
        return 0.0, 0.0
    info = torch.finfo(dtype)
    unit = np.mean(info.eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(true), info.tiny))))
    away = np.sign(true) * error / unit
    return float(away.mean()), float(4 * away.std() / np.sqrt(away.size))


def assert_same(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    backend: str | None = None,
    equal_nan: bool = False,
    condition: float = 1,
) -> None:
    """Equal but for rounding: a few units in the last place of the larger of 1 and the largest element.

    The last place is that of the dtype which `backend` computed in, by default that of our result. `condition`: what
    rounding errors are multiplied by on their way, as layer norms do, which divide by the deviation of a few numbers.
    """
    assert list(ours) == list(theirs)
    for name, true in theirs.items():
        scale = max(1.0, true.nan_to_num().abs().max().item() if true.numel() else 0.0)
        dtype = ours[name].dtype if backend is None else PLACES[backend]["dtype"]
        torch.testing.assert_close(
            ours[name].double().cpu(), true.double().cpu(), rtol=0, atol=8 * torch.finfo(dtype).eps * scale * condition,
            equal_nan=equal_nan, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
