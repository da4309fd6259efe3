"""The CuPy backend: launch.py is its layer.Launcher."""
