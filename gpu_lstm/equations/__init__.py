"""The equations of the cells, in torch's operators."""

import importlib
from types import ModuleType

from ..kernels.cells import CELLS

EQUATIONS: dict[str, ModuleType] = {name: importlib.import_module(f".{name}", __name__) for name in CELLS}
"""By a cell's name. Each has Gates, gates_of, input_product, add_product, pre_activations, step, next_cell and output;
and activate_in_place, but for the sLSTM: u needs l, which no step keeps."""
