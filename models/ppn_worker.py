"""The second process of a Parallel Perception Network: `python -m stepstream.models.ppn_worker`.

Started by `stepstream.models.ppn_parallel` only. The first line of stdin is a JSON object: `config`, `network`,
`layout`, `memory` and `weights` (file descriptors), `core` (the core to stay on, or null).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load

from stepstream.models.ppn import PPN, PPNConfig
from stepstream.models.ppn_shared import DONE, FAILED, READY, STEP, SharedArrays

__all__ = ["main"]


def serve(start: dict[str, Any], commands: BinaryIO, answers: BinaryIO) -> None:
    """Steps the network whenever it is told to, until stdin ends."""
    if start["core"] is not None:
        os.sched_setaffinity(0, {start["core"]})
    torch.set_num_threads(1)
    model = PPN(PPNConfig(**start["config"])).eval().requires_grad_(False)
    model.load_state_dict(load(Path(f"/proc/self/fd/{start['weights']}").read_bytes()))
    network = model.networks[start["network"]]
    shared = SharedArrays(start["memory"], start["layout"])
    arrays = shared.tensors
    state = shared.state(network.trunk.initial_state(1))
    answers.write(READY)
    while commands.read(1) == STEP:
        try:
            began = time.monotonic()
            with torch.inference_mode():
                window = arrays["inputs"].permute(0, 3, 1, 2).float()
                arrays["output"].copy_(network({"window": window}, 1, 1, state))
            arrays["times"][0], arrays["times"][1] = began, time.monotonic()
        except (RuntimeError, ValueError, MemoryError) as error:
            sys.stderr.write(f"ppn_worker: {error}\n")
            answers.write(FAILED)
            sys.exit(1)
        answers.write(DONE)


def main() -> None:
    """Reads what to do from stdin, and does it."""
    commands = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    # Whatever a library prints must not be taken for an answer.
    os.dup2(2, 1)
    line = b""
    while not line.endswith(b"\n"):
        byte = commands.read(1)
        if not byte:
            return
        line += byte
    serve(json.loads(line), commands, answers)


if __name__ == "__main__":
    main()
