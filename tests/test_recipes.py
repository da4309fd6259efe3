"""CONTRIBUTING's recipes, carried out: in a copy of the library each adds files and lines of lists, and nothing else.

A child process imports the copy, and compares it with a plain loop in float64, which shares no code with it.
"""

import difflib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
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

    def changes(self) -> dict[str, tuple[int, int]]:
        """The files that differ from the library's, with how many lines are new and gone."""
        found = {}
        for path in sorted(p for name in FOLDERS for p in (self.folder / name).rglob("*") if p.is_file()):
            name = str(path.relative_to(self.folder))
            before = (ROOT / name).read_text().splitlines() if (ROOT / name).exists() else []
            if "__pycache__" not in name and (after := path.read_text().splitlines()) != before:
                marks = [line[0] for line in difflib.ndiff(before, after)]
                found[name] = marks.count("+"), marks.count("-")
        return found

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

COUPLED_IN_TRITON = '''
"""The LSTM with coupled gates on a tile of [rows, units], in float32; gates f, i, g, o as in torch's operators."""

import triton
import triton.language as tl

from .lstm import sigmoid, tanh


@triton.jit
def coupled_next_cell(gates, c_prev):
    return c_prev + gates[1] * (gates[2] - c_prev)


@triton.jit
def coupled_forward(x, z, c_prev):
    i = sigmoid(x[1] + z[1])
    gates = (1.0 - i, i, tanh(x[2] + z[2]), sigmoid(x[3] + z[3]))
    return gates, coupled_next_cell(gates, c_prev), ()


@triton.jit
def coupled_backward(gates, c_prev, dz_o, dc):
    f, i, g, _ = gates
    return (tl.zeros_like(dc), dc * (g - c_prev) * i * f, dc * i * (1.0 - g * g), dz_o), dc * f, ()
'''

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

import gpu_lstm
from gpu_lstm import CoupledLSTM
from gpu_lstm.backends import verify
from gpu_lstm.call.choices import Backend
from gpu_lstm.kernels.problem import Pass, problem_of
from gpu_lstm.kernels.tensors import Inputs

I, H = 2, 4


def plain_loop(module, x, state, left, lengths, resets):
    # h [T, B, D * H] and the final states [D, B, H] of a module with one layer.
    T, B, _ = x.shape
    outputs, finals = [], []
    for d in range(1 + module.bidirectional):
        ending = "_l0" + "_reverse" * d
        w_x, w_h, *biases = (p.double() for name, p in module.named_parameters() if name.endswith(ending))
        for b in range(B):
            h, c = state[0][d, b], state[1][d, b]
            found = [torch.zeros_like(h)] * T
            for s in range(lengths[b]):
                t = lengths[b] - 1 - s if d else s
                at = t + d  # a reset at t separates t - 1 from t
                if at < lengths[b] and resets[at, b]:
                    h, c = (torch.zeros_like(h),) * 2 if left is None else (left[0][d, at, b], left[1][d, at, b])
                i, g, o = (w_x @ x[t, b] + w_h @ h + sum(biases)).chunk(3)
                c = (1 - i.sigmoid()) * c + i.sigmoid() * g.tanh()
                found[t] = h = o.sigmoid() * c.tanh()
            outputs.append(torch.stack(found))
            finals.append((h, c))
    y = torch.stack(outputs).unflatten(0, (-1, B)).permute(2, 1, 0, 3).flatten(2)
    return y, *(torch.stack(each).unflatten(0, (-1, B)) for each in zip(*finals))


def compare(backend, wrap=lambda module: module, T=3, B=2, ragged=True, given=True, **options):
    # Results and all gradients.
    torch.manual_seed(0)
    module = CoupledLSTM(I, H, backend=backend, **options)
    directions = 1 + module.bidirectional
    x, lengths, resets = torch.randn(T, B, I), torch.full((B,), T), torch.zeros(T, B, dtype=torch.bool)
    state, left = ([torch.randn(directions, *more, B, H) for _ in "hc"] for more in ((), (T,)))
    leaves, arguments = [x, *state, *module.parameters()], {}
    if ragged:
        lengths, resets = torch.randint(1, T + 1, (B,)), torch.rand(T, B) < 0.4
        arguments = dict(lengths=lengths, resets=resets)
    if ragged and given:
        leaves, arguments = [*leaves, *left], arguments | dict(reset_states=tuple(left))
    for leaf in leaves:
        leaf.requires_grad_()
    y, final = wrap(module)(x, tuple(state), **arguments)
    state, left = ([t.double() for t in states] for states in (state, left))
    truth = plain_loop(module, x.double(), state, left if given else None, lengths, resets)
    ours = y, *final
    d = [torch.randn_like(t) for t in ours]
    pairs = [*zip(ours, truth), *zip(*(
        torch.autograd.grad(results, leaves, [d.to(t.dtype) for d, t in zip(d, results)]) for results in (ours, truth)
    ))]
    for k, (our, true) in enumerate(pairs):
        torch.testing.assert_close(
            our.double(), true.double(), rtol=1e-4, atol=1e-5,
            msg=lambda text: f"{backend}, {options}, tensor {k}: {text}")


for backend in ("reference", "triton"):
    compare(backend, bidirectional=True, recompute=True)
    compare(backend, bias=False, given=False)
compare("triton", lambda module: torch.compile(module, backend="eager", fullgraph=True))
for family in ("resident", "cooperative/4/1/4", "step", "held", "pointwise", "split/4"):
    with pytest.MonkeyPatch.context() as monkeypatch:
        places.KERNELS[family].force(monkeypatch)
        places.forget()
        compare("triton", recompute=family == "step")
places.forget()

# As on a card, where kernels are verified before they run: against the reference, since torch has no such cell.
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
with pytest.raises(ValueError, match="^backend 'cupy' has no cell 'coupled'$"):
    verify.layer_of(Backend.CUPY, layer.problem, x.device)
with pytest.warns(match="left as it is: the model itself .gpu_lstm.CoupledLSTM., a subclass"):
    gpu_lstm.to_torch(lstm)
with pytest.raises(ValueError, match="^CoupledLSTM has a cell of its own, and would be scripted as a torch.nn.LSTM$"):
    torch.jit.script(lstm)
with pytest.raises(ValueError, match="^coupled cells have no peepholes and no layer norm$"):
    CoupledLSTM(I, H, layer_norm=True)
"""


def test_a_cell_is_a_line_of_a_list_its_equations_and_a_class(tmp_path):
    """Coupled gates, f = 1 - i: on the reference and on every family of Triton kernels."""
    copy, branches, modules = Copy(tmp_path), "kernels/triton_rnn/equations/__init__.py", "gpu_lstm/modules/__init__.py"
    line = """
COUPLED = Cell("coupled", ("h", "c"), 3, 1, 4, 1, (4, 1), of_torch=False, normalises=False)  # f, i, g, o"""
    copy.enter("kernels/cells.py", "of_torch=True, normalises=False)", line)
    copy.enter("kernels/cells.py", "for cell in (LSTM, GRU", ", COUPLED")
    imported = "from .coupled import coupled_backward, coupled_forward, coupled_next_cell\n"
    copy.enter(branches, "import triton.language as tl\n\n", imported)
    for function, arguments, more in (
        ("forward", "x, z, c_prev", ", rest"), ("next_cell", "gates, c_prev", ""),
        ("backward", "gates, c_prev, dz_o, dc", ", drest"),
    ):  # fmt: skip
        after = f'slstm_{function}({arguments}{more}) if S.CELL == "slstm" else\n'
        copy.enter(branches, after, f'        coupled_{function}({arguments}) if S.CELL == "coupled" else\n')
    copy.enter(modules, "from .cell import GRUCell, LSTMCell\n", "from .coupled import CoupledLSTM\n")
    copy.enter("gpu_lstm/__init__.py", "from .modules import GRU, LSTM, ", "CoupledLSTM, ")
    new = {
        "gpu_lstm/equations/coupled.py": COUPLED, "gpu_lstm/modules/coupled.py": COUPLED_LSTM,
        "kernels/triton_rnn/equations/coupled.py": COUPLED_IN_TRITON,
    }  # fmt: skip
    for path, text in new.items():
        copy.add(path, text)
    assert copy.changes() == {path: (len(text.splitlines()), 0) for path, text in new.items()} | {
        "kernels/cells.py": (2, 1),
        branches: (4, 0),
        modules: (1, 0),
        "gpu_lstm/__init__.py": (1, 1),
    }
    copy.run(COUPLED_COMPARED)


STEP_DROPOUT = '''
"""Dropout of h in the product with W_hh, drawn again for every step."""

import torch
from torch import Tensor

from ..kernels.tensors import Noise
from .regulariser import Drawing, Regulariser


class StepDropout(Regulariser):
    """Factors of h, step_h [T, B, P]: no flag tells kernels to read them."""

    name, tensors = "step_dropout", ("step_h",)

    def draw(self, rate: float, of: Drawing) -> tuple[Tensor | None, ...]:
        return (torch.nn.functional.dropout(torch.ones(of.sizes, dtype=of.dtype, device=of.device), rate),)

    def scaled(self, h: Tensor, noise: Noise) -> Tensor:
        return h if noise.step_h is None else noise.step_h * h
'''

STEP_DROPOUT_COMPARED = """
import torch

import gpu_lstm

T, B, I, H = 4, 3, 2, 5

# What changes the time loop without a flag runs on the reference alone.
torch.manual_seed(0)
lstm, x = gpu_lstm.LSTM(I, H), torch.randn(T, B, I)
lstm.step_dropout = 0.5
assert "step_dropout=0.5" in repr(lstm)
torch.manual_seed(1)
y, _ = lstm(x)
torch.manual_seed(1)
factors = torch.nn.functional.dropout(torch.ones(T, B, H), 0.5).double()
exact = gpu_lstm.to_torch(gpu_lstm.LSTMCell(I, H)).double()
exact.load_state_dict({name.removesuffix("_l0"): p for name, p in lstm.state_dict().items()})
h = c = torch.zeros(B, H, dtype=torch.float64)
for t in range(T):
    h, c = exact(x[t].double(), (factors[t] * h, c))
    torch.testing.assert_close(y[t].double(), h, rtol=1e-4, atol=1e-5)
for backend in ("triton", "torch", "cupy"):
    lstm.train().backend = backend
    try:
        lstm(x)
        raise AssertionError(f"{backend} ran it")
    except ValueError as error:
        assert str(error) == f"backend {backend!r} does not support step_dropout; use 'reference'", error
for act in (lambda: setattr(lstm, "step_dropout", -1), lambda: gpu_lstm.to_torch(lstm)):
    try:
        act()
        raise AssertionError("it was accepted")
    except ValueError as error:
        assert "step_dropout" in str(error)
lstm.backend = "torch"
assert lstm.eval()(x)[0].shape == (T, B, H)  # there is none in eval()
"""


def test_a_regulariser_is_a_file_an_entry_of_the_list_and_rows_of_the_table_of_tensors(tmp_path):
    """Dropout at every step, which kernels do not know of: the reference runs it, all others refuse it."""
    copy, the_list = Copy(tmp_path), "gpu_lstm/call/regularisers.py"
    row = """
    ("step_h",          "T B P", None, NOISE,     not LOOP, NONE),  # factors of h at a step"""
    copy.add("gpu_lstm/call/step_dropout.py", STEP_DROPOUT)
    copy.enter(
        the_list,
        "from .regulariser import Drawing, Regulariser, is_probability\n",
        "from .step_dropout import StepDropout\n",
    )
    copy.enter(the_list, "    RecurrentDropout(),\n", "    StepDropout(),\n")
    copy.enter("kernels/tensors.py", "# factors of h in the recurrent product", row)
    assert copy.changes() == {
        the_list: (2, 0), "kernels/tensors.py": (1, 0),
        "gpu_lstm/call/step_dropout.py": (len(STEP_DROPOUT.splitlines()), 0),
    }  # fmt: skip
    copy.run(STEP_DROPOUT_COMPARED)


LOOP_PACKAGE = '''
"""A backend in torch's operators, a call of each for every step: what a backend is."""

PACKAGES, NEEDS = ("sympy",), "nothing but torch"


def import_packages() -> None:
    pass
'''

LOOP_LAUNCHER = '''
"""The time loop in torch's operators, all sequences at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..cards import Card
from ..cells import CELLS
from ..layer import Chosen, NoKernel, OnlyPlan, Refuses
from ..problem import Gradients, Pass, Problem, Recurrence


PLAN = OnlyPlan("loop", "a loop is slower")


def lstm_forward(x, of_h, c):
    i, f, g, o = (x + of_h).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return (i, f, g, o), o * c.tanh(), c


def lstm_backward(gates, c_prev, c, dm, dc):
    (i, f, g, o), tanh_c = gates, c.tanh()
    dc = dc + dm * o * (1 - tanh_c**2)
    slopes = i * (1 - i), f * (1 - f), 1 - g**2, o * (1 - o)
    return [d * s for d, s in zip((dc * g, dc * c_prev, dc * i, dm * tanh_c), slopes)], dc * f


def gru_forward(x, of_h, c):
    (x_r, x_u, n, _), (h_r, h_u, s) = x.chunk(4, 1), of_h.chunk(3, 1)
    r, u = (x_r + h_r).sigmoid(), (x_u + h_u).sigmoid()
    n = (n + r * s).tanh()
    c = (1 - u) * n + u * c
    return (r, u, n, s), c, c


def gru_backward(gates, c_prev, c, dm, dc):
    (r, u, n, s), d = gates, dm + dc
    dn = d * (1 - u) * (1 - n**2)
    return [dn, dn * s * r * (1 - r), d * (c_prev - n) * u * (1 - u), dn * r], d * u


EQUATIONS = {"lstm": (lstm_forward, lstm_backward), "gru": (gru_forward, gru_backward)}


class Prepared:
    """See problem.Prepared."""

    at_once = None  # no program waits for another

    def __init__(self, problem: Problem, pass_: Pass, plan: OnlyPlan, device: torch.device, trial: bool = False):
        self.plan, self.problem, self.save = plan, problem, pass_.save
        self.projects_outside = problem.projected > 0
        self.next, self.back = EQUATIONS[problem.cell]

    def steps(self, t: Tensor, r: Recurrence) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """The times and sequences of each step; who has the step [B, 1]; who goes on from the step before [B, 1]."""
        (count, batch), i, reverse = t.shape[:2], r.inputs, self.problem.reverse
        rows = torch.arange(batch, device=t.device)
        lengths = torch.full_like(rows, count) if i.lengths is None else i.lengths.long()
        for step in range(count):
            time = (lengths - 1 - step).clamp(min=0) if reverse else torch.full_like(rows, step)
            starts = torch.zeros_like(rows, dtype=torch.bool)
            if i.resets is not None:  # one at t separates t from t - 1
                starts = i.resets[(time + reverse).clamp(max=count - 1), rows] & (time + reverse < lengths)
            yield (time, rows), (step < lengths)[:, None], ~starts[:, None]

    def forward(self, gates: Tensor, r: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As layer.Layer.forward."""
        p, i = self.problem, r.inputs
        h, c, bias = i.h0[0], i.c0[0], i.bias_hh if p.bias_hh else None
        every_h, every_c = gates.new_zeros(*gates.shape[:2], p.hidden), c.new_zeros(*gates.shape[:2], p.hidden)
        for at, valid, goes_on in self.steps(gates, r):
            of_h = torch.nn.functional.linear(h.masked_fill(~goes_on, 0), i.weight_hh, bias)
            activated, m, c_next = self.next(gates[at].float(), of_h, c.masked_fill(~goes_on, 0))
            h, c = torch.where(valid, m.to(h.dtype), h), torch.where(valid, c_next, c)
            every_h[at], every_c[at] = torch.where(valid, h, every_h[at]), torch.where(valid, c, every_c[at])
            if self.save:
                gates[at] = torch.where(valid, torch.cat(activated, 1).to(gates.dtype), gates[at])
        return every_h, h[None].clone(), c[None].clone(), every_c if self.save else None

    def backward(
        self, dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, r: Recurrence
    ) -> Gradients:
        """As layer.Layer.backward."""
        p, i, steps = self.problem, r.inputs, list(self.steps(gates, r))
        dgates, c0, cell = torch.zeros_like(gates), i.c0[0], CELLS[p.cell]
        from_next, dc = torch.zeros_like(c0), torch.zeros_like(c0) if dc_n is None else dc_n[0]
        for step in reversed(range(len(steps))):
            at, valid, goes_on = steps[step]
            last = valid & ~steps[step + 1][1] if step + 1 < len(steps) else valid
            dm = from_next
            if dh is not None:
                dm = dm + dh[at]
            if dh_n is not None:
                dm = dm + torch.where(last, dh_n[0], 0)
            c_prev = (c[steps[step - 1][0]] if step else c0).masked_fill(~goes_on, 0)
            dz, dc_prev = self.back(gates[at].float().chunk(4, 1), c_prev, c[at], dm, dc)
            dz = torch.where(valid, torch.cat(dz, 1).to(gates.dtype), 0)
            dgates[at] = torch.where(valid, dz, dgates[at])
            dc = torch.where(valid, dc_prev.masked_fill(~goes_on, 0), dc)
            from_next = (cell.of_h(dz, p.hidden) @ i.weight_hh).float().masked_fill(~goes_on, 0)
        return Gradients(dgates, None, dc[None])


BACKEND, prepare = "loop", Prepared


def card_of(device: torch.device) -> Card:
    return Card(0, 1)


def obstacle(device: torch.device, dtype: torch.dtype) -> Exception | None:
    return None


def lacks(problem: Problem) -> str | None:
    if problem.cell not in EQUATIONS:
        return f"cell {problem.cell!r}"
    more = problem.regularised or problem.weight_peephole or problem.normalised or problem.reset_c
    return "noise, peepholes, layer norms or states to reset to" if more else None


def choose(problem: Problem, device: torch.device, pass_: Pass, refuses: Refuses | None) -> OnlyPlan:
    if refuses is not None and (reason := refuses(PLAN)):
        raise NoKernel(f"the loop cannot run this layer: {reason}")
    return PLAN


def describe(problem: Problem, device: torch.device, pass_: Pass, plan: OnlyPlan | None) -> Chosen:
    return Chosen(PLAN, family="loop", tiles="all at once", why="it shows what a backend is", each_step=1)
'''

LOOP_COMPARED = '''
import contextlib, copy, io, json

import torch

import gpu_lstm
from gpu_lstm.__main__ import main
from gpu_lstm.dispatch import available, route
from gpu_lstm.kernels import cache, loop_rnn
from gpu_lstm.kernels.loop_rnn import launch

T, B, I, H = 4, 3, 2, 5
LENGTHS, RESETS = torch.tensor([4, 2, 0]), torch.tensor([[0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)


def compare(kind, arguments, compiled=False, **options):
    """Results and all gradients, with those of the reference in float64."""
    torch.manual_seed(0)
    module = getattr(gpu_lstm, kind)(I, H, backend="loop", **options)
    exact = copy.deepcopy(module).double()
    exact.backend, found, x = "reference", [], torch.randn(T, B, I)
    count, sizes = 1 + module.bidirectional, [module.proj_size or H, H][: 2 - (kind == "GRU")]
    states = [torch.randn(count, B, size) for size in sizes]
    for one in (module, exact):
        leaves = [t.to(one.weight_hh_l0.dtype, copy=True).requires_grad_() for t in (x, *states)]
        run = torch.compile(one, backend="eager", fullgraph=True) if compiled and one is module else one
        y, final = run(leaves[0], tuple(leaves[1:]) if kind == "LSTM" else leaves[1], **arguments)
        results = y, *(final if kind == "LSTM" else [final])
        torch.manual_seed(1)
        given = [torch.randn(t.shape).to(t.dtype) for t in results]
        found.append([*results, *torch.autograd.grad(results, [*leaves, *one.parameters()], given)])
    for k, (ours, true) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(
            ours.double(), true, rtol=1e-4, atol=1e-5, msg=lambda text: f"{kind}, {arguments}, {options}, {k}: {text}")
    return module, x


def refused(error, text, act):
    try:
        act()
    except error as raised:
        assert text in str(raised), raised
    else:
        raise AssertionError(f"{text!r} was not said")


ragged = dict(lengths=LENGTHS, resets=RESETS)
for kind in ("LSTM", "GRU"):
    module, x = compare(kind, {})
    found = gpu_lstm.explain(module, x)
    assert found.backend == "loop" and found.launches == 2 * T and "forward: loop, all at once; " in str(found)
    stream = gpu_lstm.Stream(module, batch=B)
    torch.testing.assert_close(torch.stack([stream(one) for one in x]), module(x)[0])
    compare(kind, ragged, bidirectional=True)
    compare(kind, ragged, bidirectional=True, recompute=True)
    compare(kind, ragged, compiled=True)
compare("LSTM", dict(resets=RESETS), proj_size=3)
# Every kernel was verified before its first call.
verdicts = [verdict for _, key, verdict in cache.entries(cache.CHECKS) if key["kernel"] == "loop"]
assert set(verdicts) == {"right"} and len(verdicts) > 8, verdicts

# What it lacks is refused, and an explicit choice never falls back.
x, left = torch.randn(T, B, I), torch.randn(1, T, B, H)
said = "backend 'loop' has no noise, peepholes, layer norms or states to reset to"
for options in (dict(layer_norm=True), dict(peepholes=True), dict(zoneout=0.1)):
    refused(ValueError, said, lambda: gpu_lstm.LSTM(I, H, backend="loop", **options)(x))
gru = gpu_lstm.GRU(I, H, backend="loop")
refused(ValueError, said, lambda: gru(x, resets=RESETS, reset_states=left))
refused(TypeError, "backend 'loop' supports float16, bfloat16 and float32, got", lambda: gru.double()(x.double()))

# The doctor lists it.
with contextlib.redirect_stdout(io.StringIO()) as printed:
    main(["--json"])
state = json.loads(printed.getvalue())
assert state["devices"][0]["backends"]["loop"] is None and state["versions"]["sympy"]

# By default it is the last to be chosen; not at all, where another is expected to be faster.
available.KERNEL_DEVICES, able = ("cpu",), available.why_unavailable
available.why_unavailable = lambda choice, *of: able(choice, *of) if choice.value == "loop" else ImportError("not here")
with gpu_lstm.racing("off"):
    found = gpu_lstm.explain(gpu_lstm.LSTM(I, H), x)
    assert (found.backend, found.why) == ("torch", "expected: a loop is slower")
    assert gpu_lstm.explain(gpu_lstm.LSTM(I, H), x, lengths=LENGTHS).backend == "loop"
    available.why_unavailable = able
    others = gpu_lstm.explain(gpu_lstm.LSTM(I, H), x, lengths=LENGTHS).others
    assert others["loop"] == "'auto' chooses its kernels only where those of 'triton' cannot run"

# A card it cannot use, a package that is missing, numbers that are wrong.
route.forget()
lstm = gpu_lstm.LSTM(I, H + 1, backend="loop")
launch.lstm_forward.__code__ = (lambda x, of_h, c: (x.chunk(4, 1), c * 0, c)).__code__
with torch.no_grad():
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(RuntimeError, "the loop cannot run this layer: the RMS error of", lambda: lstm(x))
route.forget()
launch.obstacle = lambda device, dtype: RuntimeError(f"backend 'loop' does not like {device}")
refused(RuntimeError, "backend 'loop' does not like cpu", lambda: lstm(x))
loop_rnn.import_packages = lambda: __import__("no_such_package")
available.import_problem.cache_clear()
refused(ImportError, "backend 'loop' needs nothing but torch (No module named 'no_such_package')", lambda: lstm(x))
'''


def test_a_backend_is_a_folder_and_a_name(tmp_path, monkeypatch):
    """A loop in torch's operators, which is then chosen, verified, explained and refused like those there are."""
    copy, choices = Copy(tmp_path), "gpu_lstm/call/choices.py"
    (tmp_path / "kernels/loop_rnn").mkdir()
    copy.add("kernels/loop_rnn/__init__.py", LOOP_PACKAGE)
    copy.add("kernels/loop_rnn/launch.py", LOOP_LAUNCHER)
    copy.enter(choices, 'Literal["auto", "triton", "cupy", ', '"loop", ')
    copy.enter(choices, "# fused CUDA C++ kernels, for where Triton cannot run\n", '    LOOP = "loop"\n')
    assert copy.changes() == {
        choices: (2, 1), "kernels/loop_rnn/__init__.py": (len(LOOP_PACKAGE.splitlines()), 0),
        "kernels/loop_rnn/launch.py": (len(LOOP_LAUNCHER.splitlines()), 0),
    }  # fmt: skip
    copy.run(LOOP_COMPARED)
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    built = runpy.run_path(str(tmp_path / "setup.py"))["FOLDERS"]
    assert built["gpu_lstm.kernels.loop_rnn"] == "kernels/loop_rnn"
