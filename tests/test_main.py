"""The doctor: python -m gpu_lstm."""

import json
import re
import subprocess
import sys

import pytest
import torch

from gpu_lstm.__main__ import main
from gpu_lstm.backends import Backend


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
    assert re.search(
        r"triton +not available: backend 'triton' takes CUDA tensors, got cpu; with TRITON_INTERPRET=1 in the "
        r"environment it runs CPU tensors in Triton's interpreter\n", printed,
    )  # fmt: skip
    assert re.search(r"cupy +not available: ", printed)
    assert re.search(r"reference +available", printed)
