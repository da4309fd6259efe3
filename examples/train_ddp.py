"""Train a byte-level language model in several processes, stop, and resume with bit-identical results.

Run it from the root of the repository, in one process or in more::

    pip install -e ".[demo]"
    python examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --resume --steps 600

The text is the language reference that every Python ships for `help()`. It is cut into STREAMS pieces of equal length,
which are divided among the processes and read in parallel. Back-propagation through time is truncated: a training step
reads the next WINDOW bytes of every piece, and h and c carry over from step to step without their gradient. The
processes exchange gradients by DistributedDataParallel, over NCCL if each has a GPU, and over gloo otherwise.

A checkpoint holds everything that a run needs. It has the weights, the optimizer, and the number of steps so far, which
gives the position in every piece. For each process it has the states of its pieces and of its random number generator.
"""

import argparse
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import gpu_lstm

STREAMS = 32  # pieces of the text, counted over all processes
WINDOW = 64  # T, the bytes of each piece between two updates
HIDDEN = 128  # H
LAYERS = 2
DROPOUT = 0.1
LEARNING_RATE = 4e-3
MAX_NORM = 1.0  # of the gradient
HELD_OUT = 20_000  # bytes at the end of the text

State = tuple[Tensor, Tensor]
"""h and c, each [LAYERS, N, H]."""


class Model(nn.Module):
    """Map bytes [T, N] to the logits of the next bytes, [T, N, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, HIDDEN)
        self.lstm = gpu_lstm.LSTM(HIDDEN, HIDDEN, LAYERS, dropout=DROPOUT)
        self.head = nn.Linear(HIDDEN, 256)

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = self.lstm(self.embedding(text), state)
        return self.head(y), state


class Training:
    """The part of a run that one process does."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, workers = device, dist.get_rank(), dist.get_world_size()
        if STREAMS % workers:
            raise SystemExit(f"{STREAMS} pieces of text cannot be shared out evenly among {workers} processes")
        text = the_text()
        self.held_out = text[-HELD_OUT:].long().to(device)[:, None]  # [bytes, 1]
        pieces = text[:-HELD_OUT].tensor_split(STREAMS)
        length = min(map(len, pieces))
        mine = [piece[:length] for piece in pieces[self.rank :: workers]]
        self.text = torch.stack(mine, dim=1).long().to(device)  # [bytes, N]
        self.counts = text[:-HELD_OUT].long().bincount(minlength=256).to(device) + 1.0
        torch.manual_seed(self.rank)  # for dropout; DDP copies the weights of rank 0 to all
        self.model = DistributedDataParallel(Model().to(device))
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)
        self.steps = 0
        zeros = torch.zeros(LAYERS, len(mine), HIDDEN, device=device)
        self.state: State = zeros, zeros.clone()

    def step(self) -> float:
        """Train on the next bytes of every piece, and return the loss of this process in bits per byte."""
        per_round = (len(self.text) - 1) // WINDOW  # windows of a piece
        first = self.steps % per_round * WINDOW
        if first == 0:  # at the start of the pieces
            self.state = tuple(map(torch.zeros_like, self.state))
        window = self.text[first : first + WINDOW + 1]
        logits, (h, c) = self.model(window[:-1], self.state)
        loss = cross_entropy(logits.flatten(0, 1), window[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.state = h.detach(), c.detach()
        self.steps += 1
        return loss.item() / math.log(2)

    def save(self, folder: Path) -> None:
        """Write the whole run, by all processes together."""
        dcp.save(self._parts(), checkpoint_id=folder)

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint, which must be from the same number of processes."""
        self.step()  # DDP fixes the order of its sums in it; the checkpoint overwrites all its other effects
        parts = self._parts()
        dcp.load(parts, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        own = parts[f"process {self.rank}"]
        self.steps, self.state = parts["steps"], (own["h"], own["c"])
        torch.set_rng_state(own["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["random on the GPU"], self.device)

    def _parts(self) -> dict:
        own = {"h": self.state[0], "c": self.state[1], "random": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["random on the GPU"] = torch.cuda.get_rng_state(self.device)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "steps": self.steps, f"process {self.rank}": own}

    @torch.no_grad()
    def bits(self) -> dict[str, float]:
        """Return the bits per byte on the held-out text, for the model and for the frequencies of single bytes."""
        model = self.model.module.eval()
        logits, _ = model(self.held_out[:-1])
        model.train()
        nats = {
            "the model": cross_entropy(logits[:, 0], self.held_out[1:, 0]),
            "frequencies of bytes": -(self.counts / self.counts.sum()).log()[self.held_out[1:, 0]].mean(),
        }
        return {name: value.item() / math.log(2) for name, value in nats.items()}


def the_text() -> Tensor:
    """Return the language reference, uint8 [bytes]."""
    return torch.frombuffer(bytearray("\n\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train and print, and return the bits per byte on the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of training, in total; default: %(default)s")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--out", type=Path, default=Path("out/train_ddp"), help="for checkpoints; default: %(default)s")
    options = parser.parse_args(arguments)
    device = start()
    try:
        return train(Training(device), options)
    finally:
        dist.destroy_process_group()


def start() -> torch.device:
    """Join the other processes that torchrun has started, if there are any, and return the device of this process."""
    torch.set_num_threads(1)  # the processes share the cores
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    alone = {} if dist.is_torchelastic_launched() else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    return device


def train(training: Training, options: argparse.Namespace) -> dict[str, float]:
    """Train up to the last step, with checkpoints on the way and at the end."""
    if options.resume:
        complete = [path.parent for path in options.out.glob("step-*/.metadata")]  # this file is written last
        if not complete:
            raise SystemExit(f"there is no checkpoint in {options.out}")
        training.resume(max(complete, key=lambda folder: int(folder.name.removeprefix("step-"))))
    elif training.rank == 0:
        for folder in options.out.glob("step-*"):  # of an earlier run
            shutil.rmtree(folder)
    loss_column = TextColumn("{task.fields[loss]:.2f} bits per byte")
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), loss_column)
    console = Console(quiet=training.rank > 0)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps, completed=training.steps, loss=8.0)
        while training.steps < options.steps:
            loss = training.step()
            progress.update(task, advance=1, loss=loss)
            if training.steps % options.save_every == 0 or training.steps == options.steps:
                training.save(options.out / f"step-{training.steps}")
    bits = training.bits()
    table = Table(
        "held-out text", "bits per byte", title=f"after {training.steps} steps, {dist.get_world_size()} processes"
    )
    for name, value in bits.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    return bits


if __name__ == "__main__":
    main()
