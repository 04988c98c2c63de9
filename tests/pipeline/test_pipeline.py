from __future__ import annotations

import importlib
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Record
from stepstream.operators.null import Null
from stepstream.pipeline import ConfigError, Pipeline, use

pytestmark = pytest.mark.usefixtures("parts")


def own(name: str) -> Any:
    return getattr(importlib.import_module("my_parts"), name)


def toy(tmp_path: Path, **source: Any) -> Pipeline:
    return Pipeline(
        name="toy",
        source=use(own("Count"), **source),
        operators=[
            use(own("Scale"), by=3),
            "null",
            use("my_parts:Scale", every=timedelta(minutes=10), horizons=(1, 2)),
        ],
        sink=use("my_parts:Keep", path=tmp_path / "out"),
    )


def test_a_pipeline_written_in_python_runs(tmp_path: Path) -> None:
    pipeline = toy(tmp_path, n=7)
    seen: list[Record] = []
    progress: list[tuple[int, int | None]] = []
    result = pipeline.run(on_progress=lambda done, total: progress.append((done, total)), on_output=seen.extend)
    assert result.ended
    assert (result.records_in, len(seen)) == (7, result.records_out)
    kept: list[Record] = own("Keep").kept
    assert kept == seen
    # What the first operator emits of the type that it consumes stands in the place of what it was given.
    assert sorted({record.value.value / 2 for record in kept if record.origin.offset == 2}) == [6.0]
    assert progress[-1] == (7, 7)
    assert (tmp_path / "out" / ".stepstream" / "commit.json").exists()
    assert pipeline.run().already_complete


def test_the_yaml_file_is_its_serial_form(tmp_path: Path) -> None:
    pipeline = toy(tmp_path, n=7, speed=2.5, tags=[1, 2])
    text = pipeline.to_yaml()
    again = Pipeline.from_yaml(text)
    assert again == pipeline
    assert again.to_yaml() == text
    assert again.to_dict() == pipeline.to_dict()
    assert Pipeline.from_dict(pipeline.to_dict()) == pipeline
    (tmp_path / "p.yaml").write_text(text)
    assert Pipeline.from_file(tmp_path / "p.yaml") == pipeline
    assert text.splitlines()[0] == "name: toy"
    assert [stage["by"] for stage in [pipeline.to_dict()["operators"][0]["my_parts:Scale"]]] == [3]


def test_the_serial_form_keeps_dollar_braces(tmp_path: Path) -> None:
    pipeline = Pipeline("p", "my_parts:Count", use("my_parts:Keep", path="${HOME}/$${x}"))
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline


def test_different_pipelines_differ(tmp_path: Path) -> None:
    assert toy(tmp_path, n=7) != toy(tmp_path, n=8)
    assert toy(tmp_path) != "toy"


def test_parts_may_be_dicts_names_or_classes(tmp_path: Path) -> None:
    one = Pipeline(
        "p", {"my_parts:Count": {"n": 2}}, "my_parts:Keep", [Null, {"null": {}}, "null", use("null")], {"local": None}
    )
    assert repr(one) == "Pipeline('p': my_parts:Count -> null -> null -> null -> null -> my_parts:Keep)"
    assert one.operator_names() == ["null", "null-2", "null-3", "null-4"]


def test_a_class_without_a_name_runs_but_has_no_serial_form() -> None:
    class Local(Null):
        pass

    pipeline = Pipeline("p", use("my_parts:Count", n=2), "null", [Local])
    assert pipeline.run().records_out == 2
    with pytest.raises(ConfigError, match="Local has no importable name"):
        pipeline.to_yaml()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pipeline("p", "my_parts:Count", "null", [use("null", by=3)]), r"operators\[0\].null.by: no such option"),  # noqa: E501
        (lambda: Pipeline("p", "my_parts:Kuont", "null"), "did you mean 'Count'"),
        (lambda: Pipeline("p", Null, "null"), "source.stepstream.operators.null:Null: not a source"),
        (lambda: Pipeline("", "my_parts:Count", "null"), "name: ''"),
        (lambda: use("null", key=object()), "key: a object: expected what a YAML file can hold"),
        (lambda: use("null", key=[1, {"a": {1}}]), r"key\[1\].a: a set: expected"),
        (lambda: Pipeline.from_dict({"name": "p"}), "source: is missing"),
        (lambda: Pipeline("p", "my_parts:Count", "null", ["my_parts:Needs"]), "model: is missing"),
    ],
)  # fmt: skip
def test_mistakes_in_python_name_the_part(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_operator_that_would_never_get_a_record_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline("p", "my_parts:Count", "null", ["my_parts:Scale", use("my_parts:Needs", model="x")])
    assert str(caught.value) == (
        "operators[1].my_parts:Needs: consumes SensorFrame, but all that reaches it is "
        "Reading (from source.my_parts:Count), Reading (from operators[0].my_parts:Scale); put align before it"
    )
    Pipeline("p", "my_parts:Count", "null", ["null", use("my_parts:Needs", model="x")])
    Pipeline("p", "stdin", "null", [use("my_parts:Needs", model="x")])


def test_a_part_that_cannot_be_made_is_named() -> None:
    pipeline = Pipeline("p", use("my_parts:Count", n=13), "null")
    with pytest.raises(InputError, match=r"^source.my_parts:Count: 13 readings: expected any other number$"):
        pipeline.run()


def test_stop_before_the_first_record() -> None:
    stop = threading.Event()
    stop.set()
    result = Pipeline("p", use("my_parts:Count", n=5), "null").run(stop)
    assert (result.ended, result.records_in) == (False, 0)


def test_describe_tells_parts_types_and_hides_secrets(tmp_path: Path) -> None:
    description = toy(tmp_path, n=5, password="hunter2").describe()
    assert "hunter2" not in str(description)
    assert description["source"]["emits"] == ["Reading"]
    assert [part["name"] for part in description["operators"]] == ["Scale", "null", "Scale-2"]
    assert description["operators"][0]["receptive_field"] == 1
    assert description["flow"] == [["Reading"], ["Reading"], ["Reading", "SensorFrame"], ["SensorFrame", "Reading"]]
    assert not (tmp_path / "out").exists(), "describing opens nothing"
