"""What may be laid over a pipeline file: `${NAME}` in its strings, `STEPSTREAM_...` variables, and `--set a.b=c`.

- `${NAME}` and `${NAME:-default}` inside a string of the file; `$${` is a literal `${`. The result is a string.
- `STEPSTREAM_SOURCE__REPLAY__SPEED=20` is `source.replay.speed`: upper case, two underscores for a dot. The first part
  is NAME, SOURCE, OPERATORS, SINK or ENGINE. Another `STEPSTREAM_...` that no `${...}` names is warned of.
- `--set operators.forecast.horizons=6`: an operator by its type, or by its index from 0 (`operators.1.forecast...` or
  `operators[1].forecast...`), which it must be where two have the same type. The value is YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepstream.pipeline.logs import get_logger
from stepstream.pipeline.registry import suggestion
from stepstream.pipeline.tree import Path, Problem, Tree, show_path
from stepstream.pipeline.yamlfile import YamlProblem, value

__all__ = ["apply_environment", "apply_settings", "escape", "is_stage", "substitute"]

_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|\$\{[^}]*\}?")
_PARTS = ("NAME", "SOURCE", "OPERATORS", "SINK", "ENGINE")
_ENVIRONMENT = re.compile(rf"STEPSTREAM_({'|'.join(_PARTS)})(?:__(.+))?")
# Kubernetes tells every container of a service called stepstream about it in such variables.
_NOT_OURS = re.compile(r"STEPSTREAM_((SERVICE|PORT)(_.*)?|METRICS_HOST)")
_LOG = get_logger(__name__)


class _Wrong(ValueError):
    pass


def substitute(tree: Tree, environ: Mapping[str, str]) -> set[str]:
    """Replaces `${NAME}` in every string value; a variable that is not set and has no default is a problem.

    Returns the names that were there.
    """
    named: set[str] = set()
    tree.root = _substituted(tree, tree.root, (), environ, named)
    return named


def escape(data: Any) -> Any:
    """The inverse of `substitute` with nothing to replace: every `${` in a string becomes `$${`."""
    if isinstance(data, str):
        return data.replace("${", "$${")
    if isinstance(data, dict):
        return {key: escape(item) for key, item in data.items()}
    return [escape(item) for item in data] if isinstance(data, list) else data


def _substituted(tree: Tree, data: Any, path: Path, environ: Mapping[str, str], named: set[str]) -> Any:
    if isinstance(data, dict):
        return {key: _substituted(tree, item, (*path, key), environ, named) for key, item in data.items()}
    if isinstance(data, list):
        return [_substituted(tree, item, (*path, index), environ, named) for index, item in enumerate(data)]
    if not isinstance(data, str):
        return data

    def replacement(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match[0] == "$${":
            return "${"
        if name is None:
            tree.complain(path, f"{match[0]!r}: expected ${{NAME}} or ${{NAME:-default}} (a literal '${{' is '$${{')")
            return ""
        named.add(name)
        if name in environ and (environ[name] or default is None):
            return environ[name]
        if default is None:
            tree.complain(path, f"the environment variable {name} is not set, and ${{{name}}} has no default")
            return ""
        return str(default)

    return _VARIABLE.sub(replacement, data)


def apply_environment(tree: Tree, environ: Mapping[str, str], named: set[str] | None = None) -> None:
    """Lays the `STEPSTREAM_...` variables over the tree, in the order of their names.

    Warns of those that mean nothing; `named` are the ones that the file uses itself.
    """
    for variable in sorted(environ):
        match = _ENVIRONMENT.fullmatch(variable)
        if match:
            dotted = ".".join([match[1], *(match[2] or "").split("__")]).rstrip(".").lower()
            _apply(tree, dotted, environ[variable], f"environment variable {variable}")
        elif variable.startswith("STEPSTREAM_") and variable not in (named or ()) and not _NOT_OURS.fullmatch(variable):
            _LOG.warning("the environment variable %s means nothing%s", variable, _meant(variable))


def _meant(variable: str) -> str:
    """What somebody may have wanted to write."""
    first, _, rest = variable.removeprefix("STEPSTREAM_").partition("__")
    for part in _PARTS:
        if first.startswith(f"{part}_"):  # one underscore, where a dot takes two
            return f"; did you mean 'STEPSTREAM_{part}__{variable.removeprefix(f'STEPSTREAM_{part}_')}'?"
    known = [f"STEPSTREAM_{part}{'__' if rest else ''}{rest}" for part in _PARTS if suggestion(first, [part])]
    return suggestion(variable, known) or f" (expected STEPSTREAM_ and {', '.join(_PARTS[:-1])} or {_PARTS[-1]})"


def apply_settings(tree: Tree, settings: Sequence[str]) -> None:
    """Lays `a.b=c` texts over the tree, in order."""
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted:
            tree.problems.append(
                Problem("", f"{setting!r}: expected key=value, such as source.replay.speed=20", "--set")
            )
        else:
            _apply(tree, dotted.strip(), text, f"--set {dotted.strip()}")


def _apply(tree: Tree, dotted: str, text: str, where: str) -> None:
    try:
        path = _locate(tree.root, re.sub(r"\[(\d+)\]", r".\1", dotted))
        tree.assign(path, value(text, is_name=is_stage(path)), where)
    except YamlProblem as error:
        tree.problems.append(Problem("", f"the value {text!r} is {error}", where))
    except _Wrong as error:
        tree.problems.append(Problem("", str(error), where))


def _locate(root: dict[str, Any], dotted: str) -> Path:
    """The path that dotted text means in this tree: keys that exist may contain dots, so the longest one is taken."""
    node: Any = root
    path: list[str | int] = []
    rest = dotted
    while rest:
        if isinstance(node, list):
            index, name, rest = _into_list(node, rest, show_path(tuple(path)))
            path += [index] if name is None else [index, name]
            node = node[index] if name is None else node[index][name]
            continue
        if not isinstance(node, dict):
            raise _Wrong(f"{show_path(tuple(path))} is a single value and has nothing below it")
        key, rest = _head(rest, list(node))
        if rest and node and key not in node and is_stage(tuple(path)):
            raise _Wrong(f"{show_path(tuple(path))} is {next(iter(node))!r}, not {key!r}")
        path.append(key)
        node = node.get(key, {})
    return tuple(path)


def is_stage(path: Path) -> bool:
    """Whether a part of the pipeline stands at `path`: a TYPE, or a mapping whose only key is one."""
    return path in (("source",), ("sink",), ("engine",)) or (len(path) == 2 and path[0] == "operators")


def _head(rest: str, known: list[str]) -> tuple[str, str]:
    for key in sorted(known, key=len, reverse=True):
        if rest == key or rest.startswith(f"{key}."):
            return key, rest[len(key) + 1 :]
    head, _, rest = rest.partition(".")
    if not head:
        raise _Wrong("has an empty part between its dots")
    return head, rest


def _into_list(items: list[Any], rest: str, shown: str) -> tuple[int, str | None, str]:
    """(the index, the operator's TYPE if it was named by that, what is left of the text)."""
    head, _, after = rest.partition(".")
    if head.isdigit():
        if int(head) >= len(items):
            raise _Wrong(f"{shown} has {len(items)} items, so there is no {shown}[{head}]")
        return int(head), None, after
    types = [next(iter(item)) for item in items if isinstance(item, dict) and len(item) == 1]
    name, after = _head(rest, types)
    where = [index for index, item in enumerate(items) if isinstance(item, dict) and list(item) == [name]]
    if len(where) > 1:
        choices = " or ".join(f"{shown}.{index}.{name}" for index in where)
        raise _Wrong(f"{len(where)} of {shown} are {name!r}: say {choices}")
    if not where:
        raise _Wrong(f"{shown} has no {name!r}{suggestion(name, types)} (it has: {', '.join(types) or 'nothing'})")
    return where[0], name, after
