"""PyTorch's own descriptions of nn.LSTM and nn.LSTMCell, which its test suite runs over every module, run over ours.

A ModuleInfo says how a module is built and called, what its results must equal, and which calls must raise. The checks
are those of torch's test_modules.py, which torch does not ship; the truth is torch's module with the same weights. They
leave out what other files test (gradcheck, weights, copies and moves, half precision, several devices), inputs in
channels_last, which have four dimensions, and on "triton" most samples: the interpreter is slow.
"""

from functools import partial

import pytest
import torch
from comparing import BACKENDS, PLACES, assert_same, every_backend
from torch.utils._pytree import tree_leaves, tree_map

import gpu_lstm

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

# Importing that forbids every test of this process to set torch.backends' flags.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
assert not torch.backends.flags_frozen()

pytestmark = [pytest.mark.usefixtures("exact_float32_products"), pytest.mark.filterwarnings("ignore:LSTM with proj")]

INFOS = {info.name: info for info in module_db if info.name in ("nn.LSTM", "nn.LSTMCell")}
OURS = {"nn.LSTM": gpu_lstm.LSTM, "nn.LSTMCell": gpu_lstm.LSTMCell}
every_info = pytest.mark.parametrize("name", INFOS)


def modules(name, backend, training):
    """(ours, theirs, arguments, reference function) for each sample of an info."""
    info, place = INFOS[name], PLACES[backend]
    samples = info.module_inputs_func(info, **place, requires_grad=True, training=training)
    assert len(samples) == {"nn.LSTM": 32, "nn.LSTMCell": 2}[name]
    # The interpreter is slow: of its 32 samples those with a bias, the time first and states, and the first of all.
    for sample in [samples[0], *samples[17:24:2]] if backend == "triton" and name == "nn.LSTM" else samples:
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        torch.manual_seed(0)
        theirs = getattr(torch.nn, name[3:])(*arguments, **options, **place).train(training)
        ours = OURS[name](*arguments, **options, **place, backend=backend).train(training)
        ours.load_state_dict(theirs.state_dict())
        assert not sample.forward_input.kwargs
        yield ours, theirs, sample.forward_input.args, sample.reference_fn


def call(module, arguments):
    """Results, and gradients of all that can have one."""
    results = tree_leaves(module(*arguments))
    wanted = [t for t in [*tree_leaves(arguments), *module.parameters()] if t.requires_grad]
    return [*results, *torch.autograd.grad([t.square().sum() for t in results], wanted)]


def assert_close(ours, theirs, backend):
    assert len(theirs) > 1
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


@every_info
@every_backend
def test_what_must_raise(backend, name):
    """The infos' own wrong calls: class and text of the error are those that torch's modules must raise."""
    info, place = INFOS[name], PLACES[backend]
    inputs = info.module_error_inputs_func(info, requires_grad=False, training=True, **place)
    assert len(inputs) >= 2
    for wrong in inputs:
        built, given = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input
        options = {k: v for k, v in built.kwargs.items() if k not in ("device", "dtype")} | place
        call = partial(OURS[name], *built.args, **options, backend=backend)
        if wrong.error_on is not ModuleErrorEnum.CONSTRUCTION_ERROR:
            call = partial(call(), *given.args, **given.kwargs)
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            call()
