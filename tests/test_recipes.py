"""CONTRIBUTING's recipe for a cell, carried out: in a copy of the library it adds files and entries of lists, no more.

A child process imports the copy, and compares it in float64 with an LSTM of other weights that computes the same.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from installed import ROOT

FOLDERS = "gpu_lstm", "kernels"


class Copy:
    """The library in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def add(self, path: str, text: str) -> None:
        """A new file."""
        assert not (self.folder / path).exists()
        (self.folder / path).write_text(text)

    def enter(self, path: str, line: str, entry: str) -> None:
        """An entry of a list: `entry` stands after the only place of `line`."""
        text = (self.folder / path).read_text()
        assert text.count(line) == 1, f"{line!r} in {path}"
        (self.folder / path).write_text(text.replace(line, line + entry))

    def run(self, program: str) -> None:
        """Run a program in which gpu_lstm is the copy, and kernels are interpreted."""
        path = self.folder / "program.py"
        path.write_text(program)
        paths = f"{self.folder}{os.pathsep}{ROOT / 'tests'}"
        alone = {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "XDG_CACHE_HOME": str(self.folder / "cache")}
        done = subprocess.run([sys.executable, path], env=os.environ | alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


COUPLED = '''
"""The LSTM with coupled gates, f = 1 - i (Greff et al., 2017), in torch's operators:

    i, o = sigmoid(z_i), sigmoid(z_o)      g = tanh(z_g)      c' = (1 - i) c + i g      m = o tanh(c')

Gates f, i, g, o; x and h reach the last three pre-activations, in torch's order, too: rows i, g, o.
"""

import torch
from torch.nn.functional import linear, pad

from .lstm import Gates, output


def gates_of(gates, c, h):
    f, i, g, o = gates.chunk(4, dim=2)
    return Gates(i, f, o, g, c, h)


def input_product(x, weight, bias_ih, bias_hh, gain):
    bias = None if bias_ih is None else bias_ih + bias_hh
    return pad(linear(x, weight, bias), (len(weight) // 3, 0))


def add_product(z, h, weight, gain):
    z[:, :, h.shape[2] :] += h @ weight.T


def pre_activations(of_x, of_h):
    return pad(of_x + of_h, (of_x.shape[1] // 3, 0))


def step(z, c, peephole):
    _, i, g, o = z.chunk(4, dim=1)
    gates = 1 - i.sigmoid(), i.sigmoid(), g.tanh(), o.sigmoid()
    return gates, next_cell(gates, c)


def activate_in_place(z, peephole, c):
    f, i, g, o = z.chunk(4, dim=2)
    torch.sub(1, i.sigmoid_(), out=f)
    g.tanh_()
    o.sigmoid_()
    return z


def next_cell(gates, c):
    _, i, g, _ = gates
    return c + i.to(c.dtype) * (g - c)
'''

COUPLED_IN_TRITON = {  # branches of triton_rnn/equations.py, each after one of the sLSTM
    '        c_prev + gates[0] * (gates[2] - c_prev) if S.CELL == "slstm" else\n': """\
        c_prev + gates[1] * (gates[2] - c_prev) if S.CELL == "coupled" else
""",
    "        c, rest = next_cell(gates, c_prev, S), (tl.maximum(k, z_i) + above(a),)\n": """\
    elif S.CELL == "coupled":
        i = sigmoid(x[1] + z[1])
        gates = (1.0 - i, i, tanh(x[2] + z[2]), sigmoid(x[3] + z[3]))
        c = next_cell(gates, c_prev, S)
""",
    "        dc_prev, drest = dc * stays, (dk,)\n": """\
    elif S.CELL == "coupled":
        f, i, g, _ = gates
        dz = (tl.zeros_like(dc), dc * (g - c_prev) * i * f, dc * i * (1.0 - g * g), dz_o)
        dc_prev = dc * f
""",
}

COUPLED_LSTM = '''
"""CoupledLSTM."""

from ..kernels.cells import CELLS
from .recurrent import LSTM


class CoupledLSTM(LSTM):
    """An LSTM with f = 1 - i."""

    _cell = CELLS["coupled"]
'''

COUPLED_COMPARED = """
import places
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import gpu_lstm
from gpu_lstm import CoupledLSTM
from gpu_lstm.backends import verify
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import route
from gpu_lstm.kernels.problem import Pass, problem_of
from gpu_lstm.kernels.tensors import Inputs

I, H = 2, 4


def as_lstm(module):
    # In float64 an LSTM whose forget gate is shut by what opens the input gate: sigmoid(-z_i) = 1 - sigmoid(z_i).
    lstm = gpu_lstm.LSTM(I, H, bias=module.bias, bidirectional=module.bidirectional, backend="reference").double()

    def widened(p):
        i, g, o = p.double().chunk(3)
        return torch.cat([i, -i, g, o])

    def call(*given, **ragged):
        weights = {name: widened(p) for name, p in module.named_parameters()}
        given, ragged = tree_map(lambda t: t.double() if t.is_floating_point() else t, (given, ragged))
        return torch.func.functional_call(lstm, weights, given, ragged)

    return call


def compare(backend, given=True, **options):
    # Results and all gradients.
    torch.manual_seed(0)
    module = CoupledLSTM(I, H, backend=backend, **options)
    directions, T, B = 1 + module.bidirectional, 3, 2
    x, (state, left) = torch.randn(T, B, I), (torch.randn(2, directions, *more, B, H) for more in ((), (T,)))
    leaves = [t.requires_grad_() for t in (x, state, *module.parameters(), *[left] * given)]
    ragged = dict(lengths=torch.randint(1, T + 1, (B,)), resets=torch.rand(T, B) < 0.4)
    ragged |= dict(reset_states=tuple(left)) if given else {}
    ours, truth = (tree_leaves(call(x, tuple(state), **ragged)) for call in (module, as_lstm(module)))
    d = [torch.randn_like(t) for t in ours]
    pairs = [*zip(ours, truth), *zip(*(
        torch.autograd.grad(results, leaves, [d.to(t) for d, t in zip(d, results)]) for results in (ours, truth)
    ))]
    for k, (our, true) in enumerate(pairs):
        torch.testing.assert_close(
            our.double(), true.double(), rtol=1e-4, atol=1e-5,
            msg=lambda text: f"{backend}, {options}, tensor {k}: {text}")


for backend in ("reference", "triton"):
    compare(backend, bidirectional=True, recompute=True)
    compare(backend, bias=False, given=False)
for family in ("resident", "cooperative/4/1/4", "step", "held", "pointwise", "split/4"):
    with pytest.MonkeyPatch.context() as monkeypatch:
        places.KERNELS[family].force(monkeypatch)
        route.forget()
        compare("triton", recompute=family == "step")
route.forget()

# As on a card, where kernels are verified before they run: against the reference, since torch has no such cell.
verify.ENOUGH = 1
inputs = Inputs(
    x=torch.randn(3, 2, I), h0=torch.randn(1, 2, H), c0=torch.randn(1, 2, H), weight_ih=torch.randn(3 * H, I),
    weight_hh=torch.randn(3 * H, H))
layer = verify.layer_of(Backend.TRITON, problem_of(inputs, "coupled", False, "ieee"), inputs.x.device)
for pass_ in (Pass(), Pass(True)):
    assert verify._verdict(layer, pass_, inputs, layer.chosen(pass_).plan) == "right"

lstm, x = CoupledLSTM(I, H), torch.randn(4, 3, I)
assert repr(lstm) == "gpu_lstm.CoupledLSTM(2, 4)"
said = gpu_lstm.explain(lstm, x)
assert "COUPLED 2 -> 4" in said.problem and said.others["torch"] == "it does not support coupled cells", said
with torch.no_grad():
    y, (h, c) = lstm(x)
    stream = gpu_lstm.Stream(lstm, batch=3)
    torch.testing.assert_close(torch.stack([stream(step) for step in x]), y)
    torch.testing.assert_close(stream.state, (h, c))
    gates = gpu_lstm.trace(lstm, x).layers[0][0]
    torch.testing.assert_close(gates.forget, 1 - gates.input)
lstm.backend = "torch"
with pytest.raises(ValueError, match="^backend 'torch' does not support coupled cells; use "):
    lstm(x)
with pytest.warns(match="left as it is: the model itself .gpu_lstm.CoupledLSTM., a subclass"):
    gpu_lstm.to_torch(lstm)
with pytest.raises(ValueError, match="^coupled cells have no peepholes and no layer norm$"):
    CoupledLSTM(I, H, layer_norm=True)

for backend in ("triton", "torch", "cupy"):
    lstm = gpu_lstm.LSTM(I, H, backend=backend)
    lstm.fading = 0.5
    with pytest.raises(ValueError, match=f"^backend '{backend}' does not support fading; use 'reference'$"):
        lstm(x)
"""

FADING = '''

class Fading(Regulariser):
    """It forgot to say what it has: no flag, no tensor, though a hook of the time loop is its own."""

    name = "fading"

    def scaled(self, h, noise):
        return h
'''


def test_a_cell_is_a_line_of_a_list_its_equations_and_a_class(tmp_path):
    """Coupled gates, f = 1 - i: on the reference and on every family of Triton kernels. And a regulariser beside it of
    which kernels know nothing is left to the reference."""
    copy, modules = Copy(tmp_path), "gpu_lstm/modules/__init__.py"
    line = """
COUPLED = Cell("coupled", ("h", "c"), 3, 1, 4, 1, (4, 1), of_torch=False, normalises=False)  # f, i, g, o"""
    copy.enter("kernels/cells.py", "of_torch=True, normalises=False)", line)
    copy.enter("kernels/cells.py", "for cell in (LSTM, GRU", ", COUPLED")
    for line, branch in COUPLED_IN_TRITON.items():
        copy.enter("kernels/triton_rnn/equations.py", line, branch)
    copy.enter(modules, "from .cell import GRUCell, LSTMCell\n", "from .coupled import CoupledLSTM\n")
    copy.enter("gpu_lstm/__init__.py", "from .modules import GRU, LSTM, ", "CoupledLSTM, ")
    copy.add("gpu_lstm/equations/coupled.py", COUPLED)
    copy.add("gpu_lstm/modules/coupled.py", COUPLED_LSTM)
    the_list = "gpu_lstm/call/regularisers.py"
    copy.enter(the_list, "        return F.dropout(weight, rate)\n", FADING)
    copy.enter(the_list, "RecurrentDropout(), ", "Fading(), ")
    copy.run(COUPLED_COMPARED)
