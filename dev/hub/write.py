"""Write a folder that Hugging Face's `kernels` loads: the package with its kernels, and layers.py. See `make hub`.

Layout and metadata follow https://huggingface.co/docs/kernels/kernel-requirements.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IN_ITS_NAME = '''"""The package above, for versions of `kernels` that look for one in a folder of its name."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(f"{__name__}_above", Path(__file__).parents[1] / "__init__.py")
_package = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_package)
__all__ = _package.__all__
globals().update({name: getattr(_package, name) for name in __all__})
'''


def write(folder: Path) -> None:
    """Write the variant build/torch-universal, which is for every version of torch and every device.

    Replace an old one.
    """
    variant = folder / "build/torch-universal"
    shutil.rmtree(variant, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gpu_lstm", variant, ignore=ignore)
    shutil.copytree(ROOT / "kernels", variant / "kernels", ignore=ignore)
    for name in ("LICENSE", "dev/hub/layers.py"):
        shutil.copy(ROOT / name, variant)
    package = (variant / "__init__.py").read_text()
    (variant / "__init__.py").write_text(package + '\nfrom . import layers\n\n__all__ += ["layers"]\n')
    (variant / "gpu_lstm").mkdir()
    (variant / "gpu_lstm/__init__.py").write_text(IN_ITS_NAME)

    files = {path.relative_to(variant).as_posix(): path for path in sorted(variant.rglob("*")) if path.is_file()}
    hashes = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
    metadata = {
        "name": "gpu-lstm",
        # The package is imported under this name, and its operators have it, too. Each content has a name of its own.
        "id": "_gpu_lstm_universal_" + hashlib.sha256(b"".join(hashes.values())).hexdigest()[:7],
        "version": int(re.search(r'__version__ = "(\d+)', package)[1]),
        "license": "mit",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": {n: base64.b64encode(h).decode() for n, h in hashes.items()}},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
