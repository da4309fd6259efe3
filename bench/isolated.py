"""Run calls in a separate process, so that a kernel that hangs or crashes ends nothing else."""

import contextlib
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
START_S, LIMIT_S = 120.0, 90.0  # for imports; without a sign of life, mostly while kernels are compiled


class ProviderFailed(Exception):
    """A provider raised, hung or ended its process. The arguments are its name and a text."""


class Worker:
    """Call a function in a separate process, which imports from `path` first.

    The function reports by `tell` which provider runs.
    """

    _process: Any = None

    def __init__(self, function: Callable[..., Any], path: Path | None = None, limit_s: float = LIMIT_S) -> None:
        self._function, self._path, self._limit_s = function, [] if path is None else [str(path)], limit_s

    def __call__(self, *arguments: Any) -> Any:
        running, limit_s = "start", self._limit_s
        if self._process is None:
            limit_s, context = START_S, multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
            with patch.object(sys, "path", [*self._path, *sys.path]):  # the new process gets a copy of sys.path
                self._process.start()
            theirs.close()
        try:
            self._connection.send(arguments)
            while self._connection.poll(limit_s):
                kind, value = self._connection.recv()
                if kind == "returned":
                    return value
                if kind == "raised":
                    self.close()  # the device may stay broken in it; the next call starts another process
                    raise ProviderFailed(*value)
                running, limit_s = value, self._limit_s
            failure = running, f"hung: no sign for {limit_s:.0f} s"
            self.close()
        except (EOFError, ConnectionError):
            self._process.join(START_S)  # join() sets the exit code
            failure = running, f"its process died, exit code {self.close()}"
        raise ProviderFailed(*failure)

    def close(self) -> int | None:
        """End the process, if there is one, and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        process.join()
        self._connection.close()
        return process.exitcode


def _serve(connection: Any, function: Callable[..., Any]) -> None:
    connection.send(("running", "start"))
    while True:
        arguments = connection.recv()
        try:
            connection.send(("returned", function(*arguments, tell=lambda who: connection.send(("running", who)))))
        except ProviderFailed as error:
            connection.send(("raised", error.args))


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Make a folder from which gpu_lstm of a commit is imported.

    It has nothing else: the benchmark is this checkout's.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-lstm-base-") as folder:
        tree, path, git = Path(folder) / "tree", Path(folder) / "path", ["git", "-C", str(ROOT), "worktree"]
        try:
            added = subprocess.run([*git, "add", "--detach", tree, commit], capture_output=True, text=True)
            if added.returncode or not (tree / "gpu_lstm" / "__init__.py").exists():
                said = added.stderr.strip().splitlines()[-1]
                raise ValueError(f"no commit {commit!r} with a gpu_lstm in it: {said}")
            path.mkdir()
            (path / "gpu_lstm").symlink_to(tree / "gpu_lstm")
            (tree / "gpu_lstm" / "kernels").symlink_to(tree / "kernels")  # where an installed package has it
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", tree], capture_output=True)
