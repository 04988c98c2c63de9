"""A pipeline file's values on their way to becoming a pipeline: where each came from, and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from stepstream.operators.durations import format_duration
from stepstream.pipeline.yamlfile import Path

__all__ = ["ConfigError", "Path", "Problem", "Tree", "show_path", "show_value"]

_SECRET = re.compile(r"passw|secret|token|credential|api_?key|private_?key", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the key it is about ("" if none), the message, and where it was written ("file.yaml:7")."""

    key: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(ValueError):
    """A pipeline that cannot be used: every problem found, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def of(cls, message: str, where: str = "", key: str = "") -> ConfigError:
        """A ConfigError with one problem."""
        return cls([Problem(key, message, where)])


@dataclass
class Tree:
    """Plain values (dicts, lists, scalars), `where` each path was written, and the problems found so far."""

    root: dict[str, Any]
    where: dict[Path, str] = field(default_factory=dict)
    label: str = ""
    problems: list[Problem] = field(default_factory=list)

    def complain(self, path: Path, message: str) -> None:
        """Notes a problem at `path`; it is said to stand where the nearest written key above it stands."""
        near = next((self.where[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.where), self.label)
        self.problems.append(Problem(show_path(path), message, near))

    def assign(self, path: Path, value: Any, where: str) -> None:
        """Puts `value` at `path`, making mappings on the way; lists must already be long enough."""
        node: Any = self.root
        for step in path[:-1]:
            node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]
        node[path[-1]] = value
        for known in [known for known in self.where if known[: len(path)] == path]:
            del self.where[known]
        self.where[path] = where


def show_path(path: Path) -> str:
    """`("operators", 1, "forecast")` as `operators[1].forecast`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def show_value(value: Any, path: Path = ()) -> str:
    """A value as it may be printed: short, in one line, and not at all if its key sounds like a secret."""
    if path and _SECRET.search(str(path[-1])):
        return "'***'"
    value = hide_secrets(value)
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, timedelta):
        text = repr(format_duration(value))
    else:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def hide_secrets(value: Any, path: Path = ()) -> Any:
    """`value` with "***" in place of what stands under keys that sound like secrets."""
    if path and _SECRET.search(str(path[-1])) and value is not None:
        return "***"
    if isinstance(value, dict):
        return {key: hide_secrets(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_secrets(item, path) for item in value]
    return value
