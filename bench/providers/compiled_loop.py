"""torch.compile of a loop over LSTM steps.

Compiling unrolls the loop, so that its time grows with T: CHUNK steps are compiled once and called T / CHUNK times.
"""

import shutil

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problem import Problem
from .engine import Engine, Unable, states

NAMES = ("compiled-loop",)
EVERYWHERE = ()

CHUNK = 16  # steps


def absent(name: str, device: str) -> str | None:
    """Inductor needs a C++ compiler on the CPU."""
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler here"
    return None


def _steps(gates_x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CHUNK steps from pre-activations [CHUNK, B, 4H]."""
    outputs = []
    for z in gates_x.unbind():
        i, f, g, o = (z + h @ weight_hh.T).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def build(name: str, problem: Problem) -> Engine:
    """The input product for all steps at once, then the compiled chunks."""
    case = problem.case
    if case.layers * case.directions > 1 or case != case.plain():
        raise Unable("one layer, one direction, no lengths, no resets")
    if case.steps % CHUNK:
        raise Unable(f"T is no multiple of {CHUNK}")
    training = case.run == "training"
    parameters = {key: t.detach().clone().requires_grad_(training) for key, t in problem.weights.items()}
    weight_ih, weight_hh, bias_ih, bias_hh = parameters.values()
    h0, c0 = states(problem)
    steps = torch.compile(_steps, fullgraph=True, dynamic=False)

    def call(x):
        h, c = h0[0], c0[0]
        outputs = []
        for gates_x in F.linear(x, weight_ih, bias_ih + bias_hh).split(CHUNK):
            y, h, c = steps(gates_x, h, c, weight_hh)
            outputs.append(y)
        return torch.cat(outputs), h[None], c[None]

    return Engine(call, parameters, h0, c0)
