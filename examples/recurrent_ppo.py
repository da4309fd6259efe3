"""Balance a pole whose velocity is hidden: PPO with a recurrent policy.

Run it from the root of the repository::

    pip install -e ".[examples]"
    python examples/recurrent_ppo.py

The agent sees only the cart's position and the pole's angle of CartPole-v1's observations. The velocities are hidden,
so an agent has to remember. Two agents with the same network learn, on the GPU if there is one. The second agent
forgets everything before every step. The returns are printed, and drawn in out/recurrent_ppo.png. One seed takes about
half a minute. The picture in the documentation has three seeds, with `--updates 60 --seeds 3`.

Episodes end anywhere within a rollout. gpu_lstm.LSTM accepts the steps at which they start as `resets`, so the update
is one call over the whole rollout, with no loop over its steps.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Categorical

import gpu_lstm

ENVIRONMENTS = 16  # N
STEPS = 128  # T, of each environment between updates
HIDDEN = 64  # H
EPOCHS = 4  # for each rollout
MINIBATCHES = 4  # in an epoch, each with all steps of some environments
LEARNING_RATE = 2.5e-3  # at the beginning; it falls to zero
DISCOUNT = 0.99
TRACE = 0.95  # lambda of the generalised advantages
CLIP = 0.2  # the ratio of probabilities is clipped to 1 +- this
ENTROPY = 0.01  # weight of the entropy in the loss
MAX_NORM = 0.5  # of the gradient

State = tuple[Tensor, Tensor]
"""h and c, each [1, N, H]."""


def main(updates: int = 30, seeds: int = 1, out: Path = Path("out")) -> dict[str, float]:
    """Train both agents, print and plot. Return each agent's mean return of its last 100 episodes, over the seeds."""
    torch.set_num_threads(1)  # more do not help so small a model, and slow it down if other work shares the cores
    curves = {name: [learn(updates, seed, name) for seed in range(seeds)] for name in ("remembers", "forgets")}
    table = Table("agent", "episodes", "mean return of the last 100", "seconds", title="CartPole-v1 without velocities")
    for name, its in curves.items():
        for curve in its:
            table.add_row(name, str(curve.episodes), f"{curve.averages[-1]:.0f}", f"{curve.seconds:.0f}")
    Console().print(table)
    plot(curves, out / "recurrent_ppo.png")
    return {name: float(np.mean([curve.averages[-1] for curve in its])) for name, its in curves.items()}


class Curve(NamedTuple):
    """How an agent learned."""

    averages: list[float]  # after each rollout, the mean return of the last 100 episodes
    episodes: int
    seconds: float


def learn(updates: int, seed: int, name: str) -> Curve:
    """Train one agent; `name` is "remembers" or "forgets"."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    agent = Agent(remembers=name == "remembers").to(device)
    optimiser = torch.optim.Adam(agent.parameters(), eps=1e-5)
    returns, averages, began = [], [], time.perf_counter()
    collected = rollouts(agent, cartpoles(), seed)
    for update in track(range(updates), description=f"The agent that {name}"):
        rollout, ended = next(collected)
        returns += ended
        averages.append(float(np.mean(returns[-100:])))
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(ENVIRONMENTS).to(device).chunk(MINIBATCHES):
                training_step(agent, optimiser, rollout.of(chosen))
    return Curve(averages, len(returns), time.perf_counter() - began)


def cartpoles(**options: int) -> VectorEnv:
    """The environments. A step that ends an episode returns the first observation of the next episode.

    Gymnasium's default is another mode, NEXT_STEP, in which episodes start one step later: see
    docs/reinforcement_learning.md.
    """
    autoreset = {"autoreset_mode": AutoresetMode.SAME_STEP}
    return gymnasium.make_vec("CartPole-v1", ENVIRONMENTS, "sync", autoreset, [WithoutVelocities], **options)


class WithoutVelocities(gymnasium.ObservationWrapper):
    """The cart's position and the pole's angle, scaled so that the episode ends at 1."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.limits = np.array([env.unwrapped.x_threshold, env.unwrapped.theta_threshold_radians], np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]] / self.limits


class Agent(nn.Module):
    """The policy and the values. The same call acts, one step at a time, and learns, with all steps at once."""

    def __init__(self, hidden: int = HIDDEN, remembers: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, hidden), nn.Tanh())
        self.lstm = gpu_lstm.LSTM(hidden, hidden)
        self.actor = nn.Linear(hidden, 2)
        self.critic = nn.Linear(hidden, 1)
        self.remembers = remembers
        nn.init.orthogonal_(self.actor.weight, 0.01)  # so that at first both actions are equally likely

    def forward(self, observations: Tensor, state: State, starts: Tensor) -> tuple[Categorical, Tensor, State]:
        """Return the policy and the values, [T, N], and the state, for observations [T, N, 2] and starts [T, N]."""
        resets = starts if self.remembers else torch.ones_like(starts)
        y, state = self.lstm(self.encoder(observations), state, resets=resets)  # [T, N, H]
        return Categorical(logits=self.actor(y)), self.critic(y).squeeze(-1), state


class Rollout(NamedTuple):
    """T steps of N environments. All fields except the observations and the state are [T, N]."""

    observations: Tensor  # [T, N, 2]
    starts: Tensor  # bool: an episode starts with this observation
    actions: Tensor
    log_probs: Tensor  # of the actions, by the policy that chose them
    advantages: Tensor
    returns: Tensor  # targets of the values
    state: State  # before the first step

    def of(self, chosen: Tensor) -> "Rollout":
        """Return some environments, with all of their steps."""
        h, c = self.state
        return Rollout(*(field[:, chosen] for field in self[:-1]), (h[:, chosen], c[:, chosen]))


def rollouts(agent: Agent, envs: VectorEnv, seed: int) -> Iterator[tuple[Rollout, list[float]]]:
    """Act, and yield one rollout after another, each with the returns of the episodes that ended in it.

    The step after the last one of an episode starts another: done at t is `starts` at t + 1. State and `starts` carry
    over from one rollout to the next.
    """
    N, device = envs.num_envs, agent.actor.weight.device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=device)[None]  # a step, [1, N, ...]

    observation = tensor(envs.reset(seed=seed)[0])
    start, never = tensor(np.ones(N, dtype=bool)), tensor(np.zeros(N, dtype=bool))
    h = c = torch.zeros(1, N, agent.lstm.hidden_size, device=device)
    so_far = np.zeros(N)
    while True:
        first, kept, ended = (h, c), [], []
        with torch.no_grad():
            for _ in range(STEPS):
                policy, value, (h, c) = agent(observation, (h, c), start)
                action = policy.sample()
                seen, earned, terminated, truncated, info = envs.step(action[0].cpu().numpy())
                reward = tensor((1 - DISCOUNT) * earned.astype(np.float32))  # so that values are at most 1
                cut = truncated & ~terminated  # an environment may report both
                if cut.any():  # the time limit ended the episode: add the value of the state in which it ended
                    last = seen.copy()
                    last[cut] = np.stack(info["final_obs"][cut])
                    reward += DISCOUNT * tensor(cut) * agent(tensor(last), (h, c), never)[1]
                kept.append((observation, start, action, policy.log_prob(action), value, reward))
                done = terminated | truncated
                observation, start = tensor(seen), tensor(done)
                so_far += earned
                ended += so_far[done].tolist()
                so_far[done] = 0
            _, value, _ = agent(observation, (h, c), start)
        observations, starts, actions, log_probs, values, rewards = map(torch.cat, zip(*kept))
        advantages = estimate(rewards, torch.cat([values, value]), torch.cat([starts, start]))
        yield Rollout(observations, starts, actions, log_probs, advantages, advantages + values, first), ended


def estimate(rewards: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """Return the generalised advantages [T, N], for rewards [T, N] and values and starts [T + 1, N]."""
    factors = DISCOUNT * ~starts[1:]  # the weight of all later steps; it is 0 at the end of an episode
    errors = rewards + factors * values[1:] - values[:-1]
    advantages = torch.zeros_like(values)
    for t in reversed(range(len(errors))):
        advantages[t] = errors[t] + TRACE * factors[t] * advantages[t + 1]
    return advantages[:-1]


def training_step(agent: Agent, optimiser: torch.optim.Optimizer, batch: Rollout) -> None:
    """Run forward, backward, clipping and the optimiser."""
    optimiser.zero_grad()
    loss(agent, batch).backward()
    nn.utils.clip_grad_norm_(agent.parameters(), MAX_NORM)
    optimiser.step()


def loss(agent: Agent, batch: Rollout) -> Tensor:
    """Return the loss of PPO, over all steps at once: clipped objective, error of the values and entropy."""
    policy, values, _ = agent(batch.observations, batch.state, batch.starts)
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    ratio = (policy.log_prob(batch.actions) - batch.log_probs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    return -gain + nn.functional.mse_loss(values, batch.returns) / 2 - ENTROPY * policy.entropy().mean()


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw the mean return of the last 100 episodes over the steps so far, as mean and range of the seeds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, its), colour in zip(curves.items(), ("#1f5fa8", "0.45"), strict=True):
        averages = np.array([curve.averages for curve in its])  # [seeds, updates]
        steps = STEPS * ENVIRONMENTS / 1000 * np.arange(1, averages.shape[1] + 1)
        axes.fill_between(steps, averages.min(axis=0), averages.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        label = f"the agent that {name}: mean and range of {len(its)} seeds"
        axes.plot(steps, averages.mean(axis=0), color=colour, linewidth=2, label=label)
    axes.set(xlabel="thousands of steps", ylabel="mean return of the last 100 episodes", ylim=(0, 560))
    axes.set_title("CartPole-v1 without velocities")
    axes.grid(color="0.9")
    axes.margins(x=0.01)
    axes.legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=30, help="rollouts to learn from; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="of each agent; default: %(default)s")
    main(**vars(parser.parse_args()))
