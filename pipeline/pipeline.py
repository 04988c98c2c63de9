"""A pipeline: a source, operators, a sink and an engine. Written in Python or in YAML, it is the same thing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel

import stepstream.pipeline.config as config
import stepstream.pipeline.registry as registry
import stepstream.pipeline.yamlfile as yamlfile
from stepstream.connectors.base import InputError, Sink, Source
from stepstream.connectors.records import Record
from stepstream.operators.base import Operator, OptionError
from stepstream.operators.durations import format_duration
from stepstream.pipeline.config import ConfigError, PipelineConfig, Stage
from stepstream.pipeline.overrides import escape
from stepstream.pipeline.registry import Kind, NameProblem
from stepstream.pipeline.tree import Path, Problem, Tree, hide_secrets, show_path

if TYPE_CHECKING:
    from stepstream.pipeline.engines.base import Engine, RunResult
    from stepstream.pipeline.task import Task

__all__ = ["Built", "Part", "Pipeline", "Use", "use"]

# Which built-in operator makes a payload type: what to say to somebody whose pipeline lacks it.
_MAKERS = {
    "SensorFrame": "align",
    "Forecast": "forecast",
    "Score": "score",
    "Grid": "voxelize",
    "Detections": "cluster",
}


@dataclass(frozen=True)
class Use:
    """A part of a pipeline that is still to be checked: its TYPE or class, and its options as plain values."""

    what: str | type[Any]
    options: Mapping[str, Any]


Part: TypeAlias = Use | str | type[Any] | Mapping[str, Any]
"""What stands for a part: `use(...)`, a TYPE or class without options, or `{TYPE: {options}}` as in a pipeline file."""


def use(what: str | type[Any], /, **options: Any) -> Use:
    """A part with its options: `use("align", every="5min")`, `use(MyOperator, scale=2)`.

    Options are what a YAML file can hold, or a path, a timedelta, a tuple or a pydantic model, which become that.
    """
    return Use(what, {name: _plain(value, name) for name, value in options.items()})


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, FilePath):
        return str(value)
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise ConfigError.of(f"a {type(value).__name__}: expected what a YAML file can hold", key=name)


@dataclass(frozen=True)
class Built:
    """The objects of one run of a pipeline. They are made for it and have not been used."""

    task: Task
    source: Source
    sink: Sink
    engine: Engine
    state_dir: FilePath | None

    def run(
        self,
        stop: threading.Event | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
        on_output: Callable[[Sequence[Record]], None] | None = None,
    ) -> RunResult:
        """Runs until the input ends or `stop` is set; `on_output` is shown the outputs that the sink has taken.

        Raises InputError for what a user can mend and OperatorError for an operator that failed; what was committed
        before stays, and a new run goes on there.
        """
        from stepstream.pipeline.engines.base import WatchedSink

        sink = self.sink if on_output is None else WatchedSink(self.sink, on_output)
        return self.engine.run(self.task, self.source, sink, self.state_dir, stop, on_progress)


class Pipeline:
    """A checked pipeline. Making one imports the classes it names and validates their options; it opens nothing.

    Raises ConfigError, with every problem found, for names that stand for nothing, options that are not valid, and
    operators that would never be given a record.
    """

    def __init__(
        self, name: str, source: Part, sink: Part, operators: Sequence[Part] = (), engine: Part = "local"
    ) -> None:
        tree = Tree({"name": name, "operators": []})
        classes: dict[Path, type[Any]] = {}

        def entry(kind: Kind, path: Path, part: Part) -> Any:
            if isinstance(part, Mapping):
                return {key: _plain(value, str(key)) or {} for key, value in part.items()}
            part = part if isinstance(part, Use) else Use(part, {})
            if isinstance(part.what, str):
                return {part.what: dict(part.options)}
            classes[path] = part.what
            return {_name_in_python(kind, part.what): dict(part.options)}

        tree.root["source"] = entry("source", ("source",), source)
        for index, part in enumerate(operators):
            tree.root["operators"].append(entry("operator", ("operators", index), part))
        tree.root["sink"] = entry("sink", ("sink",), sink)
        tree.root["engine"] = entry("engine", ("engine",), engine)
        self.config = _connected(config.from_tree(tree, classes))

    @classmethod
    def _of(cls, checked: PipelineConfig) -> Pipeline:
        pipeline = cls.__new__(cls)
        pipeline.config = _connected(checked)
        return pipeline

    @classmethod
    def from_file(
        cls,
        path: FilePath | str,
        settings: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Pipeline:
        """The pipeline in a YAML file, with overrides (`["source.replay.speed=20"]`) and, if given, an environment."""
        return cls._of(config.read_file(path, settings, environ))

    @classmethod
    def from_yaml(cls, text: str) -> Pipeline:
        """The pipeline in YAML text, such as `to_yaml` returns."""
        return cls._of(config.from_text(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pipeline:
        """The pipeline in the values of a pipeline file. Strings are taken as they are: no `${NAME}` is replaced."""
        return cls._of(config.from_values(_plain(data, "pipeline")))

    def to_dict(self) -> dict[str, Any]:
        """The values of the pipeline file that says the same. Raises ConfigError for a class that has no name."""
        checked = self.config
        return {
            "name": checked.name,
            "source": _entry(checked.source),
            "operators": [_entry(stage) for stage in checked.operators],
            "sink": _entry(checked.sink),
            "engine": _entry(checked.engine),
        }

    def to_yaml(self) -> str:
        """The pipeline file that says the same: `Pipeline.from_yaml(p.to_yaml()) == p`."""
        return yamlfile.dump(escape(self.to_dict()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config.name)

    def __repr__(self) -> str:
        stages = [self.config.source, *self.config.operators, self.config.sink]
        types = [stage.type_name for stage in stages]
        return f"Pipeline({self.config.name!r}: {' -> '.join(types)})"

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return self.config.name

    def operator_names(self) -> list[str]:
        """What counters, dead letters and snapshots call the operators: their TYPE, numbered from its second use."""
        names: list[str] = []
        for stage in self.config.operators:
            base = stage.type_name.rpartition(":")[2]
            base = "source-operator" if base == "source" else base
            name, number = base, 1
            while name in names:
                number += 1
                name = f"{base}-{number}"
            names.append(name)
        return names

    def operators(self) -> list[tuple[str, Operator]]:
        """New instances of the operators, with their names, each told which ones stand around it. Loads models.

        Raises ConfigError or InputError that names the operator.
        """
        made: list[Operator] = [
            _made(stage, ("operators", index, stage.type_name)) for index, stage in enumerate(self.config.operators)
        ]
        for index, (stage, operator) in enumerate(zip(self.config.operators, made, strict=True)):
            try:
                operator.connect(made[:index], made[index + 1 :])
            except OptionError as error:
                key = show_path(("operators", index, stage.type_name, error.option))
                raise ConfigError.of(str(error), key=key) from error
        return list(zip(self.operator_names(), made, strict=True))

    def build(self) -> Built:
        """New objects for one run. Raises InputError or ConfigError, saying for which part, if one cannot be made."""
        from stepstream.pipeline.metrics import Metrics
        from stepstream.pipeline.task import Task
        from stepstream.pipeline.watching import watch

        checked = self.config
        engine: Engine = _made(checked.engine, ("engine", checked.engine.type_name))
        task = Task(self.operators(), Metrics(checked.name))
        source: Source = _made(checked.source, ("source", checked.source.type_name))
        try:
            sink: Sink = _made(checked.sink, ("sink", checked.sink.type_name))
        except BaseException:
            source.close()
            raise
        sink.pipeline = checked.name
        watch(task, checked.engine.type_name, engine.longest_step_s)
        return Built(task, source, sink, engine, self.state_dir())

    def state_dir(self) -> FilePath | None:
        """Where the local engine keeps commits and snapshots: `.stepstream` in the sink's folder; None without one."""
        given = getattr(self.config.sink.options, "path", None)
        return FilePath(given) / ".stepstream" if given else None

    def run(
        self,
        stop: threading.Event | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
        on_output: Callable[[Sequence[Record]], None] | None = None,
    ) -> RunResult:
        """Builds it and runs it: see `Built.run`."""
        return self.build().run(stop, on_progress, on_output)

    def describe(self) -> dict[str, Any]:
        """What it is made of, as a JSON value: types, options (secrets hidden), record types, and what each operator
        says of itself (state, receptive field). Makes the operators, so it loads models; opens no source and no sink.
        """
        checked = self.config
        source = _described(checked.source)
        operators: list[dict[str, Any]] = []
        for stage, (name, operator) in zip(checked.operators, self.operators(), strict=True):
            operators.append(
                {
                    **_described(stage),
                    "name": name,
                    "consumes": [kind.__name__ for kind in operator.consumes],
                    "emits": [kind.__name__ for kind in operator.emits],
                    **hide_secrets(operator.describe()),
                }
            )
        emits = _source_types(checked.source)
        source["emits"] = None if emits is None else [kind.__name__ for kind in emits]
        return {
            "name": checked.name,
            "source": source,
            "operators": operators,
            "sink": _described(checked.sink),
            "engine": _described(checked.engine),
            "flow": _flow(emits, [stage.cls for stage in checked.operators]),
        }


def _name_in_python(kind: Kind, cls: type[Any]) -> str:
    try:
        return registry.name_of(kind, cls)
    except NameProblem:
        # It can run, it just has no serial form: `to_dict` says so.
        return f"{cls.__module__}:{cls.__qualname__}"


def _entry(stage: Stage) -> dict[str, Any]:
    try:
        registry.name_of(stage.kind, stage.cls)
    except NameProblem as error:
        raise ConfigError.of(str(error), key=f"{stage.kind}.{stage.type_name}") from error
    return {stage.type_name: dict(stage.given)}


def _made(stage: Stage, path: Path) -> Any:
    try:
        return stage.make()
    except InputError as error:
        raise InputError(f"{show_path(path)}: {error}") from error
    except ValueError as error:
        # Options that are valid one by one and still name what there is not: an unknown model, too many horizons.
        raise ConfigError.of(" ".join(str(error).split()), key=show_path(path)) from error


def _described(stage: Stage) -> dict[str, Any]:
    options = hide_secrets(stage.options.model_dump(mode="json"))
    return {"type": stage.type_name, "options": options, "given": hide_secrets(dict(stage.given))}


def _source_types(stage: Stage) -> tuple[type, ...] | None:
    """The payload types a source can emit, None if it does not say (any).

    A source says so with a class attribute `emits`, as operators do, or a class method `emits(options)`.
    """
    said = getattr(stage.cls, "emits", None)
    return tuple(said(stage.options) if callable(said) else said or ()) or None


def _flow(emits: tuple[type, ...] | None, operators: Sequence[type[Any]]) -> list[list[str]]:
    """The record types behind the source and behind each operator, by the rule of `Task`: what is in its `consumes`
    goes on only if a later operator consumes it too and it does not emit it itself. "any": a source that does not say.
    """
    kinds = list(emits or ())
    said = emits is not None
    result = [[kind.__name__ for kind in kinds] if said else ["any"]]
    for index, operator in enumerate(operators):
        later = tuple(kind for other in operators[index + 1 :] for kind in other.consumes)
        taken = tuple(operator.consumes)
        kinds = [
            kind
            for kind in kinds
            if not issubclass(kind, taken) or (issubclass(kind, later) and not issubclass(kind, tuple(operator.emits)))
        ]
        kinds = list(dict.fromkeys([*kinds, *operator.emits]))
        result.append([kind.__name__ for kind in kinds])
    return result


def _connected(checked: PipelineConfig) -> PipelineConfig:
    problems = _unconnected(checked)
    if problems:
        raise ConfigError(problems)
    return checked


def _unconnected(checked: PipelineConfig) -> list[Problem]:
    """The operators that would never be given a record."""
    kinds = _source_types(checked.source)
    if kinds is None:
        return []
    problems: list[Problem] = []
    flowing = [(kind, f"source.{checked.source.type_name}") for kind in kinds]
    for index, stage in enumerate(checked.operators):
        path = show_path(("operators", index, stage.type_name))
        consumes: tuple[type, ...] = tuple(stage.cls.consumes)
        if not any(issubclass(kind, consumes) for kind, _ in flowing):
            wanted = " or ".join(kind.__name__ for kind in consumes) or "nothing"
            there = ", ".join(dict.fromkeys(f"{kind.__name__} (from {maker})" for kind, maker in flowing))
            makers = [_MAKERS[kind.__name__] for kind in consumes if kind.__name__ in _MAKERS]
            hint = f"; put {makers[0]} before it" if makers else ""
            problems.append(Problem(path, f"consumes {wanted}, but all that reaches it is {there}{hint}"))
        flowing += [(kind, path) for kind in stage.cls.emits]
    return problems
