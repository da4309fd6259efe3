"""DDP and FSDP2 in two gloo processes, compared with one process. test_examples.py tests distributed checkpoints, by
examples/train_ddp.py."""

import os
import socket
import traceback
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from comparing import assert_same
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gpu_lstm
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import race, route
from gpu_lstm.kernels import triton_rnn

WORKERS, WITHIN = 2, ("torch", "triton")
T, B, I, H = 4, 4, 3, 6

Adam = partial(torch.optim.Adam, lr=0.01)


class Tagger(nn.Module):
    """Two layers and a head, over sequences with lengths and resets."""

    def __init__(self, backend, seed=0, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = gpu_lstm.LSTM(I, H, num_layers=2, dropout=dropout, backend=backend)
        self.head = nn.Linear(H, 2)

    def forward(self, x, lengths, resets):
        output, _ = self.lstm(x, lengths=lengths, resets=resets)
        return self.head(output)


def batch(number, rank=None):
    """Return x, lengths and resets of a joint batch, or one worker's part of it."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(T, B, I, generator=generator)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    resets = torch.rand(T, B, generator=generator) < 0.3
    part = slice(None) if rank is None else slice(rank * B // WORKERS, (rank + 1) * B // WORKERS)
    return x[:, part], lengths[part], resets[:, part]


def backward_of(model, number, rank=None):
    model(*batch(number, rank)).square().mean().backward()


def train(model, steps, optimizer, rank=None):
    for step in steps:
        optimizer.zero_grad()
        backward_of(model, step, rank)
        optimizer.step()


def ddp(backend, rank, folder):
    model = DistributedDataParallel(Tagger(backend, seed=rank))  # DDP hands out the weights of rank 0
    backward_of(model, 0, rank)
    return {name: p.grad for name, p in model.module.named_parameters()}


def fsdp(backend, rank, folder):
    model = Tagger(backend)
    fully_shard(model.lstm)
    fully_shard(model)
    train(model, range(3), Adam(model.parameters()), rank)
    assert model.lstm.weight_hh_l1.to_local().shape == (4 * H // WORKERS, H)
    return {name: weight.full_tensor() for name, weight in model.state_dict().items()}


def agreed(backend, rank, folder):
    """Return whether kernels run two kinds of calls. The ranks make them in different orders, and alone would decide
    differently."""
    seconds = {"triton": [1e-3 + rank] * 4, "torch": [2e-3 - rank * 1e-3] * 4}
    by_kernels = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("XDG_CACHE_HOME", str(folder / f"cache {rank}"))
        patch.setattr(triton_rnn, "DEVICES", ("cpu",))
        patch.setattr(race, "times_of", lambda rivals, now: seconds)
        for hidden in (5, 9) if rank else (9, 5):
            lstm = gpu_lstm.LSTM(I, hidden)
            call = lstm._request(torch.zeros(T, B, I))
            by_kernels[str(hidden)] = torch.tensor(route.route_of(call).backend is Backend.TRITON)
        route.forget()
    return dict(sorted(by_kernels.items()))


def work(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    for task, backend in [*product((ddp, fsdp), WITHIN), (agreed, "auto")]:
        with torch.backends.cudnn.flags(allow_tf32=False):
            try:
                found = task(backend, rank, folder)
            except Exception:
                found = traceback.format_exc()  # the test shows it
        torch.save(found, folder / f"{task.__name__} {backend} {rank}")
    dist.barrier()  # the store is in process 0
    dist.destroy_process_group()
    # DTensor's caches of meshes keep the group alive, and so gloo's threads. If these ran while Python is taken down,
    # they would abort the process.
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder where the workers have left their results."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), WORKERS)
    return folder


def found(folder, task, backend):
    """Return the results of the workers, after checking that both are the same."""
    first, second = (torch.load(folder / f"{task.__name__} {backend} {rank}") for rank in range(WORKERS))
    assert isinstance(first, dict), first
    assert all(map(torch.equal, first.values(), second.values()))
    return first


@pytest.mark.deep
@pytest.mark.parametrize("backend", WITHIN)
def test_ddp_and_fsdp2_are_as_one_process_on_the_joint_batch(folder, backend):
    model = Tagger("torch")
    backward_of(model, 0)
    assert_same(found(folder, ddp, backend), {name: p.grad for name, p in model.named_parameters()})
    train(model, range(3), Adam(model.parameters()))
    assert_same(found(folder, fsdp, backend), model.state_dict())


@pytest.mark.deep
def test_ranks_run_the_same_backend_and_none_waits_for_another(folder):
    assert len(found(folder, agreed, "auto")) == 2
