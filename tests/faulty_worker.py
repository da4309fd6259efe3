"""The other process of a benchmark, in which providers misbehave: by name, "hangs", "dies" and "raises"."""

import os
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

from bench import ceilings, isolated, providers, run
from bench.providers import torch_lstm


def serve(connection: Connection, device: str) -> None:
    """As isolated.serve_cases, with three more providers."""
    for name, build in {"hangs": _hang, "dies": _die, "raises": _raise}.items():
        providers.PROVIDERS[name] = SimpleNamespace(NAMES=(name,), absent=torch_lstm.absent, build=build)
    ceilings.COPY_BYTES["cpu"], ceilings.PRODUCT_SIZE["cpu"] = 1 << 20, 64  # what takes time here is not the point
    run.SECONDS = 0.01
    isolated.serve_cases(connection, device)


def _hang(name, problem):
    time.sleep(60)


def _die(name, problem):
    os._exit(7)


def _raise(name, problem):
    raise MemoryError("too large")
