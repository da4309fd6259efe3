"""Results that are kept on disk for later processes: measured plans, verdicts on kernels, races.

Each key has a small file of its own, so that concurrent writers lose nothing. Only the user may read or write it. No
failure here stops a call. A file that cannot be read or written is ignored, with one warning.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import torch

from .cards import driver_version

PROCESS = os.getpid()  # the process that imported gpu_lstm; a fork of it has another number

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

KINDS = RACES, CHECKS, PLANS = "races", "checks", "plans"  # each has a folder
SHARED = "GPU_LSTM_SHARED_CACHE"  # an environment variable that names a folder to read first, and never to write to

Key = dict[str, Any]  # JSON values: all facts that a result depends on, versions included


def folder() -> Path | None:
    """Return the folder to which results are written, or None if the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpu_lstm"
    except RuntimeError:  # neither HOME nor an entry in passwd, as in a container with a random user id
        return None


def folders() -> tuple[Path, ...]:
    """Return the folders from which results are read, in this order."""
    shared = os.environ.get(SHARED)
    if shared and not os.path.isdir(shared):
        warn_once(f"{SHARED} names no folder: {shared}")
    elif shared and not os.access(shared, os.R_OK | os.X_OK):
        warn_once(f"{SHARED} names a folder that this user cannot read: {shared}")
        shared = None
    elif shared and not any(os.path.isdir(os.path.join(shared, name)) for name in (*KINDS, "compiled")):
        warn_once(f"{SHARED} names a folder without cached results: {shared}")
    return tuple(Path(path) for path in (shared, folder()) if path)


def made_folder(*names: str) -> Path:
    """Return a folder inside the user's own, and make it if it is missing. Raise an OSError if that fails."""
    if (path := folder()) is None:
        raise OSError("there is no home directory, and XDG_CACHE_HOME is not set")
    for name in ("", *names):
        (path := path / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@functools.cache
def machine(device: torch.device) -> Key:
    """Return the facts about a device that all results depend on. `contract.machine_of` adds facts about a backend."""
    is_card = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(device) if is_card else device.type,
        "driver": driver_version() if is_card else None, "torch": torch.__version__, "cuDNN": cudnn_version(),
        "gpu_lstm": sources("kernels", "backends", "execution", "verification", "call", "dispatch", "equations"),
    }  # fmt: skip


@functools.cache
def sources(*names: str) -> str:
    """Return a digest of folders of this package, so that an edit voids results.

    The digest is the same in a wheel and in a checkout.
    """
    digest = hashlib.sha256()
    # A checkout has two roots, and the kernels are in the second one.
    roots = list(map(Path, sys.modules[__package__.rpartition(".")[0]].__path__))
    found = {file.relative_to(root): file for root in roots for name in names for file in (root / name).rglob("*.*")}
    for name, file in sorted(found.items()):
        if file.suffix in (".py", ".cu"):
            text = file.read_bytes()
            digest.update(f"{name.as_posix()} {len(text)} ".encode() + text)
    return digest.hexdigest()[:16]


def cudnn_version() -> int | str | None:
    """Return the version of cuDNN, or torch's error if it cannot use the cuDNN that it finds."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError as error:
        return str(error)


def cpu_name() -> str:
    """Return the model of the processor, as far as the system tells it.

    If the name has no number, family and model are added to it.
    """
    if not (cpuinfo := Path("/proc/cpuinfo")).exists():
        return platform.processor() or platform.machine()
    facts = dict(re.findall(r"(.+?)\s*: (.*)", cpuinfo.read_text().partition("\n\n")[0]))
    name = " ".join(facts.get("model name", platform.machine()).split())
    numbers = [f"{each} {facts[each]}" for each in ("cpu family", "model") if each in facts]
    return name if re.search(r"\d", name) else ", ".join([name, *numbers])


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read(kind: str, key: Key) -> Any:
    """Return the value of a cached result, or None if there is none. `kind` is one of KINDS."""
    return _read(folders(), kind, _text(key))


def write(kind: str, key: Key, value: Any, lock: contextlib.ExitStack | None = None) -> None:
    """Write a result. With `lock`, its file is locked, and nobody reads it, until the block of `lock` ends."""
    try:
        made = made_folder(kind)
        with contextlib.ExitStack() as own:
            stack = lock or own
            file = stack.enter_context(tempfile.NamedTemporaryFile("w", dir=made, suffix=".unfinished", delete=False))
            stack.callback((path := Path(file.name)).unlink, missing_ok=True)
            json.dump({"key": key, "value": value}, file, indent=1)
            file.flush()
            if lock is None:
                file.close()
            else:
                fcntl.flock(file, fcntl.LOCK_EX)
            path.replace(made / _name(_text(key)))  # in one step, so that no reader gets half a file
    except OSError as error:
        warn_of_nothing_kept(error)
    _read.cache_clear()


@contextlib.contextmanager
def trial(kind: str, key: Key, value: Any) -> Iterator[None]:
    """Run a block that may end the process. If it does, the result is `value`. Otherwise the block writes a result.

    During the block the result's file is locked, so that other processes that try the same do not see it. The system
    unlocks it when the process ends, in whatever way. If the block raises an error, there is no result.
    """
    with contextlib.ExitStack() as lock:
        try:
            if fcntl is not None:
                write(kind, key, value, lock)
            yield
        except BaseException:
            remove(kind, key)
            raise


def entries(kind: str) -> Iterator[tuple[Path, Key, Any]]:
    """Yield (file, key, value) of all results of a kind."""
    for path in folders():
        for file in sorted((path / kind).glob("*.json")):
            if entry := _entry(kind, file):
                yield file, entry["key"], entry["value"]


def remove(kind: str, key: Key | None = None) -> int:
    """Remove the user's own results of a kind, or the result of one key. Return the number of removed files.

    Broken files are removed, too.
    """
    names = "*.json" if key is None else _name(_text(key))
    files = list((ours / kind).glob(names)) if (ours := folder()) else []
    for file in files:
        file.unlink(missing_ok=True)
    _read.cache_clear()
    return len(files)


def _is_valid(kind: str, entry: Any) -> bool:
    """Whether an entry has a key, and a value with the fields of that kind. Callers check the names in the value."""
    match entry:
        case {"key": dict(), "value": {"backend": str(), "why": str(), "seconds": dict() | None as seconds} as value}:
            times = (seconds or {}).values()
            return (kind, len(value)) == (RACES, 3) and all(type(t) in (int, float) and 0 < t < inf for t in times)
        case {"key": dict(), "value": {"family": _, "rows": _, "units": _}}:
            return kind == PLANS
        case {"key": dict(), "value": str()}:
            return kind == CHECKS
    return False


@functools.cache
def warn_once(text: str) -> None:
    """Issue a warning once per process."""
    warnings.warn(f"gpu_lstm: {text}", stacklevel=3)


def warn_of_nothing_kept(error: Exception, what: str = "nothing is kept") -> None:
    """Warn that results are not kept, and why. No file is named, since a new name each time would repeat it."""
    why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    warn_once(f"{what} for the next process in {folder()}: {why}; XDG_CACHE_HOME names another place")


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def _name(text: str) -> str:
    """Return the name of the file of a result, by the text of its key."""
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _entry(kind: str, path: Path, text: str | None = None) -> dict[str, Any] | None:
    """Return the content of a file, or None if it is missing, on trial or broken. A broken file causes a warning.

    With `text`, the file must have this key.
    """
    try:
        with path.open() as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # the block of a `trial` runs, in this process or another
                return None
            except OSError:  # the file system has no locks, so there are no trials
                pass
            entry = json.load(file)  # errors of JSON and Unicode are ValueErrors
        if not _is_valid(kind, entry) or text not in (None, _text(entry["key"])):
            raise ValueError(f"it is not of this kind, or of another key: {entry!r:.300}")
        return entry
    except FileNotFoundError:
        return None
    except OSError as error:
        warn_once(f"cached results are ignored: {path.parents[1]}: {error.strerror}")
    except (ValueError, RecursionError) as error:  # RecursionError if it is nested too deeply
        warn_once(f"a cached result ({kind}) is ignored: {path}: {error}")
    return None


@functools.lru_cache(4096)
def _read(folders: tuple[Path, ...], kind: str, text: str) -> Any:
    copies = (_entry(kind, folder / kind / _name(text), text) for folder in folders)
    return next((entry["value"] for entry in copies if entry), None)
