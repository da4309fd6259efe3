"""Graphs of torch.compile and torch.export have one operator a layer, few graphs for all sizes, and eager mode's
derivatives. torch.library checks the operators."""

import contextlib
import copy
import io
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from cases import built, inputs_of, with_random_parameters
from comparing import KERNELS_HERE, PLACES, assert_same, both_kinds
from pairs import LENGTHS, RESETS, B, H, I, T, pair, random_inputs, results, states_left
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.export import Dim
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.backends import torch_rnn
from gpu_lstm.dispatch import available
from gpu_lstm.execution import graph
from gpu_lstm.execution.operators import BACKWARD, OPERATOR, TENSOR_NAMES
from gpu_lstm.kernels.layer import Layer
from gpu_lstm.kernels.problem import Inputs
from gpu_lstm.verification.verify import LEARNT

SIZES = ((3, 2), (2, 4), (5, 3))  # T, B
deep = partial(pytest.param, marks=pytest.mark.deep)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def module(kind, backend, **arguments):
    """Return a module, and its twin on the reference."""
    _, ours = pair(kind, backend, **arguments)
    twin = copy.deepcopy(ours)
    twin.backend = "reference"
    return ours, twin


def call_of(ours, steps, batch, ragged=False):
    x, hx = random_inputs(ours, batch, seed=steps, steps=steps)
    if not ragged:
        return x, {}
    options = dict(lengths=torch.randint(0, steps + 1, (batch,)), resets=torch.rand(steps, batch) < 0.3)
    return x, options | ({"reset_states": states_left(ours, hx, steps, a_step=True)} if ragged == "states" else {})


@pytest.mark.parametrize(("kind", "training", "ragged", "backend"), [
    ("StackedLSTM", True, True, "torch"), ("LSTM", True, "states", KERNELS_HERE), ("GRU", True, "marked", "torch"),
    ("SLSTM heads", True, True, KERNELS_HERE), ("GRU heads", True, True, "torch"),
    deep("LSTM", False, "marked", "torch"), deep("GRU", True, "states", KERNELS_HERE),
    deep("StackedGRU", True, False, KERNELS_HERE),
    deep("StackedLSTM", False, "states", "reference"),  # in float64, where states after resets are not rounded
])  # fmt: skip
def test_two_graphs_do_for_all_sizes_and_one_where_they_are_marked_as_dynamic(kind, training, ragged, backend):
    ours, twin = module(kind, backend, bidirectional=kind in ("LSTM", "GRU"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)

    def marked(x, **options):
        if ragged == "marked":
            for tensor, dims in ((x, (0, 1)), (options["lengths"], (0,)), (options["resets"], (0, 1))):
                torch._dynamo.mark_dynamic(tensor, dims)
        return compiled(x, **options)

    for size in SIZES:
        x, options = call_of(ours, *size, ragged)
        with torch.set_grad_enabled(training):
            assert_same(results(ours, x, call=marked, **options), results(twin, x, **options), condition=4)
    assert counter.frame_count == (1 if ragged == "marked" else 2)  # one graph of the first size, and one of all sizes


def test_a_layer_of_torch_is_one_operator_and_steps_are_none():
    recorder, gru = EagerAndRecordGraphs(), gpu_lstm.GRU(I, H, 3, bidirectional=True, backend="torch")
    torch.compile(gru, backend=recorder)(torch.randn(100, 2, I))
    (recorded,) = recorder.graphs
    operators = [node.target for node in recorded.graph.nodes if node.op == "call_function"]
    assert operators.count(OPERATOR) == 3
    assert len(operators) < 100


def test_dropout_drops_as_much_as_it_should():
    lstm, x = gpu_lstm.LSTM(I, 64, 2, dropout=0.25), torch.randn(1, 200, I)
    exported, compiled = torch.export.export(lstm, (x,)).module(), torch.compile(lstm, backend="aot_eager")
    for call in (exported, compiled):
        assert not torch.equal(call(x)[0], call(x)[0])
    for name in ("weight_hh_l1", "weight_ih_l1", "bias_ih_l1", "bias_hh_l1"):
        nn.init.zeros_(getattr(lstm, name)[: 3 * 64])
    nn.init.eye_(lstm.weight_ih_l1[2 * 64 : 3 * 64])  # candidate k of the upper layer sees output k of the lower one
    c_1 = compiled(x)[1][1][1]  # [B, H], zero where it was dropped
    assert 0.22 < (c_1 == 0).double().mean() < 0.28
    lstm.eval()
    assert torch.equal(compiled(x)[0], compiled(x)[0])


@pytest.fixture
def calls(spy):
    """A Mock that runs torch's own LSTM, and counts its calls."""
    return spy(torch_rnn, "stack")


def test_backward_does_not_run_the_layer_again_unless_what_was_saved_is_gone(calls):
    ours, twin = module("LSTM", "torch", num_layers=2)
    compiled, (x, options) = torch.compile(ours, backend="aot_eager"), call_of(ours, 6, 2, ragged=True)
    expected = results(twin, x, **options)
    assert_same(results(ours, x, call=compiled, **options), expected, condition=4)
    assert calls.call_count == 2
    # Offloading to the CPU does the same.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert_same(results(ours, x, call=compiled, **options), expected, condition=4)
    assert calls.call_count == 2 + 2 + 2


def test_backward_twice_and_nothing_saved_for_longer_than_the_graph(calls):
    (ours, _), x = module("LSTM", "torch"), torch.randn(5, 2, I).double()
    y = torch.compile(ours, backend="aot_eager")(x)[0].square().sum()
    first, second = (torch.autograd.grad(y, list(ours.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert calls.call_count == 1
    zeros = torch.zeros(1, 2, H).double()
    kept = OPERATOR("lstm", False, "torch", True, False, x, zeros, zeros, *ours.parameters())[3]
    assert kept.numel() == 0
    (leaf, *_), _ = kept.graph
    assert leaf.data_ptr() == x.data_ptr()  # x is not copied


@pytest.mark.deep
@both_kinds
def test_transforms_inside_a_graph(kind):
    """The reference computes them, whichever backend was chosen."""
    ours, _ = module(kind, "torch")
    x, parameters = torch.randn(2, 2, I).double(), dict(ours.named_parameters())

    def loss(parameters, x):
        return functional_call(ours, parameters, (x,))[0].square().sum()

    for transformed in {
        "LSTM": (grad(loss, argnums=(0, 1)), lambda _, x: jvp(lambda x: ours(x)[0], (x,), (x,))),
        "GRU": (vmap(grad(loss), in_dims=(None, 1)), lambda _, x: jacrev(lambda x: ours(x)[0][-1])(x)),
    }[kind]:  # few transforms for each kind, since compiling takes long
        torch._dynamo.reset()
        compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(parameters, x), transformed(parameters, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options", "reason", "fullgraph"), [
    ("cupy", {}, "(needs CuPy and NVRTC|runs on CUDA)", True),
    ("torch", dict(peepholes=True), "does not support", False),
], ids=str)  # fmt: skip
def test_a_backend_that_cannot_run_gives_its_reason(name, options, reason, fullgraph):
    compiled = torch.compile(gpu_lstm.LSTM(I, H, backend=name, **options), backend="eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=rf"backend \\?'{name}\\?' {reason}"):  # Dynamo shows texts as in Python
        compiled(torch.randn(2, 1, I))


def test_an_error_of_torch_while_a_backend_is_chosen_is_told(monkeypatch):
    monkeypatch.setattr(available, "select", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(Exception, match="CUDA out of memory"):
        torch.compile(gpu_lstm.LSTM(I, H), backend="eager", fullgraph=True)(torch.randn(2, 1, I))


@pytest.mark.parametrize("chosen", ["argument", "block", deep("environment")])
def test_a_choice_is_kept_by_the_graph_and_a_new_choice_makes_a_new_one(chosen, monkeypatch, calls):
    lstm, x = gpu_lstm.LSTM(I, H, backend="reference" if chosen == "argument" else None), torch.randn(3, 1, I)
    if chosen == "environment":
        monkeypatch.setenv("GPU_LSTM_BACKEND", "reference")
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    with gpu_lstm.backend("reference") if chosen == "block" else contextlib.nullcontext():
        expected = compiled(x)[0]
    calls.assert_not_called()
    with gpu_lstm.backend("torch"):
        torch.testing.assert_close(compiled(x)[0], expected)
    assert calls.call_count == (0 if chosen == "argument" else 1)


STEPS, BATCH = Dim("T"), Dim("B")


@pytest.mark.parametrize(("kind", "strict", "backend"), [
    ("StackedLSTM", False, "torch"), ("GRU", False, KERNELS_HERE), ("LSTM heads", False, "reference"),
    deep("LSTM", True, KERNELS_HERE), deep("StackedGRU", True, "torch")])  # fmt: skip
def test_an_exported_program_is_for_all_sizes_and_can_be_trained(kind, strict, backend):
    ours, twin = module(kind, backend, bidirectional=kind in ("LSTM", "GRU"))
    x, options = call_of(ours, 5, 2, ragged=True)
    x, options = x.to(next(ours.parameters())), {name: t.to(PLACES[backend]["device"]) for name, t in options.items()}
    sizes, file = dict(input={0: STEPS, 1: BATCH}, lengths={0: BATCH}, resets={0: STEPS, 1: BATCH}), io.BytesIO()
    torch.export.save(torch.export.export(ours, (x,), options, dynamic_shapes=sizes, strict=strict), file)
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    for size in SIZES[:2]:
        x, options = call_of(ours, *size, ragged=True)
        found, expected = (results(m, x, **options) for m in (loaded, twin))
        assert_same({name: found[name] for name in expected}, expected, condition=4)


NEEDS = (
    "the exported program calls operators of gpu_lstm: it loads only where that was imported before; export "
    "gpu_lstm.to_torch(model) for one that needs torch alone, unless the model has an SLSTM"
)


@pytest.mark.parametrize("strict", [deep(True), False])
def test_an_export_says_once_that_the_program_needs_the_package(caplog, strict):
    graph._log_once.cache_clear()
    lstm, x = gpu_lstm.LSTM(I, H), torch.randn(5, 2, I)
    torch.compile(lstm, backend="eager", fullgraph=True)(x)
    assert [record for record in caplog.records if record.name == "gpu_lstm"] == []
    for _ in range(2):
        torch.export.export(lstm, (x,), strict=strict)
    assert [record.message for record in caplog.records if record.name == "gpu_lstm"] == [NEEDS]


@pytest.mark.deep
# g++ is quicker where vector instructions are not tried, and headers are not precompiled.
@torch._inductor.config.patch({"cpp.vec_isa_ok": False, "aot_inductor.precompile_headers": False})
def test_ahead_of_time_by_inductor(tmp_path):
    lstm = gpu_lstm.LSTM(I, H, 2, bidirectional=True).eval()
    with torch.no_grad():
        program = torch.export.export(lstm, (torch.randn(5, 2, I),), dynamic_shapes=({0: STEPS, 1: BATCH},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "lstm.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for x in (torch.randn(*size, I) for size in SIZES[:2]):
            torch.testing.assert_close(tree_leaves(loaded(x)), tree_leaves(lstm(x)))


def test_torch_jit_trace_runs_kernels_only_without_gradients():
    ours, twin = module("LSTM", KERNELS_HERE, num_layers=2)
    example, x = (torch.randn(*size, I).to(ours.weight_ih_l0) for size in SIZES[:2])
    with pytest.raises(RuntimeError, match=rf"jit\.trace cannot record the gradients of backend '{KERNELS_HERE}'"):
        torch.jit.trace(ours, (example,))
    with torch.no_grad():
        torch.testing.assert_close(tree_leaves(torch.jit.trace(ours, (example,))(x)), tree_leaves(twin(x)))
        ours.requires_grad_(False)  # a trace has no constants that require gradients
        one_step, resets = (torch.ones_like(t[..., 0], dtype=torch.bool) for t in (example[:1], x))
        traced = torch.jit.trace(lambda x, resets: ours(x, resets=resets)[0], (example[:1], one_step))
        torch.testing.assert_close(traced(x, resets), ours(x, resets=resets)[0])
        ours.backend = "reference"  # whose loop over steps is unrolled
        traced = torch.jit.trace(ours, (example,))
        with pytest.raises(RuntimeError, match="must match the existing size"):
            traced(torch.cat([example, example]))


@pytest.mark.deep
@pytest.mark.parametrize("way", ["compiled", "exported"])
@pytest.mark.parametrize("words", [{"peepholes", "norms", "masks", "recompute"}, {"gru", "masks", "recompute"}])
def test_variants_noise_and_chunks_of_a_program_are_those_of_eager_mode(exact_float32_products, way, words):
    """test_derivatives.py tests second derivatives of a compiled module."""
    ours = with_random_parameters(built((T, B, I, H), words, backend=KERNELS_HERE, weight_drop=0.25), 0)
    x, options = random_inputs(ours, B)[0], dict(lengths=LENGTHS, resets=RESETS)
    expected = results(ours, x, **options)
    if way == "compiled":
        found = results(ours, x, call=torch.compile(ours, backend="aot_eager", fullgraph=True), **options)
    else:
        found = results(torch.export.export(ours, (x,), options).module(), x, **options)
    assert_same({name: found[name] for name in expected}, expected, condition=4)


# The operators: schemas, fakes, gradients
NORMS, MASKS = "norms expected", "no-bias ragged states peepholes masks"


def given_to(words, device):
    """Return the inputs of a layer, or of torch's own layer with two directions, and whether the layer is reverse."""
    if words == "both directions":
        lstm = nn.LSTM(3, 5, bidirectional=True, device=device).requires_grad_(False)
        states = (torch.randn(2, 2, 5, device=device) for _ in range(2))
        first, second = (list(lstm.parameters())[k : k + 4] for k in (0, 4))
        return [*Inputs(torch.randn(2, 2, 3, device=device), *states, *first), *second], False
    projected = words and "norm" not in words and "gru" not in words
    given = inputs_of((2, 2, 3, 5, *([2] if projected else [])), words)
    given = given._replace(h0=given.h0[None], c0=given.c0[None])  # [1, B, *]
    return [None if t is None else t.to(device) for t in given], "reverse" in words


def learnt(given):
    """Return which of the tensors are there and may have a gradient."""
    return [t is not None and name.removesuffix("_reverse") in LEARNT for name, t in zip(TENSOR_NAMES, given)]


@pytest.mark.parametrize(("words", "backend"), [
    ("both directions", "torch"), ("ragged resets reverse", "torch"), (NORMS, "reference"),
    *((words, by + KERNELS_HERE) for words in ("ragged resets reverse", "gru ragged states masks reverse")
      for by in ("", "auto ")),
    deep(MASKS, KERNELS_HERE), deep("ragged states peepholes reverse norms masks", KERNELS_HERE),
])  # fmt: skip
def test_an_operator(monkeypatch, words, backend, device):
    """Forward is checked with and without the tensors that backward reads, and backward with the gradient of the output
    alone, and of the states alone. With "auto" no kernel is right. The backend that runs instead returns tensors of the
    same sizes, dtypes and strides."""
    if "auto" in backend:
        monkeypatch.setattr(Layer, "has_kernel", lambda *_: False)
    (given, reverse), recompute = given_to(words, device), backend == KERNELS_HERE and "norm" not in words
    how = "gru" if "gru" in words else "lstm", reverse, backend
    torch.library.opcheck(OPERATOR, (*how, False, recompute, *given))
    there = learnt(given)
    leaves = [t.clone().requires_grad_() if learns else t for t, learns in zip(given, there)]
    torch.library.opcheck(OPERATOR, (*how, True, recompute, *leaves))
    h, h_n, c_n, *kept = OPERATOR(*how, True, recompute, *given)
    one = [k == 1 for k in range(len(given))]
    for needed, gradients in ((there, [h, None, None]), (one, [None, h_n, c_n])):
        torch.library.opcheck(BACKWARD, (*how, gradients, [h, *kept], needed, given))
