from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepstream.pipeline import registry
from stepstream.pipeline.config import ConfigError, PipelineConfig, from_text, read_file

GOOD = """\
name: toy
source: {"my_parts:Count": {n: 5}}
operators:
  - my_parts:Scale: {by: 3}
  - my_parts:Scale:
sink: my_parts:Keep
engine: my_parts:Count
"""
pytestmark = pytest.mark.usefixtures("parts", "any_engine")


@pytest.fixture
def any_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are not about engines: a source does for one."""
    from stepstream.pipeline import registry

    monkeypatch.setitem(registry._BASES, "engine", "stepstream.connectors.base:Source")


def options(config: PipelineConfig) -> list[dict[str, object]]:
    return [stage.options.model_dump() for stage in (config.source, *config.operators, config.sink)]


def problems(text: str, settings: tuple[str, ...] = (), environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_text(text, settings, environ, label="p.yaml")
    return str(caught.value).splitlines()


def test_a_good_file_becomes_checked_stages() -> None:
    config = from_text(GOOD)
    assert config.name == "toy"
    assert config.source.type_name == "my_parts:Count"
    assert [stage.options.model_dump()["by"] for stage in config.operators] == [3.0, 2.0]
    assert config.source.make().options.n == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n: 5", "tag: [5]", r"p.yaml:2: source.my_parts:Count.tag: no such option; did you mean 'tags'\? \(options: .*\)"),  # noqa: E501
        ("by: 3", "horizon: 3", r"p.yaml:4: operators\[0\].my_parts:Scale.horizon: no such option; did you mean 'horizons'\?.*"),  # noqa: E501
        ("by: 3", "by: much", r"p.yaml:4: operators\[0\].my_parts:Scale.by: 'much': expected a valid number.*"),
        ("by: 3", "every: 5", r".*Scale.every: 5: expected a valid string"),
        ("by: 3", "every: 5h", r".*Scale.every: '5h': expected a duration such as 5min"),
        ("by: 3", "inner: {alpa: 1}", r".*Scale.inner.alpa: no such option; did you mean 'alpha'\? \(options: alpha\)"),
        ("by: 3", "horizons: [1, x]", r".*Scale.horizons.*: expected a valid integer.*"),
        ("by: 3", "horizons: x", r".*Scale.horizons: 'x': expected a valid integer.* or expected a valid list"),
        ("n: 5", "n: -1", r".*Count.n: -1: expected greater than or equal to 0"),
        ("n: 5", "speed: fast", r".*Count.speed: 'fast': expected a valid number.* or expected 'max'"),
        ("n: 5", "password: 5", r".*Count.password: '\*\*\*': expected a valid string"),
        ("my_parts:Scale: {by: 3}", "my_parts:Needs: {}", r".*\[0\].my_parts:Needs.model: is missing"),
        ("my_parts:Scale: {by: 3}", "algn: {}", r"p.yaml:4: operators\[0\].algn: no such operator; did you mean 'align'\?.*"),  # noqa: E501
        ("my_parts:Scale: {by: 3}", "my_parts:Scael: {}", r".*module my_parts has no 'Scael'; did you mean 'Scale'\?"),
        ("my_parts:Scale: {by: 3}", "my_part:Scale: {}", r".*there is no module 'my_part' on the Python path"),
        ("my_parts:Scale: {by: 3}", "my_parts:Keep: {}", r".*not an operator: expected a subclass of .*Operator"),
        ("my_parts:Scale: {by: 3}", "my_parts:NotAnOperator: {}", r".*not an operator.*"),
        ("my_parts:Scale: {by: 3}", "my_broken:X: {}", r".*importing my_broken failed: SyntaxError.*"),
        ("my_parts:Scale: {by: 3}", "my_needy:X: {}", r".*my_needy needs the package 'a_package_that_nobody_has'.*"),
        ("my_parts:Scale: {by: 3}", "my_parts:Scale: 3", r".*\[0\].my_parts:Scale: 3: expected a mapping of options"),
        ("my_parts:Scale: {by: 3}", "3", r".*operators\[0\]: 3: expected an operator such as .*"),
        ("sink: my_parts:Keep", "sink: {a: {}, b: {}}", r"p.yaml:6: sink: has 2 types \(a, b\): expected one.*"),
        ("sink: my_parts:Keep", "", r"p.yaml: sink: is missing: expected a sink such as .*"),
        ("sink: my_parts:Keep", "sikn: my_parts:Keep", r"p.yaml:6: sikn: no such key; did you mean 'sink'\?.*"),
        ("name: toy", "name: [toy]", r'p.yaml:1: name: \["toy"\]: expected letters.*'),
        ("name: toy", "name: ../up", r"p.yaml:1: name: '../up': expected letters.*"),
        ("name: toy", "", r"p.yaml: name: is missing: .*"),
        ("name: toy", "name: toy\nname: joy", r"p.yaml:2: key 'name' stands twice"),
        ("n: 5", "n: 5, n: 6", r"p.yaml:2: key 'n' stands twice"),
        ("n: 5", "5: n", r"p.yaml:2: key 5 is not a string: put it in quotes"),
        ("name: toy", "name: {", r"p.yaml:\d+: not YAML: .*"),
        ("name: toy", "name: !!python/object/apply:os.getcwd []", r"p.yaml:1: not YAML: could not determine a constructor.*"),  # noqa: E501
        ("n: 5", "n: '${NOWHERE}'", r"p.yaml:2: .*Count.n: the environment variable NOWHERE is not set.*"),
        ("n: 5", "n: '${NO WHERE}'", r".*Count.n: '\$\{NO WHERE\}': expected \$\{NAME\} or .*"),
        ("engine: my_parts:Count", "engine: kafak", r"p.yaml:7: engine.kafak: no such engine.*"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(old: str, new: str, message: str) -> None:
    assert old in GOOD
    lines = problems(GOOD.replace(old, new, 1))
    assert any(re.fullmatch(message, line) for line in lines), lines


def test_all_mistakes_are_told_at_once() -> None:
    text = GOOD.replace("n: 5", "m: 5").replace("by: 3", "horizon: 3, by: x").replace("name: toy", "nme: toy")
    assert len(problems(text)) == 5


@pytest.mark.parametrize("text", ["", "- a", "7", "# nothing"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    (line,) = problems(text)
    assert "expected a mapping with the keys name, source" in line


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "[" * 3000,
        "a: &a [x,x,x,x,x,x,x,x]\n"
        + "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 8)}]" for i in range(9)),
        "a: " + "x" * (1 << 20),
        "a: \x00",
    ],
    ids=["cycle", "deep", "billion laughs", "large", "control"],
)
def test_hostile_yaml_is_refused(text: str) -> None:
    assert len(problems(text)) == 1


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("source.my_parts:Count.n=7", 7),
        ("source.my_parts:Count.n= 7 ", 7),
        ("source={'my_parts:Count': {n: 7}}", 7),
    ],
)
def test_set_changes_an_option_or_a_whole_part(setting: str, expected: int) -> None:
    assert from_text(GOOD, [setting]).source.options.model_dump()["n"] == expected


@pytest.mark.parametrize("key", ["operators.1.my_parts:Scale.by", "operators[1].my_parts:Scale.by"])
def test_an_operator_is_addressed_by_index(key: str) -> None:
    config = from_text(GOOD, [f"{key}=9"])
    assert [stage.options.model_dump()["by"] for stage in config.operators] == [3.0, 9.0]


def test_an_operator_is_addressed_by_its_type_where_that_is_unique() -> None:
    one = GOOD.replace("  - my_parts:Scale:\n", "")
    config = from_text(one, ["operators.my_parts:Scale.inner.alpha=9", "operators.my_parts:Scale.horizons=[1, 2]"])
    assert options(config)[1]["inner"] == {"alpha": 9.0}
    assert options(config)[1]["horizons"] == [1, 2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("operators.my_parts:Scale.by=9", "2 of operators are 'my_parts:Scale': say operators.0.my_parts:Scale or operators.1"),  # noqa: E501
        ("operators.align.by=9", "operators has no 'align' (it has: my_parts:Scale, my_parts:Scale)"),
        ("operators.7.align=9", "operators has 2 items, so there is no operators[7]"),
        ("source.replay.speed=9", "source is 'my_parts:Count', not 'replay'"),
        ("source.my_parts:Count.n.x=9", "source.my_parts:Count.n is a single value and has nothing below it"),
        ("source.my_parts:Count.n=[", "the value '[' is not YAML"),
        ("source.my_parts:Count.m=1", "--set source.my_parts:Count.m: source.my_parts:Count.m: no such option"),
        ("nonsense", "expected key=value"),
        ("soruce=1", "no such key; did you mean 'source'?"),
        ("source..n=1", "empty part between its dots"),
    ],
)  # fmt: skip
def test_a_wrong_set_is_one_clear_line(setting: str, message: str) -> None:
    (line,) = problems(GOOD, (setting,))
    assert line.startswith("--set")
    assert message in line


def test_the_environment_overrides_the_file_and_set_overrides_the_environment() -> None:
    text = "name: toy\nsource: my_parts:Count\noperators: [my_parts:Scale]\nsink: my_parts:Keep\nengine: my_parts:Count"
    environ = {
        "STEPSTREAM_NAME": "other",
        "STEPSTREAM_OPERATORS__0": "{'my_parts:Scale': {by: 5, every: 1min}}",
        "STEPSTREAM_LOG": "x",
        "HOME": "/",
    }
    config = from_text(text, ["operators.0.my_parts:Scale.by=6"], environ)
    assert config.name == "other"
    assert (options(config)[1]["by"], options(config)[1]["every"]) == (6.0, "1min")


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    (line,) = problems(GOOD, environ={"STEPSTREAM_OPERATORS__9__ALIGN__EVERY": "5min"})
    assert line == (
        "environment variable STEPSTREAM_OPERATORS__9__ALIGN__EVERY: operators has 2 items, so there is no operators[9]"
    )


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("${A}/out", {"A": "x"}, "x/out"),
        ("${A:-y}", {}, "y"),
        ("${A:-y}", {"A": ""}, "y"),
        ("${A:-}", {}, ""),
        ("${A}", {"A": ""}, ""),
        ("$${A}", {}, "${A}"),
        ("${A}", {"A": "${B}"}, "${B}"),
        ("$A costs 5$", {}, "$A costs 5$"),
    ],
)
def test_variables_in_strings(text: str, environ: dict[str, str], expected: str) -> None:
    config = from_text(
        GOOD.replace("sink: my_parts:Keep", f"sink: {{'my_parts:Keep': {{path: '{text}'}}}}"), (), environ
    )
    assert options(config)[-1]["path"] == expected


def test_dates_stay_strings() -> None:
    config = from_text(GOOD.replace("sink: my_parts:Keep", "sink: {'my_parts:Keep': {path: 2012-03-01}}"))
    assert options(config)[-1]["path"] == "2012-03-01"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content, message in [
        ("none.yaml", None, "No such file or directory"),
        ("latin.yaml", b"name: caf\xe9", "not a text file in UTF-8"),
        ("large.yaml", b"#" * (1 << 20) + b"##", "too large for a pipeline file"),
    ]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            read_file(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_file(tmp_path)


def test_a_built_in_part_that_this_installation_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILT_IN["engine"], "kafka", "stepstream.pipeline.engines.nowhere:KafkaEngine")
    with pytest.raises(registry.NameProblem, match="an engine that is not installed; installed: .*local"):
        registry.load("engine", "kafka")
