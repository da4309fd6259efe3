"""The Triton backend: `launch.layer_of` is its entry point."""
