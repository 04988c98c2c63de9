"""What the names in a pipeline file stand for: sources, sinks, operators and engines, imported only when asked for.

A TYPE is one of
- a built-in name (`align`),
- a name that an installed package registered as an entry point (groups `stepstream.sources`, `stepstream.sinks`,
  `stepstream.operators`, `stepstream.engines`); a built-in name cannot be taken over,
- `package.module:Name`, a class anywhere on the Python path.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from importlib import metadata
from typing import Any, Literal, TypeAlias

__all__ = ["BUILT_IN", "Kind", "NameProblem", "check", "describe_kind", "load", "name_of", "names", "suggestion"]

Kind: TypeAlias = Literal["source", "sink", "operator", "engine"]

BUILT_IN: dict[Kind, dict[str, str]] = {
    "source": {
        "replay": "stepstream.connectors.replay:Replay",
        "jsonl": "stepstream.connectors.jsonl:JsonLines",
        "stdin": "stepstream.connectors.stdio:Stdin",
        "kafka": "stepstream.connectors.kafka:KafkaSource",
        "simulated-lidar": "stepstream.connectors.simulated_lidar:SimulatedLidar",
    },
    "sink": {
        "files": "stepstream.connectors.files:Files",
        "stdout": "stepstream.connectors.stdio:Stdout",
        "null": "stepstream.connectors.null:Null",
        "kafka": "stepstream.connectors.kafka:KafkaSink",
    },
    "operator": {
        "accumulate": "stepstream.operators.accumulate:Accumulate",
        "align": "stepstream.operators.align:Align",
        "cluster": "stepstream.operators.cluster:Cluster",
        "deskew": "stepstream.operators.deskew:Deskew",
        "detect": "stepstream.operators.detect:Detect",
        "denoise": "stepstream.operators.denoise:Denoise",
        "forecast": "stepstream.operators.forecast:Forecaster",
        "rate-limit": "stepstream.operators.rate_limit:RateLimit",
        "score": "stepstream.operators.score:Scorer",
        "interactions": "stepstream.operators.interactions:Interactions",
        "limit-events": "stepstream.operators.limit_events:LimitEvents",
        "links": "stepstream.operators.links:Links",
        "shards": "stepstream.operators.shards:Shards",
        "shard-links": "stepstream.operators.shard_links:ShardLinks",
        "null": "stepstream.operators.null:Null",
        "track": "stepstream.operators.track:Track",
        "recognize": "stepstream.operators.recognize:Recognize",
        "perceive": "stepstream.operators.perceive:Perceive",
        "voxelize": "stepstream.operators.voxelize:Voxelize",
    },
    "engine": {
        "local": "stepstream.pipeline.engines.local:LocalEngine",
        "kafka": "stepstream.pipeline.engines.kafka:KafkaEngine",
        "faust": "stepstream.pipeline.engines.faust:FaustEngine",
    },
}
_BASES: dict[Kind, str] = {
    "source": "stepstream.connectors.base:Source",
    "sink": "stepstream.connectors.base:Sink",
    "operator": "stepstream.operators.base:Operator",
    "engine": "stepstream.pipeline.engines.base:Engine",
}


class NameProblem(ValueError):
    """A TYPE that names nothing, or not what was asked for. The message does not repeat the TYPE itself."""


def describe_kind(kind: Kind) -> str:
    """`kind` with its article: "an operator"."""
    return f"{'an' if kind in ('operator', 'engine') else 'a'} {kind}"


def suggestion(word: str, known: list[str]) -> str:
    """`; did you mean 'align'?`, or "" if nothing in `known` is close to `word`."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _entry_points(kind: Kind) -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=f"stepstream.{kind}s")}


def names(kind: Kind) -> list[str]:
    """The registered names that this installation can load, sorted."""
    here = {name for name, target in BUILT_IN[kind].items() if _present(target)}
    return sorted(here | set(_entry_points(kind)))


def _present(target: str) -> bool:
    module = target.partition(":")[0]
    return importlib.util.find_spec(module) is not None


def load(kind: Kind, name: str) -> type[Any]:
    """The class that `name` stands for, a subclass of that kind's base class with pydantic `Options`.

    Raises NameProblem saying what is wrong and, for a typo, what was probably meant. Importing a class runs the
    code of its module: a pipeline file is as trusted as a script.
    """
    if ":" in name:
        return check(kind, _imported(kind, name))
    if name in BUILT_IN[kind]:
        if not _present(BUILT_IN[kind][name]):
            raise NameProblem(f"{describe_kind(kind)} that is not installed; installed: {', '.join(names(kind))}")
        return check(kind, _imported(kind, BUILT_IN[kind][name]))
    registered = _entry_points(kind)
    if name in registered:
        return check(kind, _imported(kind, registered[name].value))
    known = names(kind)
    raise NameProblem(
        f"no such {kind}{suggestion(name, known)} (known: {', '.join(known)}; your own: package.module:Name)"
    )


def name_of(kind: Kind, cls: type[Any]) -> str:
    """The shortest TYPE that stands for `cls` in a pipeline file: the inverse of `load`.

    Raises NameProblem for a class that cannot be imported by name (made in a function, or in the script that runs).
    """
    target = f"{cls.__module__}:{cls.__qualname__}"
    for name, known in BUILT_IN[kind].items():
        if known == target:
            return name
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise NameProblem(f"{cls.__qualname__} has no importable name: move it to a module of its own")
    return target


def _imported(kind: Kind, target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise NameProblem(f"there is no module {missing!r} on the Python path") from error
        raise NameProblem(f"{module_name} needs the package {missing!r}, which is not installed") from error
    except (TypeError, ValueError) as error:
        raise NameProblem(f"expected package.module:Name ({error})") from error
    except Exception as error:
        raise NameProblem(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            classes = [name for name, _ in inspect.getmembers(module, inspect.isclass)]
            raise NameProblem(f"module {module_name} has no {attribute!r}{suggestion(attribute, classes)}")
        found = getattr(found, part)
    return found


def check(kind: Kind, found: Any) -> type[Any]:
    """`found`, if it is a class that can be a part of that kind. Raises NameProblem."""
    from pydantic import BaseModel

    module_name, _, attribute = _BASES[kind].partition(":")
    base = getattr(importlib.import_module(module_name), attribute)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise NameProblem(f"not {describe_kind(kind)}: expected a subclass of {module_name}.{attribute}")
    if inspect.isabstract(found):
        left = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise NameProblem(f"an abstract class: it does not define {left}")
    options = getattr(found, "Options", None)
    if not (inspect.isclass(options) and issubclass(options, BaseModel)):
        raise NameProblem("its Options is not a pydantic model")
    return found
