"""Step equals window, far past the receptive field; rows are independent; the paper's form is what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepstream.models.base import close_rows, copy_rows, state_bytes_per_stream
from stepstream.models.graphs import chebyshev_polynomials
from stepstream.models.registry import load_model
from stepstream.models.sttn import STTN, STTNConfig
from stepstream.models.weights import Card, WeightsError, save_weights

SMALL = STTNConfig(sensors=5, horizons=4, blocks=3, width=8, heads=2, memory=6, input_frames=4, slots_per_day=24)


def a_model(config: STTNConfig = SMALL, dtype: torch.dtype = torch.float32, seed: int = 0) -> STTN:
    """Random weights, none of them zero, so that every path of the model carries a signal."""
    torch.manual_seed(seed)
    polynomials = 0.5 * torch.randn(config.chebyshev_order - 1, config.sensors, config.sensors)
    model = STTN(config, polynomials if config.graph == "given" else None, mean=50, std=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def frames(batch: int, time: int, sensors: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
    """Random frames with scattered gaps, and whole frames missing now and then and for a long while."""
    generator = torch.Generator().manual_seed(seed)
    observed = torch.rand(batch, time, sensors, generator=generator) > 0.2
    observed &= torch.rand(batch, time, 1, generator=generator) > 0.1
    observed[:, time // 3 : time // 3 + 40] = False
    slot = torch.arange(time) % 24
    return {
        "value": (50 + 10 * torch.randn(batch, time, sensors, generator=generator)).to(dtype),
        "observed": observed,
        "slot_of_day": slot.expand(batch, time),
        "day_of_week": (torch.arange(time) // 24 % 7).expand(batch, time),
    }


def at(window: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    return {name: part[:, t] for name, part in window.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_step_equals_window_over_520_steps(dtype: torch.dtype, tolerance: float) -> None:
    model = a_model(dtype=dtype)
    window = frames(2, 520, 5, dtype)
    expected = model(window)
    state = model.initial_state(2)
    scale = float(expected.std())
    assert scale > 1  # a constant model would pass anything
    for t in range(520):
        output = model.step(at(window, t), state)
        assert float((output - expected[:, t]).abs().max()) <= tolerance * max(scale, float(expected.abs().max())), t


def test_step_equals_window_at_the_published_size_with_the_shipped_weights() -> None:
    model = load_model("sttn", "sttn-metr-la").model
    window = frames(1, 60, 207)
    window["slot_of_day"] = (torch.arange(60) + 90).expand(1, 60)
    state = model.initial_state(1)
    with torch.no_grad():
        expected = model(window)
        steps = torch.stack([model.step(at(window, t), state) for t in range(60)], dim=1)
    assert float((steps - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@settings(max_examples=25, deadline=None)
@given(
    blocks=st.integers(1, 3),
    memory=st.integers(1, 7),
    input_frames=st.integers(1, 5),
    order=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    graph=st.sampled_from(["given", "learned"]),
)
def test_step_equals_window_for_any_sizes(
    blocks: int, memory: int, input_frames: int, order: int, heads: int, graph: str
) -> None:
    config = STTNConfig(
        3,
        horizons=2,
        blocks=blocks,
        width=8,
        heads=heads,
        memory=memory,
        input_frames=input_frames,
        chebyshev_order=order,
        slots_per_day=24,
        graph=graph,  # type: ignore[arg-type]
    )
    model = a_model(config, torch.float64)
    assert model.receptive_field == blocks * (memory - 1) + input_frames
    time = 5 * model.receptive_field + 3
    window = frames(1, time, 3, torch.float64)
    expected, state = model(window), model.initial_state(1)
    for t in range(time):
        torch.testing.assert_close(model.step(at(window, t), state), expected[:, t], rtol=1e-10, atol=1e-8)


def test_output_depends_on_exactly_the_receptive_field() -> None:
    model = a_model(dtype=torch.float64)
    time, field = 60, model.receptive_field
    assert field == 3 * 5 + 4
    window = frames(1, time, 5, torch.float64)
    window["observed"][:] = True
    value = window["value"].clone().requires_grad_(True)
    model({**window, "value": value})[0, -1].sum().backward()
    seen = value.grad[0].abs().sum(-1) > 0  # type: ignore[index]
    assert seen[-field:].all()
    assert not seen[:-field].any()


def test_rows_run_on_their_own_clocks() -> None:
    model = a_model(dtype=torch.float64)
    streams = [frames(1, 40, 5, torch.float64, seed) for seed in range(4)]
    alone = [model(stream) for stream in streams]
    state, clock = model.initial_state(4), [0] * 4
    random = np.random.default_rng(0)
    while min(clock) < 40:
        rows = [r for r in random.permutation(4)[: random.integers(1, 5)] if clock[r] < 40]
        if not rows:
            continue
        x = {name: torch.cat([streams[r][name][:, clock[r]] for r in rows]) for name in streams[0]}
        output = model.step(x, state, torch.tensor([int(r) for r in rows]))
        for i, r in enumerate(rows):
            torch.testing.assert_close(output[i], alone[r][0, clock[r]], rtol=1e-10, atol=1e-8)
            clock[r] += 1


def test_other_rows_keep_their_bits_and_a_closed_row_is_fresh() -> None:
    model = a_model()
    window, state = frames(3, 20, 5), model.initial_state(3)
    for t in range(10):
        model.step(at(window, t), state)
    before = copy_rows(state, torch.tensor([0, 2]))
    model.step({name: part[1:2, 10] for name, part in window.items()}, state, torch.tensor([1]))
    after = copy_rows(state, torch.tensor([0, 2]))
    assert all(torch.equal(a, b) for a, b in zip(leaves(before), leaves(after), strict=True))
    close_rows(state, model.initial_state(1), torch.tensor([1]))
    fresh = copy_rows(state, torch.tensor([1]))
    assert all(torch.equal(a, b) for a, b in zip(leaves(fresh), leaves(model.initial_state(1)), strict=True))


def leaves(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    assert isinstance(tree, dict)
    return [leaf for name in sorted(tree) for leaf in leaves(tree[name])]


def test_what_was_not_observed_does_not_matter() -> None:
    model, window = a_model(), frames(1, 50, 5)
    other = {**window, "value": torch.where(window["observed"], window["value"], torch.nan)}
    assert torch.equal(model(window), model(other))


def test_bidirectional_form_looks_ahead_and_does_not_step() -> None:
    config = STTNConfig(**{**vars(SMALL), "form": "bidirectional"})
    model = a_model(config, torch.float64)
    window = frames(1, 6, 5, torch.float64)
    window["observed"][:] = True
    value = window["value"].clone().requires_grad_(True)
    model({**window, "value": value})[0, 0].sum().backward()
    assert (value.grad[0, 5].abs() > 0).any()  # type: ignore[index]
    with pytest.raises(ValueError, match="at most 6"):
        model(frames(1, 7, 5, torch.float64))
    with pytest.raises(ValueError, match="no step form"):
        model.initial_state(1)


def test_step_compiles_without_a_graph_break() -> None:
    model = a_model()
    window, state, plain = frames(2, 12, 5), model.initial_state(2), model.initial_state(2)
    compiled = torch.compile(model.step, fullgraph=True, backend="eager")
    for t in range(12):
        torch.testing.assert_close(compiled(at(window, t), state), model.step(at(window, t), plain))


def test_state_size_is_known_before_the_run() -> None:
    model = a_model()
    state = model.initial_state(7)
    total = sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))
    assert state_bytes_per_stream(state) * 7 == total


def test_chebyshev_polynomials_follow_the_recurrence_and_bear_a_lonely_sensor() -> None:
    row, column, weight = np.array([0, 1, 2]), np.array([1, 2, 0]), np.array([0.5, 1.0, 0.2])
    t1, t2, t3 = chebyshev_polynomials(4, row, column, weight, 4).double()
    assert torch.isfinite(t3).all()
    torch.testing.assert_close(t2, 2 * t1 @ t1 - torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(t3, 2 * t1 @ t2 - t1, rtol=0, atol=1e-6)
    eigenvalues = torch.linalg.eigvalsh(t1)
    assert float(eigenvalues.min()) >= -1 - 1e-6
    assert float(eigenvalues.max()) <= 1 + 1e-6


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    card = Card(model="sttn", task="traffic", config=vars(SMALL).copy(), sensors=tuple("abcde"), step_s=3600)
    save_weights(a_model(), tmp_path / "good", card)
    assert torch.equal(load_model("sttn", tmp_path / "good").model.state_dict()["sensor"], a_model().sensor)
    wide = card.model_copy(update={"config": {**card.config, "width": 16}})
    save_weights(a_model(), tmp_path / "wide", wide)
    with pytest.raises(WeightsError, match="has shape"):
        load_model("sttn", tmp_path / "wide")
    (tmp_path / "good" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(WeightsError, match="sha256"):
        load_model("sttn", tmp_path / "good")
    with pytest.raises(WeightsError, match="did you mean 'sttn'"):
        load_model("stnn", tmp_path / "good")
    with pytest.raises(WeightsError, match="neither a folder nor shipped"):
        load_model("sttn", "no-such-weights")
    with pytest.raises(WeightsError, match="did you mean 'sttn-metr-la'"):
        load_model("sttn", "sttn-metr-al")


@pytest.mark.parametrize("field", ["width", "memory", "sensors"])
def test_impossible_sizes_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        STTNConfig(**{**vars(SMALL), field: {"width": 9, "memory": 0, "sensors": 0}[field]})
