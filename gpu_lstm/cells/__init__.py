"""The equations of the cells, in torch's operators."""

from types import ModuleType

from . import gru, lstm

EQUATIONS: dict[str, ModuleType] = {"lstm": lstm, "gru": gru}
"""By a cell's name. Each has Gates, input_product, pre_activations, step, activate_in_place, next_cell, output, and
gates_of."""
