"""What the local engine refuses or tells apart before and while it runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from streams import FolderSink, ListSource, chain, readings

from stepstream.connectors.base import DeadLetter, Partition
from stepstream.connectors.output import writing
from stepstream.connectors.records import Record
from stepstream.pipeline.engines.base import EngineError
from stepstream.pipeline.engines.local import LocalEngine
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import Task

IN: Partition = ("in", 0)


def test_a_reader_that_left_is_told_apart_from_a_full_disk(tmp_path: Path) -> None:
    class Pipe(FolderSink):
        def write(self, records: Sequence[Record], dead: Sequence[DeadLetter]) -> None:
            reader, writer = os.pipe()
            os.close(reader)
            with writing("standard output"):
                os.write(writer, b"x")

    with pytest.raises(BrokenPipeError):
        LocalEngine(LocalEngine.Options()).run(
            Task(chain(), Metrics()), ListSource({IN: readings(450, 5)}), Pipe(tmp_path)
        )


def test_where_state_cannot_be_kept_is_said(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file")
    engine = LocalEngine(LocalEngine.Options())
    with pytest.raises(EngineError, match="cannot keep state there: Not a directory"):
        engine.run(
            Task(chain(), Metrics()), ListSource({IN: readings(450, 5)}), FolderSink(tmp_path), tmp_path / ".stepstream"
        )
    tmp_path.unlink()


def test_a_task_with_state_is_not_taken(tmp_path: Path) -> None:
    task = Task(chain(), Metrics())
    task.process(readings(5, 1))
    with pytest.raises(ValueError, match="a run needs a fresh one"):
        LocalEngine(LocalEngine.Options()).run(task, ListSource({IN: readings(450, 5)}), FolderSink(tmp_path))
