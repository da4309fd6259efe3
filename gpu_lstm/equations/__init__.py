"""The equations of the cells, in torch's operators."""

import importlib
from types import ModuleType

from ..kernels.cells import CELLS

EQUATIONS: dict[str, ModuleType] = {name: importlib.import_module(f".{name}", __name__) for name in CELLS}
"""The module of each cell, by the cell's name.

Each module has Gates, gates_of, input_product, add_product, pre_activations, step and output. The LSTM and the GRU also
have activate_in_place, for `recompute`. The sLSTM has none: its gate u depends on l, which is not kept. The LSTM also
has next_cell, for zoneout of c.
"""
