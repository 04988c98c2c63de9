"""Pruned models: the right channels go, nothing else changes, and what is left steps as before."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import assert_close, check_ragged_clocks, check_step_equals_window
from test_attention import spread
from torch import Tensor, nn

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.continual.adapters import adapt, fuse
from stepstream.models.continual.encoder import Encoder
from stepstream.models.continual.pruning import (
    PrunedEncoder,
    channels,
    magnitude,
    prunable_weights,
    prune,
    prune_to,
    taylor,
)
from stepstream.models.persistence import Persistence
from stepstream.models.registry import load_model
from stepstream.models.sttn import STTN, STTNConfig, STTNSizes
from stepstream.models.weights import Card, save_weights

SMALL = STTNConfig(sensors=5, horizons=4, blocks=2, width=8, heads=2, memory=5, input_frames=3, slots_per_day=24)


def an_sttn(graph: Any = "given", **sizes: Any) -> STTN:
    torch.manual_seed(0)
    config = STTNConfig(**{**asdict(SMALL), "graph": graph, **sizes})
    polynomials = 0.5 * torch.randn(config.chebyshev_order - 1, 5, 5) if graph == "given" else None
    model = STTN(config, polynomials, mean=50, std=10)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval().requires_grad_(False)


def an_encoder(**options: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(3, 16, 4, 4, feedforward=24, **options)
    spread(encoder, 0.5)
    return encoder.double().eval().requires_grad_(False)


def frames(time: int, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "value": 50 + 10 * torch.randn(batch, time, 5, generator=generator, dtype=torch.float64),
        "observed": torch.rand(batch, time, 5, generator=generator) > 0.2,
        "slot_of_day": (torch.arange(time) % 24).expand(batch, time),
        "day_of_week": (torch.arange(time) // 24 % 7).expand(batch, time),
    }


def some_input(model: Any, time: int = 40) -> Any:
    return frames(time) if isinstance(model, STTN) else torch.randn(1, time, 16).double()


MODELS = {
    "sttn": an_sttn,
    "sttn-learned-graph": lambda: an_sttn("learned"),
    "sttn-without-graph": lambda: an_sttn(chebyshev_order=1),
    "sttn-pruned-before": lambda: prune(an_sttn(), 0.3, magnitude),
    "encoder": an_encoder,
    "encoder-pruned-before": lambda: prune(an_encoder(), 0.3, magnitude),
    "encoder-grouped-rotary": lambda: an_encoder(kv_heads=2, positions="rotary", norm_first=True),
    "encoder-relative": lambda: an_encoder(positions="relative", activation="gelu", final_norm=True, bias=False),
}
every_model = pytest.mark.parametrize("name", MODELS)


def step_equals_window(model: Any) -> None:
    if not isinstance(model, STTN):
        x = torch.randn(3, 5 * model.receptive_field, 16).double()
        check_step_equals_window(model, x)
        check_ragged_clocks(model, x[:, :20])
        return
    time = 5 * model.receptive_field
    window, state = frames(time, 2), model.initial_state(3)
    expected, rows = model(window), torch.tensor([2, 0])
    assert float(expected.std()) > 1
    for t in range(time):
        assert_close(model.step({key: part[:, t] for key, part in window.items()}, state, rows), expected[:, t])


@every_model
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_pruned_model_is_smaller_and_steps_as_its_window(name: str, ratio: float) -> None:
    model = MODELS[name]()
    small = prune(model, ratio, magnitude, rounds=2)
    whole, left = prunable_weights(model), prunable_weights(small)
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone == whole - left  # nothing but prunable weights went, and they went physically
    parameters = dict(model.named_parameters())
    largest = max(part.cost(parameters) for part in channels(model))
    assert (1 - ratio) * whole - 2 * largest <= left <= (1 - ratio) * whole
    assert small.receptive_field == model.receptive_field
    assert state_bytes_per_stream(small.initial_state(1)) <= state_bytes_per_stream(model.initial_state(1))
    step_equals_window(small)


@every_model
def test_exactly_the_channels_that_are_zero_go_and_nothing_changes(name: str) -> None:
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(3)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    chosen: dict[str, Tensor] = {}
    cost = 0
    for part in channels(model):
        how_many = max(1, part.count // 3)
        # Another choice in each head.
        chosen[part.name] = torch.stack(
            [torch.randperm(part.count, generator=generator)[:how_many].sort().values for _ in range(part.heads)]
        )
        cost += how_many * part.cost(parameters)
        for parameter, (axis, indices) in part.slices.items():
            picked = torch.cat([indices[head, chosen[part.name][head]].flatten() for head in range(part.heads)])
            parameters[parameter].index_fill_(axis, picked, 0)
    x = some_input(model)
    small = prune_to(model, magnitude(model), prunable_weights(model) - cost)
    assert prunable_weights(small) == prunable_weights(model) - cost
    assert_close(small(x), model(x))
    for part, left in zip(channels(model), channels(small), strict=True):
        assert left.count == part.count - chosen[part.name].shape[1]
    # One more, of which nothing is zero, does change it.
    assert float((prune_to(small, magnitude(small), prunable_weights(small) - 1)(x) - model(x)).abs().max()) > 1e-6


@every_model
def test_what_is_left_of_every_weight_is_what_was_there(name: str) -> None:
    model = MODELS[name]()
    small = prune(model, 0.4, magnitude)
    before = dict(model.named_parameters())
    for key, parameter in small.named_parameters():
        assert set(parameter.flatten().tolist()) <= set(before[key].flatten().tolist()), key


def test_the_least_important_for_their_size_go_first() -> None:
    model = an_encoder()
    parameters = dict(model.named_parameters())
    costs = {part.name: part.cost(parameters) for part in channels(model)}
    head, unit = costs["layers.0.heads"], costs["layers.0.hidden"]
    assert (head, unit) == (4 * (4 * 16 + 3), 2 * 16 + 1)
    importance = {part.name: torch.full((1, part.count), 1e3) for part in channels(model)}
    importance["layers.1.heads"][0, 2] = 2.0  # 2 / 268 a weight is less than 1 / 33
    importance["layers.2.hidden"][0, 9] = 1.0
    gone = prune_to(model, importance, prunable_weights(model) - 1)
    assert [part.count for part in channels(gone)] == [4, 24, 3, 24, 4, 24]
    importance["layers.2.hidden"][0, 9] = 0.1
    gone = prune_to(model, importance, prunable_weights(model) - 1)
    assert [part.count for part in channels(gone)] == [4, 24, 4, 24, 4, 23]


def test_taylor_importance_is_the_square_of_gradient_times_weight() -> None:
    model = an_encoder()
    batches = [torch.randn(2, 9, 16).double() for _ in range(3)]
    found = taylor(model, [lambda m, x=x: (m(x) ** 3).mean() for x in batches])
    hidden = 5
    expected = []
    for x in batches:
        model.requires_grad_(True)
        (model(x) ** 3).mean().backward()
        layer: Any = model.layers[1]
        rows = [(p.grad * p)[hidden].sum() for p in (layer.linear1.weight, layer.linear1.bias)]
        column = (layer.linear2.weight.grad * layer.linear2.weight)[:, hidden].sum()
        expected.append(float((rows[0] + rows[1] + column).detach() ** 2))
        model.zero_grad()
    assert found["layers.1.hidden"].shape == (1, 24)
    assert float(found["layers.1.hidden"][0, hidden]) == pytest.approx(sum(expected) / 3, rel=1e-9)


def test_taylor_leaves_the_model_as_it_was_and_needs_a_batch() -> None:
    model = an_sttn()
    model.head.requires_grad_(True)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    importance = taylor(model, [lambda m: m(frames(9)).square().mean()])
    assert set(importance) == {part.name for part in channels(model)}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None
    with pytest.raises(ValueError, match="no batch"):
        taylor(model, [])


def test_taylor_keeps_a_channel_that_magnitude_would_not() -> None:
    """A hidden unit with large weights that no input ever switches on."""
    encoder = an_encoder()
    layer: Any = encoder.layers[0]
    layer.linear1.weight[7] *= 3
    layer.linear1.bias[7] = -1e4
    x = torch.randn(2, 12, 16).double()
    budget = prunable_weights(encoder) - 1
    for importance, dead in ((magnitude(encoder), False), (taylor(encoder, [lambda m: m(x).square().sum()]), True)):
        small = prune_to(encoder, importance, budget)
        assert (float(small.layers[0].linear1.bias.min()) > -1e3) == dead  # type: ignore[union-attr, operator, arg-type]


def test_a_pruned_sttn_goes_through_its_card(tmp_path: Path) -> None:
    small = prune(an_sttn(), 0.6, magnitude).float()
    assert small.config.sizes is not None
    save_weights(small, tmp_path, Card(model="sttn", task="traffic", config=asdict(small.config)))
    loaded = load_model("sttn", tmp_path)
    again = loaded.model
    assert isinstance(again, STTN) and again.config == small.config
    x = frames(20)
    x["value"] = x["value"].float()
    assert torch.equal(again(x), small(x))
    # And may be pruned, adapted, fused and saved once more.
    smaller = prune(again, 0.3, magnitude)
    plain = smaller(x)
    assert_close(fuse(adapt(smaller)).requires_grad_(False)(x), plain)
    save_weights(smaller, tmp_path, Card(model="sttn", task="traffic", config=asdict(smaller.config)))
    assert torch.equal(load_model("sttn", tmp_path).model(x), plain)


def test_the_step_of_a_pruned_model_compiles_without_a_graph_break() -> None:
    small = prune(an_sttn(blocks=1), 0.6, magnitude)
    window, rows = frames(3), torch.tensor([1])
    compiled = torch.compile(small.step, fullgraph=True, backend="eager")
    plain, state = small.initial_state(2), small.initial_state(2)
    for t in range(3):
        x = {key: part[:, t] for key, part in window.items()}
        assert_close(compiled(x, state, rows), small.step(x, plain, rows))


def test_a_pruned_encoder_goes_through_its_card(tmp_path: Path) -> None:
    small = prune(an_encoder(positions="relative", norm_first=True), 0.5, magnitude).float()
    assert isinstance(small, PrunedEncoder)
    name = "stepstream.models.continual.pruning:PrunedEncoder"
    save_weights(small, tmp_path, Card(model=name, task="layer", config=small.config))
    x = torch.randn(1, 20, 16)
    assert torch.equal(load_model(name, tmp_path).model(x), small(x))
    assert prunable_weights(prune(small, 0.2, magnitude)) < prunable_weights(small)


def test_sizes_that_say_what_width_says_change_nothing() -> None:
    model = an_sttn()
    sizes = model.config.all_sizes
    assert model.config.sizes is None
    same = STTN(STTNConfig(**{**asdict(SMALL), "sizes": STTNSizes.of(asdict(sizes))})).double().eval()
    same.load_state_dict(model.state_dict())
    assert torch.equal(same(frames(20)), model(frames(20)))


def test_a_card_with_sizes_that_cannot_be_says_which() -> None:
    sizes = SMALL.all_sizes
    first, second = sizes.blocks
    with pytest.raises(ValueError, match="sizes of 1 blocks"):
        replace(SMALL, sizes=STTNSizes((first,), 4))
    with pytest.raises(ValueError, match="head is 0"):
        replace(SMALL, sizes=STTNSizes((first, second), 0))
    with pytest.raises(ValueError, match="temporal_value is 0"):
        replace(SMALL, sizes=STTNSizes((first, replace(second, temporal_value=0)), 4))
    for graph in ((0, 8), (3, 2), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="rising channels below 8"):
            replace(SMALL, sizes=STTNSizes((first, replace(second, graph=graph)), 4))


def test_the_shipped_weights_reach_fifty_seventy_and_ninety_percent() -> None:
    model = load_model("sttn", "sttn-metr-la").model
    whole = prunable_weights(model)
    # What the model holds besides: tables, embeddings, gates, norms, and biases into the shared width.
    assert sum(p.numel() for p in model.parameters()) - whole == 333_910 - 255_104
    for ratio in (0.5, 0.7, 0.9):
        small = prune(model, ratio, magnitude)
        assert ratio <= 1 - prunable_weights(small) / whole < ratio + 0.003


def test_the_random_state_is_left_alone() -> None:
    model = an_sttn()
    before = torch.get_rng_state()
    prune(model, 0.5, magnitude)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_pruned_says_why() -> None:
    model = an_encoder()
    with pytest.raises(ValueError, match="cannot be pruned"):
        prune(Persistence(5, 4), 0.5, magnitude)
    with pytest.raises(ValueError, match=r"ratio is 1"):
        prune(model, 1.0, magnitude)
    with pytest.raises(ValueError, match="at least"):
        prune(model, 0.99, magnitude)
    with pytest.raises(ValueError, match="sizes of 1 layers"):
        PrunedEncoder(2, 16, 4, 4, sizes=[(1, 1)])
