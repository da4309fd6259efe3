"""Cases in a process of their own: a kernel that hangs or crashes takes nothing else along.

The process serves case after case until a provider fails in it. Then it is thrown away, since a device that has seen a
fault cannot be trusted, and the next case gets a new one.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

from .cases import Case
from .results import Row
from .run import ProviderFailed, run_case

START_S = 120.0  # for a process to import what it needs
LIMIT_S = 90.0  # without a sign of life; compiling kernels takes most of it


class Worker:
    """Runs cases on one device, each by `run.run_case` in another process."""

    def __init__(self, device: str, limit_s: float = LIMIT_S, serve: "Callable[[Connection, str], None] | None" = None):
        self._device, self._limit_s, self._serve = device, limit_s, serve or serve_cases
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection

    def run_case(self, case: Case, names: list[str], failed: dict[str, str]) -> list[Row]:
        """As `run.run_case`.

        Raises:
            ProviderFailed: a provider raised, or its process died or gave no sign for `limit_s` seconds.
        """
        if self._process is None:
            self._start()
        self._connection.send((case, names, failed))
        doing = "start"
        while True:
            if not self._connection.poll(self._limit_s):
                self.close()
                raise ProviderFailed(doing, f"hung: no sign for {self._limit_s:.0f} s")
            try:
                kind, value = self._connection.recv()
            except EOFError:
                exit_code = self.close()
                raise ProviderFailed(doing, f"its process died, exit code {exit_code}") from None
            match kind:
                case "doing":
                    doing = value
                case "rows":
                    return value
                case "failed":
                    self.close()
                    raise value

    def close(self) -> int | None:
        """End the process, if there is one; its exit code."""
        if self._process is None:
            return None
        self._process.join(1)  # one that dies by itself has a second to leave its exit code
        self._process.kill()
        self._process.join()
        exit_code, self._process = self._process.exitcode, None
        self._connection.close()
        return exit_code

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, self._device), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(START_S):
            raise RuntimeError(f"a process for benchmarks did not start within {START_S:.0f} s")
        self._connection.recv()


def serve_cases(connection: Connection, device: str) -> None:
    """The other process: take cases, say what is in hand, send rows."""
    connection.send("ready")
    while True:
        case, names, failed = connection.recv()
        try:
            rows = run_case(case, names, device, failed, tell=lambda provider: connection.send(("doing", provider)))
        except ProviderFailed as error:
            connection.send(("failed", error))
        else:
            connection.send(("rows", rows))
