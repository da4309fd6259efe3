"""The example against sb3-contrib's RecurrentPPO: one call makes the updates of its loop, or nothing is timed."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from installed import ROOT, load

pytest.importorskip("sb3_contrib")
pytest.importorskip("gymnasium")
example = load(ROOT / "examples" / "sb3_recurrent_ppo.py")


@pytest.mark.slow
def test_it_learns_checks_times_and_draws(tmp_path, capsys, monkeypatch):
    clock = itertools.count()  # advances by 1 s at every look
    monkeypatch.setattr(example, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    measured = example.main(rollouts=2, hidden=8, epochs=1, out=tmp_path)
    assert [each.steps for each in measured] == [1024, 2048]
    for each in measured:
        assert (each.updates, each.acting, each.loop, each.one_call, 10 < each.episode < 60) == (8, 1.0, 1.0, 1.0, True)
    assert (tmp_path / "sb3_recurrent_ppo.png").stat().st_size > 10_000
    assert "updates a second" in capsys.readouterr().out


@pytest.mark.slow
def test_resets_a_step_late_are_detected(tmp_path, monkeypatch):
    one_call = example.OneCall._process_sequence
    late = lambda x, states, starts, lstm: one_call(x, states, starts.roll(1), lstm)  # noqa: E731
    monkeypatch.setattr(example.OneCall, "_process_sequence", staticmethod(late))
    with pytest.raises(RuntimeError, match=r"one call and the loop differ by .*, expected 0\.0001"):
        example.main(rollouts=1, hidden=8, epochs=1, out=tmp_path)


@pytest.mark.parametrize("sequences", [1, 3])
def test_one_call_is_the_loop_with_episodes_that_start_anywhere(sequences):
    torch.manual_seed(0)
    T, I, H = 6, 3, 4
    theirs = torch.nn.LSTM(I, H, num_layers=2)
    ours = example.gpu_lstm.convert(theirs)
    features = torch.randn(sequences * T, I)
    states = torch.randn(2, sequences, H), torch.randn(2, sequences, H)
    starts = (torch.rand(sequences * T) < 0.4).float()
    assert starts.any()
    loop = example.RecurrentActorCriticPolicy._process_sequence(features, states, starts, theirs)
    one_call = example.OneCall._process_sequence(features, states, starts, ours)
    torch.testing.assert_close(one_call, loop)
