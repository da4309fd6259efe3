"""The Numba backend, for CPUs: launch.py is its layer.Launcher. What is known of it without Numba, see layer.Package:"""

PACKAGES = ("numba",)
NEEDS = 'Numba: pip install numba'


def import_packages() -> None:
    import numba  # noqa: F401
