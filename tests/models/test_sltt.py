from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.models.event_models import check_compiles, check_snapshot, check_steps, frames
from torch import Tensor

from stepstream.models.registry import model_class
from stepstream.models.sltt import SpikingNet, draw_steps, sltt_backward

SIZE = (9, 7)


def network(seed: int = 0, **options: object) -> SpikingNet:
    torch.manual_seed(seed)
    chosen: dict = {"classes": 3, "size": SIZE, "widths": (6, 5), **options}
    return SpikingNet(**chosen).double()


def gradients(model: SpikingNet) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


def through_time(model: SpikingNet, x: Tensor, labels: Tensor, chosen: list[bool], detach: bool) -> list[Tensor]:
    """The gradient from one graph over all steps; `detach`: without what goes from a step to the next."""
    state, total = model.initial_state(len(x)), 0
    for frame, used in zip(x.unbind(1), chosen, strict=True):
        if detach:
            state = {
                "potential": {name: leaf.detach() for name, leaf in state["potential"].items()},
                "readout": state["readout"].detach(),
                "weight": state["weight"],
            }
        logits, state = model.advance(frame, state)
        if used:
            total = total + F.cross_entropy(logits, labels) / sum(chosen)
    total.backward()  # type: ignore[attr-defined]
    return gradients(model)


@pytest.mark.parametrize("chosen", [[True] * 6, [True, False, False, True, False, True]], ids=["SLTT", "SLTT-K"])
def test_the_gradient_is_that_through_time_without_its_temporal_terms(chosen: list[bool]) -> None:
    model, x, labels = network(), frames(4, 6, SIZE).double(), torch.tensor([0, 1, 2, 1])
    loss, _ = sltt_backward(model, x, lambda logits: F.cross_entropy(logits, labels), chosen)
    found = gradients(model)
    for a, b in zip(found, through_time(model, x, labels, chosen, detach=True), strict=True):
        torch.testing.assert_close(a, b)
    # and it is another one than with them, by spikes that are there
    full = through_time(model, x, labels, chosen, detach=False)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found[:-2], full[:-2], strict=True))
    assert loss > 0 and all(gradient.abs().max() > 0 for gradient in found)


def test_a_spike_has_the_gradient_of_a_triangle() -> None:
    model = network(leak=0.0)
    seen: list[Tensor] = []
    potential = torch.linspace(-1.5, 3, 19, dtype=torch.float64, requires_grad=True)
    model.convolutions[0].forward = lambda x: potential.view(1, -1, 1, 1)  # type: ignore[method-assign]
    model.convolutions[1].forward = lambda x: seen.append(x) or torch.zeros(1, 5, 3, 2).double()  # type: ignore[func-returns-value,method-assign]
    model._shapes = ((19, 1, 1), (5, 3, 2))
    model.advance(torch.zeros(1, 2, *SIZE).double(), model.initial_state(1))
    spikes = seen[0].flatten()
    assert torch.equal(spikes, (potential >= 1).double())
    spikes.sum().backward()
    torch.testing.assert_close(potential.grad, (1 - (potential.detach() - 1).abs()).clamp(min=0))


def test_steps_are_the_window_form() -> None:
    check_steps(network(), frames(3, 25, SIZE).double(), 1e-10)
    check_steps(network().float(), frames(3, 25, SIZE), 1e-5)


def test_a_reset_takes_the_threshold_away_and_the_rest_leaks() -> None:
    model = network(leak=0.5, memory=1.0, widths=(1,))
    x = frames(1, 3, SIZE).double() * 3
    state = model.initial_state(1)
    potential, mean = torch.zeros(1, 1, 5, 4).double(), torch.zeros(1, 3).double()
    for i, frame in enumerate(x.unbind(1)):
        charged = 0.5 * potential + model.convolutions[0](torch.log1p(frame))
        spikes = (charged >= 1).double()
        potential = charged - spikes
        mean = (mean * i + model.readout(spikes.flatten(1))) / (i + 1)
        torch.testing.assert_close(model.step(frame, state), mean)
        torch.testing.assert_close(state["potential"]["0"], potential)
    assert spikes.sum() > 0


def test_a_stream_moves_between_rows_to_the_bit() -> None:
    check_snapshot(network().float(), frames(2, 8, SIZE))


def test_a_step_compiles() -> None:
    check_compiles(network().float(), frames(2, 3, SIZE))


def test_the_graph_of_a_step_is_forgotten() -> None:
    """What autograd keeps does not grow with time: after a step, none of its tensors is left but the state."""
    model, kept = network(), []

    def loss(logits: Tensor) -> Tensor:
        kept.append(len(alive))
        return logits.square().sum()

    alive: set[int] = set()

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        sltt_backward(model, frames(2, 12, SIZE).double(), loss)
    assert kept[0] > 0 and len(set(kept)) == 1


def test_k_steps_are_drawn_from_the_generator() -> None:
    drawn = [draw_steps(10, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [sum(one) for one in drawn] == [3, 3, 3]
    assert draw_steps(4, None, torch.Generator()) == draw_steps(4, 9, torch.Generator()) == [True] * 4
    with pytest.raises(ValueError, match="expected 6 flags, at least one of them set"):
        sltt_backward(network(), frames(1, 6, SIZE).double(), torch.sum, [False] * 6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for options, reason in (({"classes": 1}, "classes 1"), ({"size": (3,)}, "size"), ({"leak": 1.0}, "leak 1.0")):
        with pytest.raises(ValueError, match=reason):
            network(**options)  # type: ignore[arg-type]
    assert model_class("sltt") is SpikingNet
