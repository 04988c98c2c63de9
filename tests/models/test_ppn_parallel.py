from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ppn import ARCHITECTURES, at, network, stream

from stepstream.models import ppn_worker
from stepstream.models.base import Tree, copy_rows
from stepstream.models.ppn_parallel import InTurn, TwoProcesses, WorkerDied, runner_for
from stepstream.models.ppn_shared import flat_leaves, slot
from stepstream.operators.infer import StateRows


def same(expected: Tree, found: Tree) -> bool:
    others = flat_leaves(found)
    return all(torch.equal(leaf, others[name]) for name, leaf in flat_leaves(expected).items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_processes_give_the_same_bits_and_survive_the_death_of_one(architecture: str) -> None:
    model = network(architecture)
    x = stream(8)
    alone, state = InTurn(model, 1), model.initial_state(2)
    with TwoProcesses(model) as pair:
        other = pair.initial_state(2)
        for t in range(8):
            row = torch.tensor([t % 2])
            if t == 4 and pair.worker is not None:
                os.kill(pair.worker, signal.SIGKILL)
            expected, found = alone.step(at(x, t), state, row), pair.step(at(x, t), other, row)
            for name in expected:
                assert torch.equal(expected[name], found[name]), (t, name)
                assert expected[name].stride() == found[name].stride(), (t, name)
            assert same(state, other), t
            began, ended = pair.spans["reconstruction"]
            assert began < ended
        assert pair.restarts == 1
        first = pair.worker
    assert first is not None and pair.worker is None


def test_a_worker_that_hangs_is_replaced_and_one_that_cannot_start_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network("pyramid")
    x = stream(3)
    with TwoProcesses(model, patience_s=30) as pair:
        state = pair.initial_state(1)
        pair.step(at(x, 0), state)
        stopped = pair.worker
        assert stopped is not None
        kept = copy_rows(state["reconstruction"], torch.tensor([0]))
        os.kill(stopped, signal.SIGSTOP)
        monkeypatch.setattr(pair, "_patience", 0.2)
        monkeypatch.setattr("sys.executable", "/bin/false")
        with pytest.raises(WorkerDied, match="did not start: with exit code 1"):
            pair.step(at(x, 1), state)
        assert pair.restarts == 1
        assert same(kept, state["reconstruction"])
        with pytest.raises(ProcessLookupError):
            os.kill(stopped, 0)


def test_a_state_that_a_dead_worker_left_half_written_is_put_right() -> None:
    model = network("pyramid")
    x = stream(5)
    alone, state = InTurn(model, 1), model.initial_state(3)
    row = torch.tensor([1])
    with TwoProcesses(model) as pair:
        other = pair.initial_state(3)
        victims: list[int] = []

        def half_a_step(_given: Tree, frames: int, kept: int, state: Tree) -> Any:
            for leaf in flat_leaves(state).values():
                leaf.fill_(9)
            raise InterruptedError

        def dies(*_: object) -> None:
            # The worker is stopped before it begins; what a step does until it dies is done here, and then it is dead.
            if victims:
                with pytest.raises(InterruptedError):
                    ppn_worker.step(half_a_step, pair._shared, slot(other["reconstruction"], 1))  # type: ignore[arg-type]
                os.kill(victims.pop(), signal.SIGKILL)

        model.segmentation.register_forward_pre_hook(dies)
        for t in range(5):
            if t == 3:
                assert pair.worker is not None
                victims.append(pair.worker)
                os.kill(pair.worker, signal.SIGSTOP)
            found = pair.step(at(x, t), other, row)
            assert same(alone.step(at(x, t), state, row), found), t
            assert same(state, other), t
        assert pair.restarts == 1


def test_a_step_that_fails_here_leaves_no_answer_behind() -> None:
    model = network("pyramid")
    x = stream(4)
    alone, state = InTurn(model, 1), model.initial_state(1)
    with TwoProcesses(model) as pair:
        other = pair.initial_state(1)
        for t in range(4):
            if t == 2:
                spoilt = {**at(x, t), "points": torch.zeros(1, 20, 3)}
                kept = copy_rows(other["reconstruction"], torch.tensor([0]))
                with pytest.raises(RuntimeError):
                    pair.step(spoilt, copy_segmentation(other))
                assert pair.worker is None
                assert same(kept, other["reconstruction"])
            assert same(alone.step(at(x, t), state), pair.step(at(x, t), other)), t
            assert same(state, other), t


def copy_segmentation(state: Tree) -> Tree:
    """The same state of reconstruction, another of segmentation."""
    return {**state, "segmentation": copy_rows(state["segmentation"], torch.tensor([0]))}


def test_state_that_grows_moves_to_new_memory_and_the_old_is_freed() -> None:
    model = network("pyramid")
    x = stream(6)
    alone, states = InTurn(model, 1), {key: model.initial_state(1) for key in "abc"}

    def mapped(process: int | str = "self") -> int:
        return Path(f"/proc/{process}/maps").read_text().count("ppn-state")

    gc.collect()
    before = mapped()
    with TwoProcesses(model) as pair:
        rows = StateRows(pair, "cpu")
        for t in range(6):
            for key in "abc"[: 1 + t // 2]:
                row = torch.tensor([rows.row(key)])
                found = pair.step(at(x, t), rows.state, row)
                assert same(alone.step(at(x, t), states[key]), found), (t, key)
                assert same(states[key], copy_rows(rows.state, row)), (t, key)
        assert pair.restarts == 0
        gc.collect()
        assert mapped() == before + 2  # of the streams, and a fresh one
        assert pair.worker is not None and mapped(pair.worker) == 1
        del rows
    gc.collect()
    assert mapped() == before


def test_a_state_from_elsewhere_is_refused() -> None:
    model = network("pyramid")
    pair = TwoProcesses(model)
    with pytest.raises(ValueError, match="not one that the initial_state of this runner gave"):
        pair.step(at(stream(1), 0), model.initial_state(1))
    assert pair.worker is None


def test_one_stream_a_step() -> None:
    pair = TwoProcesses(network("ppn"))
    with pytest.raises(ValueError, match="2 streams in one step"):
        pair.step(at(stream(1, batch=2), 0), pair.initial_state(2), torch.tensor([0, 1]))
    assert pair.worker is None


def test_a_mode_needs_its_device() -> None:
    model = network("ppn")
    with pytest.raises(ValueError, match="streams is for CUDA"):
        runner_for(model, "streams")
    with pytest.raises(ValueError, match="processes is for a CPU"):
        runner_for(model, "processes", "cuda")
    with pytest.raises(ValueError, match="a second device, cuda:1, is for streams"):
        runner_for(model, "sequential", "cuda", "cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streams_of_cuda_give_what_one_after_the_other_gives(architecture: str) -> None:
    second = "cuda:1" if torch.cuda.device_count() > 1 else None
    x = {name: leaf.cuda() for name, leaf in stream(8).items()}
    alone = runner_for(network(architecture), "sequential", "cuda:0")
    pair = runner_for(network(architecture), "streams", "cuda:0", second)
    state, other = alone.initial_state(1), pair.initial_state(1)
    for t in range(8):
        expected, found = alone.step(at(x, t), state), pair.step(at(x, t), other)
        for name in expected:
            assert torch.equal(expected[name].cpu(), found[name].cpu()), (t, name)
