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
    """An observation has the number of steps that the episode ran, and the number that it has in all."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ran, self.last = 0, int(self.np_random.integers(1, 7))
        return self.observed(), {}

    def step(self, action):
        self.ran += 1
        flags = [self.ran == self.last, False]  # terminated and truncated, or the other way round
        return self.observed(), 0.0, *flags[:: 1 if self.last % 2 else -1], {}

    def observed(self):
        return np.array([self.ran, self.last, 0.0, 0.0])


LINES = {
    AutoresetMode.NEXT_STEP: "start, ended = ended, torch.from_numpy(terminated | truncated)",
    AutoresetMode.SAME_STEP: "start = torch.from_numpy(terminated | truncated)",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("mode", LINES)
def test_the_acting_loop_resets_before_first_observations_and_the_update_repeats_it(mode, line, monkeypatch):
    """With the line of the other mode it does not."""
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


def test_sentences_on_speed_have_the_stored_results():
    """test_documentation.py compares the tables."""
    page, streaming = (" ".join(text.split()) for text in (PAGE, STREAMING))
    acting, ppo = (pd.read_csv(ROOT / "bench" / "results" / "cpu" / f"{name}.csv") for name in ("acting", "ppo"))
    acting = acting[acting["device"].str.endswith("1 thread")]

    def longer(its, over):
        return f"up to {(its / over).max() - 1:.0%} longer than".replace("%", " %")

    def span(cell, low, high, way, *resets):
        its = acting[acting["cell"].isin(cell) & acting["N"].between(low, high) & acting["resets"].isin(resets)]
        return "{:.2f} to {:.2f}".format(*its[f"{way}, times as fast"].agg(["min", "max"]))

    share = (ppo["rollout, one call ms"] / ppo["rollout, loop ms"]).groupby(ppo["cell"]).agg(["min", "max"])
    lstms, grus = ("{:.2f} to {:.2f}".format(*share.loc[cell]) for cell in ("LSTM", "GRU"))
    stream = longer(acting["Stream us"], acting["module us"])
    cases = report.measured(results.read(ROOT / "bench/results/amd-epyc-1-thread.csv"))
    cases = cases[(cases["mode"] == "step") & (cases["sequences"] == "full")].set_index(["provider", "case"])
    steps = cases["over_ours"]["ours-stream"]
    of_one = cases["over_ours"].xs("step-fp32-T1-B1-I128-H128-gru", level="case")
    both, few, many = ("LSTM", "GRU"), (2, 8, "Stream"), (64, 4096, "Stream")
    for text, said in (
        (page, f"an LSTM's rollout takes {lstms} of the time with `nn.LSTM`"),
        (page, f"a GRU's rollout takes {grus} of the time with `nn.GRU`"),
        (page, f"`Stream` takes {stream} the module"),
        (streaming, f"its module, {stream.removesuffix(' longer than')} in the timings of acting"),
        (streaming, "it takes {:.0f} to {:.0f} % longer, and".format(*(100 * steps - 100).agg(["min", "max"]))),
        (streaming, f"one sequence takes {of_one['ours-stream'] / of_one['torch']:.2f} times as long as `nn.GRU`"),
        (page, f"the module is {span(both, 64, 4096, 'module', False, True)} times as fast"),
        *((streaming, f"| {of}, 2 or 8 | {span([of], *few, False)} | {span([of], *few, True)} |") for of in both),
        (streaming, f"| LSTM or GRU, 64 to 4,096 | {span(both, *many, False)} | {span(both, *many, True)} |"),
    ):  # fmt: skip
        assert said in text, said
