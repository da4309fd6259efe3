"""The Triton backend: launch.py is its layer.Launcher. What is known of it without Triton, see layer.Package:"""

PACKAGES, NEEDS = ("triton",), "Triton: pip install triton"


def import_packages() -> None:
    from . import launch  # noqa: F401
