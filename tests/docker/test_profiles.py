"""The compose file's profiles as shipped: what is played comes out as an undisturbed process has it, to the byte."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("kafka", reason="kafka-python is not installed")

if TYPE_CHECKING:
    from engine import Engine
    from stack import Stack

TOPICS = {"lidar": "lidar.tracks", "events": "events.activities", "graph": "graph.links"}
LEAST = {"lidar": 32, "events": 3, "graph": 250}
"""Outputs: one for each sweep; three gestures; one for each message of nodes that have been seen before."""


@pytest.fixture
def stack(engine: Engine, image: str, tmp_path: Path) -> Iterator[Stack]:
    from stack import Stack
    from stand_ins import KAFKA, stand_in

    if (reason := stand_in(engine, KAFKA)) is not None:
        pytest.skip(reason)
    made = Stack(engine, image, 1)
    draw = random.Random(0)
    messages = tmp_path / "messages.txt"
    messages.write_text("".join(f"{draw.randrange(40)} {draw.randrange(40, 80)} {time}\n" for time in range(300)))
    messages.chmod(0o644)
    made.environment |= {"GRAPH_RECORDING": str(messages), "GRAPH_RATE": "max", "COMPOSE_PROFILES": ",".join(TOPICS)}
    with made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_profile_does_its_job(stack: Stack) -> None:
    from stack import Reader, judge, wait_until

    services = [f"{name}-{role}" for name in TOPICS for role in ("worker", "replayer")]
    stack.up(*services)
    for name, topic in TOPICS.items():
        wait_until(f"{name} is played", lambda n=name: not stack.containers(f"{n}-replayer"), 120, 1)
        with Reader(stack, (topic,)) as reader:
            verdict = judge(stack, reader, name)
        assert verdict.exact, (name, verdict, stack.logs(f"{name}-worker"))
        assert verdict.found >= LEAST[name], name
