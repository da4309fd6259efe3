"""The CuPy backend: `launch.layer_forward` and `launch.layer_backward` are its two entry points."""
