"""From a pipeline file to checked stages: substitution, overrides, and every problem named at once.

A file's value gives way to the environment's, and that to `--set`'s. See docs/pipeline-file.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

import stepstream.pipeline.registry as registry
import stepstream.pipeline.yamlfile as yamlfile
from stepstream.pipeline.overrides import apply_environment, apply_settings, is_stage, substitute
from stepstream.pipeline.registry import Kind, NameProblem
from stepstream.pipeline.tree import ConfigError, Path, Tree, show_value

__all__ = ["ConfigError", "PipelineConfig", "Stage", "from_text", "from_tree", "from_values", "read_file"]

_KEYS = ("name", "source", "operators", "sink", "engine")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WANTED = {
    "source": "a source such as {replay: {path: recording.npz}}",
    "sink": "a sink such as {files: {path: out/}}",
    "operator": "an operator such as {align: {every: 5min}}",
    "engine": "an engine such as local",
}


@dataclass(frozen=True)
class Stage:
    """One checked part of a pipeline: its TYPE, the class it names, and its options as given and as validated."""

    kind: Kind
    type_name: str
    given: Mapping[str, Any]
    cls: type[Any] = field(repr=False)
    options: BaseModel = field(repr=False)

    def make(self) -> Any:
        """A new instance."""
        return self.cls(self.options)


@dataclass(frozen=True)
class PipelineConfig:
    """A whole pipeline whose names exist and whose options are valid."""

    name: str
    source: Stage
    operators: tuple[Stage, ...]
    sink: Stage
    engine: Stage


def read_file(
    path: FilePath | str, settings: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> PipelineConfig:
    """The pipeline in a YAML file, with `--set` texts (`a.b=c`) and an environment applied; both may be empty.

    Raises ConfigError with every problem that could be found, each with its line or the override it came from.
    """
    path = FilePath(path)
    try:
        if path.stat().st_size > yamlfile.MAX_BYTES:
            raise ConfigError.of(f"larger than {yamlfile.MAX_BYTES} bytes, too large for a pipeline file", str(path))
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError.of("not a text file in UTF-8", str(path)) from error
    except OSError as error:
        raise ConfigError.of(f"cannot be read: {error.strerror or error}", str(path)) from error
    return from_text(text, settings, environ, label=str(path))


def from_text(
    text: str,
    settings: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    label: str = "pipeline",
) -> PipelineConfig:
    """As `read_file`, from YAML text that messages call `label`."""
    try:
        value, lines = yamlfile.read(text, is_stage)
    except yamlfile.YamlProblem as error:
        raise ConfigError.of(str(error), f"{label}:{error.line}" if error.line else label) from error
    if not isinstance(value, dict):
        found = "nothing" if value is None else show_value(value)
        raise ConfigError.of(f"expected a mapping with the keys {', '.join(_KEYS)}, found {found}", label)
    tree = Tree(value, {path: f"{label}:{line}" for path, line in lines.items()}, label)
    environ = {} if environ is None else environ
    named = substitute(tree, environ)
    _normalise(tree)
    apply_environment(tree, environ, named)
    apply_settings(tree, settings)
    _normalise(tree)
    return from_tree(tree)


def from_values(data: Mapping[str, Any]) -> PipelineConfig:
    """As `from_text`, from the values of a file, taken as they are."""
    tree = Tree(dict(data))
    _normalise(tree)
    return from_tree(tree)


def from_tree(tree: Tree, classes: Mapping[Path, type[Any]] | None = None) -> PipelineConfig:
    """Checks a normalised tree; `classes` gives the class of a stage (by its path) that is not to be looked up."""
    problems = tree.problems
    classes = classes or {}
    root = tree.root
    for key in root:
        if key not in _KEYS:
            tree.complain((key,), f"no such key{registry.suggestion(str(key), list(_KEYS))} (keys: {', '.join(_KEYS)})")
    name = root.get("name")
    if name is None:
        tree.complain(("name",), "is missing: expected a name for the pipeline, such as la-traffic")
    elif not (isinstance(name, str) and _NAME.fullmatch(name)):
        tree.complain(("name",), f"{show_value(name)}: expected letters, digits, '.', '_' or '-', at most 100")
    source = _stage(tree, "source", ("source",), root.get("source"), classes)
    entries = root.get("operators")
    operators: list[Stage | None] = []
    if entries is not None and not isinstance(entries, list):
        tree.complain(("operators",), f"{show_value(entries)}: expected a list, each item {_WANTED['operator']}")
    else:
        operators = [
            _stage(tree, "operator", ("operators", index), entry, classes) for index, entry in enumerate(entries or [])
        ]
    sink = _stage(tree, "sink", ("sink",), root.get("sink"), classes)
    engine = _stage(tree, "engine", ("engine",), root.get("engine", {"local": {}}), classes)
    if problems or source is None or sink is None or engine is None:
        raise ConfigError(problems)
    return PipelineConfig(str(name), source, tuple(stage for stage in operators if stage is not None), sink, engine)


def _normalise(tree: Tree) -> None:
    """`engine: local` and `align:` become `{local: {}}` and `{align: {}}`, so that overrides can address them."""
    root = tree.root
    for key in ("source", "sink", "engine"):
        if key in root:
            root[key] = _expanded(root[key])
    if isinstance(root.get("operators"), list):
        root["operators"] = [_expanded(entry) for entry in root["operators"]]


def _expanded(entry: Any) -> Any:
    if isinstance(entry, str):
        return {entry: {}}
    if isinstance(entry, dict):
        return {name: {} if options is None else options for name, options in entry.items()}
    return entry


def _stage(tree: Tree, kind: Kind, path: Path, entry: Any, classes: Mapping[Path, type[Any]]) -> Stage | None:
    if entry is None:
        tree.complain(path, f"is missing: expected {_WANTED[kind]}")
        return None
    if not isinstance(entry, dict) or not entry:
        tree.complain(path, f"{show_value(entry)}: expected {_WANTED[kind]}")
        return None
    if len(entry) > 1:
        found = ", ".join(str(name) for name in entry)
        tree.complain(path, f"has {len(entry)} types ({found}): expected one, with its options indented below it")
        return None
    type_name, given = next(iter(entry.items()))
    path = (*path, type_name)
    try:
        known = classes.get(path[:-1])
        cls = registry.load(kind, type_name) if known is None else registry.check(kind, known)
    except NameProblem as error:
        tree.complain(path, str(error))
        return None
    if not isinstance(given, dict):
        tree.complain(path, f"{show_value(given)}: expected a mapping of options")
        return None
    try:
        options = cls.Options.model_validate(given)
    except ValidationError as error:
        for where, message in option_problems(error, given, cls.Options):
            tree.complain((*path, *where), message)
        return None
    return Stage(kind, type_name, given, cls, options)


def option_problems(error: ValidationError, given: Any, model: type[BaseModel]) -> Iterable[tuple[Path, str]]:
    """What pydantic found, as (path below `given`, message): one a path, a union's alternatives joined by "or"."""
    found: dict[Path, list[Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_real_path(item["loc"], given, item["type"] == "missing"), []).append(item)
    for path, items in found.items():
        first = items[0]
        if first["type"] == "extra_forbidden":
            known = sorted(_fields_at(model, path[:-1]))
            hint = registry.suggestion(str(path[-1]), known)
            listed = f" (options: {', '.join(known)})" if known else " (it takes no options)"
            yield path, f"no such option{hint}{listed}"
        elif first["type"] == "missing":
            yield path, "is missing"
        else:
            wanted = list(dict.fromkeys(_expectation(item) for item in items))
            shown = f"{show_value(first['input'], path)}: " if path else ""
            yield path, f"{shown}{' or '.join(wanted)}"


def _expectation(item: Any) -> str:
    message = str(item["msg"])
    for start, instead in (("Input should be ", "expected "), ("Value error, ", ""), ("Assertion failed, ", "")):
        if message.startswith(start):
            message = instead + message[len(start) :]
    return message


def _real_path(loc: tuple[int | str, ...], given: Any, last_is_absent: bool) -> Path:
    """`loc` without the names of validators and union members that pydantic puts between the keys."""
    path: list[str | int] = []
    for position, step in enumerate(loc):
        items: dict[Any, Any] = dict(enumerate(given)) if isinstance(given, list) else given
        if isinstance(items, dict) and step in items:
            given = items[step]
        elif not (last_is_absent and position == len(loc) - 1):
            continue
        path.append(step)
    return tuple(path)


def _fields_at(model: type[BaseModel], path: Path) -> list[str]:
    """The option names of `model`, or of the nested model at `path` below it; [] if that is not to be told."""
    current: Any = model
    for step in path:
        info = getattr(current, "model_fields", {}).get(step)
        current = info.annotation if info is not None else None
    fields = getattr(current, "model_fields", {})
    return [info.alias or name for name, info in fields.items()]
