"""The example of training in several processes: it goes on from a checkpoint with the same bits, and learns."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from installed import ROOT, load
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._pytree import tree_leaves_with_path

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
example = load(ROOT / "examples" / "train_ddp.py")


def in_two_processes(arguments: list[str]) -> None:
    """As torchrun does it, in forks, which have torch."""
    config = dict(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    handlers = [(number, signal.getsignal(number)) for number in numbers]
    elastic_launch(LaunchConfig(**config, start_method="fork", monitor_interval=0.01), example.main)(arguments)
    for number, handler in handlers:  # which the launcher replaces
        signal.signal(number, handler)


def contents(checkpoint: Path, tmp_path: Path) -> dict:
    """All that a checkpoint holds, by its place there."""
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    return {str(path): leaf for path, leaf in tree_leaves_with_path(whole)}


@pytest.mark.slow
@pytest.mark.parametrize(("run", "processes"), [(example.main, 1), (in_two_processes, 2)], ids=["one", "two"])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(run, processes, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(["--out", str(whole), "--steps", "6", "--save-every", "3"])
    shutil.copytree(whole / "step-3", parts / "step-3")
    shutil.copytree(whole / "step-6", parts / "step-5", ignore=shutil.ignore_patterns(".metadata"))  # not yet whole
    run(["--out", str(parts), "--steps", "6", "--resume"])
    expected, found = (contents(folder / "step-6", tmp_path) for folder in (whole, parts))
    assert expected.keys() == found.keys()
    assert len(expected) > 60
    for path, value in expected.items():
        assert torch.equal(value, found[path]) if isinstance(value, torch.Tensor) else value == found[path], path
    dropped = [value for path, value in expected.items() if "random" in path]
    assert len(dropped) == processes
    assert processes == 1 or not torch.equal(*dropped)


@pytest.mark.slow
def test_it_learns_more_than_the_frequencies_of_bytes(tmp_path):
    bits = example.main(["--steps", "60", "--out", str(tmp_path)])
    assert 4.0 < bits["frequencies of bytes"] < 5.2
    assert bits["the model"] < bits["frequencies of bytes"] - 0.5  # 3.77 against 4.61


def test_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(SystemExit, match="there is no checkpoint in"):
        example.main(["--resume", "--out", str(tmp_path)])
