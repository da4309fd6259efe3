"""One layer in one direction, plain and with noise: the reference and the kernels against the NumPy oracle.

Noise is what recurrent dropout and zoneout draw for a call. The kernels without it are in test_kernels.
"""

import dataclasses
from functools import partial

import pytest
import torch
from comparing import NAMES, PLACES, Example, assert_as_good_as_torch, example

from gpu_lstm import ops, reference
from gpu_lstm.kernels import layer_norm
from gpu_lstm.kernels.cupy_lstm import launch as cupy
from gpu_lstm.kernels.problem import Problem, Recurrence, problem_of
from gpu_lstm.kernels.triton_lstm import choose
from gpu_lstm.kernels.triton_lstm import launch as triton
from gpu_lstm.kernels.triton_lstm.choose import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Family
from gpu_lstm.noise import Noise
from gpu_lstm.sequences import Traversal
from gpu_lstm.weights import Weights

pytestmark = pytest.mark.usefixtures("exact_float32_products")
NOISES = {"none": (False, False, False), "masks": (True, True, True), "dropout": (True, False, False),
          "h": (False, True, False), "c": (False, False, True), "expected": None}  # fmt: skip
RAGGED = dict(ragged=True, resets=0.4)
VARIANTS = {
    "plain": {},
    "reverse": dict(reverse=True),
    "ragged resets": RAGGED,
    "ragged resets reverse": dict(**RAGGED, reverse=True),
    "no bias": dict(bias=False, **RAGGED),
    "states": dict(resets=0.4, states=True),
    "ragged states reverse": dict(**RAGGED, states=True, reverse=True),
    "peepholes": dict(peepholes=True),
    "ragged states peepholes reverse": dict(**RAGGED, states=True, peepholes=True, reverse=True),
    "layer norm": dict(norms=("ih", "hh", "c")),
    # With states to reset to, since the norm of a W_hh h that is almost zero multiplies every error.
    "layer norm of W_hh h": dict(norms=("hh",), bias=False, **RAGGED, states=True),
    "layer norm of c": dict(norms=("c",), bias=False, **RAGGED, reverse=True),
    "ragged states peepholes layer norm reverse": dict(
        **RAGGED, states=True, peepholes=True, norms=("ih", "hh", "c"), reverse=True
    ),
}


def sizes_and_variants(*sizes) -> list[tuple[tuple[int, ...], str]]:
    """All of them, but for layer norms with a projection, with which they are not defined."""
    return [
        (size, variant) for size in sizes for variant in VARIANTS if not size[4:] or "norms" not in VARIANTS[variant]
    ]


def noisy(size, variant, noise, seed=0) -> Example:
    """A random problem with masks of which each element is a coin toss, or with expectations."""
    given = example(*size, **VARIANTS[variant], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    steps, (batch, width), hidden = len(given.tensors[0]), given.tensors[1].shape, given.tensors[2].shape[1]

    def tosses(*shape, heads):
        return torch.rand(*shape, generator=generator) < heads

    if NOISES[noise] is None:
        return dataclasses.replace(given, noise=Noise(None, torch.tensor(0.3), torch.tensor(0.45)))
    drawn = tosses(batch, width, heads=0.7).double() / 0.7, tosses(steps, batch, width, heads=0.3)
    drawn = (*drawn, tosses(steps, batch, hidden, heads=0.45))
    return dataclasses.replace(given, noise=Noise(*(t if there else None for t, there in zip(drawn, NOISES[noise]))))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("size", "variant"), sizes_and_variants((6, 4, 3, 5), (6, 4, 3, 5, 2), (1, 1, 1, 3)), ids=str)
def test_the_reference_equals_the_oracle(variant, size, noise):
    given = noisy(size, variant, noise)
    for name, true, our in zip(NAMES, given.truth(), given.run("reference", torch.float64), strict=True):
        if true is not None:
            torch.testing.assert_close(our.detach(), torch.from_numpy(true), rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("noise", ["none", "masks", "expected"])
@pytest.mark.parametrize(
    ("projected", "variant"),
    [(0, "no bias"), (2, "ragged states peepholes reverse"), (0, "ragged states peepholes layer norm reverse")],
)
def test_derivatives_of_the_reference_by_finite_differences(projected, variant, noise):
    given = noisy((2, 2, 2, 3, projected), variant, noise)
    every = *given.tensors, *given.reset_states

    def layer(*tensors):
        remaining = iter(tensors)
        x, h0, c0, *weights, reset_h, reset_c = (None if t is None else next(remaining) for t in every)
        states = None if reset_h is None else [(reset_h, reset_c)]
        traversal = Traversal(given.lengths, given.resets, given.reverse, states)
        h, state = reference.layer(x, (h0, c0), Weights(*weights), traversal, given.noise)
        return h, *state

    inputs = [t.requires_grad_() for t in every if t is not None]
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


# The kernels with noise: more than one tile of 16 sequences and of 32 units, the last of them not full


SIZES = (3, 17, 3, 33), (4, 4, 3, 33, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "variant", "noise"),
    [
        *((*both, "masks") for both in sizes_and_variants(*SIZES) if both[1] != "layer norm"),
        *((size, "peepholes", "none") for size in SIZES),
        *((size, "ragged resets reverse", noise) for size in SIZES for noise in list(NOISES)[2:]),
    ],
    ids=str,
)
def test_the_kernels_are_as_good_as_the_reference(size, variant, noise, device):
    assert_as_good_as_torch(
        partial(noisy, size, variant, noise), "triton", torch.float32, device, 1, yardstick="reference"
    )


@pytest.mark.parametrize("noise", ["masks", "expected"])
def test_the_kernels_in_float16(noise, device):
    make = partial(noisy, (4, 3, 4, 20, 7), "ragged states peepholes reverse", noise)
    assert_as_good_as_torch(make, "triton", torch.float16, device, yardstick="reference")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize(("variant", "projected"), [("plain", 2), ("layer norm", 0)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nan_passes_neither_a_reset_nor_out_of_the_padding(backend, variant, projected):
    given = noisy((5, 3, 3, 4, projected), variant, "masks")
    given.tensors[0][:2, 0], given.tensors[1][1] = float("nan"), float("nan")
    given.tensors[0][3:, 2], given.output_gradients[0][3:, 2] = float("nan"), float("nan")
    given.lengths, given.resets = torch.tensor([5, 5, 3]), torch.zeros(5, 3, dtype=torch.bool)
    given.resets[2, 0], given.resets[0, 1], given.resets[3:, 2] = True, True, True
    given.reset_states = tuple(  # what stands where there is no reset, or in the padding
        torch.where((given.resets & (torch.arange(5)[:, None] < given.lengths))[:, :, None], 1.0, float("nan"))
        .expand(5, 3, size).double().clone() for size in (projected or 4, 4)
    )  # fmt: skip
    h, h_n, c_n, dx, *_ = given.run(backend, PLACES[backend]["dtype"], PLACES[backend]["device"])
    assert h.isnan().any(2).T.tolist() == [[True, True, False, False, False], [False] * 5, [False] * 5]
    assert not any(t.isnan().any() for t in (h_n, c_n, dx[2:]))
    assert (dx[3:, 2] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("noise", ["none", "masks"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nan_in_the_padding_reaches_no_gradient_of_a_weight(backend, noise):
    given = noisy((5, 3, 3, 16), "ragged states peepholes layer norm reverse", noise)
    padding = torch.arange(5)[:, None] >= given.lengths
    given.tensors[0][padding] = given.output_gradients[0][padding] = float("nan")
    found = dict(zip(NAMES, given.run(backend, PLACES[backend]["dtype"], PLACES[backend]["device"]), strict=True))
    assert not [name for name, t in found.items() if t is not None and t.isnan().any()]


@pytest.mark.parametrize("variant", ["ragged states peepholes reverse", "ragged states peepholes layer norm reverse"])
def test_the_operators(variant, device):
    given = noisy((3, 2, 3, 5, 0 if "norm" in variant else 2), variant, "masks")
    x, h0, c0, weight_ih, weight_hh, _, _, weight_hr, weight_peephole, _, *norms = (
        None if t is None else t.to(device, torch.float32) for t in given.tensors
    )
    noise = [(t if t.dtype is torch.bool else t.float()).to(device) for t in given.noise]
    gates, left = x @ weight_ih.T, [t.to(device, torch.float32) for t in given.reset_states]
    traversal = given.lengths.to(device), given.resets.to(device)
    recurrence = [weight_hh, weight_hr, weight_peephole, h0, c0, *traversal, *noise, *left, *norms]
    rest = True, 1, "triton"
    torch.library.opcheck(ops.layer_forward, (gates, *ops.flat(recurrence), *rest, True))
    h, h_n, c_n, c = ops.layer_forward(gates, *ops.flat(recurrence), *rest, True)
    if "norm" in variant:
        recurrence += [*layer_norm.unit_of(gates), *layer_norm.unit_of(c)]
    torch.library.opcheck(ops.layer_backward, ([h, h_n, c_n], gates, c, *ops.flat(recurrence), *rest))


def test_the_kernels_of_cupy_refuse_noise():
    gates, h0, weight_hh = torch.zeros(2, 1, 16), torch.zeros(1, 4), torch.zeros(16, 4)
    for variant in (dict(weight_peephole=torch.zeros(12)), dict(gain_c=torch.zeros(4))):
        recurrence = Recurrence(weight_hh=weight_hh, h0=h0, c0=h0, **variant)
        with pytest.raises(ValueError, match=r"^backend 'cupy' takes neither peepholes nor layer norms$"):
            cupy.layer_forward(gates, recurrence, save=True)
    both = Recurrence(weight_hh=weight_hh, weight_hr=h0, h0=h0, c0=h0, gain_c=torch.zeros(4))
    with pytest.raises(ValueError, match=r"^expected no projection combined with a layer norm"):
        triton.layer_of(problem_of(gates, both), h0.device)
    for noise in (dict(dropout_h=h0), dict(zoneout_h=torch.tensor(0.1)), dict(zoneout_c=torch.tensor(0.1))):
        recurrence = Recurrence(weight_hh=weight_hh, h0=h0, c0=h0, **noise)
        with pytest.raises(ValueError, match=r"^backend 'cupy' takes neither recurrent dropout nor zoneout$"):
            cupy.layer_forward(gates, recurrence, save=True)
        with pytest.raises(ValueError, match=r"^backend 'cupy' takes neither"):
            cupy.layer_backward(None, None, None, gates, gates[..., :4], recurrence)


def test_noise_takes_the_plans_of_the_plain_cell():
    plain = Problem(128, 16, 128, torch.bfloat16)
    regularised = plain._replace(dropout_h=True)
    for backward in (False, True):
        assert plans(plain, DEVICES["h100"], backward)[0].family is Family.RESIDENT
        assert plans(regularised, DEVICES["h100"], backward)[:-1] == plans(plain, DEVICES["h100"], backward)[:-1]
        keys = [choose._key(p, DEVICES["h100"], backward) for p in (plain, regularised)]
        assert keys[0] != keys[1], "a measured plan of the one is not taken for the other"
