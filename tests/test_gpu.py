"""What only a GPU can show: the compiled kernels, streams, graphs."""

import copy
import itertools
from functools import partial

import pytest
import torch
from cases import check, with_random_parameters
from comparing import judge
from places import tf32
from standing_in import plan_of
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.__main__ import main
from gpu_lstm.kernels import layer as layers
from gpu_lstm.kernels import memory
from gpu_lstm.kernels.problem import Pass
from gpu_lstm.kernels.triton_rnn import launch
from gpu_lstm.kernels.triton_rnn.plans.choose import card_of

pytestmark = pytest.mark.gpu
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
every_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
every_cell = pytest.mark.parametrize("cell", ["LSTM", "GRU"])
FORCED = *itertools.product(("cooperative", "step", "pointwise"), (100, 300)), ("held", 300), ("resident", 100)
FORCED += (("split", 320),)
# B and H of a family each, as the headline's is the cooperative one.
CHOSEN = {"resident": (4, 64), "cooperative": (4, 512), "step": (4, 2048), "pointwise": (512, 1024)}
CHOSEN |= {"held": (1024, 256)}
CARD = "cuda"
# Cells and heads that torch has not; and two that it has.
OF_OURS = ("LSTM", 2), ("GRU", 2), ("SLSTM", 1), ("SLSTM", 2)
OF_BOTH = ("LSTM", 1), ("GRU", 1), ("LSTM", 2), ("SLSTM", 2)
of_ours, of_both = (pytest.mark.parametrize(("cell", "heads"), kinds) for kinds in (OF_OURS, OF_BOTH))
in_tf32_and_bf16 = pytest.mark.parametrize("dtype", [F32, BF16], ids=["tf32", "bf16"])
SIZE = 24, 40, 32  # T, B, I
# Of a head, by the family; with Triton 3.9 none of these kernels spills.
UNITS = {"resident": 48, "cooperative": 250, "step": 100, "split": 128, "held": 256, "pointwise": 100}
SIZES = (16, 512, 4), (256, 1024, 4), (16, 64, 1), (16, 768, 1)  # B, H and heads whose families are chosen
YARDSTICKS = {"LSTM": "torch", "GRU": "torch", "SLSTM": "reference"}  # torch has no sLSTM


def kernels(inputs, hidden, backend="triton", cell="LSTM", **options):
    return getattr(gpu_lstm, cell)(inputs, hidden, device=CARD, backend=backend, **options)


def random(*size, dtype=F32, **options):
    return torch.randn(*size, device=CARD, dtype=dtype, **options)


def results(lstm, x, **given):
    y, _ = lstm(x, **given)
    return [y, *torch.autograd.grad(y.square().mean(), [t for t in (x, *lstm.parameters()) if t.requires_grad])]


class Call:
    """A call of a module of any backend and dtype, with tensors in one dtype."""

    def __init__(self, module, batch, steps=SIZE[0]):
        like, inputs = next(module.parameters()), module.input_size
        lengths = 7 * torch.arange(batch, device=CARD) % (steps + 1)
        lengths[-1] = steps
        self.ragged = dict(lengths=lengths, resets=random(steps, batch) > 1)
        self.x = random(steps, batch, inputs, dtype=like.dtype)
        _, states = found = module(self.x)
        self.hx = [random(*t.shape, dtype=like.dtype) for t in tree_leaves(states)]
        if len(self.hx) == 4:  # c, n and m of an sLSTM: n is positive, or the state is empty
            self.hx[2].exp_()[:, 0] = 0
        self.weights = [random(*t.shape, dtype=like.dtype) for t in tree_leaves(found)]

    def __call__(self, module):
        """Output, final states, and the gradients of a weighted sum of them by all that was given, by name."""
        like, names = next(module.parameters()), {1: "h", 2: "hc", 4: "hcnm"}[len(self.hx)]
        x, *hx = leaves = [t.detach().to(like).requires_grad_() for t in (self.x, *self.hx)]
        results = tree_leaves(module(x, tuple(hx) if len(hx) > 1 else hx[0], **self.ragged))
        found = {name: t for name, t in zip(["output", *names], results, strict=True) if name != "n"}  # which is 1
        weights = [w.to(t) for w, t in zip(self.weights, results, strict=True) if t.requires_grad]
        gradients = torch.autograd.grad([*found.values()], [*leaves, *module.parameters()], weights)
        of = ["x", *names, *(name for name, _ in module.named_parameters())]
        return found | {f"d{name}": t for name, t in zip(of, gradients, strict=True)}


def judged(monkeypatch, cell, heads, size, dtype, exact=False, **options):
    """Kernels are as near to the reference in float64 as torch's own in their dtype: the module, and the call."""
    torch.manual_seed(0)
    steps, batch, inputs, hidden = size
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not exact)
    if dtype is F32 and not exact:
        tf32(monkeypatch, inputs)
    ours = with_random_parameters(kernels(inputs, hidden, cell=cell, heads=heads, dtype=dtype, **options), 0)
    call, truth, theirs = Call(ours, batch, steps), copy.deepcopy(ours).double(), copy.deepcopy(ours)
    truth.backend, theirs.backend = "reference", YARDSTICKS[cell]
    found, measured, true = ({name: t.detach().double().cpu().numpy() for name, t in call(module).items()}
                             for module in (ours, theirs, truth))  # fmt: skip
    errors = {name: [(found[name] - t, measured[name] - t, t)] for name, t in true.items()}
    judge(errors, dtype, theirs.backend, (), steps)
    return ours, call


def force(monkeypatch, family):
    def of_family(problem, device, pass_, *_):
        return plan_of(family, problem, pass_.backward, card_of(device))

    monkeypatch.setattr(launch, "choose_plan", of_family)


def on_a_stream(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run()
    torch.cuda.current_stream().wait_stream(stream)
    return found


def captured(run):
    """The results of a call that is captured, and what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return found, graph.replay


@every_cell
def test_the_headline(cell):
    """H=768, B=16 in bfloat16, all steps in one cooperative launch: the LSTM's first of all, and alone."""
    check((64, 16, 256, 768), "gru" * (cell == "GRU"), "triton", BF16, "cuda", seeds=1)
    gpu_lstm.check()
    chosen_layers = [layer for layer in layers._layers.values() if layer.problem.hidden == 768]
    chosen = [layer.chosen(Pass(backward)).plan.family for layer in chosen_layers for backward in (False, True)]
    assert {family.name for family in chosen} == {"cooperative"}


@pytest.mark.usefixtures("within_margins")
@every_dtype
@pytest.mark.parametrize("variant", ["", "reverse", "no-bias ragged resets", "ragged resets reverse", "gru",
                                     "gru ragged resets reverse"])  # fmt: skip
@pytest.mark.parametrize("size", [(32, 16, 64, 64), (32, 16, 64, 128), (24, 17, 100, 513), (16, 70, 64, 768)], ids=str)
def test_what_is_chosen_is_right(size, variant, dtype):
    check(size, variant, "triton", dtype, "cuda", seeds=1)


@pytest.mark.usefixtures("within_margins")
@every_cell
@pytest.mark.parametrize(("family", "hidden"), FORCED)
def test_every_family(monkeypatch, family, hidden, cell):
    force(monkeypatch, family)
    words = "ragged resets reverse" + " gru" * (cell == "GRU")
    check((20, 9, 32, hidden), words, "triton", F16, "cuda", seeds=1)
    gpu_lstm.check()


@pytest.mark.usefixtures("within_margins")
@in_tf32_and_bf16
@of_ours
@pytest.mark.parametrize("family", UNITS)
def test_every_family_of_heads_and_of_the_slstm(monkeypatch, family, cell, heads, dtype):
    """Beside the reference; and the same on a stream, and from a graph that was captured."""
    if family == "held" and card_of(torch.device(CARD, 0)).architecture != 90:
        pytest.skip("plans that hold W_hh in shared memory are for cards of compute capability 9.0")
    force(monkeypatch, family)
    module, call = judged(monkeypatch, cell, heads, (*SIZE, heads * UNITS[family]), dtype)
    memory._Checking.on = False  # which waits for every launch
    same = partial(torch.testing.assert_close, rtol=0, atol=0)
    same(on_a_stream(lambda: call(module)), call(module))
    found, replay = captured(lambda: call(module))
    call.x.normal_()
    replay()
    same(found, call(module))
    gpu_lstm.check()


@pytest.mark.usefixtures("within_margins")
@pytest.mark.parametrize("precision", ["exact", "tf32", "bf16"])
@pytest.mark.parametrize(("cell", "size"), [
    (cell, size) for size in SIZES for cell in ("LSTM", "GRU", "SLSTM") if size[-1] > 1 or cell == "SLSTM"
])  # fmt: skip
def test_what_is_chosen_for_heads_and_the_slstm_is_right(monkeypatch, cell, size, precision):
    (batch, hidden, heads), dtype = size, BF16 if precision == "bf16" else F32
    judged(monkeypatch, cell, heads, (SIZE[0], batch, SIZE[2], hidden), dtype, precision == "exact")


@in_tf32_and_bf16
@of_ours
def test_layers_and_directions_of_heads_side_by_side(monkeypatch, cell, heads, dtype):
    deep = dict(num_layers=2, bidirectional=True)
    module, call = judged(monkeypatch, cell, heads, (100, 8, 32, 96), dtype, **deep)
    first = call(module)
    for _ in range(5):
        torch.testing.assert_close(call(module), first, rtol=0, atol=0)


@pytest.mark.parametrize("options", [
    {"num_layers": 3}, {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "cell": "GRU"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_and_directions_side_by_side(options, recompute):
    """Streams hand tensors to each other: the numbers are those of one after another, run after run."""
    torch.manual_seed(0)
    ours = kernels(64, 96, recompute=recompute, **options)
    theirs = kernels(64, 96, backend="reference", **options).double()
    theirs.load_state_dict(ours.state_dict())
    x, close = random(400, 8, 64, requires_grad=True), partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    expected = results(theirs, x.double().detach().requires_grad_())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(5):
            close([t.double() for t in results(ours, x)], expected)
        with torch.no_grad():
            close(ours(x)[0].double(), expected[0])


def test_two_grids_at_once():
    """Layers that each fill the card, on streams of their own, and one whose directions share it: no launch times out,
    and the numbers are those of one after another."""
    models = [kernels(64, 1024, cell=cell, dtype=F16) for cell in ("LSTM", "GRU")]
    models.append(kernels(64, 512, bidirectional=True, dtype=F16))
    kinds = itertools.product(OF_OURS, (F32, BF16))
    models += [kernels(64, 1024, cell=cell, heads=heads, dtype=dtype) for (cell, heads), dtype in kinds]
    x = random(200, 16, 64)
    inputs = [x.to(next(model.parameters())) for model in models]
    with torch.no_grad():
        alone = [model(x)[0] for model, x in zip(models, inputs)]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in models]
        for _ in range(20):
            together = []
            for model, x, stream in zip(models, inputs, streams):
                with torch.cuda.stream(stream):
                    together.append(model(x)[0])
            gpu_lstm.check()
            assert all(map(torch.equal, alone, together))


@of_both
@pytest.mark.parametrize("hidden", [64, 512])
def test_the_same_bits_every_run(hidden, cell, heads):
    lstm = kernels(32, hidden, cell=cell, heads=heads, num_layers=2, dtype=BF16)
    x = random(200, 16, 32, dtype=BF16)
    assert all(map(torch.equal, results(lstm, x), results(lstm, x)))


@every_cell
@pytest.mark.parametrize("family", CHOSEN)
def test_a_captured_graph_replays(family, cell):
    batch, hidden = CHOSEN[family]
    lstm, x = kernels(32, hidden, cell=cell, dtype=F16), random(30, batch, 32, dtype=F16)
    with torch.no_grad():
        lstm(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = lstm(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, lstm(x)[0])


@every_dtype
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 8}, {"num_layers": 2, "bidirectional": True},
                                     {"cell": "GRU"}, {"cell": "GRU", "bias": False}])  # fmt: skip
@pytest.mark.filterwarnings("error:RNN module weights are not part of single contiguous chunk of memory")
def test_cudnn_copies_no_weights(dtype, options):
    """Parameters, those of another call, and those that shut gates; the layout is cuDNN's own."""
    lstm = kernels(16, 32, dtype=dtype, backend="torch", **options)
    x, resets = random(9, 4, 16, dtype=dtype), torch.rand(9, 4, device="cuda") < 0.3
    others = {name: 2 * parameter for name, parameter in lstm.named_parameters()}
    for given in ({}, {"resets": resets}, {"lengths": torch.tensor([9, 1, 0, 5], device="cuda")}):
        lstm(x, **given)[0].sum().backward()
        torch.func.functional_call(lstm, others, (x,), given)


@every_cell
def test_an_update_of_torchs_own_with_resets_is_captured(cell):
    torch.manual_seed(0)
    lstm, x = kernels(16, 32, backend="torch", cell=cell), random(9, 4, 16)
    resets, lengths = torch.rand(9, 4, device="cuda") < 0.3, torch.tensor([9, 1, 0, 5], device="cuda")
    ragged = dict(resets=resets, lengths=lengths)
    with torch.cuda.stream(torch.cuda.Stream()):
        results(lstm, x, **ragged)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(lstm, x, **ragged)
    for _ in range(2):
        x.normal_()
        resets.copy_(torch.rand(9, 4, device="cuda") < 0.3)
        graph.replay()
        torch.testing.assert_close(captured, results(lstm, x, **ragged))
        reference = kernels(16, 32, backend="reference", cell=cell)
        reference.load_state_dict(lstm.state_dict())
        torch.testing.assert_close(captured[0], reference(x, **ragged)[0], rtol=1e-2, atol=1e-3)


def test_more_than_65535_steps():
    lstm, torchs = kernels(4, 16), kernels(4, 16, backend="torch")
    x = random(70_000, 2, 4, requires_grad=True)
    y, _ = lstm(x)
    y[-1].sum().backward()
    torchs.load_state_dict(lstm.state_dict())
    with torch.no_grad():
        first, states = torchs(x[:40_000])  # in two calls, as cuDNN refuses more than 65,535 steps
        second, _ = torchs(x[40_000:], states)
    theirs = torch.cat([first, second])
    torch.testing.assert_close(y, theirs, rtol=1e-3, atol=1e-3)  # torch's takes TF32 by default, and so does ours
    assert x.grad[-50:].abs().sum() > 0


def test_auto_chooses_the_triton_kernels_and_the_doctor_says_so(capsys):
    assert main(["--json"]) == 0
    assert '"auto": "triton"' in capsys.readouterr().out
