"""The package imported again, reloaded, and loaded as Hugging Face's `kernels` does: several copies in a process."""

import base64
import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import subprocess
import sys
from types import MethodType

import torch
from installed import ROOT
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.backends import graph


def in_another_process(function, *args):
    """Its result, in a fork, which has torch; numbers are float64 there."""
    with multiprocessing.get_context("fork").Pool(1, torch.set_default_dtype, [torch.float64]) as another:
        return another.apply(function, args)


def results(module, x) -> list:
    """Output and states, and the gradients of the parameters."""
    found = tree_leaves(module(x))
    return [*found, *torch.autograd.grad(sum(t.square().sum() for t in found), list(module.parameters()))]


def far(found, expected) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def compared(other) -> list[float]:
    """How far another copy is from torch's own: eager and compiled."""
    theirs, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    of_all = []
    for backend, compiler in (("reference", "eager"), ("torch", "aot_eager")):
        ours = other.LSTM(3, 4, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        called = torch.compile(ours, backend=compiler, disable=compiler == "eager", fullgraph=True)
        of_all.append(far(results(called, x), results(theirs, x)))
    return of_all


def again() -> tuple:
    for module in (graph, gpu_lstm):
        importlib.reload(module)
    first = compared(gpu_lstm)
    for name in [name for name in sys.modules if name.startswith("gpu_lstm")]:
        del sys.modules[name]
    other = importlib.import_module("gpu_lstm")
    return first + compared(other), other is not gpu_lstm, repr(other.LSTM(3, 4))


def test_a_copy_that_is_imported_again_runs_beside_the_first():
    of_all, is_another, shown = in_another_process(again)
    assert max(of_all) < 1e-12
    assert (is_another, shown) == (True, "gpu_lstm.LSTM(3, 4)")


def kernelized(path) -> tuple:
    """How far torch's modules with the forward of `layers` are from what they were; what `kernels` asks of a layer."""
    spec = importlib.util.spec_from_file_location("_a_kernel", path)
    sys.modules[spec.name] = other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    of_all, x = [], torch.randn(5, 2, 3)
    for kind, options in (("LSTM", dict(num_layers=2, bidirectional=True)), ("LSTM", dict(proj_size=2)), ("GRU", {})):
        for given in (x, x[:, 0], pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)):
            theirs = getattr(nn, kind)(3, 4, **options)
            expected = results(theirs, given)
            theirs.forward = MethodType(getattr(other.layers, kind).forward, theirs)
            of_all.append(far(results(theirs, given), expected))
    signatures = [inspect.signature(of.LSTM.forward).parameters.values() for of in (other.layers, nn)]
    own = set(dir(other.layers.LSTM)) - set(dir(nn.Module))
    return of_all, own, *([p.kind for p in parameters] for parameters in signatures), other.__all__


def test_modules_of_torch_with_the_forward_of_the_folder_that_make_hub_writes_compute_the_same(tmp_path):
    subprocess.run([sys.executable, ROOT / "dev/hub/write.py", tmp_path], check=True)
    variant = tmp_path / "build/torch-universal"
    files = {path.relative_to(variant).as_posix(): path.read_bytes() for path in variant.rglob("*") if path.is_file()}
    metadata = json.loads(files.pop("metadata.json"))
    asked = kernelized, variant / "gpu_lstm/__init__.py"  # which older versions of `kernels` load; it loads the other
    of_all, own, ours, torchs, names = in_another_process(*asked)
    assert max(of_all) < 1e-12
    assert (own, ours, names) == ({"can_torch_compile"}, torchs, [*gpu_lstm.__all__, "layers"])
    digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in files.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
