"""A cell's equations in a file: forward, next_cell, output, and backward of both, on a tile. triton_rnn/equations/
states the formulas; a gate's row is that of its pre-activation."""
