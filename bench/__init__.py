"""Benchmarks: `python -m bench`."""

import importlib.util

for package in ("matplotlib", "pandas", "rich"):
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'bench needs {package}: pip install --editable ".[bench]"')
