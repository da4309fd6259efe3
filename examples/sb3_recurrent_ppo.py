"""sb3-contrib's RecurrentPPO with one call over all steps in the place of its loop: the same updates, timed in turns.

Run it from the root of the repository::

    pip install -e ".[examples]" "sb3-contrib>=2.6"
    python examples/sb3_recurrent_ppo.py

sb3-contrib cuts a minibatch into its episodes and calls torch.nn.LSTM at every step of them. OneCall says the same as
`resets`. That, and gpu_lstm.convert, is all that a program of your own needs::

    model = RecurrentPPO(OneCall, env)
    gpu_lstm.convert(model.policy)
    model.learn(...)

Here a model learns by one call, and at every update sb3-contrib's own policy does the same update aside, from the same
weights and rollout, after its gradients were found the same. The plot is out/sb3_recurrent_ppo.png.
"""

import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from torch import Tensor, nn

import gpu_lstm

ENVIRONMENTS = 8
TOLERANCE = 1e-4  # by which gradients may differ, relative to their norm


class OneCall(RecurrentActorCriticPolicy):
    """sb3-contrib's policy, which calls its LSTMs once for all steps of a minibatch."""

    @staticmethod
    def _process_sequence(
        features: Tensor,  # [N*T, I], one sequence after another
        lstm_states: tuple[Tensor, Tensor],  # each [L, N, H]
        episode_starts: Tensor,  # [N*T], 1 where an episode starts
        lstm: nn.Module,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sequences = lstm_states[0].shape[1]
        if len(features) == sequences:  # while acting, where there is no loop
            return RecurrentActorCriticPolicy._process_sequence(features, lstm_states, episode_starts, lstm)
        x = features.view(sequences, -1, lstm.input_size).transpose(0, 1)  # [T, N, I]
        resets = episode_starts.view(sequences, -1).t().bool()
        y, states = lstm(x, lstm_states, resets=resets)
        return y.transpose(0, 1).flatten(0, 1), states


class WithoutVelocities(gymnasium.ObservationWrapper):
    """The cart's position and the pole's angle."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]]


class Measured(NamedTuple):
    """One rollout and the updates from it."""

    steps: int  # taken by all environments, up to here
    episode: float  # steps of one, in the mean
    acting: float  # seconds
    loop: float
    one_call: float
    updates: int  # of the weights, by either


class Timed(RecurrentPPO):
    """Times how long it learns from a rollout, and how long a twin with sb3-contrib's own policy takes for the same.

    Each takes one of the `epochs` in turns with the other, so that both meet the same load of the machine.
    """

    def __init__(self, twin: RecurrentPPO, epochs: int, *arguments, **named) -> None:
        super().__init__(OneCall, *arguments, n_epochs=1, **named)
        gpu_lstm.convert(self.policy)
        self.twin, self.epochs, self.measured = twin, epochs, []
        twin.set_logger(configure(None, []))

    def collect_rollouts(self, *arguments, **named) -> bool:
        began = time.perf_counter()
        going_on = super().collect_rollouts(*arguments, **named)
        self.acting = time.perf_counter() - began
        return going_on

    def train(self) -> None:
        starts, twin = self.rollout_buffer.episode_starts.mean(), self.twin
        twin.policy.load_state_dict(self.policy.state_dict())
        twin.policy.optimizer.load_state_dict(copy.deepcopy(self.policy.optimizer.state_dict()))
        twin.rollout_buffer = copy.deepcopy(self.rollout_buffer)
        check(twin, copy.deepcopy(self.rollout_buffer), self)
        learn = {"loop": twin.train, "one_call": super().train}
        seconds = dict.fromkeys(learn, 0.0)
        for epoch in range(self.epochs):
            for name in sorted(learn, reverse=epoch % 2 == 1):
                np.random.seed(len(self.measured) * self.epochs + epoch)  # by which minibatches are drawn
                began = time.perf_counter()
                learn[name]()
                seconds[name] += time.perf_counter() - began
        updates = self.epochs * math.ceil(self.n_steps * self.n_envs / self.batch_size)
        self.measured.append(Measured(self.num_timesteps, 1 / starts, self.acting, **seconds, updates=updates))


def check(twin: RecurrentPPO, buffer, ours: RecurrentPPO) -> None:
    """Raise RuntimeError unless values, probabilities and gradients of a minibatch are the same."""
    np.random.seed(0)
    batch = next(buffer.get(ours.batch_size))
    found = []
    for policy in (twin.policy, ours.policy):
        arguments = batch.observations, batch.actions.long().flatten(), batch.lstm_states, batch.episode_starts
        results = torch.cat([each.flatten() for each in policy.evaluate_actions(*arguments)])
        gradients = torch.autograd.grad(results.square().mean(), list(policy.parameters()))
        found.append([results.detach(), *gradients])
    names = ["values, probabilities and entropies", *(name for name, _ in ours.policy.named_parameters())]
    for name, their, our in zip(names, *found, strict=True):
        error = ((our - their).norm() / their.norm()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"{name}: one call and the loop differ by {error:.2g}, expected {TOLERANCE:g}")


def main(rollouts: int = 24, hidden: int = 256, epochs: int = 4, out: Path = Path("out")) -> list[Measured]:
    """Learn, time, print and plot. RuntimeError if the two differ."""
    torch.set_num_threads(1)

    def environments():
        return make_vec_env("CartPole-v1", ENVIRONMENTS, seed=0, wrapper_class=WithoutVelocities)

    settings = {"seed": 0, "policy_kwargs": {"lstm_hidden_size": hidden}, "device": "cpu"}
    twin = RecurrentPPO(RecurrentActorCriticPolicy, environments(), n_epochs=1, **settings)
    model = Timed(twin, epochs, environments(), **settings)
    for _ in track(range(rollouts), description="RecurrentPPO"):
        model.learn(model.n_steps * ENVIRONMENTS, reset_num_timesteps=False)
    measured = model.measured
    table = Table("", "loop", "one call", "times as fast", "p20-p80", title=f"RecurrentPPO, H = {hidden}, 1 thread")
    for name, acting in (("updates a second", False), ("rollout and its updates, s", True)):
        loop, one_call = (
            np.array([getattr(each, way) + acting * each.acting for each in measured]) for way in ("loop", "one_call")
        )
        unit = 1 if acting else measured[0].updates
        cells = (f"{np.median(seconds if acting else unit / seconds):.2f}" for seconds in (loop, one_call))
        low, median, high = np.percentile(loop / one_call, [20, 50, 80])
        table.add_row(name, *cells, f"{median:.2f}", f"{low:.2f}-{high:.2f}")
    Console().print(table)
    plot(measured, hidden, out / "sb3_recurrent_ppo.png")
    return measured


def plot(measured: list[Measured], hidden: int, path: Path) -> None:
    """Draw, for each rollout, updates a second and how many times as fast one call was."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(f"sb3-contrib's RecurrentPPO, CartPole-v1 without velocities, H = {hidden}, CPU, 1 thread")
    above, below = figure.subplots(2, sharex=True)
    steps = [each.steps for each in measured]
    for label, way, colour in (("one call", "one_call", "black"), ("sb3-contrib's loop", "loop", "0.6")):
        speeds = [each.updates / getattr(each, way) for each in measured]
        above.plot(steps, speeds, "o-", color=colour, markersize=4, label=f"{label}, median {np.median(speeds):.1f}")
    above.set(ylabel="updates a second")
    ratios = [each.loop / each.one_call for each in measured]
    low, median, high = np.percentile(ratios, [20, 50, 80])
    label = f"one call over the loop, median {median:.1f}"
    below.plot(steps, ratios, "o-", color="black", markersize=4, label=label)
    below.axhspan(low, high, color="0.9", label=f"20th to 80th percentile, {low:.1f} to {high:.1f}")
    below.set(xlabel="steps of the agent", ylabel="times as fast")
    for axes, place in ((above, "upper left"), (below, "lower right")):
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.legend(loc=place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


if __name__ == "__main__":
    main()
