"""Tests that need a GPU: the compiled kernels, streams, graphs."""

import itertools
from functools import partial

import pytest
import torch
from cases import built, call_of, check
from places import tf32
from standing_in import plan_of

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
CARD = "cuda"
OF_OURS = "heads", "gru heads", "slstm", "slstm heads"  # cells and heads that torch does not have
in_tf32_and_bf16 = pytest.mark.parametrize("dtype", [F32, BF16], ids=["tf32", "bf16"])
SIZE = 24, 40, 32  # T, B, I
# Units of a head, by family. With Triton 3.9 none of these kernels spills.
UNITS = {"resident": 24, "cooperative": 250, "step": 100, "split": 128, "held": 256, "pointwise": 100}
# B, H and heads; the families are chosen.
SIZES = (16, 512, "four-heads"), (256, 1024, "four-heads"), (16, 64, ""), (16, 768, "")
same = partial(torch.testing.assert_close, rtol=0, atol=0)


def kernels(inputs, hidden, backend="triton", cell="LSTM", **options):
    return getattr(gpu_lstm, cell)(inputs, hidden, device=CARD, backend=backend, **options)


def random(*size, dtype=F32, **options):
    return torch.randn(*size, device=CARD, dtype=dtype, **options)


def results(lstm, x, **given):
    y, _ = lstm(x, **given)
    return [y, *torch.autograd.grad(y.square().mean(), [t for t in (x, *lstm.parameters()) if t.requires_grad])]


def call_in(words, size, dtype):
    """Return a module of these words, with x, lengths and resets for it."""
    module = built(size, {*words.split()}, backend="triton").to(CARD, dtype)
    x, _, rest = call_of(module, size, {*words.split()}, 0)
    return module, x.to(CARD, dtype), {name: t.to(CARD) for name, t in rest.items()}


def judged(monkeypatch, words, size, dtype, exact=False):
    """Check a case. The reference in TF32 judges float32 in TF32."""
    in_tf32 = dtype is F32 and not exact
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", in_tf32)
    if in_tf32:
        tf32(monkeypatch, size[2])
    check(size, words, "triton", dtype, CARD, seeds=1, yardstick="reference" if in_tf32 else None)


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
    """Return the results of a call that is captured, and a function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return found, graph.replay


@every_cell
def test_the_headline(cell):
    """With H=768 and B=16 in bfloat16, all steps are in one cooperative launch. This is the first test of an LSTM, on
    an idle card."""
    check((64, 16, 256, 768), "gru" * (cell == "GRU"), "triton", BF16, "cuda", seeds=1)
    gpu_lstm.check()
    chosen_layers = [layer for layer in layers._layers.values() if layer.problem.hidden == 768]
    chosen = [layer.chosen(Pass(backward)).plan.family for layer in chosen_layers for backward in (False, True)]
    assert {family.name for family in chosen} == {"cooperative"}


@pytest.mark.usefixtures("within_margins")
@in_tf32_and_bf16
@pytest.mark.parametrize("words", ["", "gru", *OF_OURS])
@pytest.mark.parametrize("family", UNITS)
def test_every_family(monkeypatch, family, words, dtype):
    """A stream, and a graph that was captured, give the same, in training and in inference."""
    if family == "held" and card_of(torch.device(CARD, 0)).architecture != 90:
        pytest.skip("plans that hold W_hh in shared memory are for cards of compute capability 9.0")
    force(monkeypatch, family)
    size = *SIZE, (1 + ("heads" in words)) * UNITS[family]
    words = f"{words} ragged resets" + " reverse" * (words not in OF_OURS)
    judged(monkeypatch, words, size, dtype)
    memory._Checking.on = False  # it waits for every launch
    module, x, ragged = call_in(words, size, dtype)
    for run in (partial(results, module, x, **ragged), torch.no_grad()(lambda: module(x, **ragged)[0])):
        same(on_a_stream(run), run())
        found, replay = captured(run)
        x.normal_()
        replay()
        same(found, run())
    gpu_lstm.check()


@pytest.mark.usefixtures("within_margins")
@pytest.mark.parametrize(("dtype", "exact"), [(F32, True), (F32, False), (F16, True), (BF16, True)], ids=str)
@pytest.mark.parametrize(("size", "words"), [
    *itertools.product(
        ((32, 16, 64, 64), (32, 16, 64, 128), (24, 17, 100, 513), (16, 70, 64, 768)),
        ("", "reverse", "no-bias ragged resets", "gru", *(f"{cell}ragged resets reverse" for cell in ("", "gru ")))),
    *(((SIZE[0], batch, SIZE[2], hidden), f"{cell} {heads} ragged resets") for batch, hidden, heads in SIZES
      for cell in ("", "gru", "slstm") if heads or cell == "slstm")
], ids=str)  # fmt: skip
def test_what_is_chosen_is_right(monkeypatch, size, words, dtype, exact):
    judged(monkeypatch, words, size, dtype, exact)


@in_tf32_and_bf16
@pytest.mark.parametrize("words", [*(f"{words} both" for words in OF_OURS), "gru both", "both no-grad",
                                   "recompute both"])  # fmt: skip
def test_directions_side_by_side(monkeypatch, words, dtype):
    """Streams hand tensors to each other. The numbers are the same as one after another, run after run."""
    words, size = f"{words} deep", (400, 8, 32, 96)
    judged(monkeypatch, words, size, dtype)
    module, x, _ = call_in(words, size, dtype)
    first = results(module, x)
    for _ in range(5):
        same(results(module, x), first)


def test_two_grids_at_once():
    """Layers that each fill the card run on streams of their own, and so does one whose directions share it. No launch
    times out, and the numbers are the same as one after another."""
    models = [kernels(64, 1024, cell=cell, dtype=F16) for cell in ("LSTM", "GRU")]
    models.append(kernels(64, 512, bidirectional=True, dtype=F16))
    kinds = itertools.product(OF_OURS, (F32, BF16))
    models += [call_in(words, (1, 16, 64, 1024), dtype)[0] for words, dtype in kinds]
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


@every_dtype
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 8}, {"num_layers": 2, "bidirectional": True},
                                     {"cell": "GRU"}, {"cell": "GRU", "bias": False}])  # fmt: skip
@pytest.mark.filterwarnings("error:RNN module weights are not part of single contiguous chunk of memory")
def test_cudnn_copies_no_weights(dtype, options):
    """cuDNN copies neither parameters, nor the weights of another call, nor weights that shut gates. The layout is
    cuDNN's own."""
    lstm = kernels(16, 32, dtype=dtype, backend="torch", **options)
    x, resets = random(9, 4, 16, dtype=dtype), torch.rand(9, 4, device="cuda") < 0.3
    others = {name: 2 * parameter for name, parameter in lstm.named_parameters()}
    for given in ({}, {"resets": resets}, {"lengths": torch.tensor([9, 1, 0, 5], device="cuda")}):
        lstm(x, **given)[0].sum().backward()
        torch.func.functional_call(lstm, others, (x,), given)


@every_cell
def test_an_update_of_torchs_own_with_resets_is_captured(cell):
    lstm, x = kernels(16, 32, backend="torch", cell=cell), random(9, 4, 16)
    resets, lengths = torch.rand(9, 4, device="cuda") < 0.3, torch.tensor([9, 1, 0, 5], device="cuda")
    ragged = dict(resets=resets, lengths=lengths)
    run, reference = partial(results, lstm, x, **ragged), kernels(16, 32, backend="reference", cell=cell)
    reference.load_state_dict(lstm.state_dict())
    on_a_stream(run)
    torch.cuda.synchronize()
    found, replay = captured(run)
    for _ in range(2):
        x.normal_()
        resets.copy_(torch.rand(9, 4, device="cuda") < 0.3)
        replay()
        torch.testing.assert_close(found, run())
        torch.testing.assert_close(found[0], reference(x, **ragged)[0], rtol=1e-2, atol=1e-3)


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
    torch.testing.assert_close(y, theirs, rtol=1e-3, atol=1e-3)  # torch takes TF32 by default, and so do our kernels
    assert x.grad[-50:].abs().sum() > 0


def test_auto_chooses_the_triton_kernels_and_the_doctor_says_so(capsys):
    assert main(["--json"]) == 0
    assert '"auto": "triton"' in capsys.readouterr().out
