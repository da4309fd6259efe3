"""The recipes of docs/reinforcement_learning.md against torch.nn.LSTM or GRU called at every step, with a masked state.

Outputs, states and gradients are in float64. Each recipe must also notice resets that are a step late.
test_bench_providers.py tests other ways of trainers, in pieces and padded, and test_frameworks.py tests TorchRL itself.
Also the page's acting loop in Gymnasium's environments, and its figures outside of tables.
"""

import copy
import re
from types import SimpleNamespace

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from installed import ROOT, load
from torch import nn
from torch.func import functional_call, stack_module_state

import gpu_lstm
from bench import report, results

T, N, I, H, L = 12, 5, 3, 4, 2
PAGE, STREAMING = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("reinforcement_learning", "streaming"))


def blocks(heading, kind="python"):
    """Return the code blocks of the page between a heading and the next one of its level or above."""
    end = rf"^#{{2,{heading.count('#')}}} "
    section = re.split(end, PAGE.split(f"\n{heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"```{kind}\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture(scope="module")
def recipes():
    names = {"torch": torch, "gpu_lstm": gpu_lstm}
    for block in blocks("## Your trainer"):
        exec(block, names)
    return SimpleNamespace(**names)


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def starts():
    """Starts or ends of episodes, bool [T, N]. Some environments have one at step 0, one has one at the last step, and
    two have one at the same step in the middle."""
    starts = torch.rand(T, N) < 0.25
    starts[0], starts[5, :2], starts[-1, 1] = torch.tensor([True, False, True, False, False]), True, True
    return starts


@pytest.fixture(params=["LSTM", "GRU"])
def kind(request):
    return request.param


@pytest.fixture
def states(kind):
    """A pair of states, or a tuple of one for a GRU."""
    return torch.randn(1 + (kind == "LSTM"), L, N, H).unbind()


def after(ends):
    """Convert ends of episodes to the starts within a rollout."""
    return torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])


def pair(kind="LSTM", **options):
    """Return torch's module, and ours with the same weights."""
    theirs, ours = getattr(nn, kind)(I, H, L), getattr(gpu_lstm, kind)(I, H, L, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def taken(states):
    """Return states in the form that a module takes: a pair, or h for a GRU."""
    return states[0] if len(states) == 1 else tuple(states)


def given(states):
    """Reverse `taken`, for the states that a module returns."""
    return (states,) if torch.is_tensor(states) else states


def loop(module, x, state, starts, left=None):
    """Return [output, *states] of one call for each step of x [T, N, I]. Episodes start from 0, or from `left` [T, L,
    N, H]."""
    outputs = []
    for t, start in enumerate(starts[..., None]):
        state = [torch.where(start, of[t] if left else 0.0, each) for of, each in zip(left or state, state)]
        y, state = module(x[t : t + 1], taken(state))
        outputs.append(y)
        state = given(state)
    return [torch.cat(outputs), *state]


def close(found, expected):
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=1e-12)


def check(call, parameters, expected, of_theirs, resets, steps=0):
    """Check call(resets) and the gradients of its output. With resets a step late they must differ."""

    def with_gradients(results, parameters):
        weighting = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1))
        return [*results, *torch.autograd.grad((results[0] * weighting).sum(), parameters)]

    expected = with_gradients(expected, of_theirs)
    assert all(each.abs().max() > 1e-6 for each in expected)
    close(with_gradients(call(resets), parameters), expected)
    with pytest.raises(AssertionError, match="not close"):
        close(with_gradients(call(resets.roll(1, steps)), parameters), expected)


def test_a_reset_ends_a_nan_which_a_loop_of_keep_times_h_does_not(kind, states, starts):
    """A call and a Stream give the results of a loop that replaces the state by zeros."""
    theirs, ours = pair(kind)
    x = torch.randn(T, N, I)
    x[3, 0], starts[1:6, 0], starts[6, 0] = torch.nan, False, True
    with torch.no_grad():
        expected, *_ = loop(theirs, x, states, starts)
        output, _ = ours(x, taken(states), resets=starts)
        stream, streamed = gpu_lstm.Stream(ours, N, hx=taken(states)), []
        state, by_keep = states, []
        for x_t, start in zip(x, starts):
            stream.reset(start)
            streamed.append(stream(x_t))
            y, state = theirs(x_t[None], taken([~start[:, None] * each for each in state]))
            by_keep.append(y)
            state = given(state)
    assert torch.cat(by_keep)[3:, 0].isnan().all()
    assert expected[3:6, 0].isnan().all()
    assert not expected[6:].isnan().any()
    for found in (output, torch.stack(streamed)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_cleanrl(recipes, starts, kind, states):
    """x, dones and outputs are flat, [T*N, ...]. dones are starts, as floats."""
    theirs, ours = pair(kind)
    agent, images = SimpleNamespace(network=nn.Linear(I, I), lstm=ours), 255 * torch.rand(T * N, I)
    y, *finals = loop(theirs, agent.network(images / 255).view(T, N, I), states, starts)

    def call(starts):
        y, after = recipes.get_states(agent, images, taken(states), starts.double().flatten())
        return [y, *given(after)]

    of_network = list(agent.network.parameters())
    compared = [*of_network, *ours.parameters()], [y.flatten(0, 1), *finals], [*of_network, *theirs.parameters()]
    check(call, *compared, starts)
    close(recipes.get_states(agent, images[:N], taken(states), starts[0].double())[:1], y[:1])  # acting


def test_rl_games(recipes, starts, kind, states):
    """dones [T, N, 1] are starts, as bytes."""
    module = getattr(recipes, f"{kind}WithDones")(input_size=I, hidden_size=H, num_layers=L)
    assert next(iter(module.state_dict())) == "rnn.weight_ih_l0"
    theirs, x, dones = getattr(nn, kind)(I, H, L), torch.randn(T, N, I), starts.byte().unsqueeze(-1)
    theirs.load_state_dict(module.rnn.state_dict())
    expected = loop(theirs, x, states, starts)
    held = states[0] if kind == "GRU" else list(states)  # rl_games holds them so

    def call(dones):
        y, after = module(x, held, dones, bptt_len=T)
        assert type(after) is (torch.Tensor if kind == "GRU" else tuple)
        return [y, *given(after)]

    check(call, list(module.parameters()), expected, list(theirs.parameters()), dones)
    close(call(dones.transpose(0, 1).contiguous().transpose(0, 1)), expected)  # as rl_games transposes its flat batch
    close(module(x[:1], [])[:1], theirs(x[:1])[:1])  # acting, at first without states
    close(module(x[:1], held)[:1], theirs(x[:1], taken(states))[:1])


def test_rsl_rl(recipes, starts, kind, states):
    """dones [T, N, 1] are ends. Acting zeroes the state in place at an end. A minibatch has some of the N
    environments."""
    (theirs, ours), x = pair(kind), torch.randn(T, N, I)
    y, *_ = loop(theirs, x, states, after(starts))
    memory = SimpleNamespace(rnn=ours, hidden_state=taken([each.clone() for each in states]))
    with torch.no_grad():
        for x_t, done, y_t in zip(x, starts, y):
            close(recipes.forward(memory, x_t), y_t[None])
            for each in given(memory.hidden_state):
                each[:, done] = 0
    # States of every step; only the first one counts.
    saved = [torch.cat([each[None], torch.randn(T - 1, L, N, H)]) for each in states]
    of_steps = ("actions", "values", "advantages", "returns", "actions_log_prob")
    storage = SimpleNamespace(
        **dict.fromkeys(of_steps, torch.arange(T * N).view(T, N, 1)), observations=x, distribution_params=(x,),
        dones=starts.byte().unsqueeze(-1), num_envs=N, Batch=SimpleNamespace,
        saved_hidden_state_a=saved, saved_hidden_state_c=[-each for each in saved],
    )  # fmt: skip
    found = list(recipes.recurrent_mini_batch_generator(storage, 2, 3))
    for some, batch in zip([slice(0, 2), slice(2, 4)] * 3, found, strict=True):
        for name in (*of_steps[:4], "old_actions_log_prob"):
            assert torch.equal(getattr(batch, name), storage.actions[:, some])
        (first, its), part = batch.hidden_states, batch.observations
        assert torch.equal(batch.old_distribution_params[0], part)
        close(given(its), [-each for each in given(first)])
        y, *_ = loop(theirs, x[:, some], [each[:, some] for each in states], after(starts)[:, some])
        call = lambda resets: [recipes.forward(memory, part, masks=resets, hidden_state=first)]  # noqa: B023, E731
        check(call, list(ours.parameters()), [y], list(theirs.parameters()), batch.masks)


def test_skrl(recipes, starts, kind, states):
    """Everything is flat, [N*T, ...]. A state is stored at every step, and only the states before the first step count.
    Ends are "terminated" or "truncated". Older versions give one name to both."""
    theirs, ours = pair(kind, batch_first=True)
    model, x = SimpleNamespace(rnn=ours, sequence_length=T, training=True), torch.randn(N, T, I)
    y, *finals = loop(theirs, x.transpose(0, 1), states, after(starts))
    expected = [y.transpose(0, 1).flatten(0, 1), *finals]
    stored = [torch.cat([each[:, :, None], torch.randn(L, N, T - 1, H)], 2).flatten(1, 2) for each in states]

    def call(ends, **others):
        ends = {name: each.t().reshape(-1, 1) for name, each in dict(terminated=ends, **others).items()}
        y, rest = recipes.remember(model, x.flatten(0, 1), {"rnn": stored, **ends})
        return [y, *rest["rnn"]]

    check(call, list(ours.parameters()), expected, list(theirs.parameters()), starts)
    by_clock = torch.rand(T, N) < 0.5
    close(call(starts & ~by_clock, truncated=starts & by_clock), expected)
    model.training = False  # acting: a step of every environment
    y, rest = recipes.remember(model, x[:, 0], {"rnn": list(states)})
    acted, finals = theirs(x[None, :, 0], taken(states))
    close([y, *rest["rnn"]], [acted[0], *given(finals)])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchrl(recipes, starts, kind):
    """The page's module acts and learns as TorchRL's own, with the names of states that TorchRL chooses. A trajectory
    that starts within the batch begins with the state stored there, and gradients flow into that state."""
    torchrl, TensorDict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict").TensorDict
    (block,) = blocks("### TorchRL", "text")
    its_names = {**vars(recipes), "torchrl": SimpleNamespace(modules=torchrl)}
    of_two_layers = block.replace("128", "128, num_layers=2").replace("LSTM", kind)
    exec(re.sub(r"(?<!gpu_)lstm", kind.lower(), of_two_layers), its_names)
    ours = its_names["module"]
    rnn = getattr(nn, kind)(64, 128, L, batch_first=True)
    theirs = getattr(torchrl, f"{kind}Module")(**{kind.lower(): rnn}, in_key="embedding", out_key="features")
    theirs.load_state_dict(ours.state_dict())
    x, stored = torch.randn(N, T, 64), torch.randn(1 + (kind == "LSTM"), N, T, L, 128, requires_grad=True)
    keys = ["recurrent_state_h", "recurrent_state_c"] if kind == "LSTM" else ["recurrent_state"]
    data = TensorDict(dict(zip(keys, stored), embedding=x, is_init=starts.t()[:, :, None]), [N, T])

    def found(module):
        step = module(data[:, 0].clone())
        with torchrl.set_recurrent_mode(True):
            y = module(data.clone())["features"]
        gradients = torch.autograd.grad(y.square().sum(), [stored, *module.parameters()])
        return [step["features"], *(step["next", key] for key in keys), y, *gradients]

    close(found(ours), found(theirs))


def test_benchmarl(recipes, starts, kind):
    """torch.vmap runs agents with weights of their own: x [N, T, agents, I], states [N, agents, L, H]."""
    x, states = torch.randn(N, T, 3, I), torch.randn(1 + (kind == "LSTM"), N, 3, L, H).unbind()
    networks, theirs = [getattr(recipes, f"Agents{kind}")(I, H, "cpu", L, 0.0, True) for _ in range(3)], pair(kind)[0]
    stacked, _ = stack_module_state(networks)
    found = []
    for agent in range(3):
        weights = {name.removeprefix("rnn."): weight[agent] for name, weight in stacked.items()}
        one = lambda *given: functional_call(theirs, weights, given)  # noqa: B023, E731
        found.append(loop(one, x[:, :, agent].transpose(0, 1), [s[:, agent].transpose(0, 1) for s in states], starts))
    y, *finals = (torch.stack(each, 2) for each in zip(*found))
    expected = [y.transpose(0, 1), *(each.permute(1, 2, 0, 3) for each in finals)]

    def call(is_init):
        one = lambda weights, *given: functional_call(networks[0], weights, given)  # noqa: E731
        many = [-3] * len(states)
        vmapped = torch.vmap(one, in_dims=(0, -2, -2, *many), out_dims=(-2, *many))
        return vmapped(stacked, x, is_init, *states)

    weights, is_init = list(stacked.values()), starts.t()[:, :, None, None].expand(N, T, 3, 1)
    check(call, weights, expected, weights, is_init, 1)


def test_stored_state_and_burn_in(kind):
    """The states before steps 5, 10 and 15 are those of a trace. After the burn-in the outputs are those of one
    call."""
    (block,) = blocks("### Stored state and burn-in (R2D2)")
    _, ours = pair(kind)
    x, starts, hx = torch.randn(20, N, I), torch.rand(20, N) < 0.1, taken(torch.randn(1 + (kind == "LSTM"), L, N, H))
    # A reset where a piece begins, which the stored state does not include, and one in the burn-in.
    starts[[5, 11], 0] = True
    exec(block.replace("(h_0, c_0)", "hx"), names := dict(torch=torch, lstm=ours, x=x, starts=starts, hx=hx))
    trace = gpu_lstm.trace(ours, x, hx, resets=starts)
    names_of = ("hidden", "cell")[: len(given(hx))]
    everywhere = [torch.stack([getattr(gates, name) for (gates,) in trace.layers]) for name in names_of]
    for place, before in enumerate(names["before"][1:]):
        for each, of_steps in zip(given(before), everywhere):
            close([each], [of_steps[:, 5 * place + 4]])
            assert (each - of_steps[:, 5 * place + 5]).abs().max() > 1e-3
    close([names["output"]], [trace.output[13:]])


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sb3_trains_with_the_policy_of_the_example_and_after_it_was_loaded(tmp_path, monkeypatch):
    """The same weights as with sb3-contrib's own policy. The optimizer has the converted module's weights."""
    sb3 = pytest.importorskip("sb3_contrib")
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    example = load(ROOT / "examples" / "sb3_recurrent_ppo.py")

    def environments():
        return example.make_vec_env("CartPole-v1", 4, seed=0)

    def ppo(policy, env):
        shape = dict(n_steps=64, n_epochs=2, policy_kwargs=dict(lstm_hidden_size=H))
        return sb3.RecurrentPPO(policy, env, seed=0, device="cpu", **shape)

    ppo.load = sb3.RecurrentPPO.load
    theirs = ppo("MlpLstmPolicy", environments()).learn(512)
    (block,) = blocks("### Stable-Baselines3", "text")
    first, again = block.replace("100_000", "512").split("\n\n")
    monkeypatch.setattr(example.OneCall, "__module__", "__main__")  # pickled by value
    names = dict(RecurrentPPO=ppo, OneCall=example.OneCall, env=environments(), gpu_lstm=gpu_lstm)
    exec(first, names)
    trained = names["model"].policy
    assert type(trained.lstm_actor) is gpu_lstm.LSTM
    torch.testing.assert_close(trained.state_dict(), theirs.policy.state_dict(), rtol=1e-3, atol=1e-4)
    exec(again, names)
    loaded = names["model"].policy
    assert type(loaded.lstm_actor) is gpu_lstm.LSTM
    before = copy.deepcopy(loaded.state_dict())
    torch.testing.assert_close(before, trained.state_dict(), rtol=0, atol=0)
    names["model"].learn(256)
    assert (loaded.lstm_actor.weight_hh_l0 != before["lstm_actor.weight_hh_l0"]).any()


class Counter(gymnasium.Env):
    """An observation has the number of steps that the episode ran, and the number that it has in all. The latter says
    whether the episode is terminated (2, 3, 5, 6) and whether it is truncated (1, 2, 4, 5)."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ran, self.last = 0, int(self.np_random.integers(1, 7))
        return self.observed(), {}

    def step(self, action):
        self.ran += 1
        ended = self.ran == self.last
        return self.observed(), float(self.ran), ended and self.last % 3 != 1, ended and self.last % 3 != 0, {}

    def observed(self):
        return np.array([self.ran, self.last, 0.0, 0.0])


LINES = {
    AutoresetMode.NEXT_STEP: "start, filler = filler, torch.from_numpy(terminated | truncated)",
    AutoresetMode.SAME_STEP: "start = torch.from_numpy(terminated | truncated)",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("mode", LINES)
def test_the_acting_loop_resets_before_first_observations_and_the_update_repeats_it(mode, line, monkeypatch):
    """With the line of the other mode the loop resets at other steps."""
    loop, update, *_ = blocks("## Acting and learning")
    monkeypatch.setattr(
        gymnasium, "make_vec", lambda *_, num_envs, **__: SyncVectorEnv([Counter] * num_envs, autoreset_mode=mode)
    )
    assert all(PAGE.count(each) for each in LINES.values())
    assert loop.count(LINES[AutoresetMode.NEXT_STEP]) == 1
    names = dict(torch=torch, gpu_lstm=gpu_lstm, T=20, N=N, H=H)
    exec(loop.replace(LINES[AutoresetMode.NEXT_STEP], LINES[line]), names)
    observations, resets, fillers = (torch.cat([rollout[of] for rollout in names["rollouts"]]) for of in (1, 2, 3))
    ran, last, *_ = observations.unbind(-1)
    assert ((ran == 0).sum(0) > 4).all()
    assert torch.equal(resets, ran == 0) == (mode is line)
    if mode is not line:
        return
    is_next = mode is AutoresetMode.NEXT_STEP
    assert torch.equal(fillers, ran == last)
    assert fillers.any() == is_next
    dones = (fillers if is_next else resets).roll(-1, 0)  # the last row counts for no row of resets
    rule = (
        "resets_from_dones(resets_from_dones(dones, last), before_last)"
        if is_next
        else "resets_from_dones(dones, last)"
    )
    assert f"`{rule}`" in PAGE
    given = dict(dones=dones[20:], last=dones[19], before_last=dones[18])
    assert torch.equal(eval(rule, {"resets_from_dones": gpu_lstm.resets_from_dones}, given), resets[20:])
    exec(update, names)
    with pytest.raises(AssertionError, match="not close"):  # the states after the rollout
        exec(update.replace("h_before[", "h[").replace("c_before[", "c["), names)


@pytest.fixture
def agent_and_critic(monkeypatch):
    """Our LSTM, torch's with its weights, and a critic. gymnasium.make_vec makes Counters."""

    def make_vec(*_, num_envs, vector_kwargs=None, **__):
        return SyncVectorEnv([Counter] * num_envs, **(vector_kwargs or {}))

    monkeypatch.setattr(gymnasium, "make_vec", make_vec)
    agent, theirs = gpu_lstm.LSTM(4, H), nn.LSTM(4, H)
    theirs.load_state_dict(agent.state_dict())
    return agent, theirs, nn.Linear(H, 1)


@torch.no_grad()
def expected_advantages(theirs, critic, seed, steps):
    """Return the advantages of the first steps of a Counter, and its episodes, both from one episode after another."""
    env, rewards, values, following, lasts, done = Counter(), [], [], [], [], []
    while len(rewards) < steps:
        observations, ended = [env.reset(seed=None if rewards else seed)[0]], False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(0)
            observations.append(observation)
            rewards.append(reward)
            ended = terminated or truncated
            done.append(ended)
        its = critic(theirs(torch.from_numpy(np.stack(observations))[:, None])[0])[:, 0, 0]
        values += its[:-1].tolist()
        following += [*its[1:-1].tolist(), 0.0 if terminated else its[-1].item()]
        lasts.append(env.last)
    advantages, carried = [], 0.0
    for reward, value, after_it, end in reversed([*zip(rewards, values, following, done, strict=True)]):
        carried = reward + 0.99 * after_it - value + 0.99 * 0.95 * (not end) * carried
        advantages.insert(0, carried)
    return advantages, lasts


def complete(lasts, steps):
    """Return how many of the first steps belong to episodes that end within them."""
    whole = np.cumsum(lasts)
    return int(whole[whole <= steps].max())


def test_truncated_episodes_are_bootstrapped_from_the_state_before_the_reset(agent_and_critic):
    """The page's loop for SAME_STEP, with Counters, against episodes that are run alone."""
    agent, theirs, critic = agent_and_critic
    loop, function, _ = blocks("## Bootstrapping where an episode is truncated")

    def found(loop):
        names = dict(torch=torch, gymnasium=gymnasium, agent=agent, T=40, N=N, H=H)
        with torch.no_grad():
            exec(loop.replace("torch.nn.Linear(H, 1)", "given"), names | dict(given=critic) | (kept := {}), kept)
            exec(function, kept | names, kept)
        return kept["found"]

    def check(found):
        for n in range(N):
            expected, lasts = expected_advantages(theirs, critic, n, 40)
            assert {last % 3 for last in lasts} == {0, 1, 2}
            close([found[: complete(lasts, 40), n]], [torch.tensor(expected[: complete(lasts, 40)])])

    check(found(loop))
    wrong = {"[None], (h, c))": "[None], (h, c), resets=start[None])", "truncated & ~terminated": "truncated"}
    for right, other in wrong.items():
        assert loop.count(right) == 1
        with pytest.raises(AssertionError):
            check(found(loop.replace(right, other)))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
@torch.no_grad()
def test_the_value_of_the_last_observation_is_that_of_the_filler_or_of_a_step_before_a_reset(mode, agent_and_critic):
    agent, theirs, critic = agent_and_critic
    function = blocks("## Bootstrapping where an episode is truncated")[1].split("\n\n\n")[0]
    exec(function, names := dict(torch=torch, gamma=0.99))
    envs = gymnasium.make_vec(num_envs=N, vector_kwargs={"autoreset_mode": mode})
    observation, rows = envs.reset(seed=0)[0], []
    h = c = torch.zeros(1, N, H)
    start, ended, T = torch.ones(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool), 60
    is_next = mode is AutoresetMode.NEXT_STEP
    for _ in range(T + 1):
        y, (h, c) = agent(torch.from_numpy(observation)[None], (h, c), resets=start[None])
        observation, *rest, _ = envs.step(envs.action_space.sample())
        reward, terminated, truncated = map(torch.from_numpy, rest)
        done = terminated | truncated
        if not is_next and done.any():
            last = critic(agent(torch.from_numpy(observation)[None], (h, c))[0])[0, :, 0]
            reward += 0.99 * (truncated & ~terminated) * last
            observation, _ = envs.reset(options={"reset_mask": done.numpy()})
        rows.append((reward, critic(y)[0, :, 0], terminated if is_next else done, done, ended & is_next))
        start, ended = (ended if is_next else done), done
    rewards, values, terminated, dones, fillers = map(torch.stack, zip(*rows))
    found = names["advantages"](rewards[:T], values, terminated[:T], dones[:T])
    if is_next:  # the page's own loop finds the same
        loop = blocks("## Bootstrapping where an episode is truncated")[2].split("\nfound = (")[0]
        of_page = dict(agent=agent, critic=critic, gymnasium=gymnasium, name="", N=N, H=H, T=T)
        exec(loop, of_page := names | of_page)
        close([of_page["found"]], [found])
        assert torch.equal(of_page["fillers"], fillers[:T])
    assert fillers.any() == is_next
    assert not rewards[fillers].any()
    for n in range(N):
        its = found[~fillers[:T, n], n]
        expected, lasts = expected_advantages(theirs, critic, n, len(its))
        count = complete(lasts, len(its))
        close([its[:count]], [torch.tensor(expected[:count])])


def test_a_stream_acts_as_the_module_does_in_the_update_also_after_the_weights_changed(agent_and_critic):
    agent, theirs, _ = agent_and_critic
    (block,) = blocks("### Acting with a Stream")
    envs = gymnasium.make_vec(num_envs=N)
    names = dict(torch=torch, gpu_lstm=gpu_lstm, envs=envs, agent=agent, T=20, N=N, start=torch.ones(N).bool())
    exec(block, names)
    observations, starts, _, y = map(torch.stack, zip(*names["steps"]))
    assert starts[1:].any()
    output, *_ = loop(theirs, observations, names["before"], starts)
    close([y], [output])
    with torch.no_grad():
        for weight in [*agent.parameters(), *theirs.parameters()]:
            weight.mul_(0.5)
    names["stream"].reset()
    close([names["stream"](observations[0])], theirs(observations[:1])[0])


def test_sentences_on_speed_have_the_stored_results():
    """test_documentation.py compares the tables."""
    page, streaming = (" ".join(text.split()) for text in (PAGE, STREAMING))
    acting, ppo = (pd.read_csv(ROOT / "bench" / "results" / "cpu" / f"{name}.csv") for name in ("acting", "ppo"))
    acting, on_xeon = (acting[acting["device"] == f"{cpu}, 1 thread"] for cpu in (
        "AMD EPYC", "Intel(R) Xeon(R) Processor"))  # fmt: skip

    def span(cell, low, high, way, *resets, rows=acting):
        its = rows[rows["cell"].isin(cell) & rows["N"].between(low, high) & rows["resets"].isin(resets)]
        return "{:.2f} to {:.2f}".format(*its[f"{way}, times as fast"].agg(["min", "max"]))

    at, at_xeon = (rows.set_index(["cell", "N", "H"]).sort_index() for rows in (
        ppo[ppo["device"] == f"{cpu}, 1 thread"] for cpu in ("AMD EPYC", "Intel(R) Xeon(R) Processor")))  # fmt: skip
    on = lambda cell, name: "{:.2f} to {:.2f}".format(*at_xeon[name].loc[cell].agg(["min", "max"]))  # noqa: E731
    lstm_8, gru_8 = (at.loc[each] for each in (("LSTM", 8, 128), ("GRU", 8, 128)))
    share = at["rollout, times as fast"].groupby("cell").agg(["min", "max"])
    lstms, grus = ("{:.2f} to {:.2f}".format(*share.loc[cell]) for cell in ("LSTM", "GRU"))
    total = lambda cell, way: (  # noqa: E731
        at[f"rollout, {way} ms"][cell, 8, 128] + 16 * at[f"update, {way} ms"][cell, 2, 128]
    )
    of_cleanrl = {cell: f"{total(cell, 'loop') / total(cell, 'one call'):.1f}" for cell in ("LSTM", "GRU")}
    stream = acting["Stream, times as fast"] / acting["module, times as fast"]
    stream = f"{stream.min():.2f} to {stream.max():.2f} times as fast as"
    cases = report.measured(results.read(ROOT / "bench/results/amd-epyc-1-thread.csv"))
    by_case = cases.set_index(["case", "provider"])
    kept = lambda cell, way: "{:.1f}".format(  # noqa: E731
        by_case["kept_bytes"]["training-fp32-T128-B16-I128-H128-resets-2.0%" + cell, way] / 1e6
    )
    plain = cases[(cases["mode"] == "training") & (cases["variant"] == "plain") & (cases["reset_rate"] > 0)]
    of_lstms = plain[(plain["cell"] == "lstm") & (plain["hidden_size"] <= 256) & (plain["reset_rate"] < 0.01)]
    rare = of_lstms["over_ours"][of_lstms["provider"] == "rl_games-pieces"]
    cut_or_pad = plain["over_ours"][plain["provider"].isin(["rl_games-pieces", "rsl_rl-padded", "torchrl-pad"])]
    cases = cases[(cases["mode"] == "step") & (cases["sequences"] == "full")].set_index(["provider", "case"])
    steps = 1 / cases["over_ours"]["ours-stream"]
    of_one = cases["over_ours"].xs("step-fp32-T1-B1-I128-H128-gru", level="case")
    both, few, many = ("LSTM", "GRU"), (2, 8, "Stream"), (64, 4096, "Stream")
    for text, said in (
        (page, f"a rollout is {lstms} times as fast with an LSTM, "),
        (page, f"{grus} times with a GRU. CleanRL"),
        (page, f"an update is {on('LSTM', 'times as fast')} times as fast with an LSTM, and "
         f"{on('GRU', 'times as fast')} times with a GRU. A rollout of a GRU is "
         f"{on('GRU', 'rollout, times as fast')} times as fast."),
        (page, f"128 units would be {of_cleanrl['LSTM']} times as fast with an LSTM, and {of_cleanrl['GRU']} times"),
        (page, "an update is {:.2f} times as fast with an LSTM and {:.2f} times".format(
            *(each["times as fast"] for each in (lstm_8, gru_8)))),
        (page, "A rollout without its environments is {:.2f} and {:.2f} times as fast".format(
            *(each["rollout, times as fast"] for each in (lstm_8, gru_8)))),
        (page, "of both {:.2f} and {:.2f} times".format(
            *(each["iteration, times as fast"] for each in (lstm_8, gru_8)))),
        (page, f"an LSTM keeps {kept('', 'ours')} MB for backward. The call for every step keeps "
         f"{kept('', 'cleanrl-loop')} MB, pieces keep {kept('', 'rl_games-pieces')} MB, and rsl_rl's padding keeps "
         f"{kept('', 'rsl_rl-padded')} MB. A GRU keeps {kept('-gru', 'ours')} MB, and its call for every step keeps "
         f"{kept('-gru', 'cleanrl-loop')} MB."),
        (page, "an update is {:.2f} to {:.1f} times as fast.".format(*cut_or_pad.agg(["min", "max"]))),
        (page, "units is {:.2f} to {:.2f} times as fast as in pieces.".format(*rare.agg(["min", "max"]))),
        (page, f"a step of acting is {span(both[:1], 64, 4096, 'module', False, True)} times as fast with an LSTM."),
        (page, f"Xeon, a step of a GRU is {span(both[1:], 2, 4096, 'module', False, True, rows=on_xeon)} times"),
        (page, "the module was {} times as fast with an LSTM and 2 or 8 environments, and {} times with more. With a "
         "GRU it was {} times as fast with up to 64 environments, and {} times with more.".format(*(
             span([cell], *sizes, "module", False, True, rows=on_xeon) for cell, *sizes in (
                 ("LSTM", 2, 8), ("LSTM", 64, 4096), ("GRU", 2, 64), ("GRU", 512, 4096))))),
        (page, f"A `Stream` is {stream} the module"),
        (streaming, f"a `Stream` is {stream} a call of its module"),
        (streaming, "and {:.2f} to {:.2f} times in the steps of".format(*steps.agg(["min", "max"]))),
        (streaming, f"one sequence is {of_one['torch'] / of_one['ours-stream']:.2f} times as fast as `nn.GRU`"),
        (page, "the module is {} times as fast with an LSTM, and {} times with a GRU.".format(
            *(span([of], 64, 4096, "module", False, True) for of in both))),
        *((streaming, f"| {of}, {name} | {span([of], *sizes, False)} | {span([of], *sizes, True)} |")
          for of in both for name, sizes in (("2 or 8", few), ("64 to 4,096", many))),
    ):  # fmt: skip
        assert said in text, said
