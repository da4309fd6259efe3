"""CuPy backend."""
