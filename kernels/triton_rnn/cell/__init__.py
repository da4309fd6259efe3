"""What a step of any family does of its cells: where they are, what they load and store, resets and noise."""
