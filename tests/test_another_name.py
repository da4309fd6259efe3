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

import pytest
import torch
from installed import ROOT
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gpu_lstm
from gpu_lstm.backends import graph


def in_another_process(function, *args):
    with multiprocessing.get_context("fork").Pool(1) as another:  # which has torch
        return another.apply(function, args)


def compared(other) -> list[float]:
    """How far results and gradients of another copy are from torch's own: eager and compiled."""
    torch.manual_seed(0)
    theirs, x = torch.nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = [theirs(x)[0], *torch.autograd.grad(theirs(x)[0].sum(), list(theirs.parameters()))]
    far = []
    for backend, compiler in (("reference", "eager"), ("torch", "aot_eager")):
        ours = other.LSTM(3, 4, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        y = torch.compile(ours, backend=compiler, disable=compiler == "eager", fullgraph=True)(x)[0]
        found = [y, *torch.autograd.grad(y.sum(), list(ours.parameters()))]
        far.append(max((a - b).abs().max().item() for a, b in zip(found, expected)))
    return far


def again() -> tuple:
    for module in (graph, gpu_lstm):
        importlib.reload(module)
    first = compared(gpu_lstm)
    for name in [name for name in sys.modules if name.startswith("gpu_lstm")]:
        del sys.modules[name]
    other = importlib.import_module("gpu_lstm")
    return first + compared(other), other is not gpu_lstm, repr(other.LSTM(3, 4))


def test_a_copy_that_is_imported_again_runs_beside_the_first():
    far, is_another, shown = in_another_process(again)
    assert max(far) < 1e-6
    assert (is_another, shown) == (True, "gpu_lstm.LSTM(3, 4)")


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """What `make hub` writes."""
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "dev/hub/write.py", folder], check=True)
    return folder / "build/torch-universal"


def load(name, path):
    """As `kernels` does."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(lstm, x) -> list:
    """Output and states, and the gradients of parameters and input."""
    y, states = lstm(x)
    y, x = (t.data if isinstance(t, PackedSequence) else t for t in (y, x))
    loss = sum(t.square().sum() for t in (y, *states))
    return [y, *states, *torch.autograd.grad(loss, [x, *lstm.parameters()])]


KERNELIZED = [
    ("LSTM", dict()), ("LSTM", dict(bias=False, proj_size=2)), ("LSTM", dict(num_layers=2, bidirectional=True)),
    ("LSTM", dict(batch_first=True)), ("LSTM", dict(num_layers=2, dropout=0.5)),
    ("LSTM", dict(num_layers=2, dropout=1.0)), ("GRU", dict()), ("GRU", dict(num_layers=2, bidirectional=True)),
]  # fmt: skip


def kernelized(path) -> list[float]:
    """How far torch's modules with the forward of `layers` are from what they were."""
    other, far = load("_a_kernel", path), []
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, requires_grad=True)
    for kind, options in KERNELIZED:
        for given in (x, x[:, 0], pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)):
            theirs = getattr(nn, kind)(3, 4, **options)
            theirs.train(options.get("dropout") != 0.5)  # which would be drawn at random
            if "batch_first" in options:  # a weight that is no parameter, but a property of a class made for the module
                nn.utils.parametrizations.weight_norm(theirs, "weight_hh_l0")
            expected = results(theirs, given)
            theirs.forward = MethodType(getattr(other.layers, kind).forward, theirs)
            for backend in ("torch", "reference"):
                with other.backend(backend):
                    found = results(theirs, given)
                far.append(max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)))
    return far


@pytest.mark.parametrize("file", ["__init__.py", "gpu_lstm/__init__.py"])  # which older versions of `kernels` load
def test_a_module_of_torch_with_the_forward_of_the_layer_computes_the_same(file, variant):
    far = in_another_process(kernelized, variant / file)
    assert len(far) == 48
    assert max(far) < 1e-6


def compiled(path) -> tuple[list[int], float]:
    """Graphs with a torch.nn.LSTM, with another forward, and with that where LSTMs are traced; how far results are."""
    other, lstm, x = load("_a_kernel", path), nn.LSTM(3, 4), torch.randn(5, 2, 3)
    graphs, y = [], []
    for traced in (False, False, True):
        if y:
            lstm.forward = MethodType(other.layers.LSTM.forward, lstm)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        with torch._dynamo.config.patch(allow_rnn=traced):
            y.append(torch.compile(lambda x: lstm(x.sin())[0].cos(), backend=counter, fullgraph=traced)(x))
        graphs.append(counter.frame_count)
    return graphs, max((other_y - y[0]).abs().max().item() for other_y in y)


def test_the_layer_compiles_as_a_torch_lstm_and_where_that_may_be_traced_into_one_graph(variant):
    graphs, far = in_another_process(compiled, variant / "__init__.py")
    assert graphs[1] == graphs[0]
    assert graphs[2] == 1
    assert far < 1e-6


def loaded(path, name, kind) -> tuple:
    """What `kernels` asks of a layer and its names."""
    other = load(name, path)
    layer = getattr(other.layers, kind)
    signatures = [
        [p.kind for p in inspect.signature(c.forward).parameters.values()] for c in (layer, getattr(nn, kind))
    ]
    own = {member for member, _ in inspect.getmembers(layer)} - {member for member, _ in inspect.getmembers(nn.Module)}
    return own, layer.__init__ is nn.Module.__init__, *signatures, other.__all__, other.backends.operators.NAMESPACE


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_layer_and_the_metadata_keep_the_rules_of_kernels(variant, kind):
    metadata = json.loads((variant / "metadata.json").read_text())
    asked = loaded, variant / "__init__.py", metadata["id"], kind
    own, stateless, ours, torchs, names, namespace = in_another_process(*asked)
    assert own == {"can_torch_compile"}
    assert stateless
    assert ours == torchs
    assert names == [*gpu_lstm.__all__, "layers"]
    assert namespace == metadata["id"]
    assert metadata["name"].replace("-", "_") == "gpu_lstm"
    files = {path for path in variant.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    digests = {p.relative_to(variant).as_posix(): hashlib.sha256(p.read_bytes()).digest() for p in files}
    del digests["metadata.json"]
    assert metadata["digest"] == {
        "algorithm": "sha256",
        "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
    }


def test_importing_the_folder_imports_the_standard_library_and_torch_alone(variant):
    code = f"""
import importlib.util, sys
sys.modules["numpy"] = None
import torch
before = set(sys.modules)
{inspect.getsource(load)}
other = load("_a_kernel", sys.argv[1])
print({{name.split(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names - {{"torch"}})
other.layers.LSTM.forward(torch.nn.LSTM(3, 4), torch.zeros(5, 2, 3))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, variant / "__init__.py"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "{'_a_kernel'}\n"
