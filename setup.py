"""Settings that pyproject.toml cannot express: the place of the kernels, and links in the README."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = (file for pattern in ("__init__.py", "*.cu") for file in ROOT.glob(f"kernels/**/{pattern}"))
# Folders of .cu files count, too, since setuptools warns otherwise.
NAMES = sorted({file.parent.relative_to(ROOT).as_posix() for file in SOURCES})
FOLDERS = {f"gpu_lstm.{name.replace('/', '.')}": name for name in NAMES}
REPOSITORY = "gpu-lstm/gpu_lstm"


class BuildWithKernels(build_py):
    """Put kernels/ into a wheel as gpu_lstm.kernels.

    In an editable install kernels/ stays beside gpu_lstm/, which finds it there. So an editable install is a line in a
    .pth file, which type checkers read, too.
    """

    def run(self) -> None:
        """Copy modules and data."""
        if not self.editable_mode:
            self.packages = [*self.packages, *FOLDERS]
            self.package_dir = {**(self.package_dir or {}), **FOLDERS}
        super().run()


def long_description() -> str:
    """Return the README, in which links and pictures lead to the files of the release."""
    version = re.search(r'__version__ = "(.*)"', (ROOT / "gpu_lstm/__init__.py").read_text())[1]
    text = (ROOT / "README.md").read_text()
    shown = r"(!\[[^\]]*\]\(|\b(?:src|srcset)=\")(?!https?:)"
    text = re.sub(shown, rf"\1https://raw.githubusercontent.com/{REPOSITORY}/v{version}/", text)
    return re.sub(r"(?<=\]\()(?!https?:|#)", f"https://github.com/{REPOSITORY}/blob/v{version}/", text)


setup(
    cmdclass={"build_py": BuildWithKernels},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
