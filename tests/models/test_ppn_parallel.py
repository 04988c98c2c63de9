from __future__ import annotations

import os
import signal

import pytest
import torch
from test_ppn import ARCHITECTURES, at, network, stream

from stepstream.models.base import copy_rows
from stepstream.models.ppn_parallel import InTurn, TwoProcesses, WorkerDied, runner_for
from stepstream.models.ppn_shared import flat_leaves


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
            for name, leaf in flat_leaves(state).items():
                assert torch.equal(leaf, flat_leaves(other)[name]), (t, name)
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
        for name, leaf in flat_leaves(kept).items():
            assert torch.equal(leaf, flat_leaves(state["reconstruction"])[name])
        with pytest.raises(ProcessLookupError):
            os.kill(stopped, 0)


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
