"""Whether a package of somebody else's can be used here."""

import importlib
import importlib.metadata
import importlib.util
import re


def missing(package: str, install: str) -> str | None:
    """Why it cannot be imported, and the command that installs it; None if it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: {install}"
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:  # most often an extension built for another torch
        return f"{package} is installed but cannot be imported: {error}"
    return None


def release(package: str) -> tuple[int, ...]:
    """The numbers of its version, to compare: (3, 9, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", importlib.metadata.version(package))
    assert numbers is not None
    return tuple(map(int, numbers[0].split(".")))
