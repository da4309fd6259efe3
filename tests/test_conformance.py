"""PyTorch's own descriptions of nn.LSTM and nn.LSTMCell, which its test suite runs over every module, run over ours.

A ModuleInfo says how a module is built and called, what its results are held to, and which calls must raise. The checks
are those of torch's test_modules.py, which torch does not ship; here the truth is torch's module with the same weights.

Every call, every result and every error is torch's. What its checks do and these leave out:

- on "triton", gradcheck and most samples: float32 is too coarse for finite differences (test_derivatives.py holds
  gradients of gradients to torch's), and the interpreter is slow;
- half precision: its tolerances need the yardstick of test_layer.py;
- channels_last inputs: no input of an LSTM has four dimensions; a module that is moved to it stays as it is;
- in-place variants: there are none; and two devices at once: test_devices.py and test_gpu.py have them.
"""

import copy
import io
import itertools
from functools import partial

import pytest
import torch
from comparing import BACKENDS, PLACES
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
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def modules(name, backend, training=True, requires_grad=False):
    """(ours, theirs, arguments, reference function) for each sample of an info."""
    info, place = INFOS[name], PLACES[backend]
    samples = info.module_inputs_func(
        info, device=place["device"], dtype=place["dtype"], requires_grad=requires_grad, training=training
    )
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


def assert_close(ours, theirs, dtype):
    assert len(ours) == len(theirs) > 1
    for our, their in zip(ours, theirs):
        accuracy = 32 * torch.finfo(dtype).eps * max(1.0, their.abs().max().item())
        torch.testing.assert_close(our, their, rtol=0, atol=accuracy)


# Kernels know nothing of eval(), and the interpreter is slow.
@pytest.mark.parametrize(("backend", "training"), [(b, t) for b in BACKENDS for t in (True, False)][:-1])
@every_info
def test_forward_and_gradients(backend, name, training):
    """Against torch's module, and against torch's reference function: of one unbatched call, the same in a batch."""
    for ours, theirs, arguments, reference in modules(name, backend, training, requires_grad=True):
        found = call(ours, arguments)
        assert_close(found, call(theirs, arguments), PLACES[backend]["dtype"])
        with torch.no_grad():
            expected = reference(ours, *arguments)
        found = tree_leaves(ours(*arguments))
        assert_close(found, tree_leaves(expected), PLACES[backend]["dtype"])


@every_info
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_by_finite_differences(backend, name):
    samples = list(modules(name, backend, requires_grad=True))
    for ours, _, arguments, _ in samples[:: len(samples) // 2]:
        flat = [*tree_leaves(arguments), *ours.parameters()]
        names = [parameter for parameter, _ in ours.named_parameters()]

        def results(*tensors, ours=ours, arguments=arguments, names=names):
            states = iter(tensors)
            given = tree_map(lambda _: next(states), arguments)
            parameters = dict(zip(names, states))
            return tuple(tree_leaves(torch.func.functional_call(ours, parameters, given)))

        assert torch.autograd.gradcheck(results, flat, fast_mode=True)
        assert torch.autograd.gradgradcheck(results, flat, fast_mode=True)


@every_info
@every_backend
def test_inputs_that_are_not_contiguous(backend, name):
    """Every other element of a larger tensor; so are the gradients that come from above."""
    for ours, _, arguments, _ in itertools.islice(modules(name, backend), 2 if backend == "triton" else None):
        given = tree_map(lambda t: t.detach().requires_grad_(), arguments)
        apart = tree_map(lambda t: t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(), arguments)
        assert not any(t.is_contiguous() for t in tree_leaves(apart))
        assert_close(call(ours, apart), call(ours, given), PLACES[backend]["dtype"])


@every_info
def test_repr_and_state_are_torchs_and_pickles_copies_and_moves_compute_the_same(name):
    """Moves: to(dtype) there and back, and to(memory_format=), which says nothing about matrices."""
    for ours, theirs, arguments, _ in modules(name, "reference"):
        file, expected = io.BytesIO(), tree_leaves(ours(*arguments))
        torch.save(ours, file)
        file.seek(0)
        copies = torch.load(file, weights_only=False), copy.deepcopy(ours)
        assert all(type(again) is type(ours) and repr(again) == repr(ours) for again in copies)
        moves = ours.to(torch.float64), ours.to(memory_format=torch.channels_last), ours.double().cpu()
        for same in (*copies, *moves):
            assert all(map(torch.equal, tree_leaves(same(*arguments)), expected))
        ours.backend = None
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert sorted(theirs.__constants__) == sorted(ours.__constants__)


@every_info
def test_factory_arguments(name):
    """Parameters are created where and as device and dtype say."""
    info = INFOS[name]
    for sample in info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        for place in ({"dtype": torch.float64}, {"dtype": torch.float16}, {"device": "meta"}):
            for parameter in OURS[name](*arguments, **options, **place).parameters():
                assert parameter.dtype is place.get("dtype", torch.float32)
                assert parameter.device.type == place.get("device", "cpu")
        empty = OURS[name](*arguments, **options, device="meta").to_empty(device="cpu")
        assert all(parameter.device.type == "cpu" for parameter in empty.parameters())


@every_info
@every_backend
def test_what_must_raise(backend, name):
    """The infos' own wrong calls: class and text of the error are those that torch's are held to."""
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
