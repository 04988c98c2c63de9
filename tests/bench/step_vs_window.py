"""One causal step of the shipped STTN against recomputing the window it equals, and the paper's form over 12 frames.

uv run python -m tests.bench.step_vs_window [FOLDER]

One thread, 207 sensors, batch 1. "window" gives the same forecast as the step (checked here) from the last
`receptive_field` frames; "window-34" from as many as blocks (M - 1) + 1 frames, what a model without the input
convolution would need; "paper-12" is the bidirectional form over 12 frames with weights of the same sizes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tests.bench.common import cpu_seconds, report

from stepstream.models.registry import load_model
from stepstream.models.sttn import STTN


def main() -> None:
    torch.set_num_threads(1)
    loaded = load_model("sttn", "sttn-metr-la")
    model = loaded.model
    assert isinstance(model, STTN)
    paper = STTN(replace(model.config, form="bidirectional")).eval().requires_grad_(False)
    paper.load_state_dict(model.state_dict())
    field = model.receptive_field
    torch.manual_seed(0)
    window = {
        "value": 50 + 10 * torch.randn(1, field, model.config.sensors),
        "observed": torch.rand(1, field, model.config.sensors) > 0.1,
        "slot_of_day": torch.arange(field)[None],
        "day_of_week": torch.zeros(1, field, dtype=torch.int64),
    }

    def last(frames: int) -> dict[str, torch.Tensor]:
        return {name: part[:, -frames:] for name, part in window.items()}

    state = model.initial_state(1)
    rows = torch.tensor([0])
    with torch.no_grad():
        for t in range(field):
            output = model.step({name: part[:, t] for name, part in window.items()}, state, rows)
        difference = float((output - model(window)[:, -1]).abs().max())
        now = {name: part[:, -1] for name, part in window.items()}
        short = model.config.blocks * (model.config.memory - 1) + 1
        seconds = cpu_seconds(
            {
                "step": lambda: model.step(now, state, rows),
                "window": lambda: model(window),
                f"window-{short}": lambda: model(last(short)),
                "paper-12": lambda: paper(last(12)),
            },
            rounds=60,
        )
    step = seconds["step"]
    report(
        "step_vs_window",
        {
            "receptive_field": field,
            "largest_difference_mph": difference,
            "cpu_ms": {name: round(1e3 * s, 3) for name, s in seconds.items()},
            "times_the_step": {name: round(s / step, 2) for name, s in seconds.items()},
        },
    )


if __name__ == "__main__":
    main()
