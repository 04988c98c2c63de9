"""YAML as stepstream reads it: plain values only, bounded, no key twice, and every key's line number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import yaml

__all__ = ["MAX_BYTES", "Path", "YamlProblem", "dump", "read", "value"]

MAX_BYTES = 1 << 20
_MAX_NODES = 100_000
_MAX_DEPTH = 50
_STRING = "tag:yaml.org,2002:str"

Path: TypeAlias = tuple[str | int, ...]


class YamlProblem(ValueError):
    """Text that is not the YAML we read. `line` counts from 1, or is None."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    """SafeLoader whose dates stay strings: options say themselves what they make of a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(text: str, is_name: Callable[[Path], bool] = lambda path: False) -> tuple[Any, dict[Path, int]]:
    """The value of a YAML document and the line (from 1) of each of its keys and list items.

    The plain word `null` is the string "null" where it is a key, and where `is_name` says that a name stands: there
    are parts of that name, and nobody would think of quoting it.

    Raises YamlProblem for a syntax error, a key that stands twice, a key that is not a string, more than `MAX_BYTES`
    bytes, more than 100,000 values after anchors are expanded, or nesting deeper than 50.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlProblem(f"larger than {MAX_BYTES} bytes")
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[Path, int] = {}
        _walk(node, (), lines, [0], is_name)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlProblem(f"not YAML: {message}", mark.line + 1 if mark else None) from error
    except yaml.reader.ReaderError as error:
        raise YamlProblem(f"not YAML: character {error.position} cannot be read ({error.reason})") from error
    except RecursionError as error:
        raise YamlProblem(f"nested deeper than {_MAX_DEPTH}") from error
    except ValueError as error:
        if isinstance(error, YamlProblem):
            raise
        raise YamlProblem(f"not YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _walk(
    node: yaml.Node, path: Path, lines: dict[Path, int], seen: list[int], is_name: Callable[[Path], bool]
) -> None:
    line = node.start_mark.line + 1
    seen[0] += 1
    if seen[0] > _MAX_NODES:
        raise YamlProblem(f"more than {_MAX_NODES} values (anchors expanded)", line)
    if len(path) > _MAX_DEPTH:
        raise YamlProblem(f"nested deeper than {_MAX_DEPTH}", line)
    if _is_null(node) and is_name(path):
        node.tag = _STRING
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), lines, seen, is_name)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key_node, item in node.value:
            key_line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                _walk(item, (*path, "<<"), lines, seen, is_name)
                continue
            if _is_null(key_node):
                key_node.tag = _STRING
            if key_node.tag != _STRING:
                found = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a collection"
                raise YamlProblem(f"key {found!s} is not a string: put it in quotes", key_line)
            key = str(key_node.value)
            if key in keys:
                raise YamlProblem(f"key {key!r} stands twice", key_line)
            keys.add(key)
            lines[(*path, key)] = key_line
            _walk(item, (*path, key), lines, seen, is_name)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null" and node.value == "null"


def value(text: str, is_name: bool = False) -> Any:
    """The value of one line of YAML: `6`, `[3, 6]`; with `is_name`, `null` is the string. Raises YamlProblem."""
    return read(text, lambda path: is_name and not path)[0]


class _Dumper(yaml.SafeDumper):
    """Lists of plain values in one line, the rest in blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        plain = all(item is None or isinstance(item, str | int | float) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes the line ends of Unicode as they are and reads them back as spaces, except in double quotes.
        return self.represent_scalar(_STRING, data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def dump(data: Any) -> str:
    """YAML text that `read` turns back into `data` (dicts with string keys, lists, str, int, float, bool, None)."""
    text: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120
    )
    return text
