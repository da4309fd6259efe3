"""The CuPy backend: `launch.layer_of` is its entry point."""
