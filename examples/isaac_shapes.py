"""Training steps of an LSTM at the shapes that Isaac Lab's trainers use: pieces, padding, one call.

Run it from the root of the repository, after `pip install -e .`: `python examples/isaac_shapes.py`

Episodes of synthetic rollouts end at 1 of 100 steps. Three ways are compared, and then timed in turns, with backward:

- pieces, as in rl_games: torch.nn.LSTM is called for the steps between any two steps at which some environment starts
  an episode;
- padded, as in rsl_rl: the trajectories are padded to the longest one. rsl_rl pads once for all epochs, so the padding
  is not timed;
- one call: gpu_lstm.LSTM with `resets`.

On a CUDA device all environments are used, in TF32 as in Isaac Lab. On a CPU the example uses one thread, 16
environments and at most 512 units. With so few environments there are fewer pieces. Please send the last line in an
issue of the repository.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import gpu_lstm

SHAPES = [("rl_games", 4, 4096, 1024), ("rl_games", 16, 1024, 1024), ("rl_games", 16, 1024, 2048),
          ("rsl_rl", 24, 1024, 256), ("rsl_rl", 24, 4096, 256),
          ("TorchRL", 32, 256, 256), ("TorchRL", 32, 8192, 256)]  # trainer, T, B environments, H  # fmt: skip
EPISODE = 100  # steps, on average
Ways = dict[str, Callable[[], Tensor]]  # each returns the outputs [T, B, H]


def main(arguments: Sequence[str] | None = None) -> str:
    """Compare, time and print, and return the last line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = dict(type=int, help="default: %(default)s")
    parser.add_argument("--environments", metavar="MOST", **default, default=16 if device.type == "cpu" else 8192)
    parser.add_argument("--hidden", metavar="MOST", **default, default=512 if device.type == "cpu" else 2048)
    parser.add_argument("--rounds", **default, default=9)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    shapes = dict.fromkeys((who, T, min(B, options.environments), min(H, options.hidden)) for who, T, B, H in SHAPES)
    print(f"{'ms of a training step':33}  pieces   padded one call   faster than pieces, padded")
    results = []
    for who, T, B, H in shapes:
        lstm, ways, cuts = prepare(T, B, H, device)
        pieces, padded, ours = measure(lstm, ways, options.rounds)
        shape, times = f"T{T} B{B} H{H}", f"{pieces:8.2f} {padded:8.2f} {ours:8.2f}"
        print(f"{who:9}{shape}, {cuts} pieces".ljust(33), f"{times} {pieces / ours:13.2f}, {padded / ours:.2f}")
        results.append(f"{shape} {' '.join(times.split())}")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU, 1 thread"
    backend = gpu_lstm.explain(lstm, torch.zeros(T, B, H, device=device)).backend
    where = f"{card}, torch {torch.__version__}, gpu_lstm {gpu_lstm.__version__}, {backend}"
    line = f"isaac_shapes on {where}; ms in pieces, padded, in one call: {'; '.join(results)}"
    print(f"\n{line}")
    return line


def prepare(T: int, B: int, H: int, device: torch.device) -> tuple[gpu_lstm.LSTM, Ways, int]:
    """Return an LSTM, three ways to run a rollout through its weights, and the number of pieces of that rollout."""
    torch.manual_seed(0)
    ours = gpu_lstm.LSTM(H, H, device=device)
    theirs = gpu_lstm.to_torch(ours)  # with the same weights
    x, state = torch.randn(T, B, H, device=device), torch.randn(2, 1, B, H, device=device).tanh()
    starts = torch.rand(T, B, device=device) < 1 / EPISODE
    keep = (~starts).float()[:, None, :, None]  # [T, 1, B, 1]

    def pieces() -> Tensor:
        hx, outputs = state, []
        begins = [0, *(1 + starts[1:].any(dim=1).nonzero()[:, 0]).tolist()]  # this waits for the device
        for begin, end in pairwise([*begins, T]):
            y, hx = theirs(x[begin:end], (keep[begin] * hx[0], keep[begin] * hx[1]))
            outputs.append(y)
        return torch.cat(outputs)

    begins = starts.t().clone()  # of trajectories, one environment after another: [B, T]
    begins[:, 0] = True
    first = begins.flatten().nonzero()[:, 0]
    lengths = torch.diff(first, append=first.new_tensor([B * T]))
    valid = torch.arange(int(lengths.max()), device=device) < lengths[:, None]  # [trajectories, steps]
    batch, hx = x.new_zeros(*valid.shape, H), x.new_zeros(2, 1, len(first), H)
    batch[valid], hx[:, :, first % T == 0] = x.transpose(0, 1).flatten(0, 1), keep[0] * state
    batch = batch.transpose(0, 1).contiguous()

    def padded() -> Tensor:
        y, _ = theirs(batch, (hx[0], hx[1]))
        return y.transpose(0, 1)[valid].view(B, T, H).transpose(0, 1)

    ways = {"pieces": pieces, "padded": padded, "one call": lambda: ours(x, tuple(state), resets=starts)[0]}
    return ours, ways, 1 + int(starts[1:].any(dim=1).sum())


def step(lstm: nn.Module, way: Callable[[], Tensor]) -> list[Tensor]:
    """Run forward and backward, and return the outputs and the gradients of all weights."""
    y = way()
    return [y.detach(), *torch.autograd.grad(y.square().mean(), list(lstm.parameters()))]


def measure(lstm: nn.Module, ways: Ways, rounds: int) -> list[float]:
    """Return the median time of each way in ms. The ways take turns.

    Raise RuntimeError if their results differ by more than 1e-4, or on CUDA, in TF32, by more than 1e-2.
    """
    expected, *others = (step(lstm, way) for way in ways.values())
    for way, found in zip(list(ways)[1:], others):
        error = max(((one - true).norm() / true.norm()).item() for one, true in zip(found, expected))
        if not error <= (1e-2 if expected[0].is_cuda else 1e-4):
            raise RuntimeError(f"{way} and pieces differ by {error:.2g}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + rounds):
        for name in sorted(ways, reverse=number % 2 == 1):
            began = time.perf_counter()
            step(lstm, ways[name])
            if expected[0].is_cuda:
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - began))
    return [statistics.median(each[1:]) for each in times.values()]  # the first round warms up


if __name__ == "__main__":
    main()
