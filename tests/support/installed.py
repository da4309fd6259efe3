"""gpu_lstm as users install it: wheel, sdist and editable install of this checkout, in environments of their own.

An environment sees the packages of the one that runs the tests, except for gpu_lstm. So nothing is downloaded.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = [Path(folder) for folder in sys.path if Path(folder).name == "site-packages"]


def checkout(folder):
    """Copy the files of this checkout, without generated files."""
    left_out = ".git", ".venv*", ".*_cache", "out", "build", "*.egg-info"
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))


def build(folder, *targets):
    """Build the "wheel" or "sdist" by the backend that pip uses. It writes into the source, so it gets a copy."""
    source = checkout(folder / "source")
    calls = ", ".join(f"build_meta.build_{target}({str(folder)!r})" for target in targets)
    names = run([sys.executable, "-c", f"from setuptools import build_meta; print({calls}, sep='/')"], cwd=source)
    return [folder / name for name in names.stdout.splitlines()[-1].split("/")]


def environment(folder, install):
    """Return the interpreter of a new environment. `install` holds the arguments of pip install."""
    python = empty_environment(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-build-isolation"]
    done = run([*pip, "--verbose", "--ignore-installed", *install])
    assert not re.search("warning|deprecat", done.stdout + done.stderr, re.IGNORECASE), done.stdout + done.stderr
    return python


def empty_environment(folder):
    """Return the interpreter of a new environment in which nothing is installed."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder), "platbase": str(folder)}))
    # Python does not read a .pth file inside these folders, such as that of an editable install.
    (packages / "outer.pth").write_text("\n".join(map(str, PACKAGES)))
    return folder / "bin" / "python"


def run(command, **options):
    """Run a command and keep its output as text. If the command fails, the output is shown."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON_"))}
    variables |= options.pop("env", {})
    done = subprocess.run(command, env=variables, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def load(path):
    """Import a program of this checkout as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
