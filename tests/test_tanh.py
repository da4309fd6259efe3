"""A GRU's n in bfloat16 is the tanh of an instruction that is off by up to 2^-11: whether that keeps to the limit.

No CPU has the instruction. So a GRU is computed as the kernels round it, and its tanh is wrong by all that the PTX ISA
allows, always to the same side or in turns. The yardstick is the same GRU with the tanh of torch.
"""

import numpy as np
import oracle
import pytest
import torch
from comparing import judge

T, B, I, H = 1024, 2, 16, 16
NAMES = "dx", "dh0", "dw_ih", "dw_hh", "db_ih", "db_hh"
BF16, AT_MOST = torch.bfloat16, 2.0**-11


def rounded(a):
    return a.to(BF16).float()


def as_the_kernels(x, h0, w_ih, w_hh, b_ih, b_hh, dh, tanh):
    """h of every step, and the gradients NAMES: h, gates, and their gradients in bfloat16, all else in float32."""
    units, new = slice(0, 2 * H), slice(2 * H, 3 * H)  # those of r and z, and of n
    bias = torch.cat([b_ih[units] + b_hh[units], b_ih[new]])
    h, words, saved, into_x, into_h = h0, [h0], [], [], []
    for x_t in rounded(x @ w_ih.T + bias):
        of_h, before = words[-1] @ w_hh.T, h
        r, z = torch.sigmoid(x_t[:, units] + of_h[:, units]).chunk(2, 1)
        s = of_h[:, new] + b_hh[new]
        n = tanh(x_t[:, new] + r * s)
        h = n + z * (before - n)
        words.append(rounded(h))
        saved.append((*map(rounded, (r, z, n, s)), before))
    d_after = torch.zeros_like(h)
    for dh_t, (r, z, n, s, before) in zip(dh.flip(0), saved[::-1]):
        d = dh_t + d_after
        dn = d * (1 - z) * (1 - n * n)
        of_both = dn * s * r * (1 - r), d * (before - n) * z * (1 - z)
        into_x.insert(0, rounded(torch.cat([*of_both, dn], 1)))
        into_h.insert(0, rounded(torch.cat([*of_both, dn * r], 1)))
        d_after = into_h[0] @ w_hh + d * z
    dx, dz = torch.stack(into_x), torch.stack(into_h)
    dw_ih, dw_hh = (torch.einsum("tbg,tbk->gk", *pair) for pair in ((dx, x), (dz, torch.stack(words[:-1]))))
    found = torch.stack(words[1:]), dx @ w_ih, d_after, dw_ih, dw_hh, dx.sum((0, 1)), dz.sum((0, 1))
    return [rounded(a).double().numpy() for a in found]


def errors_of(tanh, memory):
    """For `judge`: errors with this tanh, with torch's, and the truth; `memory` is added to z's pre-activation."""
    torch.manual_seed(0)
    shapes = (3 * H, I), (3 * H, H), (3 * H,), (3 * H,)
    weights = [(2 * torch.rand(shape) - 1) / H**0.5 for shape in shapes]
    weights[2][H : 2 * H] += memory
    given = [rounded(a) for a in (torch.randn(T, B, I), torch.randn(B, H) / 2, *weights, torch.randn(T, B, H))]
    x, h0, *weights, dh = (a.double().numpy() for a in given)
    zero = np.zeros((B, H))
    h, *_, tape = oracle.gru_layer(x, h0, zero, *weights)
    dx, dh0, _, *rest = oracle.gru_layer_gradients(x, h0, zero, *weights, tape=tape, dh=dh, dh_n=zero, dc_n=zero)
    found = zip(("h", *NAMES), as_the_kernels(*given, tanh), as_the_kernels(*given, torch.tanh), (h, dx, dh0, *rest))
    return {name: [(ours - true, theirs - true, true)] for name, ours, theirs, true in found}


OFF = {
    "away from zero": lambda x: 1.0,
    "towards zero": lambda x: -1.0,
    "in turns": lambda x: torch.sin(150 * x),
}  # by what part of AT_MOST


@pytest.mark.parametrize("memory", [0, 4], ids=["", "long memory"])
@pytest.mark.parametrize("off", OFF)
def test_tanh_of_the_instruction_keeps_to_the_limit(off, memory):
    judge(errors_of(lambda x: torch.tanh(x) * (1 + AT_MOST * OFF[off](x)), memory), BF16, "torch", (), T)


def test_of_an_error_of_a_half_per_cent_it_would_not():
    with pytest.raises(AssertionError, match="away from zero"):
        judge(errors_of(lambda x: torch.tanh(x) * (1 + 10 * AT_MOST), 0), BF16, "torch", (), T)
