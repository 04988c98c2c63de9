from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstream.pipeline.yamlfile import YamlProblem, dump, read, value

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_what_is_dumped_is_read_back(data: dict[str, Any]) -> None:
    again, _ = read(dump(data))
    assert again == data
    assert repr(again) == repr(data), "the types too"


@pytest.mark.parametrize(
    "text", ["2012-03-01", "2012-03-01 00:00:00", "null", "true", "1e-3", "0x1F", "12:30", "<<", "=", "~"]
)
def test_strings_that_look_like_something_else_come_back(text: str) -> None:
    assert read(dump({text: text}))[0] == {text: text}


def test_every_key_and_item_has_its_line() -> None:
    _, lines = read("a: 1\nb:\n  - c: 2\n  -\n    d: {e: 3}\n")
    found = {".".join(map(str, path)): line for path, line in lines.items()}
    assert found == {"a": 1, "b": 2, "b.0": 3, "b.0.c": 3, "b.1": 5, "b.1.d": 5, "b.1.d.e": 5}


def test_anchors_and_merge_keys_work() -> None:
    assert read("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}")[0] == {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}


def test_null_is_a_name_where_a_name_stands() -> None:
    assert value("null") is None
    assert value("null", is_name=True) == "null"
    assert read("null: null")[0] == {"null": None}
    assert read("sink: null\nx: null", lambda path: path == ("sink",))[0] == {"sink": "null", "x": None}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\na: 2", 2, "key 'a' stands twice"),
        ("a: {b: 1, b: 2}", 1, "key 'b' stands twice"),
        ("a:\n  true: 1", 2, "key true is not a string"),
        ("a:\n  [1]: 1", 2, "key a collection is not a string"),
        ("a: 1\n b: 2", 2, "not YAML"),
        ("a: 1\n--- \nb: 2", 2, "not YAML: expected a single document"),
        ("a: !!python/name:os.system", 1, "could not determine a constructor"),
        ("a: *x", 1, "undefined alias"),
        ("a: !!int x", None, "not YAML: invalid literal"),
    ],
)
def test_bad_yaml_names_its_line(text: str, line: int | None, message: str) -> None:
    with pytest.raises(YamlProblem, match=message) as caught:
        read(text)
    assert caught.value.line == line
