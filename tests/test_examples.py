"""The examples learn, check and print what they promise, and the benchmark of one of them works."""

import itertools
import os
import re
import runpy
import shutil
import signal
import sys
import wave
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from installed import ROOT, load
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._pytree import tree_leaves_with_path

import gpu_lstm
from bench import ppo

EXAMPLES = ROOT / "examples"
example, ddp = ppo.load_example(), load(EXAMPLES / "train_ddp.py")


@pytest.fixture
def clock():
    """The module `time` with a clock that advances by 1 s at every look."""
    return SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)


@pytest.mark.parametrize("remembers", [True, False])
def test_a_rollout_at_once_gives_what_the_agent_did_step_by_step(remembers):
    agent = example.Agent(remembers=remembers)
    with torch.no_grad():
        agent.actor.weight.mul_(100)
    (_, _), (rollout, _) = itertools.islice(example.rollouts(agent, example.cartpoles(), 0), 2)

    def error(**changed):
        given = rollout._replace(**changed)
        policy, _, _ = agent(given.observations, given.state, given.starts)
        return (policy.log_prob(given.actions) - given.log_probs).abs().max()

    assert not rollout.starts[0].all()  # it begins in the middle of episodes
    assert error() < 1e-5
    assert (error(starts=rollout.starts.roll(1, dims=0)) > 1e-3) == remembers
    assert (error(state=tuple(map(torch.zeros_like, rollout.state))) > 1e-3) == remembers
    part = rollout.of(torch.tensor([3, 1]))  # a minibatch uses the states of its environments
    values, of_part = (agent(some.observations, some.state, some.starts)[1] for some in (rollout, part))
    torch.testing.assert_close(of_part, values[:, [3, 1]])


def test_advantages_are_the_discounted_errors_up_to_the_end_of_the_episode():
    rewards, values, starts = torch.randn(6, 3), torch.randn(7, 3), torch.rand(7, 3) < 0.4
    errors = rewards + 0.99 * ~starts[1:] * values[1:] - values[:-1]
    expected = torch.zeros(6, 3)
    for first, n in itertools.product(range(6), range(3)):
        for t in range(first, 6):
            expected[first, n] += (0.99 * 0.95) ** (t - first) * errors[t, n]
            if starts[t + 1, n]:
                break
    torch.testing.assert_close(example.estimate(rewards, values, starts), expected)


def test_the_benchmark_times_nothing_that_differs(monkeypatch):
    """An update in one call has the loss and gradients of a loop over steps. If resets are late, it does not."""
    monkeypatch.setattr(ppo.timing, "interleaved", lambda calls, *_: set(calls))
    assert ppo.measure("cpu", 24, 5, 16) == set(itertools.product(ppo.CELLS, ppo.WAYS, ("update", "rollout")))
    forward = ppo.LOOPS.GRU.forward
    late = lambda self, x, state, resets: forward(self, x, state, resets.roll(1, dims=0))  # noqa: E731
    monkeypatch.setattr(ppo.LOOPS.GRU, "forward", late)
    with pytest.raises(RuntimeError, match=r"differs by .*, expected at most 0\.0001"):
        ppo.measure("cpu", 24, 5, 16)


@pytest.mark.deep
def test_it_learns_checks_times_and_draws_with_sb3(clock, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sb3_contrib")
    sb3 = load(EXAMPLES / "sb3_recurrent_ppo.py")
    monkeypatch.setattr(sb3, "time", clock)
    measured = sb3.main(rollouts=2, seeds=2, hidden=8, epochs=1, out=tmp_path)
    assert [(each.seed, each.steps) for each in measured] == [(0, 1024), (1, 1024), (0, 2048), (1, 2048)]
    for each in measured:
        assert (each.updates, each.acting, each.loop, each.one_call, 10 < each.episode < 60) == (8, 1.0, 1.0, 1.0, True)
    assert (tmp_path / "sb3_recurrent_ppo.png").stat().st_size > 10_000
    assert "updates a second" in capsys.readouterr().out


def test_a_line_for_each_shape_and_one_to_send_but_nothing_is_timed_where_padding_and_pieces_differ(
    clock, capsys, monkeypatch, request
):
    isaac = load(EXAMPLES / "isaac_shapes.py")
    monkeypatch.setattr(isaac, "time", clock)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for of in (torch.backends.cuda.matmul, torch.backends.cudnn):  # main() sets them
        request.addfinalizer(partial(setattr, of, "allow_tf32", of.allow_tf32))
    line = isaac.main(["--environments", "64", "--hidden", "4", "--rounds", "2"])
    *rows, empty, last = capsys.readouterr().out.splitlines()
    assert (empty, last) == ("", line)
    shapes = ["T4 B64 H4", "T16 B64 H4", "T24 B64 H4", "T32 B64 H4"]  # the seven shapes, cut to these sizes, are four
    for row, shape in zip(rows[1:], shapes, strict=True):
        assert re.fullmatch(rf"\w+ +{shape}, [1-9]\d* pieces( +1000\.00){{3}} +1\.00, 1\.00", row), row
    assert "gpu_lstm 0." in line
    assert line.endswith("; ".join(f"{shape} 1000.00 1000.00 1000.00" for shape in shapes))
    lstm, ways, _ = isaac.prepare(24, 40, 5, torch.device("cpu"))
    lstm.forward = lambda x, state, resets: type(lstm).forward(lstm, x, state)
    with pytest.raises(RuntimeError, match=r"one call and pieces differ by"):
        isaac.measure(lstm, ways, 1)


def in_two_processes(arguments):
    """Run the example as torchrun does, in forks, in which torch is imported already."""
    config = dict(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    handlers = [(number, signal.getsignal(number)) for number in numbers]
    elastic_launch(LaunchConfig(**config, start_method="fork", monitor_interval=0.01), ddp.main)(arguments)
    for number, handler in handlers:  # the launcher replaces them
        signal.signal(number, handler)


@pytest.mark.deep
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    in_two_processes(["--out", str(whole), "--steps", "6", "--save-every", "3"])
    shutil.copytree(whole / "step-3", parts / "step-3")
    # A checkpoint that is not complete.
    shutil.copytree(whole / "step-6", parts / "step-5", ignore=shutil.ignore_patterns(".metadata"))
    in_two_processes(["--out", str(parts), "--steps", "6", "--resume"])
    expected, found = {}, {}  # everything that each checkpoint holds, by its place there
    for folder, held in ((whole, expected), (parts, found)):
        dcp_to_torch_save(folder / "step-6", tmp_path / "whole.pt")
        leaves = tree_leaves_with_path(torch.load(tmp_path / "whole.pt", weights_only=False))
        held.update((str(path), leaf) for path, leaf in leaves)
    assert expected.keys() == found.keys()
    assert len(expected) > 60
    for path, value in expected.items():
        assert torch.equal(value, found[path]) if isinstance(value, torch.Tensor) else value == found[path], path
    first, second = (value for path, value in expected.items() if "random" in path)
    assert not torch.equal(first, second)


def test_the_denoiser_gives_frame_by_frame_what_one_call_gives_and_notices_a_state_that_is_lost(
    monkeypatch, capsys, tmp_path
):
    denoise = load(EXAMPLES / "denoise.py")
    before, after = denoise.main(updates=3, out=tmp_path)
    assert after > before + 4  # 10 after 40 updates
    assert f"denoised {after:.1f} dB" in capsys.readouterr().out
    assert (tmp_path / "denoise.png").stat().st_size > 10_000
    with wave.open(str(tmp_path / "denoise.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 2 * (256 + 180 * 128))

    class Forgetful(gpu_lstm.Stream):
        def __call__(self, input):
            self.reset()
            return super().__call__(input)

    monkeypatch.setattr(gpu_lstm, "Stream", Forgetful)
    with pytest.raises(AssertionError, match="not close"):
        denoise.main(updates=0, out=tmp_path)


def test_characters_have_the_labels_of_the_tokenizer_and_all_of_an_f_string_is_a_string():
    pieces = ("a = ", 0), ("rb'b'", 1), ("; c = ", 0), ("f\"d{e['f']}\"", 1), ("  ", 0), ("# 'g' é\f", 2), ("\nh(", 0)
    pieces += ("'''i\n  # j \"k'''", 1), (")\n", 0)
    found = load(EXAMPLES / "highlight.py").label("".join(text for text, _ in pieces))
    assert found == bytes(kind for text, kind in pieces for _ in text)


@pytest.mark.deep
def test_only_with_a_long_memory_are_strings_and_comments_told_from_code(tmp_path):
    scores = load(EXAMPLES / "highlight.py").main(files=60, out=tmp_path)
    ours = scores.pop("StackedLSTM")
    assert ours.accuracy > 0.95
    assert len(scores) == 2
    for rival in scores.values():
        assert all(share > its + 0.1 for share, its in zip(ours, rival))
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("highlight", "highlight_cell"))


@pytest.mark.parametrize("number", range(1, 10))
def test_the_answer_of_an_exercise_is_right(number, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # for weather.py
    getattr(load(EXAMPLES / "lesson_answers.py"), f"exercise_{number}")()


OTHERS = {"lesson_answers.py", "lesson_plots.py", "lesson_drawings.py"}  # they belong to the lesson, and end in seconds


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - OTHERS))
def test_an_example_says_what_it_does_and_trains_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {name}")


def test_what_make_agree_says(monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])
    for name in ("rich", "matplotlib", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)  # make agree does not install these
    agree = load(ROOT / "dev/agree.py")
    monkeypatch.setattr(agree, "T", 4)
    monkeypatch.setattr(agree, "H", 6)
    assert agree.main()
    assert "They agree, and with resets." in capsys.readouterr().out
    right = gpu_lstm.LSTM.forward
    late = lambda self, x, resets=None: right(self, x, resets=resets if resets is None else resets.roll(1, 0))  # noqa: E731
    monkeypatch.setattr(gpu_lstm.LSTM, "forward", late)
    assert not agree.main()
