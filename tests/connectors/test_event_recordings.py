"""The recordings in ../shared/data/event against the truth and the sums in its SOURCES.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import DATA

from stepstream.connectors.recording import open_recording


def recording_of(name: str) -> Any:
    path = DATA / "event" / name
    if not path.exists():
        pytest.skip(f"{name} is not in ../shared/data/event")
    return open_recording(path)


def played(recording: Any) -> list[Any]:
    slices = list(recording.slices())
    return [np.concatenate([getattr(s, name) for s in slices]) for name in ("t_us", "x", "y", "polarity")]


@pytest.mark.parametrize("name", ["evt3_sample.raw", "evt3_sample_dsec_layout.h5"])
def test_evt3_equals_the_truth(name: str) -> None:
    recording = recording_of(name)
    truth = np.load(DATA / "event" / "evt3_sample_truth.npz", allow_pickle=False)
    t, x, y, polarity = played(recording)
    for found, expected in ((t, "t"), (x, "x"), (y, "y"), (polarity, "p")):
        np.testing.assert_array_equal(found, truth[expected])
    assert (recording.events, recording.on, int(t.sum())) == (219_596, 115_532, 2574324900467)
    assert (recording.width, recording.height, recording.t_first_us, recording.t_last_us) == (
        1280,
        720,
        11718656,
        11727457,
    )
    assert not any(recording.counts.values())


def test_evt2() -> None:
    recording = recording_of("evt2_sample.raw")
    assert (recording.format, recording.width, recording.height) == ("prophesee-evt2", 640, 480)
    assert (recording.events, recording.t_first_us, recording.t_last_us) == (539_481, 1317888, 1367888)
    assert not any(recording.counts.values())


def five_bytes(path: Path) -> list[Any]:
    """A second decoder, in numpy, of files whose time does not begin anew."""
    rows = np.fromfile(path, np.uint8).reshape(-1, 5).astype(np.int64)
    t = (rows[:, 2] & 127) << 16 | rows[:, 3] << 8 | rows[:, 4]
    return [t, rows[:, 0], rows[:, 1], rows[:, 2] >> 7]


@pytest.mark.parametrize(
    ("name", "format", "side"),
    [
        ("dvs_gesture_bs2/01_hand_clapping.bs2", "bs2", 128),
        ("dvs_gesture_bs2/05_right_arm_ccw.bs2", "bs2", 128),
        ("tonic_samples/sample_nmnist.bin", "nmnist-bin", 34),
    ],
)
def test_five_bytes_an_event(name: str, format: str, side: int) -> None:
    recording = recording_of(name)
    assert (recording.format, recording.width, recording.height) == (format, side, side)
    expected = five_bytes(DATA / "event" / name)
    assert recording.events == len(expected[0])
    # N-MNIST's times fall here and there: within a slice they are put in order, and what is too late is counted.
    assert len(played(recording)[0]) == recording.events - recording.counts["late"]
    if not recording.counts["backwards"]:
        for found, column in zip(played(recording), expected, strict=True):
            np.testing.assert_array_equal(found, column)


def test_dat() -> None:
    recording = recording_of("tonic_samples/sample_ncars.dat")
    t, x, y, _ = played(recording)
    words = np.frombuffer((DATA / "event" / "tonic_samples" / "sample_ncars.dat").read_bytes()[-8 * 2009 :], "<u4")
    assert recording.format == "prophesee-dat"
    np.testing.assert_array_equal(t, words[::2])
    np.testing.assert_array_equal(x, words[1::2] & 0x3FFF)
    np.testing.assert_array_equal(y, words[1::2] >> 14 & 0x3FFF)


def test_text() -> None:
    recording = recording_of("rpg_txt/slider_depth_events_chunk.txt")
    lines = (DATA / "event" / "rpg_txt" / "slider_depth_events_chunk.txt").read_text().splitlines()
    expected = [line.split() for line in lines]
    t, x, y, polarity = played(recording)
    assert (recording.format, recording.width, recording.height) == ("events-text", 240, 180)
    # Digits by hand: no time goes through a float.
    assert t.tolist() == [int(row[0].split(".")[0]) * 10**6 + int(row[0].split(".")[1][:6]) for row in expected]
    assert [x.tolist(), y.tolist(), polarity.astype(int).tolist()] == [[int(r[i]) for r in expected] for i in (1, 2, 3)]


def test_a_header_without_events_is_a_recording_without_events() -> None:
    recording = recording_of("tonic_samples/sample_aedat_header.aedat")
    assert (recording.format, recording.width, recording.height, recording.events) == ("aedat2", 346, 260, 0)
    assert recording.notes == ("there are no events",)
