"""The Triton backend: launch.py is its layer.Launcher."""
