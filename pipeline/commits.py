"""The commit of a local run: one small file that says how far everything is, replaced in one step."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from stepstream.connectors.base import Partition
from stepstream.pipeline.atomic import make_directory, remove_temporaries, write_atomic
from stepstream.pipeline.engines.base import EngineError
from stepstream.pipeline.snapshots import SnapshotRef

__all__ = ["Commit", "CommittedTotals", "Held", "StateDirectory", "from_rows", "to_rows"]

_MAX_BYTES = 64 << 20
_Rows = list[tuple[str, int, NonNegativeInt]]


def to_rows(offsets: dict[Partition, int]) -> _Rows:
    """Offsets as a JSON value: [[topic, partition, next offset]], sorted."""
    return sorted((topic, partition, offset) for (topic, partition), offset in offsets.items())


def from_rows(rows: _Rows) -> dict[Partition, int]:
    """The inverse of `to_rows`."""
    return {(topic, partition): offset for topic, partition, offset in rows}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Held(_Strict):
    """A snapshot that a commit holds on to."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: NonNegativeInt
    offsets: _Rows

    def ref(self) -> SnapshotRef:
        """As the snapshot store knows it."""
        return SnapshotRef(self.sha256, self.bytes, from_rows(self.offsets))


class CommittedTotals(_Strict):
    """See `metrics.Totals`."""

    records_in: NonNegativeInt = 0
    records_out: dict[str, NonNegativeInt] = {}
    dead_letters: dict[str, NonNegativeInt] = {}
    operator_events: dict[str, dict[str, NonNegativeInt]] = {}


class Commit(_Strict):
    """Everything up to `offsets` (the next to read) is done: the outputs are durable and stand at `sink`.

    `pipeline`: the task's fingerprint. `snapshots`: newest first. `totals`: counters since the log's beginning.
    `ended`: the input has ended for good. `finished`: and the sink has made its final form. `proof`: the source's,
    at `offsets`. `stopped`: nothing was read beyond `offsets`, for a source that gives nothing twice. `gaps`: how often
    such a one was read on after a run that had lost records. Version 1 had none of these three.
    """

    version: Literal[1, 2] = 2
    pipeline: list[dict[str, Any]]
    offsets: _Rows
    sink: dict[str, Any]
    snapshots: list[Held] = []
    totals: CommittedTotals = CommittedTotals()
    ended: bool = False
    finished: bool = False
    proof: str | None = None
    stopped: bool = False
    gaps: NonNegativeInt = 0


class StateDirectory:
    """The directory of a local run: its commit, its snapshots, and a lock so that it has one owner at a time.

    A context manager; the lock is the kernel's and goes with the process, however that dies.
    Raises EngineError if the directory is somebody else's at the moment, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def snapshots(self) -> Path:
        """Where the snapshots are."""
        return self.path / "snapshots"

    def __enter__(self) -> Self:
        try:
            make_directory(self.path)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise EngineError(f"{self.path}: cannot keep state there: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise EngineError(
                f"{self.path} is in use by another stepstream run (process {owner or 'unknown'}): "
                "stop that one, or give this one another output folder"
            ) from error
        self._lock = lock
        # Only for the message above: that it cannot be written on a full disk must not stop a restart.
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        remove_temporaries(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self) -> Commit | None:
        """The last commit, None if there never was one. Raises EngineError if it is not a commit."""
        path = self.path / "commit.json"
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) > _MAX_BYTES:
            raise EngineError(f"{path} has more than {_MAX_BYTES} bytes: it is not a commit")
        try:
            document = json.loads(data)
            version = document.get("version") if isinstance(document, dict) else None
            if version not in (1, 2):
                raise EngineError(f"{path}: version is {version!r}, and this program reads versions 1 and 2")
            # As JSON: its lists are tuples to a strict model only when it knows that they came from JSON.
            return Commit.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise self._broken(path, f"{where}: {first['msg']}, not {str(first['input'])[:60]!r}") from error
        except EngineError:
            raise
        except (ValueError, RecursionError) as error:
            raise self._broken(path, str(error)) from error

    @staticmethod
    def _broken(path: Path, why: str) -> EngineError:
        return EngineError(
            f"{path} was changed by somebody and is no commit any more: {why}. "
            "Start again with a new output folder; the input is all that is needed"
        )

    def store(self, commit: Commit) -> None:
        """Makes a commit the last one, durably. Raises OSError, and then the one before still is."""
        write_atomic(self.path / "commit.json", [commit.model_dump_json(indent=1).encode() + b"\n"])
