"""The doctor, and the README's examples."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu_lstm.__main__ import main
from gpu_lstm.backends import Backend

README = Path(__file__).parent.parent / "README.md"


def test_the_doctor_names_versions_devices_and_backends(capsys):
    assert main(["--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["versions"]["torch"] == torch.__version__
    devices = {device["device"]: device for device in findings["devices"]}
    assert set(devices) == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    assert set(devices["cpu"]["backends"]) == {backend.value for backend in Backend} - {"auto"}
    assert devices["cpu"]["auto"] == "torch"
    assert devices["cpu"]["backends"]["torch"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_the_doctor_says_why_a_backend_is_not_available():
    command = [sys.executable, "-m", "gpu_lstm"]
    printed = subprocess.run(command, env={"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=True).stdout
    assert re.search(r"triton +not available: .*takes CUDA tensors, got cpu", printed)
    assert re.search(r"cupy +not available: ", printed)
    assert re.search(r"reference +available", printed)


def test_the_examples_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    names = {"model": torch.nn.Sequential(torch.nn.LSTM(3, 4))}
    for block in blocks:
        exec(block, names)
    assert names["output"].shape == (2, 3, 5)  # of the last example, as its comment says
    assert [tuple(state.shape) for state in (names["h1"], names["c1"], names["h2"], names["c2"])] == [
        (2, 4), (2, 4), (2, 5), (2, 5),
    ]  # fmt: skip
    assert type(names["model"][0]) is names["gpu_lstm"].LSTM
