"""PyTorch's own descriptions of nn.LSTM, nn.GRU and their cells, which its test suite runs over all, run over ours.

A ModuleInfo says how a module is built and called, and what its results must equal. The checks are those of torch's
test_modules.py, which torch does not ship; the truth is torch's module with the same weights. They leave out what other
files test (wrong calls, gradcheck, weights, copies and moves, half precision, several devices), inputs in
channels_last, which have four dimensions, and on "triton" most samples: the interpreter is slow.
"""

import pytest
import torch
from comparing import BACKENDS, PLACES, assert_same
from torch.utils._pytree import tree_leaves, tree_map

import gpu_lstm

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_modules import module_db

# Importing that forbids every test of this process to set torch.backends' flags.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
assert not torch.backends.flags_frozen()

pytestmark = [pytest.mark.usefixtures("exact_float32_products"), pytest.mark.filterwarnings("ignore:LSTM with proj")]

SAMPLES = {"nn.LSTM": 32, "nn.LSTMCell": 2, "nn.GRU": 16, "nn.GRUCell": 2}
INFOS = {info.name: info for info in module_db if info.name in SAMPLES}
every_info = pytest.mark.parametrize("name", INFOS)


def modules(name, backend, training):
    """(ours, theirs, arguments, reference function) for each sample of an info."""
    info, place = INFOS[name], PLACES[backend]
    samples = info.module_inputs_func(info, **place, requires_grad=True, training=training)
    assert len(samples) == SAMPLES[name]
    # The interpreter is slow: the first sample; with a bias and states the simplest, and that with everything.
    few = {"nn.LSTM": (0, 17, 23), "nn.GRU": (0, 9, 15)}.get(name) if backend == "triton" else None
    for sample in samples if few is None else [samples[k] for k in few]:
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        torch.manual_seed(0)
        theirs = getattr(torch.nn, name[3:])(*arguments, **options, **place).train(training)
        ours = getattr(gpu_lstm, name[3:])(*arguments, **options, **place, backend=backend).train(training)
        ours.load_state_dict(theirs.state_dict())
        assert not sample.forward_input.kwargs
        yield ours, theirs, sample.forward_input.args, sample.reference_fn


def call(module, arguments):
    results = tree_leaves(module(*arguments))
    wanted = [t for t in [*tree_leaves(arguments), *module.parameters()] if t.requires_grad]
    return [*results, *torch.autograd.grad([t.square().sum() for t in results], wanted)]


def assert_close(ours, theirs, backend):
    assert theirs
    assert_same(dict(enumerate(ours)), dict(enumerate(theirs)), backend, condition=4)


# Kernels know nothing of eval(), and the interpreter is slow.
@pytest.mark.parametrize(("backend", "training"), [(b, t) for b in BACKENDS for t in (True, False)][:-1])
@every_info
def test_forward_and_gradients(backend, name, training):
    """Against torch's module, and torch's reference function. In eval() inputs and gradients are not contiguous."""
    for ours, theirs, arguments, reference in modules(name, backend, training):
        with torch.no_grad():
            assert_close(tree_leaves(ours(*arguments)), tree_leaves(reference(ours, *arguments)), backend)
        expected = call(theirs, arguments)
        if not training or backend == "triton":
            arguments = tree_map(lambda t: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(), arguments)
            assert not any(t.is_contiguous() for t in tree_leaves(arguments))
        assert_close(call(ours, arguments), expected, backend)
