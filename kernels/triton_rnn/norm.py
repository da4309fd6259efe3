"""Layer norms (Ba, Kiros & Hinton, 2016) over all units of a sequence:

    LN(v) = gain unit + bias      unit = (v - mean) scale

v is a tuple of a unit's numbers, COUNT: the four gates of W_hh h, or c alone. Here are the equations, and what every
family loads; the sums over all units are of norm_exchange.py in the cooperative family, of norm_tiles.py in the step
family, of norm_block.py in the resident one. Where a call has no such norm, they return what they are given.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .. import layer_norm
from .features import nothing

EPS = tl.constexpr(layer_norm.EPS)

# The pointers of NormHH or of NormC, which says what they are.
Norm = namedtuple("Norm", "gain_ptr bias_ptr unit_ptr scale_ptr pairs_ptr")
# What a norm made of cells at a step: unit, of the cells' shape, and scale, of the sequence; gain and bias as of
# `load_affine`. All but the scale are tuples of COUNT.
Normed = namedtuple("Normed", "unit scale gain bias")


@triton.jit
def normalise(v, mean, scale, affine):
    """LN(v)."""
    normed = ()
    for n in tl.static_range(len(v)):
        normed = normed + (affine[0][n] * ((v[n] - mean) * scale) + affine[1][n],)
    return normed


@triton.jit
def normalise_backward(d, unit, scale, mean_d, mean_d_unit):
    """Gradient d of unit = (v - mean) scale -> of v. mean_d and mean_d_unit: of d and d * unit, over all units."""
    return scale * (d - mean_d - unit * mean_d_unit)


@triton.jit
def squares_about(mean, its_mean, its_squares, count):
    """Of `count` elements: their sum of squares about any mean, from that about their mean (Chan, Golub & LeVeque,
    1979). About the mean of all, such sums can be added up."""
    distance = its_mean - mean
    return its_squares + count * distance * distance


@triton.jit
def units_of(tile, S: tl.constexpr):
    """How many units a tile has, or a program, float32; 0 past the last."""
    return tl.minimum(tl.maximum(S.H - tile * S.UNITS, 0), S.UNITS).to(tl.float32)


@triton.jit
def load_affine(norm, unit, COUNT: tl.constexpr, H: tl.constexpr):
    """(gains, biases) of some units, each like `unit`; zeros where there is no bias."""
    gain, bias = (), ()
    if norm.gain_ptr is not None:
        for n in tl.static_range(COUNT):
            gain = gain + (tl.load(norm.gain_ptr + unit + n * H, mask=unit < H, other=0.0).to(tl.float32),)
            if norm.bias_ptr is None:
                bias = bias + (tl.zeros(unit.shape, tl.float32),)
            else:
                bias = bias + (tl.load(norm.bias_ptr + unit + n * H, mask=unit < H, other=0.0).to(tl.float32),)
    return gain, bias


@triton.jit
def load_normed(norm, affine, position, cells, H: tl.constexpr):
    """What the norm made of cells at a step, as forward saved it."""
    COUNT: tl.constexpr = len(affine[0])
    normed = nothing()
    if norm.gain_ptr is not None:
        unit, at = (), cells.gates_at if COUNT == 4 else cells.at
        for n in tl.static_range(COUNT):
            unit = unit + (tl.load(norm.unit_ptr + at + n * H, mask=cells.valid, other=0.0).to(tl.float32),)
        scale = tl.load(norm.scale_ptr + position.row, mask=position.valid, other=0.0)
        normed = Normed(unit, scale, affine[0], affine[1])
    return normed


@triton.jit
def normalised(v, norm, normed):
    """LN(v), of what the norm made of v."""
    if norm.gain_ptr is not None:
        unit, _, gain, bias = normed
        v = ()
        for n in tl.static_range(len(unit)):
            v = v + (gain[n] * unit[n] + bias[n],)
    return v


@triton.jit
def unit_backward(d, normed, DTYPE: tl.constexpr):
    """Gradient d of LN(v), as it is stored in DTYPE -> (d_unit, that of unit; sums of d_unit and d_unit * unit over a
    unit's numbers)."""
    unit, _, gain, _ = normed
    d_unit, products = (), ()
    for n in tl.static_range(len(d)):
        d_unit = d_unit + (gain[n] * d[n].to(DTYPE).to(tl.float32),)
        products = products + (d_unit[n] * unit[n],)
    return d_unit, sum_of(d_unit), sum_of(products)


@triton.jit
def sum_of(x):
    """Of one number, or of four."""
    return x[0] if len(x) == 1 else (x[0] + x[1]) + (x[2] + x[3])


@triton.jit
def normed_backward(d_unit, normed, mean_d, mean_d_unit):
    """`normalise_backward` of all of a unit's numbers."""
    unit, scale, _, _ = normed
    d = ()
    for n in tl.static_range(len(d_unit)):
        d = d + (normalise_backward(d_unit[n], unit[n], scale, mean_d, mean_d_unit),)
    return d
