"""The command `stepstream` in processes of its own that start in milliseconds, to be killed, starved and watched.

They are forked from one process that has imported everything and done nothing yet.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "commands",
        "pytest",
        "stepstream.connectors.files",
        "stepstream.connectors.jsonl",
        "stepstream.connectors.replay",
        "stepstream.connectors.traffic_csv",
        "stepstream.models.persistence",
        "stepstream.models.sttn",
        "stepstream.operators.align",
        "stepstream.operators.forecast",
        "stepstream.operators.score",
        "stepstream.pipeline.cli",
        "stepstream.pipeline.pipeline",
        "stepstream.pipeline.scores",
        "stepstream.pipeline.task",
        "stepstream.pipeline.engines.local",
    ]
)
TIMEOUT_S = 300


@dataclass(frozen=True)
class Done:
    """How a command went. `code` below 0: the signal that ended it. `operations`: counted if `die_at` was set."""

    code: int
    out: str
    err: str
    operations: int

    @property
    def summary(self) -> dict[str, Any]:
        """The one JSON object of a good run with --json."""
        assert self.code == 0, self.err
        value: dict[str, Any] = json.loads(self.out)
        return value


class Command:
    """A running command. `file_limit`: RLIMIT_FSIZE in bytes, which fails a write half way as a full disk does.

    `die_at`: it sends itself SIGKILL before the so-manieth operation on a file below its folder.
    """

    def __init__(
        self,
        folder: Path,
        *args: str,
        file_limit: int | None = None,
        die_at: int | None = None,
        stdout: str | None = None,
    ) -> None:
        self._log = folder / f".command-{os.getpid()}-{id(self)}"
        self._out = Path(stdout) if stdout else self._log.with_suffix(".out")
        self._err = self._log.with_suffix(".err")
        target = (str(folder), args, str(self._out), str(self._err), file_limit, die_at)
        self._process = _CONTEXT.Process(target=_main, args=target)
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, which a command that has ended does not mind."""
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self) -> Done:
        self._process.join(TIMEOUT_S)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"not done after {TIMEOUT_S} s")
        out = self._out.read_text() if self._out.is_file() else ""
        count = self._err.with_suffix(".count")
        return Done(code, out, self._err.read_text(), int(count.read_text()) if count.exists() else 0)


def command(folder: Path, *args: str, **options: Any) -> Done:
    """Runs a command to its end in a folder."""
    return Command(folder, *args, **options).wait()


def _main(folder: str, args: tuple[str, ...], out: str, err: str, file_limit: int | None, die_at: int | None) -> None:
    os.chdir(folder)
    for descriptor, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["stepstream", *args]
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    from stepstream.pipeline.cli import main

    if die_at is None:
        main()
        return
    tripwire = _Tripwire(str(Path(folder).resolve()), die_at)
    sys.addaudithook(tripwire)
    try:
        main()
    finally:
        Path(err).with_suffix(".count").write_text(str(die_at - tripwire.left))


class _Tripwire:
    """Kills the process before its k-th operation on a file below a folder."""

    events = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "fcntl.flock"})

    def __init__(self, folder: str, at: int) -> None:
        self.folder, self.left = folder, at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in self.events:
            return
        named = str(arguments[0])
        if event == "fcntl.flock" or not named.startswith("/") or named.startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
