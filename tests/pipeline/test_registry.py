from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from stepstream.operators.null import Null
from stepstream.pipeline import registry
from stepstream.pipeline.registry import NameProblem, load, name_of, names

pytestmark = pytest.mark.usefixtures("parts")


def test_every_built_in_name_that_is_listed_can_be_loaded() -> None:
    kinds: tuple[registry.Kind, ...] = ("source", "sink", "operator", "engine")
    for kind in kinds:
        assert names(kind)
        for name in names(kind):
            assert name_of(kind, load(kind, name)) == name


def test_a_class_has_its_shortest_name() -> None:
    assert name_of("operator", Null) == "null"
    own = load("operator", "my_parts:Scale")
    assert name_of("operator", own) == "my_parts:Scale"
    assert load("operator", name_of("operator", own)) is own


def test_a_class_made_in_a_function_has_none() -> None:
    class Local(Null):
        pass

    with pytest.raises(NameProblem, match=r"Local has no importable name: move it to a module of its own"):
        name_of("operator", Local)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nul", "no such operator; did you mean 'null'"),
        ("qqqqq", r"no such operator \(known: "),
        ("my_parts:Keep", "not an operator"),
        ("my_parts:PARTS", "has no 'PARTS'"),
        ("my_parts:Operator", "has no 'Operator'"),
        (":X", "expected package.module:Name"),
        (".x:X", "expected package.module:Name"),
        ("my_parts:", "has no ''"),
        ("stepstream.operators.base:Operator", "an abstract class: it does not define process"),
        ("stepstream.pipeline.registry:load", "not an operator"),
    ],
)
def test_what_cannot_be_loaded_says_why(name: str, message: str) -> None:
    with pytest.raises(NameProblem, match=message):
        load("operator", name)


@pytest.mark.parametrize("name", ["kafka", "faust"])
def test_an_engine_that_is_not_installed_says_so(name: str) -> None:
    if name in names("engine"):
        pytest.skip(f"the {name} engine is installed")
    with pytest.raises(NameProblem, match="an engine that is not installed; installed: local"):
        load("engine", name)


def test_an_installed_package_registers_names(parts: Path) -> None:
    info = parts / "my_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[stepstream.operators]\nscale = my_parts:Scale\nnull = my_parts:Scale\nwrong = my_parts:Keep\n"
    )
    assert metadata.version("my-parts") == "1.0"
    assert load("operator", "scale").__name__ == "Scale"
    assert load("operator", "null") is Null, "a built-in name cannot be taken over"
    assert "scale" in names("operator")
    with pytest.raises(NameProblem, match="not an operator"):
        load("operator", "wrong")
