"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_weather_beats_both_baselines_on_the_held_out_year(tmp_path):
    errors = _load("weather").main(out=tmp_path)
    ours = errors.pop("StackedLSTM")
    assert set(errors) == {"yesterday's value", "day-of-year mean"}
    for baseline in errors.values():
        assert ours.mae < baseline.mae
        assert ours.rmse < baseline.rmse
    assert (tmp_path / "weather.png").stat().st_size > 10_000
