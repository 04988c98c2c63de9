from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import DATA

from stepstream.connectors import sweeps_ouster
from stepstream.connectors.base import InputError
from stepstream.connectors.sweeps_ouster import SweepsOuster

FOLDER = DATA / "lidar" / "ouster"


def test_osf_and_pcap_are_known_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    osf, pcap = tmp_path / "a.bin", tmp_path / "OS-1_1024x10.pcap"
    osf.write_bytes(bytes(8) + b"OSF$" + bytes(50))
    pcap.write_bytes(b"\xd4\xc3\xb2\xa1" + bytes(60))
    assert SweepsOuster.sniff(osf, osf.read_bytes())
    assert not SweepsOuster.sniff(pcap, pcap.read_bytes())  # any network traffic
    (tmp_path / "other.json").write_text('{"beam_altitude_angles": [1]}')
    assert not SweepsOuster.sniff(pcap, pcap.read_bytes())
    (tmp_path / "OS-1.json").write_text('{"beam_altitude_angles": [1]}')
    assert SweepsOuster.sniff(pcap, pcap.read_bytes())
    assert not SweepsOuster.sniff(tmp_path, b"")
    monkeypatch.setattr(sweeps_ouster, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="need the vendor's package: pip install .stepstream.ouster."):
        SweepsOuster.read(osf)


def read(name: str) -> sweeps_ouster.SweepRecording:
    pytest.importorskip("ouster.sdk", reason="ouster-sdk is not installed")
    if not (FOLDER / name).exists():
        pytest.skip(f"{name} is not in ../shared/data/lidar/ouster")
    return SweepsOuster.read(FOLDER / name)


def test_osf_is_what_was_decoded_from_it() -> None:
    recording = read("osf_fw_3.2_10scans.osf")
    with np.load(FOLDER / "os_10scans_decoded.npz", allow_pickle=False) as truth:
        xyz, stamps = truth["xyz"], truth["col_timestamp_ns"].astype(np.int64)
    assert recording.times_ns.tolist() == stamps.min(axis=1).tolist()
    for index, sweep in enumerate(recording):
        there = (xyz[index] != 0).any(axis=-1)
        np.testing.assert_allclose(sweep.points, xyz[index][there], atol=1e-4)
        assert sweep.ring is not None and sweep.ring.tolist() == np.nonzero(there)[0].tolist()
        assert sweep.offsets_ns is not None and sweep.offsets_ns.min() >= 0


@pytest.mark.parametrize(
    ("name", "sweeps", "rings"),
    [("OS-1-128_v2.3.0_1024x10_lb_n3.osf", 3, 128), ("OS-0-128-U1_v2.3.0_1024x10.pcap", 1, 128)],
)
def test_the_other_recordings(name: str, sweeps: int, rings: int) -> None:
    summary = read(name).summary()
    assert (summary["sweeps"], summary["rings"], summary["unreadable"], summary["empty"]) == (sweeps, rings, 0, 0)
    assert summary["points"] > 1000 * sweeps


def test_a_truncated_osf_is_refused(tmp_path: Path) -> None:
    read("osf_fw_3.2_10scans.osf")
    path = tmp_path / "cut.osf"
    path.write_bytes((FOLDER / "osf_fw_3.2_10scans.osf").read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"cut\.osf: (cannot be read|expected at least one whole scan)"):
        SweepsOuster.read(path)
