"""use_for_slstm: cells of xlstm and of TiRex compute by slstm_layer. xlstm's own cells also judge ours.

xlstm is in the extra `interop`. Tests that need xlstm are skipped where it is not installed. No test needs TiRex: a
stand-in with the names and the layout of TiRex's cell takes its place, and the oracle judges.
"""

import copy
import importlib
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from installed import ROOT
from pairs import weighing
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

import gpu_lstm
from gpu_lstm.call.choices import Backend
from gpu_lstm.dispatch import available
from gpu_lstm.tools import xlstm as tool

B, STEPS, HEADS, H = 3, 5, 2, 8
CELLS, PAGE = "xlstm.blocks.slstm.cell", (ROOT / "docs/slstm.md").read_text()


def cell_of_xlstm(fresh=False, **options):
    """Return a cell with random weights, or with its initial weights if `fresh`."""
    module = pytest.importorskip(CELLS, reason="xlstm is not installed")
    options = dict(hidden_size=H, num_heads=HEADS, backend="vanilla", dtype="float32") | options
    skip = dict(skip_backend_init=True) if options["backend"] == "cuda" else {}  # otherwise it would call nvcc
    cell = module.sLSTMCell(module.sLSTMCellConfig(**options), **skip)
    return cell if fresh else drawn(cell)


def drawn(module, std=0.5):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def tensors_for(dtype):
    """Return an input [B, S, 4H] and a state [4, B, H] whose n is from 1 to 2."""
    torch.manual_seed(1)
    state = torch.randn(4, B, H)
    state[2] = torch.rand(B, H) + 1
    return torch.randn(B, STEPS, 4 * H).to(dtype), state.to(dtype)


def numbers_of(cell, x, state=None):
    """Return the output, the numbers that equal states have in common, and the gradients of a random sum of all."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, state) if t is not None]
    y, (h, c, n, m) = cell(*leaves)
    found = [y, h, c / n, m + n.log()]
    return [*found, *torch.autograd.grad(found, [*leaves, *cell.parameters()], weighing(found))]


SHAPES = [("SBGNH", "SBH"), ("BSGNH", "BSH"), ("SBGNH", "SBNH")]  # inputs and outputs


@pytest.mark.parametrize(("given", "shut", "shapes"), [
    *((given, shut, {}) for given, shut in ((False, 0.0), (True, 0.0), (True, -1e9), (True, -float("inf")))),
    *((True, 0.0, dict(zip(("input_shape", "output_shape"), names))) for names in SHAPES)])  # fmt: skip
def test_xlstms_own_cell_is_of_one_mind_in_float64(given, shut, shapes):
    """Input gates may be shut, too. Where every n is 0, xlstm's cell forgets m, so states are given then."""
    cell = cell_of_xlstm(**shapes).double()
    x, state = tensors_for(torch.float64)
    x[..., :H] += torch.where(torch.rand(B, STEPS, H) < 0.4, shut, 0.0)
    x = x.transpose(0, 1) if shapes.get("input_shape") == "SBGNH" else x
    theirs = numbers_of(cell, x, state if given else None)
    assert gpu_lstm.use_for_slstm(cell) == 1
    assert cell._theirs is type(cell).__mro__[2]
    for our, their in zip(numbers_of(cell, x, state if given else None), theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=2e-15 * max(1.0, their.abs().max().item()))


@pytest.mark.parametrize("steps", range(1, tool.MOST_STEPS + 2))
def test_second_derivatives_and_traces_are_those_of_xlstms_own_cell(steps):
    cell, x = cell_of_xlstm().double(), tensors_for(torch.float64)[0][:, :steps].requires_grad_()

    def second():
        (first,) = torch.autograd.grad(cell(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *cell.parameters()])

    theirs, output = second(), cell(x)[0]
    gpu_lstm.use_for_slstm(cell)
    torch.testing.assert_close(second(), theirs, rtol=1e-12, atol=1e-12)
    traced = torch.jit.trace(cell, (x.detach(),), check_trace=False)
    torch.testing.assert_close(traced(x)[0], output, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("steps", "said"), [(1, "few steps on a CPU"), (9, "SLSTM")])
def test_explain_takes_a_cell(steps, said):
    cell, x = cell_of_xlstm(), tensors_for(torch.float32)[0][:, :1].repeat(1, steps, 1)
    gpu_lstm.use_for_slstm(cell)
    explanation = gpu_lstm.explain(cell, x)
    assert said in str(explanation)
    if explanation.layers:  # the cell is given W_ih x
        assert f"SLSTM W_ih x -> {H} " in explanation.problem
        assert f"W_ih x -> {H} of {HEADS} heads" in str(explanation)
    with pytest.raises(TypeError, match="got ModuleDict: give it the module 'cell' of it"):
        gpu_lstm.explain(nn.ModuleDict({"cell": cell}), x)
    has_loops = available.import_problem(Backend.NUMBA) is None
    assert (explanation.backend == "reference") == (steps == 1 or not has_loops)


@pytest.fixture
def calls(spy):
    """A Mock that makes and counts the calls of slstm_layer."""
    return spy(tool, "slstm_layer")


@torch.no_grad()
def test_without_gradients_twice_as_many_steps_are_few(calls):
    theirs, most = cell_of_xlstm().double(), 2 * tool.MOST_STEPS
    ours = copy.deepcopy(theirs)
    gpu_lstm.use_for_slstm(ours)
    for steps in (most, most + 1):
        x = torch.randn(B, steps, 4 * H, dtype=torch.float64)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=0, atol=1e-14)
        assert calls.call_count == (steps > most)


@pytest.mark.parametrize("steps", range(1, tool.MOST_STEPS + 1))
def test_a_few_steps_of_gates_that_are_shut_and_units_that_are_empty(steps, calls):
    """xlstm's cell gives NaN there. The steps give the results of slstm_layer, and its derivatives."""
    cell, (x, state) = cell_of_xlstm().double(), tensors_for(torch.float64)
    x[..., :H][torch.rand(B, STEPS, H) < 0.5], state[:, :, 1::2] = -float("inf"), 0
    gpu_lstm.use_for_slstm(cell)
    both = []
    for backend in ("auto", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x[:, :steps], state)]
        with gpu_lstm.backend(backend):
            y, final = cell(*leaves)
        gradients = torch.autograd.grad(y.square().sum() + final[:3].sum(), [*leaves, *cell.parameters()])
        both.append([y, final, *gradients])
    assert calls.call_count == 1
    torch.testing.assert_close(*both, rtol=0, atol=1e-14)


def test_a_few_steps_that_are_left_to_slstm_layer(calls):
    cell, (x, state) = cell_of_xlstm(), tensors_for(torch.float32)
    gpu_lstm.use_for_slstm(cell)
    x = x[:, :1]
    with gpu_lstm.backend("reference"):
        cell(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        assert cell(x, state)[0].dtype == torch.bfloat16
    assert cell(x.bfloat16(), state)[1].dtype == torch.float32
    torch.func.vmap(lambda x: cell(x, state)[0])(x[None])
    assert calls.call_count == 4
    for wrong in ((x, state[:, :1]), (x[..., :-4], state), (x, state[..., :-1])):
        with pytest.raises((RuntimeError, ValueError), match="size"):
            cell(*wrong)
    assert calls.call_count == 7


KERNEL = "_recurrent_kernel_"
MADE_AND_UNDONE = {
    "parametrized": (lambda *named: parametrize.register_parametrization(*named, nn.Tanh()),
                     parametrize.remove_parametrizations),
    "weight_norm": (weight_norm, remove_weight_norm),
    "parametrizations.weight_norm": (parametrizations.weight_norm, parametrize.remove_parametrizations),
    "pruned": (lambda *named: prune.l1_unstructured(*named, 0.3), prune.remove),
}  # fmt: skip


@pytest.mark.parametrize("first", ["ours", "made", "ours, undone"])
@pytest.mark.parametrize("way", MADE_AND_UNDONE)
def test_weights_that_are_made_of_others(way, first):
    cell, (make, undo) = cell_of_xlstm().double(), MADE_AND_UNDONE[way]
    own, (x, state) = type(cell), tensors_for(torch.float64)
    if first == "made":
        make(cell, KERNEL)
        gpu_lstm.use_for_slstm(cell)
    else:
        gpu_lstm.use_for_slstm(cell)
        make(cell, KERNEL)
    ours = numbers_of(cell, x, state)
    if parametrize.is_parametrized(cell):
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(cell)
    if first == "ours, undone":
        undo(cell, KERNEL)
        assert torch.equal(cell(x, state)[0], ours[0])
    assert cell._theirs is own
    gpu_lstm.use_for_slstm(cell, False)
    theirs = numbers_of(cell, x, state)
    if first != "ours, undone":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
        undo(cell, KERNEL)
    assert type(cell) is own
    torch.testing.assert_close(cell(x, state)[0], ours[0], rtol=0, atol=1e-14)


def test_weights_that_are_given_to_a_call():
    cell = cell_of_xlstm().double()
    x, state = tensors_for(torch.float64)
    given = {name: (2 * p.detach()).requires_grad_() for name, p in cell.named_parameters()}

    def numbers():
        y, _ = functional_call(cell, given, (x,), dict(state=state, lengths=None))
        return [y, *torch.autograd.grad(y.square().sum(), list(given.values()))]

    theirs = numbers()
    gpu_lstm.use_for_slstm(cell)
    torch.testing.assert_close(numbers(), theirs, rtol=0, atol=1e-13)


def test_lengths_are_ignored_and_resets_are_no_argument():
    cell, (x, state) = cell_of_xlstm(), tensors_for(torch.float32)
    for _ in range(2):  # xlstm's own first
        assert all(map(torch.equal, cell(x, state, torch.tensor([1, 2, 3])), cell(x, state)))
        with pytest.raises(TypeError, match="resets"):
            cell(x, state, resets=None)
        gpu_lstm.use_for_slstm(cell)


def test_the_layout_of_its_cuda_kernels():
    vanilla, cuda = cell_of_xlstm(), cell_of_xlstm(backend="cuda")
    with torch.no_grad():
        kernel = vanilla._recurrent_kernel_int2ext(vanilla._recurrent_kernel_)
        cuda._recurrent_kernel_[:] = cuda._recurrent_kernel_ext2int(kernel)
        cuda._bias_[:] = cuda._bias_ext2int(vanilla._bias_int2ext(vanilla._bias_))
    assert cuda._recurrent_kernel_.shape != vanilla._recurrent_kernel_.shape
    gpu_lstm.use_for_slstm(cuda)
    x, state = tensors_for(torch.float32)
    torch.testing.assert_close(cuda(x, state)[0], vanilla(x, state)[0])


def from_the_page(begin, kind="python"):
    """Return the only block of docs/slstm.md that begins so."""
    (block,) = re.findall(rf"(?s)```{kind}\n({re.escape(begin)}.*?)```", PAGE)
    return block


def test_the_page_turns_a_model_of_cuda_cells_into_a_model_of_vanilla_cells(tmp_path, monkeypatch):
    config = model_of_xlstm().config
    names = dict(torch=torch, xlstm=importlib.import_module("xlstm"), gpu_lstm=gpu_lstm, config=config)
    # Otherwise a cell would call nvcc.
    monkeypatch.setattr(importlib.import_module(CELLS), "sLSTMCellFuncGenerator", lambda *given: None)
    config.slstm_block.slstm.backend = "cuda"
    cuda, x = drawn(names["xlstm"].xLSTMBlockStack(config), 0.3), torch.randn(B, STEPS, H)
    gpu_lstm.use_for_slstm(cuda)
    monkeypatch.chdir(tmp_path)
    torch.save(cuda.state_dict(), "cuda.pt")
    exec(from_the_page("def to_vanilla"), names)
    exec(from_the_page("config.slstm_block", "text").replace("heads=4", f"heads={HEADS}"), names)
    torch.testing.assert_close(names["model"](x), cuda(x))
    before = copy.deepcopy(given := cuda.state_dict())
    names["to_vanilla"](given, HEADS)
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


def test_the_page_turns_checkpoints_of_vanilla_cells_into_checkpoints_of_cuda_cells_and_back():
    """xlstm's own methods for the two layouts are the judge."""
    exec(from_the_page("def to_vanilla"), names := {})
    model, cuda = model_of_xlstm(), cell_of_xlstm(backend="cuda")
    given = model.state_dict()
    expected, kernels = dict(given), [name for name in given if name.endswith(KERNEL)]
    for name in kernels:
        vanilla, bias = model.get_submodule(name.removesuffix("." + KERNEL)), name.replace(KERNEL, "_bias_")
        expected[name] = cuda._recurrent_kernel_ext2int(vanilla._recurrent_kernel_int2ext(given[name]))
        expected[bias] = cuda._bias_ext2int(vanilla._bias_int2ext(given[bias]))
    found = names["to_cuda"](given, HEADS)
    assert len(kernels) == 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(found[name].is_contiguous() for name in kernels)  # safetensors refuses others
    back = names["to_vanilla"](found, HEADS)
    assert all(torch.equal(back[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize(("function", "kernel", "bias", "said"), [
    ("to_vanilla", (2, 3, 4, 3), (24,), "c._recurrent_kernel_ of size (2, 3, 12), got (2, 3, 4, 3)"),
    ("to_vanilla", (2, 12, 3), (24,), "c._recurrent_kernel_ of size (2, 3, 12), got (2, 12, 3)"),
    ("to_cuda", (2, 3, 12), (24,), "c._recurrent_kernel_ of size (2, 12, 3), got (2, 3, 12)"),
    ("to_cuda", (3, 8, 2), (24,), "c._recurrent_kernel_ of size (2, 12, 3), got (3, 8, 2)"),  # other heads
    ("to_vanilla", (2, 3, 12), (2, 4, 3), "c._bias_ of size (24,), got (2, 4, 3)"),
    ("to_vanilla", (2, 3, 12), (25,), "c._bias_ of size (24,), got (25,)"),
])  # fmt: skip
def test_the_page_turns_no_checkpoint_of_other_sizes(function, kernel, bias, said):
    exec(from_the_page("def to_vanilla"), names := {})
    given = {"c._recurrent_kernel_": torch.zeros(kernel), "c._bias_": torch.zeros(bias)}
    with pytest.raises(ValueError, match=f"^Expected {re.escape(said)}$"):
        names[function](given, HEADS)


def test_a_cell_of_cuda_needs_a_gpu_and_is_the_default(monkeypatch):
    module = pytest.importorskip(CELLS, reason="xlstm is not installed")
    monkeypatch.delenv("CUDA_LIB", raising=False)  # xlstm sets it if torch sees a GPU
    with pytest.raises(KeyError, match="CUDA_LIB"):
        module.sLSTMCell(module.sLSTMCellConfig(hidden_size=H, num_heads=HEADS))


@pytest.mark.parametrize("folder", [None, "/nowhere"])
def test_xlstm_is_imported_beside_a_gpu_only_if_torch_has_a_folder_of_cuda(folder):
    pytest.importorskip("xlstm", reason="xlstm is not installed")
    lines = (
        "import torch, torch.utils.cpp_extension as extension", "torch.cuda.is_available = lambda: True",
        f"extension.CUDA_HOME = {folder!r}", f"import {CELLS}",
    )  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    if folder:
        assert ended.returncode == 0, ended.stderr
    else:
        assert "OSError: CUDA_HOME environment variable is not set" in ended.stderr


@pytest.mark.parametrize("ours", [False, True])
def test_the_step_of_a_cell_stays_xlstms_and_returns_the_given_state(ours):
    cell, (x, state) = cell_of_xlstm(), tensors_for(torch.float32)
    if ours:
        gpu_lstm.use_for_slstm(cell)
    y, final = cell.step(x[:, :1], state)
    expected, after = cell(x[:, :1], state)
    torch.testing.assert_close(y, expected)
    assert final is state
    assert not torch.equal(after[0], state[0])


def test_the_page_gives_the_weights_of_a_layer_of_xlstm_to_a_module():
    module = pytest.importorskip("xlstm.blocks.slstm.layer", reason="xlstm is not installed")
    names = dict(torch=torch, gpu_lstm=gpu_lstm, sLSTMLayerConfig=module.sLSTMLayerConfig)
    names["sLSTMLayer"] = lambda config: drawn(module.sLSTMLayer(config), 0.3)  # W_hh is 0 at first
    begin = "layer = sLSTMLayer(sLSTMLayerConfig(embedding_dim=64, num_heads=4, conv1d"
    exec(from_the_page(begin), names)  # it compares
    assert names["cell"]._recurrent_kernel_.any()


def test_the_page_gives_the_tensors_of_flashrnn_to_slstm_layer():
    """The formulas and the order of the axes, [gates, heads, D], are taken from FlashRNN's vanilla backend."""
    exec(from_the_page("from gpu_lstm.functional import slstm_layer"), names := {"torch": torch})
    (hx,) = re.findall(r"fourth argument by `(.*?)`", PAGE)
    assert all(map(torch.equal, eval(hx, {"states": names["last"]}), names["states"]))  # the way back
    Wx, R, b, h = (names[name].double() for name in ("Wx", "R", "b", "h"))
    states, outputs, half = torch.zeros(4, *Wx[:, 0, 0].shape, dtype=Wx.dtype), [], Wx.shape[1] // 2
    for t in range(Wx.shape[1]):
        if t == half:
            names["states"] = states[:, :, None].float()  # [4, B, 1, heads, D]
        y, c, n, m = states
        i, f, z, o = (Wx[:, t] + torch.einsum("ghdp,bhp->bghd", R, y) + b).unbind(1)
        k = nn.functional.logsigmoid(f) + m
        m = torch.maximum(i, k) if t else i
        i, f = (i - m).exp(), (k - m).exp()
        c, n = f * c + i * z.tanh(), (f * n + i).clamp(min=1)
        states = torch.stack([o.sigmoid() * c / n, c, n, m])
        outputs.append(states[0].flatten(1))
    torch.testing.assert_close(h, torch.stack(outputs), rtol=0, atol=1e-5)
    z, *weights = (t.float() for t in (Wx[:, half:].transpose(0, 1).flatten(2), R.flatten(0, 2), b.flatten()))
    h, _ = names["slstm_layer"](z, *weights, eval(hx, names), heads=R.shape[1])
    torch.testing.assert_close(h.double(), torch.stack(outputs[half:]), rtol=0, atol=1e-5)


def test_the_page_gives_the_weights_of_a_cell_of_xlstm_to_slstm_layer():
    module = pytest.importorskip("xlstm.blocks.slstm.layer", reason="xlstm is not installed")
    layer = drawn(module.sLSTMLayer(module.sLSTMLayerConfig(embedding_dim=64, num_heads=4, backend="vanilla")), 0.2)
    names = dict(torch=torch, gpu_lstm=gpu_lstm, layer=layer, slstm_layer=gpu_lstm.functional.slstm_layer)
    gpu_lstm.use_for_slstm(layer)
    exec(from_the_page("cell, z = layer.slstm_cell"), names)  # it compares
    assert type(layer.slstm_cell).__module__ == CELLS
    assert names["cell"]._recurrent_kernel_.any()


@pytest.mark.parametrize(("init", "block"), [("small_init", 0), ("powerlaw_blockdependent", 0),
                                             ("powerlaw_blockdependent", 3)])  # fmt: skip
def test_the_page_initializes_a_module_as_xlstm_does(init, block):
    cell = cell_of_xlstm(fresh=True, bias_init=init, _block_idx=block, _num_blocks=4)
    slstm = gpu_lstm.SLSTM(3, H, num_layers=2, bidirectional=True, heads=HEADS)
    code = from_the_page("block, blocks =").replace("block, blocks = 0, 4", f"block, blocks = {block}, 4")
    if init == "small_init":
        code = code.replace("# forget = ", "forget = ")
    before = slstm.weight_ih_l0.clone()
    exec(code, dict(torch=torch, slstm=slstm))
    for name, found in slstm.named_parameters():
        if name.startswith("bias"):
            torch.testing.assert_close(found, cell._bias_ * name.startswith("bias_ih"), msg=name)
        if name.startswith("weight_hh"):
            assert not found.any()
    assert torch.equal(slstm.weight_ih_l0, before)
    assert not cell._recurrent_kernel_.any()


def model_of_xlstm():
    """Return a model with two blocks of sLSTM, and one of mLSTM, which stays as it is."""
    xlstm = pytest.importorskip("xlstm", reason="xlstm is not installed")
    slstm = xlstm.sLSTMBlockConfig(slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=HEADS, dtype="float32"))
    mlstm = xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=HEADS))
    blocks = dict(slstm_block=slstm, mlstm_block=mlstm, num_blocks=3, slstm_at=[0, 2])
    return drawn(xlstm.xLSTMBlockStack(xlstm.xLSTMBlockStackConfig(embedding_dim=H, context_length=8, **blocks)), 0.3)


# xlstm rounds c, n and m at each step. Results of about 1 are off by a few units in bfloat16's last place.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_model_of_xlstm_and_back(dtype, limit):
    model = model_of_xlstm().to(dtype).eval()
    x, parameters, keys = torch.randn(B, STEPS, H).to(dtype), list(model.parameters()), list(model.state_dict())
    with torch.no_grad():
        theirs = model(x)
        assert gpu_lstm.use_for_slstm(model) == gpu_lstm.use_for_slstm(model) == 2
        ours = model(x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)
        assert not torch.equal(ours, theirs)
        state, steps = {}, []
        for t in range(STEPS):
            y, state = model.step(x[:, t : t + 1], state)
            steps.append(y)
        torch.testing.assert_close(torch.cat(steps, 1), ours, rtol=0, atol=limit)
        cell, (z, state) = model.blocks[0].xlstm.slstm_cell, tensors_for(dtype)
        state = cell(z, state)[1]
        assert torch.equal(copy.deepcopy(model)(x), ours)
        assert list(model.state_dict()) == keys
        assert all(map(torch.Tensor.is_set_to, model.parameters(), parameters))
        assert not any(module.training for module in model.modules())
        assert gpu_lstm.use_for_slstm(model, False) == 2
        assert torch.equal(model(x), theirs)
        assert cell(z, state.to(z.dtype))[0].isfinite().all()
        if dtype == torch.bfloat16:
            with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
                cell(z, state)


def test_under_autocast_and_in_a_graph():
    model = model_of_xlstm()
    x = torch.randn(B, STEPS, H)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(x)
        gpu_lstm.use_for_slstm(model)
        torch.testing.assert_close(model(x), theirs, rtol=0, atol=0.1)
    cell, (x, state) = model.blocks[0].xlstm.slstm_cell, tensors_for(torch.float32)
    expected = numbers_of(cell, x, state)
    torch._dynamo.reset()
    cell.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(numbers_of(cell, x, state), expected)


def test_a_cell_that_computes_something_else_is_refused_and_nothing_is_changed():
    x, state = tensors_for(torch.float32)
    for name, value in (
        ("function", "lstm"), ("gradient_recurrent_cut", True), ("gradient_recurrent_clipval", 0.0),
        ("forward_clipval", 1.0),
    ):  # fmt: skip
        model = nn.ModuleList([cell_of_xlstm(), cell_of_xlstm(**{name: value})])
        theirs = model[0](x, state)[0]
        with pytest.raises(ValueError, match=f"the cell '1' has {name}={value!r}, which slstm_layer has not"):
            gpu_lstm.use_for_slstm(model)
        assert torch.equal(model[0](x, state)[0], theirs)


class StandIn(nn.Module):
    """A cell with the parameters and the form of TiRex's: W [N, D of h, 4 D of z], and a flat bias [N, 4, D]."""

    def __init__(self):
        super().__init__()
        self.config, units = SimpleNamespace(num_heads=HEADS), H // HEADS
        self._recurrent_kernel_ = nn.Parameter(torch.empty(HEADS, units, 4 * units))
        self._bias_ = nn.Parameter(torch.empty(4 * H))


StandIn.__module__, StandIn.__qualname__ = "tirex.models.slstm.cell", "sLSTMCell"


def test_a_subclass_of_a_cell_stays_as_it_is_and_a_warning_says_so():
    class Other(StandIn):
        pass

    model = nn.ModuleList([StandIn(), Other()])
    for on in True, False:
        with pytest.warns(UserWarning, match=r"the cell '1' stays as it is: Other is a subclass of StandIn"):
            assert gpu_lstm.use_for_slstm(model, on) == 1
        assert type(model[1]) is Other


def test_which_cells_were_swapped_is_logged(caplog):
    cell, its = StandIn(), "(tirex.models.slstm.cell.sLSTMCell)"
    caplog.set_level("INFO", "gpu_lstm")
    gpu_lstm.use_for_slstm(nn.ModuleDict(dict(a=cell, b=nn.Linear(2, 2), c=StandIn(), again=cell)))
    gpu_lstm.use_for_slstm(cell, False)
    assert caplog.messages == [
        f"use_for_slstm: by functional.slstm_layer compute a {its}, c {its}",
        f"use_for_slstm: by their own package compute the model itself {its}",
    ]


def test_convert_names_use_for_slstm():
    cell, advice = StandIn(), "; gpu_lstm.use_for_slstm changes its sLSTM cells"
    for model, function, said in (
        (nn.Sequential(cell), gpu_lstm.convert, True), (nn.Linear(2, 2), gpu_lstm.convert, False),
        (cell, gpu_lstm.to_torch, False),
    ):  # fmt: skip
        with pytest.warns(UserWarning, match="swapped nothing") as caught:
            function(model)
        assert str(caught[0].message).endswith(advice) == said


def test_the_layout_of_tirex_against_the_oracle():
    cell = drawn(StandIn()).double()
    x, state = tensors_for(torch.float64)
    assert gpu_lstm.use_for_slstm(nn.Sequential(cell)) == 1
    y, (h, c, n, m) = cell(x, state)
    kernel, bias = (p.detach().numpy() for p in (cell._recurrent_kernel_, cell._bias_))
    units, weight = H // HEADS, np.zeros((4, HEADS, H // HEADS, HEADS, H // HEADS))
    for head in range(HEADS):
        weight[:, head, :, head] = kernel[head].reshape(units, 4, units).transpose(1, 2, 0)
    z = (x.numpy() + bias.reshape(HEADS, 4, units).swapaxes(0, 1).ravel()).swapaxes(0, 1)
    rest = state[0].numpy(), state[1:].numpy(), np.eye(4 * H), weight.reshape(4 * H, H)
    true, h_n, (c_n, _, m_n), _ = oracle.layer(z, *rest)
    pairs = (y.permute(2, 0, 1, 3).flatten(2), true), (h, h_n), (c / n, c_n), (m + n.log(), m_n)
    for our, truth in pairs:
        np.testing.assert_allclose(our.detach().numpy(), truth, rtol=1e-12, atol=1e-12)
