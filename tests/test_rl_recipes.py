"""The recipes of docs/reinforcement_learning.md against the trainers' own ways, which are written here as plain loops.

Outputs, states and gradients in float64. Each recipe must also notice resets that are a step late.
"""

import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from installed import ROOT
from torch import nn
from torch.func import functional_call, stack_module_state

import gpu_lstm

T, N, I, H, L = 12, 5, 3, 4, 2
PAGE = (ROOT / "docs" / "reinforcement_learning.md").read_text()
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def recipes():
    """What the code of the page's section defines."""
    section = re.search(r"## Your trainer\n(.*?)\n## ", PAGE, flags=re.DOTALL)[1]
    names = {"torch": torch, "gpu_lstm": gpu_lstm}
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        exec(block, names)
    return SimpleNamespace(**names)


@pytest.fixture(autouse=True)
def in_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def starts_of_episodes():
    """Bool [T, N]: some environments start at step 0; several start in the middle, two of them at the same step."""
    starts = torch.rand(T, N) < 0.25
    starts[0], starts[5, :2] = torch.tensor([True, False, True, False, False]), True
    return starts


def ends_of_episodes():
    """Bool [T, N]; one ends with the last step."""
    ends = torch.rand(T, N) < 0.25
    ends[-1, 1] = True
    return ends


def a_state():
    return torch.randn(L, N, H), torch.randn(L, N, H)


def with_gradients(results, parameters):
    """The results, and the gradients of a weighted sum of the first one."""
    generator = torch.Generator().manual_seed(1)
    weighting = torch.randn(results[0].shape, generator=generator)
    return [*(each.detach() for each in results), *torch.autograd.grad((results[0] * weighting).sum(), parameters)]


def same(found, expected):
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert all(each.abs().max() > 1e-6 for each in expected)
    return all((a - b).abs().max() <= TOLERANCE for a, b in zip(found, expected))


def pair(ours, **options):
    """torch's LSTM, and `ours` with the same weights."""
    theirs = nn.LSTM(I, H, L, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def masked_loop(lstm, x, state, starts):
    """A call for each step, its state masked: x [T, N, I]."""
    outputs = []
    for x_t, start in zip(x, starts):
        keep = 1 - start.double().view(1, -1, 1)
        y, state = lstm(x_t[None], tuple(keep * each for each in state))
        outputs.append(y)
    return torch.cat(outputs), state


def in_pieces(lstm, x, state, starts):
    """A call from each step at which any environment starts to the next one."""
    begins = [0] + [t for t in range(1, len(x)) if starts[t].any()]
    outputs = []
    for begin, end in zip(begins, [*begins[1:], len(x)]):
        keep = 1 - starts[begin].double().view(1, -1, 1)
        y, state = lstm(x[begin:end], tuple(keep * each for each in state))
        outputs.append(y)
    return torch.cat(outputs), state


def test_cleanrl(recipes):
    """A loop over steps; x, dones and outputs are flat, [T*N, ...]; dones are starts, as floats."""
    theirs, ours = pair(gpu_lstm.LSTM(I, H, L))
    agent = SimpleNamespace(network=nn.Linear(I, I), lstm=ours)
    images, state, starts = 255 * torch.rand(T * N, I), a_state(), starts_of_episodes()

    features = agent.network(images / 255).view(T, N, I)
    y, states = masked_loop(theirs, features, state, starts)
    expected = with_gradients([y.flatten(0, 1), *states], [*agent.network.parameters(), *theirs.parameters()])

    def found(starts):
        y, states = recipes.get_states(agent, images, state, starts.double().flatten())
        return with_gradients([y, *states], [*agent.network.parameters(), *ours.parameters()])

    assert same(found(starts), expected)
    assert not same(found(starts.roll(1, 0)), expected)
    one_step, _ = recipes.get_states(agent, images[:N], state, starts[0].double())  # acting
    torch.testing.assert_close(one_step, y.flatten(0, 1)[:N], rtol=0, atol=TOLERANCE)


def test_rl_games(recipes):
    """Pieces that are cut where any environment starts; dones [T, N, 1] are starts, of bytes."""
    module = recipes.LSTMWithDones(input_size=I, hidden_size=H, num_layers=L)
    assert next(iter(module.state_dict())) == "rnn.weight_ih_l0"
    theirs, _ = pair(module.rnn)
    x, state, starts = torch.randn(T, N, I), a_state(), starts_of_episodes()
    y, states = in_pieces(theirs, x, state, starts)
    expected = with_gradients([y, *states], list(theirs.parameters()))
    dones = starts.byte().unsqueeze(-1)

    def found(dones):
        y, states = module(x, list(state), dones, bptt_len=T)
        assert type(states) is tuple
        return with_gradients([y, *states], list(module.parameters()))

    assert same(found(dones), expected)
    assert not same(found(dones.roll(1, 0)), expected)
    across = dones.transpose(0, 1).contiguous().transpose(0, 1)  # as rl_games transposes its flat batch
    assert same(found(across), expected)
    for states in ([], list(state)):  # acting; at first without states
        acted, _ = module(x[:1], states)
        torch.testing.assert_close(acted, theirs(x[:1], states or None)[0], rtol=0, atol=TOLERANCE)


def test_rsl_rl(recipes):
    """Trajectories that are padded to the longest, each from the state stored at its start; dones [T, N] are ends."""
    theirs, ours = pair(gpu_lstm.LSTM(I, H, L))
    x, dones = torch.randn(T, N, I), ends_of_episodes()

    # The rollout goes on from one before it. Acting stores every state, and zeroes it in place where an episode ended.
    state, stored = a_state(), []
    memory = SimpleNamespace(rnn=ours, hidden_state=tuple(each.clone() for each in state))
    with torch.no_grad():
        for x_t, done in zip(x, dones):
            stored.append([each.clone() for each in state])
            y, state = theirs(x_t[None], state)
            torch.testing.assert_close(recipes.forward(memory, x_t), y, rtol=0, atol=TOLERANCE)
            for each in (*state, *memory.hidden_state):
                each[:, done] = 0
            torch.testing.assert_close(memory.hidden_state, state, rtol=0, atol=TOLERANCE)

    def padded(environments):
        """One after another their trajectories, each (environment, begin, end); outputs [T, environments, H]."""
        pieces = []
        for n in environments:
            cuts = [0, *(t + 1 for t in range(T - 1) if dones[t, n]), T]
            pieces += [(n, begin, end) for begin, end in pairwise(cuts)]
        batch = torch.zeros(max(end - begin for _, begin, end in pieces), len(pieces), I)
        for k, (n, begin, end) in enumerate(pieces):
            batch[: end - begin, k] = x[begin:end, n]
        hx = [torch.stack([stored[begin][part][:, n] for n, begin, _ in pieces], dim=1) for part in (0, 1)]
        y, _ = theirs(batch, tuple(hx))
        rows = {n: [] for n in environments}
        for k, (n, begin, end) in enumerate(pieces):
            rows[n].append(y[: end - begin, k])
        return torch.stack([torch.cat(rows[n]) for n in environments], dim=1)

    found = list(recipes.minibatches(x, dones.byte(), stored[0], 2))
    assert [each.shape for each, _, _ in found] == [(T, 3, I), (T, 2, I)]
    for environments, (some, resets, state) in zip(([0, 1, 2], [3, 4]), found):
        expected = with_gradients([padded(environments)], list(theirs.parameters()))
        for late in (0, 1):
            y = recipes.forward(memory, some, masks=resets.roll(late, 0), hidden_state=state)
            assert same(with_gradients([y], list(ours.parameters())), expected) == (late == 0)


def test_skrl(recipes):
    """Pieces that are cut after any end; all is flat, [N*T, ...], with a state stored at every step.

    Ends are "terminated" or "truncated"; older versions hand over one for both.
    """
    theirs, ours = pair(gpu_lstm.LSTM(I, H, L, batch_first=True), batch_first=True)
    model = SimpleNamespace(lstm=ours, sequence_length=T, training=True)
    x, state, ends = torch.randn(N, T, I), a_state(), ends_of_episodes()

    states, outputs = state, []
    cuts = [0, *(t + 1 for t in range(T - 1) if ends[t].any()), T]
    for begin, end in pairwise(cuts):
        y, states = theirs(x[:, begin:end], states)
        outputs.append(y)
        if end < T:
            states = tuple(each * ~ends[end - 1][:, None] for each in states)
    expected = with_gradients([torch.cat(outputs, 1).flatten(0, 1), *states], list(theirs.parameters()))

    stored = [torch.randn(L, N, T, H) for _ in "hc"]  # only those before the first step count
    for each, first in zip(stored, state):
        each[:, :, 0] = first

    by_clock = torch.rand(T, N) < 0.5

    def found(ends, **others):
        inputs = {"rnn": [each.flatten(1, 2) for each in stored], "terminated": ends, **others}
        inputs = {name: each if name == "rnn" else each.t().reshape(-1, 1) for name, each in inputs.items()}
        y, rest = recipes.remember(model, x.flatten(0, 1), inputs)
        return with_gradients([y, *rest["rnn"]], list(ours.parameters()))

    assert same(found(ends), expected)
    assert same(found(ends & ~by_clock, truncated=ends & by_clock), expected)
    assert not same(found(ends & ~by_clock), expected)
    assert not same(found(ends.roll(1, 0)), expected)
    model.training = False  # acting: a step of every environment
    y, rest = recipes.remember(model, x[:, 0], {"rnn": list(state)})
    acted, states = theirs(x[:, :1], state)
    torch.testing.assert_close([y, *rest["rnn"]], [acted[:, 0], *states], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("zeros", [False, True])
def test_torchrl(recipes, zeros):
    """LSTMModule, which pads; where it is not installed, a loop that goes on from the stored state at a start."""
    theirs, ours = pair(gpu_lstm.LSTM(I, H, L, batch_first=True), batch_first=True)
    x, starts = torch.randn(N, T, I), starts_of_episodes().t()
    stored = [torch.randn(N, T, L, H) * (1 - zeros) for _ in "hc"]
    if zeros:  # but those of a trajectory that goes on from the batch before
        for each in stored:
            each[~starts[:, 0], 0] = torch.randn(L, H)
    stored = [each.requires_grad_() for each in stored]
    data = {"x": x, "is_init": starts[:, :, None], "h": stored[0], "c": stored[1]}
    leaves = lambda lstm: [*stored, *lstm.parameters()]  # noqa: E731

    state, outputs = [each[:, 0].transpose(0, 1) for each in stored], []
    for t in range(T):
        there = starts[:, t][None, :, None]
        state = [torch.where(there, left[:, t].transpose(0, 1), each) for left, each in zip(stored, state)]
        y, state = theirs(x[:, t : t + 1], tuple(state))
        outputs.append(y)
    expected = with_gradients([torch.cat(outputs, 1)], leaves(theirs))
    assert same(with_gradients([recipes.all_trajectories(ours, data)], leaves(ours)), expected)
    late = {**data, "is_init": data["is_init"].roll(1, 1)}
    assert not same(with_gradients([recipes.all_trajectories(ours, late)], leaves(ours)), expected)

    modules, TensorDict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict").TensorDict
    keys = dict(in_keys=["x", "h", "c"], out_keys=["y", ("next", "h"), ("next", "c")])
    policy = modules.LSTMModule(lstm=theirs, recurrent_backend="pad", **keys)
    with modules.set_recurrent_mode(True):
        y = policy(TensorDict(data, [N, T]))["y"]
    assert same(with_gradients([y], leaves(theirs)), expected)


def the_loop_of_benchmarl(cells, x, is_init, h, c):
    """Steps, and layers within them: x [N, T, I], is_init [N, T, 1], h and c [N, L, H]."""
    h, c, outputs = list(h.unbind(1)), list(c.unbind(1)), []
    for t in range(x.shape[1]):
        y = x[:, t]
        for layer, cell in enumerate(cells):
            h[layer], c[layer] = (each.masked_fill(is_init[:, t], 0) for each in (h[layer], c[layer]))
            y, c[layer] = h[layer], c[layer] = cell(y, (h[layer], c[layer]))
        outputs.append(h[-1])
    return torch.stack(outputs, 1), torch.stack(h, 1), torch.stack(c, 1)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_weights"])
def test_benchmarl(recipes, shared):
    """Agents by torch.vmap, with weights of their own or the same."""
    agents = 3
    x, starts = torch.randn(N, T, agents, I), starts_of_episodes().t()
    h, c = torch.randn(2, N, agents, L, H).unbind()
    is_init = starts[:, :, None, None].expand(N, T, agents, 1)
    networks = [recipes.AgentsLSTM(I, H, "cpu", L, 0.0, True) for _ in range(1 if shared else agents)]
    cells = [[nn.LSTMCell(I, H), nn.LSTMCell(H, H)] for _ in networks]
    for network, own in zip(networks, cells):
        weights = {f"{k}_l{layer}": v for layer, cell in enumerate(own) for k, v in cell.state_dict().items()}
        network.lstm.load_state_dict(weights)

    def expected_of(agent):
        parts = x[:, :, agent], is_init[:, :, agent], h[:, agent], c[:, agent]
        return the_loop_of_benchmarl(cells[0 if shared else agent], *parts)

    y, h_n, c_n = zip(*map(expected_of, range(agents)))
    results = torch.stack(y, 2), torch.stack(h_n, 1), torch.stack(c_n, 1)
    in_turn = zip(*([p for cell in own for p in cell.parameters()] for own in cells))  # each weight, of every network
    expected = with_gradients(results, [weight for weights in in_turn for weight in weights])

    def found(is_init):
        if shared:
            vmapped = torch.vmap(networks[0], in_dims=(-2, -2, -3, -3), out_dims=(-2, -3, -3))
            return with_gradients(vmapped(x, is_init, h, c), list(networks[0].parameters()))
        stacked, _ = stack_module_state(networks)
        call = lambda weights, *inputs: functional_call(networks[0], weights, inputs)  # noqa: E731
        vmapped = torch.vmap(call, in_dims=(0, -2, -2, -3, -3), out_dims=(-2, -3, -3))
        results = with_gradients(vmapped(stacked, x, is_init, h, c), list(stacked.values()))
        return [*results[:3], *(one for each in results[3:] for one in each)]

    assert same(found(is_init), expected)
    assert not same(found(is_init.roll(1, 1)), expected)


def test_dones_that_are_starts_are_shifted_twice():
    """What the page and the docstring of resets_from_dones warn of."""
    starts, x, lstm = torch.rand(128, 8) < 0.05, torch.randn(128, 8, I), gpu_lstm.LSTM(I, H)
    starts[0] = True
    right, _ = lstm(x, resets=starts)
    ends = torch.cat([starts[1:], torch.zeros_like(starts[:1])])
    torch.testing.assert_close(lstm(x, resets=gpu_lstm.resets_from_dones(ends, first=starts[0]))[0], right)
    wrong, _ = lstm(x, resets=gpu_lstm.resets_from_dones(starts))
    assert (~torch.isclose(wrong, right)).double().mean() > 0.3
