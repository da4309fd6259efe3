"""The kernels of a backend, each verified before it is used."""

import importlib

import torch

from ..call.choices import Backend
from ..kernels.layer import Layer
from ..kernels.problem import Problem
from .verify import verify


def layer_of(backend: Backend, problem: Problem, device: torch.device) -> Layer:
    """The kernels of a problem on a device: the one place where a launcher is imported."""
    launcher = importlib.import_module(f"..kernels.{backend.value}_lstm.launch", __package__)
    layer: Layer = launcher.layer_of(problem, device, verify)
    layer.backend = backend.value  # as the operators of graph.py name it
    return layer
