"""Structured logs on stderr: stdout belongs to results.

As JSON, a line has the keys of `ALWAYS`, `pipeline` as soon as it is known, and those of `KEYS` that its message is
about. They are stable: a new one may come, none changes its meaning. docs/operations.md has them as a table.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

__all__ = ["ALWAYS", "KEYS", "configure", "get_logger", "name_pipeline"]

_ROOT = "stepstream"
# Their warnings would come as bare text between JSON lines; those of Faust come through our own logger.
_LIBRARIES = ("kafka", "opentelemetry", "py.warnings")

ALWAYS = ("time", "level", "logger", "message")
"""On every line: when (UTC, ISO 8601), debug to error, who, what."""

KEYS = {
    "assigned": "numbers of the partitions that the group has given to this process",
    "committed": "the offset that a restart goes on from",
    "count": "how many of a kind since it was last told",
    "error": "the stack trace of an exception",
    "from": "the offset at which a restored state stands",
    "gaps": "how often records were lost behind a commit",
    "group": "the consumer group",
    "host": "the address that is served",
    "id": "the transactional id",
    "key": "the record's key",
    "library": "whose warning it is",
    "model": "the model's name",
    "offset": "the record's offset",
    "operator": "the operator's name",
    "outputs": "how many outputs",
    "page": "the page that was asked for",
    "partition": "the number of a partition",
    "partitions": "numbers of partitions",
    "pipeline": "the pipeline's name",
    "port": "the port that is served",
    "reason": "why",
    "records": "how many records",
    "seconds": "how long",
    "source": "the partitions of the input",
    "to_replay": "how many records are to be replayed",
    "topic": "the topic",
    "total": "how many of a kind in all",
    "weights": "sha256 of the weights, by operator",
}
"""What stands beside a message, where it is about that."""

_common: dict[str, Any] = {}
# What logging itself puts on a record; everything else came in through `extra`.
_BUILT_IN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def get_logger(name: str) -> logging.Logger:
    """The logger for a module: `get_logger(__name__)`. Fields go in `extra={...}` and come out as fields."""
    return logging.getLogger(name if name == _ROOT or name.startswith(_ROOT + ".") else f"{_ROOT}.{name}")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _BUILT_IN}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            line[f"{name}_" if name in line else name] = value
        for name, value in _common.items():
            line.setdefault(name, value)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _HumanFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        text = f"{clock} {level}{record.getMessage()}{fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(
    level: str = "info", form: Literal["human", "json"] = "human", stream: TextIO | None = None
) -> logging.Logger:
    """Sends everything below the logger `stepstream` to stderr, for a person or as JSON lines. May be called again.

    Raises ValueError for a level that logging does not know.
    """
    logger = logging.getLogger(_ROOT)
    logger.setLevel(level.upper())
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_JsonFormatter() if form == "json" else _HumanFormatter())
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.propagate = False
    _common.clear()
    for name in _LIBRARIES if form == "json" else ():
        library = logging.getLogger(name)
        library.handlers[:], library.propagate = [handler], False
    return logger


def name_pipeline(name: str) -> None:
    """From now on JSON lines say which pipeline it is, until `configure` is called again."""
    _common["pipeline"] = name
