"""The recipes of CONTRIBUTING for a regulariser, a cell and a backend, carried out in a copy of the package."""

import os
import shutil
import subprocess
import sys

import pytest
from installed import ROOT

EDITS = [  # (file, the text there, the new text)
    # A regulariser: Gaussian noise on h after each step.
    (
        "gpu_lstm/call/regularisers.py",
        "REGULARISERS: tuple[Regulariser, ...] = (",
        """
class StateNoise(Regulariser):
    name, tensors = "state_noise", ("noise_h",)

    def accepted(self, value, cell):
        return float(value)

    def draw(self, rate, of):
        return (rate * torch.randn(of.sizes, dtype=of.dtype),)

    def after(self, before, new, noise):
        h, c = new
        return (h if noise.noise_h is None else h + noise.noise_h), c


REGULARISERS: tuple[Regulariser, ...] = (StateNoise(), """,
    ),
    (
        "kernels/tensors.py",
        '    ("lengths",  ',
        '    ("noise_h", "T B P", None, NOISE, LOOP, NONE),\n    ("lengths",  ',
    ),
    ("kernels/tensors.py", "the same for c\n", "the same for c\n    noise_h: Tensor | None = None\n"),
    ("kernels/tensors.py", "    lengths: Tensor", "    noise_h: Tensor | None = None\n    lengths: Tensor"),
    ("gpu_lstm/modules/arguments.py", "    weight_drop: float", "    state_noise: float = 0.0\n    weight_drop: float"),
    # A cell: an LSTM whose forget gate is 1 - i.
    (
        "kernels/cells.py",
        "CELLS = {cell.name: cell for cell in (",
        """
COUPLED = LSTM._replace(name="coupled", of_torch=False, normalises=False)
CELLS = {cell.name: cell for cell in (COUPLED, """,
    ),
    (
        "gpu_lstm/modules/recurrent.py",
        "class NotCompiled(",
        """
class Coupled(LSTM):
    _cell = cells.COUPLED


class NotCompiled(""",
    ),
    ("gpu_lstm/modules/__init__.py", "import GRU, LSTM", "import GRU, LSTM, Coupled as Coupled"),
    ("gpu_lstm/__init__.py", "from .modules import GRU,", "from .modules import Coupled, GRU,"),
    # A backend, which runs the loops of another one.
    ("gpu_lstm/call/choices.py", '    TORCH = "torch"', '    MIRROR = "mirror"\n    TORCH = "torch"'),
]
FILES = {
    "gpu_lstm/equations/coupled.py": """
from .lstm import Gates, add_product, gates_of, input_product, output, pre_activations

def step(z, c, peephole):
    i, _, g, o = z.chunk(4, dim=1)
    gates = i.sigmoid(), 1 - i.sigmoid(), g.tanh(), o.sigmoid()
    return gates, next_cell(gates, c)

def next_cell(gates, c):
    return gates[1] * c + gates[0] * gates[2]
""",
    "kernels/mirror_rnn/__init__.py": "from ..numba_rnn import *\nfrom ..numba_rnn import import_packages, made_by\n",
    "kernels/mirror_rnn/launch.py": """
from ..numba_rnn import launch as _launch
from ..numba_rnn.launch import *
from ..contract import OnlyPlan

BACKEND = "mirror"

def choose(*arguments):
    _launch.choose(*arguments)
    return OnlyPlan(BACKEND)
""",
}
SCRIPT = """
import torch, gpu_lstm
from torch import nn

torch.manual_seed(0)
T, B, I, H = 4, 3, 3, 5
x = torch.randn(T, B, I)

def by_hand(module, step):
    h = c = torch.zeros(B, H)
    outputs = []
    for x_t in x:
        z = x_t @ module.weight_ih_l0.T + module.bias_ih_l0 + h @ module.weight_hh_l0.T + module.bias_hh_l0
        h, c = step(len(outputs), z.chunk(4, 1), c)
        outputs.append(h)
    return torch.stack(outputs)

# What was there runs as before, on every backend.
theirs = nn.GRU(I, H)
for backend in ("reference", "torch", "numba", "mirror", "triton"):
    ours = gpu_lstm.GRU(I, H, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-5, atol=1e-6)

lstm = gpu_lstm.LSTM(I, H)
lstm.state_noise = 0.5
torch.manual_seed(1)
found = lstm(x)[0]
torch.manual_seed(1)
noise = 0.5 * torch.randn(T, B, H)

def noisy(t, z, c):
    c = z[1].sigmoid() * c + z[0].sigmoid() * z[2].tanh()
    return z[3].sigmoid() * c.tanh() + noise[t], c

torch.testing.assert_close(found, by_hand(lstm, noisy))

gru, cell, h, noisy = gpu_lstm.GRU(I, H), nn.GRUCell(I, H), torch.zeros(B, H), []
gru.load_state_dict({f"{name}_l0": t for name, t in cell.state_dict().items()})
gru.state_noise = 0.5
for x_t, noise_t in zip(x, noise):
    noisy.append(h := cell(x_t, h) + noise_t)
torch.manual_seed(1)
torch.testing.assert_close(gru(x)[0], torch.stack(noisy))

lstm.backend = "numba"
try:
    lstm(x)
except ValueError as error:
    assert "backend 'numba' does not support state_noise; use 'reference'" in str(error), error
else:
    raise AssertionError

coupled = gpu_lstm.Coupled(I, H)

def of_coupled(t, z, c):
    i = z[0].sigmoid()
    c = (1 - i) * c + i * z[2].tanh()
    return z[3].sigmoid() * c.tanh(), c

torch.testing.assert_close(coupled(x)[0], by_hand(coupled, of_coupled))
for backend, said in (("numba", "has no cell 'coupled'"), ("torch", "does not support coupled cells")):
    coupled.backend = backend
    try:
        coupled(x)
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError
"""


def test_a_regulariser_a_cell_and_a_backend_by_their_recipes(tmp_path):
    pytest.importorskip("numba")
    for name in ("gpu_lstm", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, old, new in EDITS:
        text = (tmp_path / path).read_text()
        assert text.count(old) == 1, (path, old)
        (tmp_path / path).write_text(text.replace(old, new))
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    environment = os.environ | dict(
        PYTHONPATH=str(tmp_path), TRITON_INTERPRET="1", XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
