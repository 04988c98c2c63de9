"""A stack of convolutions over time, one input at a time: against continual-inference, and torch over the window.

uv run --group bench python -m tests.bench.continual_conv [FOLDER]

One thread; 6 convolutions of 128 channels and a kernel of 9, without padding, so that an output sees 49 inputs.
"step": this package's Sequential of Conv1d; "step_causal": the same with causal padding, which needs no clock;
"continual_inference": co.Sequential of co.Conv1d, forward_step; "window": torch.nn over the last 49 inputs. The four
have the same weights and, found here, the same outputs up to `largest_difference`. "many": 1,000 streams of different
ages in one call, against one call for each of them; both do the same products, which is what the one call consists of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from tests.bench.common import cpu_seconds, report
from torch import Tensor, nn

from stepstream.models.continual.containers import Sequential
from stepstream.models.continual.conv import Conv1d

LAYERS, WIDTH, KERNEL = 6, 128, 9
FIELD = LAYERS * (KERNEL - 1) + 1
BURST = 10
"""Inputs in a row of one alternative: a stream goes on, and does not find the weights of three others in the cache."""


def stacks() -> tuple[nn.Sequential, Sequential, Sequential, nn.Module]:
    """The window's, the step's, the causal step's and continual-inference's, with the same weights."""
    logging.getLogger("continual").setLevel(logging.ERROR)
    import continual as co

    window = nn.Sequential(*[nn.Conv1d(WIDTH, WIDTH, KERNEL) for _ in range(LAYERS)])
    step = Sequential(*[Conv1d(WIDTH, WIDTH, KERNEL) for _ in range(LAYERS)])
    causal = Sequential(*[Conv1d(WIDTH, WIDTH, KERNEL, padding="causal") for _ in range(LAYERS)])
    reference = co.Sequential(*[co.Conv1d(WIDTH, WIDTH, KERNEL) for _ in range(LAYERS)])
    for network in (step, causal, reference):
        network.load_state_dict(window.state_dict())
    return window.eval(), step.eval(), causal.eval(), reference.eval()


def burst(call: Callable[[], object]) -> None:
    """As many inputs in a row as are timed together."""
    for _ in range(BURST):
        call()


def one_batch(batch: int) -> dict[str, object]:
    """Times with `batch` streams in step."""
    window, step, causal, reference = stacks()
    x = torch.randn(batch, FIELD, WIDTH)
    state, causal_state = step.initial_state(batch), causal.initial_state(batch)
    for t in range(FIELD):
        stepped, due = step.advance(x[:, t], state)
        stepped_causal, _ = causal.advance(x[:, t], causal_state)
        theirs = reference.forward_step(x[:, t])
    assert due is not None and due.all()
    whole = window(x.transpose(1, 2))[..., 0]
    difference = max(float((y - whole).abs().max()) for y in (stepped, stepped_causal, theirs))
    now, frames = x[:, -1].contiguous(), x.transpose(1, 2).contiguous()
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: step.advance(now, state),
        "step_causal": lambda: causal.advance(now, causal_state),
        "continual_inference": lambda: reference.forward_step(now),
        "window": lambda: window(frames),
    }
    seconds = cpu_seconds({name: partial(burst, call) for name, call in calls.items()}, rounds=60 if batch == 1 else 10)
    return {
        "largest_difference": difference,
        "cpu_us": {name: round(1e6 * s / BURST, 1) for name, s in seconds.items()},
        "times_the_step": {name: round(s / seconds["step"], 2) for name, s in seconds.items()},
    }


def many_streams(streams: int) -> dict[str, object]:
    """1,000 streams of different ages in one call, against one call a stream."""
    _, step, _, _ = stacks()
    state = step.initial_state(streams)
    x = torch.randn(streams, WIDTH)
    for _ in range(FIELD):
        rows = torch.randperm(streams)[: streams // 2].sort().values
        step.advance(x[rows], state, rows)
    every, single = torch.randperm(streams), [torch.tensor([i]) for i in range(streams)]

    def one_by_one() -> Tensor:
        return torch.cat([step.advance(x[i : i + 1], state, row)[0] for i, row in enumerate(single)])

    calls = {"one_call": lambda: step.advance(x, state, every), "one_by_one": one_by_one}
    seconds = cpu_seconds(calls, rounds=5, warmup=1)
    return {
        "streams": streams,
        "cpu_ms": {name: round(1e3 * s, 2) for name, s in seconds.items()},
        "times_the_throughput": round(seconds["one_by_one"] / seconds["one_call"], 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        result = {f"batch_{batch}": one_batch(batch) for batch in (1, 32)} | {"many": many_streams(1_000)}
    report("continual_conv", {"layers": LAYERS, "width": WIDTH, "kernel": KERNEL, "window": FIELD, **result})


if __name__ == "__main__":
    main()
