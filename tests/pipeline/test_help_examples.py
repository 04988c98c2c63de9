"""The examples in the help of every verb are commands that it takes."""

from __future__ import annotations

import shlex

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from stepstream.models.registry import model_class
from stepstream.models.weights import shipped_weights
from stepstream.pipeline.cli import app

GROUP = get_command(app)
assert isinstance(GROUP, TyperGroup)
FITTED_WHILE_EVALUATING = {"ridge", "persistence", "weekly-average", "recency"}


def examples() -> list[str]:
    """The lines below "Examples:" of all verbs, without the remark behind a command and what it is piped into."""
    lines = [line.strip() for command in GROUP.commands.values() for line in (command.epilog or "").splitlines()]
    return [line.split("   ")[0].split(" | ")[0] for line in lines if line.startswith("stepstream ")]


def test_every_verb_has_one() -> None:
    assert {line.split()[1] for line in examples()} == set(GROUP.commands)
    assert len(examples()) >= 2 * len(GROUP.commands)


@pytest.mark.parametrize("line", examples())
def test_it_parses_and_names_what_there_is(line: str) -> None:
    _, verb, *words = shlex.split(line)
    context = GROUP.commands[verb].make_context(verb, words)  # raises for an option that does not exist, or is missing
    given = context.params
    weights = given.get("weights")
    if verb in ("train", "evaluate"):
        assert given["model"] in FITTED_WHILE_EVALUATING or model_class(given["model"])
    if verb == "evaluate":
        assert (weights is None) == (given["model"] in FITTED_WHILE_EVALUATING)
        assert weights is None or weights in shipped_weights()
