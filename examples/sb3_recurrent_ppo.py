"""sb3-contrib's RecurrentPPO with one call over all steps instead of its loop: the same updates, timed in turns.

Run it from the root of the repository::

    pip install -e ".[examples]" "sb3-contrib>=2.6"
    python examples/sb3_recurrent_ppo.py

sb3-contrib cuts a minibatch where episodes start, and calls torch.nn.LSTM at every step of the sequences. OneCall makes
one call, with the starts of episodes as `resets`. The gain comes from one call instead of a loop. No episode starts
inside these sequences, so one call of torch.nn.LSTM with a masked first state would save the loop as well. Your own
program needs only that policy and gpu_lstm.convert, also after RecurrentPPO.load, which makes torch.nn.LSTM again::

    model = RecurrentPPO(OneCall, env)
    gpu_lstm.convert(model.policy)
    model.learn(...)

The example trains one model for each seed with the policy OneCall. At every update sb3-contrib's own policy makes the
same update from the same weights and the same rollout, and both are timed. Before that, their gradients are compared.
The plot is out/sb3_recurrent_ppo.png.
"""

import argparse
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
TOLERANCE = 1e-4  # the largest difference between gradients, relative to their norm


class OneCall(RecurrentActorCriticPolicy):
    """sb3-contrib's policy with one call of each LSTM for all steps of a minibatch."""

    @staticmethod
    def _process_sequence(
        features: Tensor,  # [N*T, I], one sequence after another
        lstm_states: tuple[Tensor, Tensor],  # each [L, N, H]
        episode_starts: Tensor,  # [N*T], 1 where an episode starts: these are resets, not dones
        lstm: nn.Module,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sequences = lstm_states[0].shape[1]
        if len(features) == sequences:  # the agent acts, and there is no loop
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

    seed: int
    steps: int  # so far, of all environments
    episode: float  # mean length, in steps
    acting: float  # seconds
    loop: float
    one_call: float
    updates: int  # of the weights, the same number for both


class Timed(RecurrentPPO):
    """Times its own updates from a rollout, and the same updates of a twin with sb3-contrib's own policy.

    The two take turns, one of the `epochs` each, so that the machine's load is the same for both.
    """

    def __init__(self, twin: RecurrentPPO, epochs: int, measured: list[Measured], *arguments, **named) -> None:
        super().__init__(OneCall, *arguments, n_epochs=1, **named)
        gpu_lstm.convert(self.policy)
        self.twin, self.epochs, self.measured = twin, epochs, measured
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
                np.random.seed(len(self.measured) * self.epochs + epoch)  # draws the minibatches
                began = time.perf_counter()
                learn[name]()
                seconds[name] += time.perf_counter() - began
        updates = self.epochs * math.ceil(self.n_steps * self.n_envs / self.batch_size)
        steps = self.num_timesteps
        self.measured.append(Measured(self.seed, steps, 1 / starts, self.acting, **seconds, updates=updates))


def check(twin: RecurrentPPO, buffer, ours: RecurrentPPO) -> None:
    """Raise RuntimeError unless values, probabilities and gradients of a minibatch are equal."""
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


def main(
    rollouts: int = 6, seeds: int = 1, hidden: int = 256, epochs: int = 4, out: Path = Path("out")
) -> list[Measured]:
    """Learn, time, print and plot. Raise RuntimeError if the two policies differ."""
    torch.set_num_threads(1)

    measured: list[Measured] = []
    models = []
    for seed in range(seeds):
        environments = [
            make_vec_env("CartPole-v1", ENVIRONMENTS, seed=seed, wrapper_class=WithoutVelocities) for _ in range(2)
        ]
        settings = {"seed": seed, "policy_kwargs": {"lstm_hidden_size": hidden}, "device": "cpu"}
        twin = RecurrentPPO(RecurrentActorCriticPolicy, environments[0], n_epochs=1, **settings)
        models.append(Timed(twin, epochs, measured, environments[1], **settings))
    for number in track(range(rollouts * seeds), description="RecurrentPPO"):
        model = models[number % seeds]
        model.learn(model.n_steps * ENVIRONMENTS, reset_num_timesteps=False)
    title = f"RecurrentPPO, H = {hidden}, 1 thread, {seeds} x {rollouts} rollouts"
    table = Table("", "loop", "one call", "times as fast", "p20-p80", title=title)
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
    """Draw the updates a second of both policies for each rollout. The title has the ratio, also with the rollouts."""
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    update, whole = (
        np.median([(each.loop + acting * each.acting) / (each.one_call + acting * each.acting) for each in measured])
        for acting in (False, True)
    )
    figure.suptitle(f"RecurrentPPO, H = {hidden}, one CPU core: {update:.1f} times the updates\n"
                    f"a second; with its rollouts {whole:.1f} times as fast", fontsize=10)  # fmt: skip
    axes = figure.subplots()
    for way, label, colour in (("one_call", "one call", "black"), ("loop", "sb3-contrib's loop", "0.6")):
        for seed in sorted({each.seed for each in measured}):
            its = [each for each in measured if each.seed == seed]
            speeds = [each.updates / getattr(each, way) for each in its]
            axes.plot([each.steps for each in its], speeds, "o-", color=colour, markersize=4, label=label)
            label = None
    axes.set(xlabel="steps of the agent", ylabel="updates a second")
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    axes.legend(loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    print(f"Plot: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=6, help="of each seed; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=256, help="units; default: %(default)s")
    main(**vars(parser.parse_args()))
