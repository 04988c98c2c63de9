from __future__ import annotations

import pytest
import torch
from tests.models.event_models import check_compiles, check_snapshot, check_steps, frames

from stepstream.models.convs5_events import ConvS5Classifier
from stepstream.models.registry import model_class

SIZE = (10, 13)


def network(**options: object) -> ConvS5Classifier:
    torch.manual_seed(0)
    chosen: dict = {"classes": 3, "size": SIZE, "width": 6, "states": 4, "blocks": 2, **options}
    return ConvS5Classifier(**chosen)


def test_steps_are_the_window_form() -> None:
    check_steps(network().double(), frames(3, 40, SIZE).double(), 1e-10)
    check_steps(network(), frames(3, 40, SIZE), 1e-4)


def test_what_was_seen_long_ago_is_not_forgotten() -> None:
    model, x = network().double().eval(), frames(1, 40, SIZE).double()
    with torch.no_grad():
        whole, later = model(x)[:, -1], model(x[:, 1:])[:, -1]
    assert (whole - later).abs().max() > 1e-9


def test_a_stream_moves_between_rows_to_the_bit() -> None:
    check_snapshot(network(), frames(2, 8, SIZE))


def test_a_step_compiles() -> None:
    check_compiles(network(), frames(2, 3, SIZE))


def test_sizes_that_do_not_fit_are_refused() -> None:
    for options in ({"classes": 1}, {"size": (3,)}, {"width": 0}):
        with pytest.raises(ValueError, match="expected sizes above 0"):
            network(**options)
    assert model_class("convs5-events") is ConvS5Classifier
