"""make agree: compare kernels of an LSTM and of a GRU, forward and backward, with torch, in Triton's interpreter.

These sizes run by the step family, as one program. `make test` runs the other families. Everything runs as in a
user's call, except that NumPy executes the kernels. Each result and gradient is compared with torch's own in float64.
The error of torch's own in float32 is printed beside it. The script needs only the packages that gpu_lstm needs.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import

import torch
from torch import Tensor, nn

import gpu_lstm

T, B, I, H = 16, 5, 8, 20
MOST = 4.0  # the largest error, as a multiple of torch's; a root mean square of few numbers varies so much


def results(module: nn.Module, x: Tensor, resets: Tensor | None = None) -> dict[str, Tensor]:
    """Return the output, and the gradients of its sum of squares."""
    x = x.clone().requires_grad_()
    y, _ = module(x) if resets is None else module(x, resets=resets)
    names, leaves = zip(("x", x), *module.named_parameters())
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    return {"output": y.detach()} | {f"gradient of {name}": d for name, d in zip(names, gradients)}


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).double().square().mean().sqrt() / true.square().mean().sqrt())


def main() -> bool:
    """Print a table, row by row, and return whether all rows agree."""
    torch.manual_seed(0)
    print(f"{'relative error, beside torch in float64':41} kernels  torch's own in float32")
    x, agree = torch.randn(T, B, I), True
    for name in ("LSTM", "GRU"):
        theirs = getattr(nn, name)(I, H)
        exact = getattr(nn, name)(I, H, dtype=torch.float64)
        exact.load_state_dict(theirs.state_dict())
        true, of_torch = results(exact, x.double()), results(theirs, x)
        ours = gpu_lstm.convert(theirs)
        ours.backend = "triton"
        for what, found in results(ours, x).items():
            kernels, torchs = error(found, true[what]), error(of_torch[what], true[what])
            agree &= kernels <= MOST * torchs
            print(f"{name + ', ' + what:41} {kernels:.1e}  {torchs:.1e}")
        starts = torch.rand(T, B) < 0.1
        y, _ = ours(x, resets=starts)
        h_and_c = None
        for t in range(T):  # the loop that `resets` replaces
            if h_and_c is not None:
                keep = (~starts[t]).float()[:, None]
                h_and_c = tuple(keep * s for s in h_and_c) if name == "LSTM" else keep * h_and_c
            step, h_and_c = exact(x[t : t + 1].double(), None if h_and_c is None else h_and_c)
            agree &= error(y[t : t + 1].detach(), step.detach()) < 1e-6
    print("They agree, and with resets." if agree else "They do not agree.")
    return agree


if __name__ == "__main__":
    raise SystemExit(not main())
