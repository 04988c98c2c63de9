"""SNAP's edge lists: text without a header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepstream.connectors.base import InputError
from stepstream.connectors.interactions_snap import InteractionsSnap
from stepstream.connectors.recording import find_reader, open_recording

MESSAGES = ["1 2 1082040961", "3 4 1082155839", "1 2 1082414391", "2 2 1082414391"]
RATINGS = ["7188,1,10,1407470400", "430,1,-10,1376539200", "3134,430,1,1369713600.5"]


def written(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_text("\n".join(lines) + end)
    return path


@pytest.mark.parametrize("delimiter", [" ", "\t", ","])
@pytest.mark.parametrize("end", ["\n", ""])
def test_source_destination_time(tmp_path: Path, delimiter: str, end: str) -> None:
    lines = [line.replace(" ", delimiter) for line in MESSAGES]
    found = open_recording(written(tmp_path / "CollegeMsg.txt", lines, end))
    assert (found.format, found.nodes) == ("interactions-snap", (1, 2, 3, 4))
    assert [found.nodes[i] for i in found.source] == [1, 3, 1, 2]
    assert [found.nodes[i] for i in found.destination] == [2, 4, 2, 2]
    assert (found.times_ns // 10**9).tolist() == [1082040961, 1082155839, 1082414391, 1082414391]
    assert found.features is None


def test_source_target_rating_time_out_of_order(tmp_path: Path) -> None:
    found = open_recording(written(tmp_path / "soc-sign-bitcoin-otc.csv", RATINGS))
    assert found.format == "interactions-snap" and found.feature_names == ("rating",)
    assert found.features is not None and np.array_equal(found.features[:, 0], [10, -10, 1])
    assert found.times_ns.tolist() == [1407470400 * 10**9, 1376539200 * 10**9, 1369713600_500000000]


@pytest.mark.parametrize(
    "lines",
    [
        ["0.003811 96 133 0", "0.003820 96 133 1"],  # events of a camera: t x y p
        ["11718656 762 147 0", "11718657 763 147 1"],
        ["1 2 0.5", "2 3 0.7"],  # a weighted graph
        ["source destination time", "1 2 3"],
        ["1 2", "2 3"],
        ["1 2 -3"],
    ],
)
def test_what_may_be_anything_else_is_not_taken_for_one(tmp_path: Path, lines: list[str]) -> None:
    path = written(tmp_path / "other.txt", lines)
    assert not InteractionsSnap.sniff(path, path.read_bytes())
    with pytest.raises(InputError, match=r"row 1: expected whole numbers: source, destination, time"):
        InteractionsSnap.read(path)


def test_a_head_that_ends_within_a_row_does_not_decide(tmp_path: Path) -> None:
    head = "\n".join([*MESSAGES, "17 18"]).encode()
    assert InteractionsSnap.sniff(tmp_path / "long.txt", head)


def test_a_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "cut.txt", [*MESSAGES * 10, "3 4"])
    assert isinstance(find_reader(path), InteractionsSnap)
    with pytest.raises(InputError, match=r"row 41: expected 3 fields, got 2"):
        open_recording(path)
    path = written(tmp_path / "word.txt", [*MESSAGES * 10, "3 4 soon"])
    with pytest.raises(InputError, match=r"row 41: time: .*'soon'"):
        open_recording(path)
