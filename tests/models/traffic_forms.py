"""What every traffic model that steps must pass, and the streams it is tried on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepstream.models.base import StreamModel, Tree, close_rows, copy_rows

SENSORS = 5
Frames = dict[str, Tensor]


def frames(batch: int, time: int, dtype: torch.dtype = torch.float32, seed: int = 1, sensors: int = SENSORS) -> Frames:
    """Random hourly frames with scattered gaps, and whole frames missing now and then and for a long while."""
    generator = torch.Generator().manual_seed(seed)
    observed = torch.rand(batch, time, sensors, generator=generator) > 0.2
    observed &= torch.rand(batch, time, 1, generator=generator) > 0.1
    observed[:, time // 3 : time // 3 + min(40, time // 4)] = False
    return {
        "value": (50 + 10 * torch.randn(batch, time, sensors, generator=generator)).to(dtype),
        "observed": observed,
        "slot_of_day": (torch.arange(time) % 24).expand(batch, time),
        "day_of_week": (torch.arange(time) // 24 % 7).expand(batch, time),
    }


def at(window: Frames, t: int) -> Frames:
    return {name: part[:, t] for name, part in window.items()}


def with_random_weights(model: StreamModel, dtype: torch.dtype = torch.float32) -> StreamModel:
    """None of them zero, so that every path of the model carries a signal."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def equal(first: Tree, second: Tree) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def step_equals_window(model: StreamModel, window: Frames, tolerance: float) -> None:
    """At every step of a batch of streams, relative to the size of the output."""
    expected, state = model(window), model.initial_state(window["value"].shape[0])
    assert torch.isfinite(expected).all()
    # A constant model, or one that only repeats the last value, would pass anything.
    assert float(expected.std()) > 1 and float((expected[:, :, 0] - expected[:, :, -1]).std()) > 0.1
    limit = tolerance * float(expected.abs().max())
    for t in range(expected.shape[1]):
        assert float((model.step(at(window, t), state) - expected[:, t]).abs().max()) <= limit, t


def rows_run_on_their_own_clocks(model: StreamModel, time: int = 40) -> None:
    """Four streams in one state, stepped in random company, against each stream alone (float64)."""
    streams = [frames(1, time, torch.float64, seed) for seed in range(4)]
    alone = [model(stream) for stream in streams]
    state, clock = model.initial_state(4), [0] * 4
    random = np.random.default_rng(0)
    while min(clock) < time:
        rows = [int(r) for r in random.permutation(4)[: random.integers(1, 5)] if clock[r] < time]
        if not rows:
            continue
        x = {name: torch.cat([streams[r][name][:, clock[r]] for r in rows]) for name in streams[0]}
        output = model.step(x, state, torch.tensor(rows))
        for i, r in enumerate(rows):
            torch.testing.assert_close(output[i], alone[r][0, clock[r]], rtol=1e-10, atol=1e-8)
            clock[r] += 1


def other_rows_keep_their_bits(model: StreamModel) -> None:
    """A step of one row leaves the others alone; a closed row is a fresh stream, and runs as one."""
    window, state = frames(3, 12), model.initial_state(3)
    for t in range(10):
        model.step(at(window, t), state)
    others, one = torch.tensor([0, 2]), torch.tensor([1])
    before, mine = copy_rows(state, others), copy_rows(state, one)
    model.step({name: part[1:2, 10] for name, part in window.items()}, state, one)
    assert equal(before, copy_rows(state, others)) and not equal(mine, copy_rows(state, one))
    close_rows(state, model.initial_state(1), one)
    assert equal(copy_rows(state, one), model.initial_state(1))
    first = {name: part[:1, 0] for name, part in window.items()}
    assert torch.equal(model.step(first, state, one), model.step(first, model.initial_state(1)))


def what_was_not_observed_does_not_matter(model: StreamModel) -> None:
    window = frames(1, 50)
    other = {**window, "value": torch.where(window["observed"], window["value"], torch.nan)}
    assert torch.equal(model(window), model(other))


def depends_on(model: StreamModel, time: int, position: int) -> list[int]:
    """The frames that the forecast made at a position depends on, when everything is observed."""
    window = frames(1, time, torch.float64)
    window["observed"][:] = True
    value = window["value"].clone().requires_grad_(True)
    model({**window, "value": value})[0, position].sum().backward()
    assert value.grad is not None
    return torch.nonzero(value.grad[0].abs().sum(-1))[:, 0].tolist()


OTHER_PROCESS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from stepstream.models.registry import load_model
torch.set_num_threads(1)
name, folder = sys.argv[1], Path(sys.argv[2])
model = load_model(name, folder / "weights").model
state, window = ({n: x.clone() for n, x in load_file(path).items()} for path in sorted(folder.glob("*.in")))
for t in range(window["value"].shape[1]):
    output = model.step({part: x[:, t] for part, x in window.items()}, state)
save_file({"output": output.contiguous(), **state}, folder / "done.out")
"""


def goes_on_in_another_process(name: str, model: StreamModel, folder: Path) -> None:
    """`folder / "weights"` holds the model. Half of a stream here, the state to disk, the other half there."""
    window, state = frames(2, 20), model.initial_state(2)
    for t in range(10):
        model.step(at(window, t), state)
    save_file(copy_rows(state, torch.tensor([1, 0])), folder / "1-state.in")
    rest = {part: x[:, 10:].flip(0).contiguous() for part, x in window.items()}
    save_file(rest, folder / "2-window.in")
    command = [sys.executable, "-c", OTHER_PROCESS, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there = load_file(folder / "done.out")
    state, threads = copy_rows(state, torch.tensor([1, 0])), torch.get_num_threads()
    # A product's last bit depends on the number of threads and on how its input lies in memory.
    torch.set_num_threads(1)
    try:
        for t in range(10):
            output = model.step(at(rest, t), state)
    finally:
        torch.set_num_threads(threads)
    assert equal({"output": output, **state}, there)
