"""Every recurrent layer's state moves to another process, through safetensors, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from recurrent_checks import awake, check_other_process

from stepstream.models.continual.conv_s5 import ConvS5
from stepstream.models.continual.recurrent import GRU, LSTM
from stepstream.models.continual.retention import Retention
from stepstream.models.continual.s5 import S5, S5Block


def test_goes_on_in_another_process(tmp_path: Path) -> None:
    flat, images = torch.randn(2, 40, 4), torch.randn(2, 12, 2, 5, 4)
    cases = [
        ("GRU(4, 5)", GRU(4, 5), flat),
        ("LSTM(4, 5, 2, proj_size=2)", LSTM(4, 5, 2, proj_size=2), flat),
        ("S5(4, 6)", S5(4, 6), flat),
        ("S5Block(3, 6, timed=True)", S5Block(3, 6, timed=True), torch.cat([flat[..., :3], flat[..., 3:].abs()], -1)),
        ("ConvS5(2, 6, (5, 4))", ConvS5(2, 6, (5, 4)), images),
        ("Retention(4, 2)", Retention(4, 2), flat),
    ]
    check_other_process([(build, awake(layer), x) for build, layer, x in cases], tmp_path)
