"""The second process of a Parallel Perception Network: `python -m stepstream.models.ppn_worker`.

Started by `stepstream.models.ppn_parallel` only. The first packet on stdin, a socket, is a JSON object: `config`,
`network`, `layout`, `memory` and `weights` (file descriptors), `core` (the core to stay on, or null).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.ppn import PPN, PPNConfig
from stepstream.models.ppn_networks import Reconstruction, Segmentation
from stepstream.models.ppn_shared import (
    COMMAND,
    DONE,
    FAILED,
    READY,
    SharedArrays,
    flat_leaves,
    slot,
    state_layout,
)

__all__ = ["main"]

_LONGEST = 1 << 17


def serve(start: dict[str, Any], link: socket.socket) -> None:
    """Steps the network whenever it is told to, until the other side is gone."""
    if start["core"] is not None:
        os.sched_setaffinity(0, {start["core"]})
    torch.set_num_threads(1)
    model = PPN(PPNConfig(**start["config"])).eval().requires_grad_(False)
    model.load_state_dict(load(Path(f"/proc/self/fd/{start['weights']}").read_bytes()))
    network = model.networks[start["network"]]
    arrays = SharedArrays(start["memory"], start["layout"]).tensors
    like = network.trunk.initial_state(1)
    state = like
    link.send(READY)
    while True:
        command, files, _, _ = socket.recv_fds(link, COMMAND.size, 1)
        if not command:
            return
        row, slots = COMMAND.unpack(command)
        for file in files:
            state = SharedArrays(file, state_layout(like, slots)).state(like)
            os.close(file)
        try:
            step(network, arrays, slot(state, row))
        except (RuntimeError, ValueError, MemoryError) as error:
            sys.stderr.write(f"ppn_worker: {error}\n")
            link.send(FAILED)
            sys.exit(1)
        link.send(DONE)


def step(network: Segmentation | Reconstruction, arrays: dict[str, Tensor], state: Tree) -> None:
    """One step of one stream, from shared memory to shared memory."""
    began = time.monotonic()
    with torch.inference_mode():
        for name, leaf in flat_leaves(state, "undo").items():
            arrays[name].copy_(leaf)
        arrays["begun"][0] = 1
        window = arrays["inputs"].permute(0, 3, 1, 2).float()
        arrays["output"].copy_(network({"window": window}, 1, 1, state))
    arrays["times"][0], arrays["times"][1] = began, time.monotonic()


def main() -> None:
    """Reads what to do from stdin, and does it."""
    # The other side may be gone before it is answered.
    with socket.socket(fileno=os.dup(0)) as link, contextlib.suppress(ConnectionError):
        start = link.recv(_LONGEST)
        if start:
            serve(json.loads(start), link)


if __name__ == "__main__":
    main()
