"""A fused step is the step of torch's operations: outputs, state, what is refused, what is left to torch."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from equality import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stepstream.models.base import copy_rows
from stepstream.models.continual import attention, block_attention, encoder, fused, kernels, two_block_encoder
from stepstream.models.continual.attention import ContinualAttention
from stepstream.models.continual.base import Layer
from stepstream.models.continual.encoder import FEW, EncoderLayer
from stepstream.models.continual.positions import AgeBias
from stepstream.models.continual.two_block_encoder import TwoBlockEncoder

WIDTH, STREAMS = 12, 9


@contextmanager
def calls(*, refused: bool = False) -> Iterator[list[str]]:
    """The kernels called meanwhile; with `refused`, every step is left to torch."""
    names: list[str] = []
    real_call, real_usable = fused.call_kernel, fused.usable

    def call(name: str, *arguments: Any) -> None:
        names.append(name)
        real_call(name, *arguments)

    def usable(*arguments: Any, **options: Any) -> bool:
        return not refused and real_usable(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, block_attention, encoder, two_block_encoder):
            patch.setattr(module, "call_kernel", call)
        for module in (attention, encoder, two_block_encoder):
            patch.setattr(module, "usable", usable)
        if refused:
            patch.setattr(block_attention, "left_to_us", lambda *_: False)
        yield names


def assert_fused_equals_torch(
    layer: Layer,
    batch: int,
    steps: int,
    seed: int,
    kernel: str,
    *,
    absent: bool,
    then: Sequence[str] = (),
    once: Sequence[str] = (),
) -> None:
    """Ragged rows, some of them not due, some steps absent: the same outputs and, to rounding, the same state.

    `then`: the kernels that follow for each row that is due; `once`: those that follow for all.
    """
    layer.eval()
    random = torch.Generator().manual_seed(seed)
    one, other = layer.initial_state(STREAMS), layer.initial_state(STREAMS)
    for _ in range(steps):
        rows = torch.randperm(STREAMS, generator=random)[:batch] if batch < STREAMS else None
        x = torch.randn(batch, WIDTH, generator=random)
        due = torch.rand(batch, generator=random) < 0.8
        present = {"present": torch.rand(batch, generator=random) < 0.7} if absent else {}
        with torch.no_grad():
            with calls() as names:
                found, _ = layer.advance(x, one, rows, due, **present)
            assert names == [kernel, *list(then) * int(due.sum()), *once]
            with calls(refused=True) as names:
                wanted, _ = layer.advance(x, other, rows, due, **present)
            assert names == []
        assert_close(found[due], wanted[due])
    assert_same_state(one, other)


def assert_same_state(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        for name in one:
            assert_same_state(one[name], other[name])
    elif one.is_floating_point():
        assert_close(one, other)
    else:
        assert torch.equal(one, other)


TWO_BLOCKS = ("encoder_middle", "two_block_end")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of few weights, too, multiply matrices for more rows than `FEW`."""
    monkeypatch.setattr(encoder, "READ", 0)


OPTIONS = {
    "kv_heads": st.sampled_from([1, 3]),
    "bias": st.booleans(),
    "positions": st.sampled_from(["none", "rotary", "relative"]),
    "absent": st.booleans(),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_rings_that_are_asked_for_ahead(kv_heads: int) -> None:
    layer, streams = ContinualAttention(64, 4, 35, kv_heads=kv_heads).eval(), 400 // kv_heads
    state = layer.initial_state(streams)
    assert state["keys_values"]["data"][0].nbytes <= kernels.SHORT, "else none is asked for"
    other = layer.initial_state(streams)
    for step in range(3):
        rows, due = torch.randperm(streams)[:-7], torch.rand(streams - 7) < 0.8
        assert state["keys_values"]["data"][rows].nbytes > kernels.NEAR, "else none is asked for"
        clocks = torch.randint(0, 90, (streams,))
        x = torch.randn(len(rows), 64)
        with torch.no_grad():
            for held in (state, other):
                held["clock"].copy_(clocks)
            with calls() as names:
                fast = layer.advance(x, state, rows, due)[0]
            assert names == ["attention_step"], step
            with calls(refused=True):
                slow = layer.advance(x, other, rows, due)[0]
        assert_close(fast[due], slow[due])
    for mine, theirs in zip(state["keys_values"].values(), other["keys_values"].values(), strict=True):
        assert_close(mine, theirs)


@settings(max_examples=40, deadline=None)
@given(
    options=st.fixed_dictionaries(OPTIONS), memory=st.integers(1, 7), batch=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_attention(options: dict[str, Any], memory: int, batch: int, seed: int) -> None:
    layer = ContinualAttention(WIDTH, 3, memory, **options)
    if layer.age_bias is not None:
        nn.init.normal_(layer.age_bias.weight)
    assert_fused_equals_torch(layer, batch, 20, seed, "attention_step", absent=options["absent"])


@settings(max_examples=40, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {**OPTIONS, "norm_first": st.booleans(), "activation": st.sampled_from(["relu", "gelu"])}
    ),
    memory=st.integers(1, 7),
    feedforward=st.integers(1, 19),
    batch=st.integers(1, FEW),
    seed=st.integers(0, 99),
)
def test_an_encoder_layer(options: dict[str, Any], memory: int, feedforward: int, batch: int, seed: int) -> None:
    layer = EncoderLayer(WIDTH, 3, memory, feedforward, **options)
    assert_fused_equals_torch(layer, batch, 20, seed, "encoder_step", absent=options["absent"])


@pytest.mark.parametrize(
    ("width", "feedforward", "most"),
    [(256, 1024, FEW), (128, 512, 26), (64, 128, encoder.MOST), (12, 16, encoder.MOST)],
)
def test_how_many_rows_are_one_kernel(width: int, feedforward: int, most: int) -> None:
    layer = EncoderLayer(width, 4, 3, feedforward).eval()
    state = layer.initial_state(most + 1)
    with torch.no_grad():
        for rows in (most, most + 1):
            with calls() as names:
                layer.step(torch.randn(rows, width), state, torch.arange(rows))
            assert names[0] == ("encoder_step" if rows == most else "attention_step")


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("feedforward", [16, 512])
def test_many_rows_share_products_of_matrices(norm_first: bool, activation: Any, feedforward: int) -> None:
    """Those of the wider network are packed."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"norm_first": norm_first, "activation": activation, "absent": True}
    layer = EncoderLayer(WIDTH, 3, 5, feedforward, **options)
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    then = ("encoder_middle", "encoder_end")
    assert_fused_equals_torch(layer, FEW + 1, 20, 0, "attention_step", absent=True, once=then)


@settings(max_examples=12, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "kv_heads": st.sampled_from([1, 3]),
            "bias": st.booleans(),
            "norm_first": st.booleans(),
            "activation": st.sampled_from(["relu", "gelu"]),
            "final_norm": st.booleans(),
        }
    ),
    memory=st.integers(1, 7),
    batch=st.sampled_from([1, 3, FEW]),
)
def test_two_blocks(options: dict[str, Any], memory: int, batch: int) -> None:
    layer = TwoBlockEncoder(WIDTH, 3, memory, feedforward=16, **options)
    assert_fused_equals_torch(layer, batch, 20, 0, "two_block_begin", absent=False, then=TWO_BLOCKS)


def test_two_blocks_with_rotary_positions_end_in_a_kernel() -> None:
    layer = TwoBlockEncoder(WIDTH, 3, 5, feedforward=16, positions="rotary")
    assert_fused_equals_torch(layer, 3, 20, 0, "finish_step", absent=False)


@pytest.mark.parametrize(("build", "rows"), [(EncoderLayer, FEW), (EncoderLayer, 100), (TwoBlockEncoder, FEW)])
def test_what_is_beside_a_row_does_not_move_its_bits(build: Any, rows: int) -> None:
    torch.manual_seed(0)
    layer = build(64, 4, 5, feedforward=128).eval()
    x, together, alone = torch.randn(9, rows, 64), layer.initial_state(rows), layer.initial_state(rows)
    with torch.no_grad():
        for t in range(9):
            whole = layer.step(x[t, t % 3 :], together, torch.arange(t % 3, rows))
            for row in range(t % 3, rows):
                one = layer.step(x[t, row : row + 1], alone, torch.tensor([row]))
                assert torch.equal(one[0], whole[row - t % 3])


def test_queries_of_inputs_are_attention_to_their_keys_and_values() -> None:
    torch.manual_seed(0)
    layer = ContinualAttention(WIDTH, 6, 5, kv_heads=2).double()
    nn.init.normal_(layer.in_proj_bias)
    x, time = torch.randn(4, 5, WIDTH).double(), torch.arange(5)[None]
    seen = torch.tensor([[True, True, False, True, False]] * 4)[:, None, None]
    q = layer.project_query(x[:, :1], time[:, :1]).transpose(1, 2)
    k, v = (part.transpose(1, 2) for part in layer.project_keys_values(x, time))
    assert_close(layer.attend_inputs(q, x, seen), attention.attend(q, k, v, seen))


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_logits_of_any_size(scale: float) -> None:
    torch.manual_seed(0)
    layer = ContinualAttention(WIDTH, 3, 5).eval()
    state, exact = layer.initial_state(1), layer.double().initial_state(1)
    exact_layer = ContinualAttention(WIDTH, 3, 5).eval().double()
    exact_layer.load_state_dict(layer.state_dict())
    layer.float()
    with torch.no_grad():
        for _ in range(12):
            x = torch.randn(1, WIDTH) * scale**0.5
            with calls() as names:
                found = layer.step(x, state)
            assert names == ["attention_step"]
            # A logit's own rounding moves a weight by so much of itself.
            assert_close(found.double(), exact_layer.step(x.double(), exact), 1e-5 * max(1.0, scale / 10))


def test_what_is_not_a_number_is_not_hidden() -> None:
    layer = EncoderLayer(WIDTH, 3, 4, 16).eval()
    state = layer.initial_state(2)
    x = torch.zeros(2, WIDTH)
    x[1, 3] = torch.nan
    with torch.no_grad(), calls() as names:
        found = [layer.step(x, state), layer.step(torch.zeros(2, WIDTH), state)]
    assert names == ["encoder_step"] * 2
    assert all(y[0].isfinite().all() and y[1].isnan().all() for y in found), "only the stream that got it, from then on"


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("norm_first", [False, True])
def test_what_is_not_a_number_is_not_hidden_among_many(norm_first: bool) -> None:
    layer = EncoderLayer(64, 4, 4, 128, norm_first=norm_first).eval()
    state, x = layer.initial_state(FEW + 3), torch.zeros(FEW + 3, 64)
    x[1, 3] = torch.nan
    with torch.no_grad(), calls() as names:
        found = layer.step(x, state)
    assert names == ["attention_step", "encoder_middle", "encoder_end"]
    assert found[1].isnan().all() and found[[0, *range(2, FEW + 3)]].isfinite().all()


@pytest.mark.parametrize("rows", [[0, 2], [-1, 0], [0]])
@pytest.mark.parametrize(
    "build",
    [
        lambda: ContinualAttention(4, 2, 3),
        lambda: EncoderLayer(4, 2, 3, 8),
        lambda: TwoBlockEncoder(4, 2, 3, feedforward=8),
    ],
)
def test_a_row_without_a_slot_is_refused_before_anything_is_written(rows: list[int], build: Any) -> None:
    layer = build().eval()
    state = layer.initial_state(2)
    before = copy_rows(state, torch.arange(2))
    with torch.no_grad(), pytest.raises(IndexError, match="slots of the state"):
        layer.step(torch.randn(2, 4), state, torch.tensor(rows))
    assert_same_state(state, before)


def test_all_rows_means_all() -> None:
    layer = ContinualAttention(4, 2, 3).eval()
    with torch.no_grad(), pytest.raises(IndexError, match="slots of the state"):
        layer.step(torch.randn(1, 4), layer.initial_state(2))


def step(layer: Layer, x: Tensor, state: Any = None) -> list[str]:
    with calls() as names:
        layer.step(x, layer.initial_state(x.shape[0]) if state is None else state)
    return names


def test_torch_steps_what_it_must_see() -> None:
    layer = EncoderLayer(WIDTH, 3, 4, 16).eval()
    x = torch.randn(2, WIDTH)
    assert step(layer, x) == [], "a gradient reaches the parameters"
    layer.requires_grad_(False)
    assert step(layer, x) == ["encoder_step"]
    assert step(layer, x.clone().requires_grad_()) == []
    with torch.no_grad():
        assert step(layer.double(), x.double()) == []
        assert step(EncoderLayer(WIDTH, 3, 4, 16, cache="bfloat16").eval(), x) == []
        layer.float().linear1.register_forward_hook(lambda *_: None)
        assert step(layer, x) == ["attention_step"], "a hook would not be called"
        assert step(EncoderLayer(WIDTH, 3, 4, 16, dropout=0.5).train(), x) == []


def _moved(layer: EncoderLayer) -> None:
    layer.linear2.weight.data = layer.linear2.weight.data * 2


def _assigned(layer: EncoderLayer) -> None:
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()}, assign=True)


def _another_module(layer: EncoderLayer) -> None:
    layer.linear1 = nn.Linear(WIDTH, 16)


def _another_parameter(layer: EncoderLayer) -> None:
    layer.self_attn.in_proj_bias = nn.Parameter(torch.randn(3 * WIDTH))


def _another_attention(layer: EncoderLayer) -> None:
    layer.self_attn = ContinualAttention(WIDTH, 3, 4, positions="relative")


def _another_bias_by_age(layer: EncoderLayer) -> None:
    layer.self_attn.age_bias = AgeBias(3, 4)
    nn.init.normal_(layer.self_attn.age_bias.weight)


def _no_bias_by_age(layer: EncoderLayer) -> None:
    layer.self_attn.age_bias = None


def _no_bias(layer: EncoderLayer) -> None:
    layer.linear1.bias = None


def _written(layer: EncoderLayer) -> None:
    with torch.no_grad():
        layer.norm2.weight.mul_(3)


def _parametrised(layer: EncoderLayer) -> None:
    parametrize.register_parametrization(layer.linear1, "weight", nn.Tanh())


def _attention_parametrised(layer: EncoderLayer) -> None:
    parametrize.register_parametrization(layer.self_attn, "in_proj_weight", nn.Tanh())


def _normed(layer: EncoderLayer) -> None:
    module: Any = nn.utils.parametrizations.weight_norm(layer.self_attn.out_proj)
    module.parametrizations.weight.original0.mul_(2)


def _hooked(layer: EncoderLayer) -> None:
    layer.norm1.register_forward_hook(lambda module, given, y: 2 * y)


def _hooked_before(layer: EncoderLayer) -> None:
    layer.self_attn.out_proj.register_forward_pre_hook(lambda module, given: (given[0] + 1,))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    "change",
    [
        _moved,
        _assigned,
        _another_module,
        _another_parameter,
        _another_attention,
        _another_bias_by_age,
        _no_bias_by_age,
        _no_bias,
        _written,
        _parametrised,
        _attention_parametrised,
        _normed,
        _hooked,
        _hooked_before,
    ],
)
@pytest.mark.parametrize("batch", [2, FEW + 1])
def test_a_layer_that_changes_between_two_steps(change: Callable[[EncoderLayer], None], batch: int) -> None:
    """What was looked up at the first step is not what the second goes by."""
    torch.manual_seed(0)
    layer = EncoderLayer(WIDTH, 3, 4, 16, positions="relative").eval()
    nn.init.normal_(layer.self_attn.age_bias.weight)
    state, other = layer.initial_state(batch), layer.initial_state(batch)
    before, after, last = torch.randn(3, batch, WIDTH)
    with torch.no_grad():
        layer.step(before, state)
        with calls(refused=True):
            layer.step(before, other)
        unchanged = copy.deepcopy(layer).step(after, {name: copy.deepcopy(leaf) for name, leaf in state.items()})
        change(layer)
        layer.eval()
        for x in (after, last):
            found = layer.step(x, state)
            with calls(refused=True):
                wanted = layer.step(x, other)
            assert_close(found, wanted)
            assert not torch.allclose(found, unchanged), "else nothing has changed"
    assert_same_state(state, other)


def test_kernels_are_compiled_anew_where_no_folder_can_be_written(tmp_path: Any) -> None:
    """What a read-only container meets: numba finds nowhere to keep compiled code."""
    code = """
import numba.core.caching as caching
caching.FunctionCache._impl_class._locator_classes = []
import torch
from stepstream.models.continual.attention import ContinualAttention
layer = ContinualAttention(4, 2, 3).eval()
with torch.no_grad():
    print(layer.step(torch.ones(1, 4), layer.initial_state(1)).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "[1, 4]" in run.stdout
