"""Lengths and resets: an LSTM, a GRU or a stack with them gives the numbers of the NumPy oracle, on every backend."""

import pytest
import torch
from cases import check
from comparing import PLACES, assert_same, every_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import RAGGED, B, pair, random_inputs, results, truth
from torch.utils._pytree import tree_map

import gpu_lstm

pytestmark = pytest.mark.usefixtures("exact_float32_products")


@st.composite
def problems(draw, longest: int, most: int, left: bool):
    """A size, words of cases.py and a seed; where resets may have states `left`, these or zeros."""
    hidden, some = draw(st.integers(1, 4)), st.booleans()
    words = [word for word in ("no-bias", "batch-first", "both", "no-hx") if draw(some)]
    form, steps = draw(st.sampled_from(["", "packed", "unbatched"])), draw(st.integers(1, longest))
    batch = 1 if form == "unbatched" else draw(st.integers(1, most))
    size = steps, batch, draw(st.integers(1, 3)), hidden
    words += ["gru"] * draw(some)
    if draw(st.integers(0, 2)):
        size += tuple({draw(st.integers(0, hidden - 1))} - {0}) if "gru" not in words else ()
        words += ["deep"] * draw(some)
    else:
        words.append(draw(st.sampled_from(["stack", "residual"])))
    words += [form, draw(st.sampled_from(["", "resets", *["state", "states"] * left]))]
    words += ["ragged"] * (form != "packed" and draw(some))
    return size, " ".join(words), draw(st.integers(0, 2**16))


@every_backend
def test_any_problem_gives_the_numbers_of_the_oracle(backend):
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(problem=problems(4, 4, left=backend != "torch"))
    def checked(problem):
        size, words, seed = problem
        check(size, words, backend, PLACES[backend]["dtype"], PLACES[backend]["device"], seeds=1, first_seed=seed)

    checked()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [["lengths"], ["resets"], ["lengths", "resets"]], ids=" and ".join)
@pytest.mark.parametrize(("kind", "value"), [("LSTM", 20.0), ("GRU", 20.0), ("GRU", -20.0)])
def test_half_precision_holds_and_clears_whatever_the_gates_would(ragged, dtype, kind, value):
    """On torch's own modules padding and resets shut gates that the biases open wide, or open those that are shut."""
    _, ours = pair(kind, "torch", bidirectional=True)
    x, hx = random_inputs(ours, B)
    for name, parameter in ours.named_parameters():
        if "bias" in name:
            parameter.data[: 2 * ours.hidden_size] = value  # of gates i and f, or r and z
        if name.startswith("bias_ih") and kind == "GRU":
            parameter.data[2 * ours.hidden_size :] = 3.7  # of n
    (x, hx), ragged = tree_map(lambda t: t.to(dtype), (x, hx)), {name: RAGGED[name] for name in ragged}
    found = truth(ours.to(dtype), x, hx, **ragged), results(ours, x, hx, **ragged)
    expected, got = ({name: t for name, t in each.items() if not name.startswith(("dw", "db"))} for each in found)
    assert_same(got, expected)


def test_resets_are_dones_a_step_later():
    """Two rollouts, one after the other, are split where the episodes end."""
    torch.manual_seed(0)
    lstm, x = gpu_lstm.LSTM(3, 4), torch.randn(8, 1, 3)
    dones = torch.zeros(8, 1, dtype=torch.bool)
    dones[[2, 3, 6]] = True  # episodes: 0 to 2, 3, 4 to 6, 7
    expected = torch.cat([lstm(episode)[0] for episode in x.split([3, 1, 3, 1])])
    y, state = lstm(x[:4], resets=gpu_lstm.resets_from_dones(dones[:4]))
    rest, _ = lstm(x[4:], state, resets=gpu_lstm.resets_from_dones(dones[4:], first=dones[3]))
    torch.testing.assert_close(torch.cat([y, rest]), expected)
