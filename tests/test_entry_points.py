"""A model and a reader of an installed package are found by their entry points, by name and by content."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PARTS = """
from pathlib import Path
from stepstream.models.persistence import Persistence

class Drift(Persistence):
    pass

class Found:
    def __init__(self, text):
        self.text = text
    def summary(self):
        return {"modality": "traffic", "format": "tally", "said": self.text}

class Tally:
    name, modality = "tally", "traffic"
    @staticmethod
    def sniff(path, head):
        return head.startswith(b"TALLY")
    @staticmethod
    def read(path):
        return Found(Path(path).read_text())
"""
USE = """
from stepstream.connectors.recording import open_recording
from stepstream.models.registry import model_class
print(model_class("drift").__module__, open_recording("week.dat").summary()["said"])
"""


def test_an_installed_package_registers_a_model_and_a_reader(tmp_path: Path) -> None:
    (tmp_path / "their_parts.py").write_text(PARTS)
    info = tmp_path / "their_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[stepstream.models]\ndrift = their_parts:Drift\n[stepstream.readers]\ntally = their_parts:Tally\n"
    )
    (tmp_path / "week.dat").write_text("TALLY 12")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["their_parts", "TALLY", "12"]
