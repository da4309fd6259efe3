"""The parts of a step that all families share: offsets, loads and stores of a cell, resets and noise."""
