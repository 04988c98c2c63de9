from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording

WIDE = """,773869,767541
2012-03-01 00:00:00,64.375,0.0
2012-03-01 00:05:00,62.0,
2012-03-01 00:10:00,61.5,48.25
"""
LONG = """time,sensor,value
2020-01-01T00:00:00Z,a,1.5
2020-01-01T00:00:00Z,b,2
2020-01-01T00:05:00Z,b,3
2020-01-01T00:10:00Z,a,
2020-01-01T00:10:00Z,a,5
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "file.dat"
    path.write_text(text)
    return path


def test_wide(tmp_path: Path) -> None:
    recording = open_recording(written(tmp_path, WIDE))
    assert recording.format == "traffic-csv"
    assert recording.sensors == ("773869", "767541")
    expected = np.array([[64.375, np.nan], [62, np.nan], [61.5, 48.25]], np.float32)
    np.testing.assert_array_equal(recording.values, expected)
    summary = recording.summary()
    assert (summary["start"], summary["end"], summary["step_s"]) == (
        "2012-03-01T00:00:00",
        "2012-03-01T00:10:00",
        300,
    )


def test_wide_as_pandas_writes_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    times = pd.date_range("2017-01-01", periods=40, freq="5min")
    values = rng.uniform(1, 70, (40, 325)).astype(np.float32)
    frame = pd.DataFrame(values, times, [str(400_000 + i) for i in range(325)])
    path = tmp_path / "pems-bay.csv"
    frame.to_csv(path)
    recording = open_recording(path)
    np.testing.assert_array_equal(recording.values, values)
    np.testing.assert_array_equal(recording.times_ns, times.as_unit("ns").asi8)


def test_a_header_longer_than_the_head_that_is_sniffed(tmp_path: Path) -> None:
    names = [f"sensor-with-a-long-name-{i}" for i in range(5000)]
    text = "time," + ",".join(names) + "\n2020-01-01 00:00:00" + ",1" * 5000 + "\n"
    assert len(open_recording(written(tmp_path, text)).sensors) == 5000


def test_long(tmp_path: Path) -> None:
    recording = open_recording(written(tmp_path, LONG))
    assert recording.sensors == ("a", "b")
    expected = np.array([[1.5, 2], [np.nan, 3], [5, np.nan]], np.float32)
    np.testing.assert_array_equal(recording.values, expected)
    assert recording.notes == ("1 repeated (time, sensor) rows: the last of each counts",)


def test_long_with_columns_in_another_order(tmp_path: Path) -> None:
    text = "Speed,station_id,timestamp\n3.5,77,2020-01-01 00:00:00\n4.5,78,2020-01-01 00:01:00\n"
    recording = open_recording(written(tmp_path, text))
    assert recording.sensors == ("77", "78")
    assert recording.step_s == 60


def test_times_with_offsets_are_utc(tmp_path: Path) -> None:
    recording = open_recording(written(tmp_path, "time,a\n2020-01-01T01:00:00+01:00,5\n2020-01-01T00:05:00Z,6\n"))
    assert recording.summary()["start"] == "2020-01-01T00:00:00"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (WIDE + "2012-03-01 00:10:00,1,2\n", "row 5: its time is that of the row above"),
        (
            WIDE + "2012-03-01 00:05:00,1,2\n",
            "row 5: time goes backwards, from 2012-03-01 00:10:00 to 2012-03-01 00:05:00",
        ),
        (WIDE + "2012-03-01 00:15:00,1", r"row 5: expected 3 fields, got 2 \(is the file cut off\?\)"),
        (WIDE + "2012-03-01 00:15:00,fast,2\n", "row 5: 773869: expected a number, got 'fast'"),
        (WIDE + "noon,1,2\n", "row 5: time: expected ISO 8601"),
        (WIDE + ",1,2\n", "row 5: time: missing"),
        (",a,a\n2012-03-01 00:00:00,1,2\n", "sensors: 'a' is named twice"),
        (",a,b\n", "expected rows below the header"),
        ("time,sensor,value\n", "expected rows below the header"),
        (LONG + "2020-01-01T00:00:00Z,a,7\n", "row 7: time goes backwards"),
        (LONG + "2020-01-01T00:15:00Z,,7\n", "row 7: sensor: missing"),
        (LONG + "2020-01-01T00:15:00Z,a,x\n", "row 7: value: expected a number, got 'x'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=reason) as error:
        open_recording(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "t,x,y,p\n1,2,3,1\n",
        "0.5 3 4 yes\n0.6 3 4 no\n",
        "hello\n",
        "a,b\n20200101,2\n",
    ],
)
def test_other_texts_are_not_taken_for_traffic(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="of no known format"):
        open_recording(written(tmp_path, text))


def test_negative_values_and_gaps_are_told_in_numbers_and_in_words(tmp_path: Path) -> None:
    path = tmp_path / "speeds.csv"
    rows = ["2024-01-01T00:00,50,60", "2024-01-01T00:05,-1.5,60", "2024-01-01T00:10,50,-3", "2025-01-01T00:10,1,2"]
    path.write_text("\n".join(["time,a,b", *rows]) + "\n")
    recording = open_recording(path)
    summary = recording.summary()
    assert (summary["negative_values"], summary["longest_gap_s"]) == (2, 366 * 86_400)
    assert list(recording.notes) == [
        "2 negative values, the lowest -3: `align` rejects them (its option negative)",
        "time skips frames once, most of them from 2024-01-01T00:10:00 to 2025-01-01T00:10:00 (366 days)",
    ]
    path.write_text("\n".join(["time,a,b", *rows[:1], *rows[3:]]) + "\n")
    assert open_recording(path).summary()["longest_gap_s"] == 0  # two frames: their distance is the step
    path.write_text("\n".join(["time,a,b", *rows[:1], "2024-01-01T00:05,1,1"]) + "\n")
    plain = open_recording(path)
    assert (plain.summary()["negative_values"], plain.summary()["longest_gap_s"], plain.notes) == (0, 0, ())
