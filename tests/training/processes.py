"""Real processes for the tests of distributed training: forked, joined by gloo, and never outliving a time limit."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch
import torch._dynamo  # which the first optimizer imports, for more than a second: once here, not in each forked rank
from accelerate.state import AcceleratorState, GradientState

from hpcdistill.ranks.rendezvous import leave


def launch(ranks: int, work: Callable[[int, int], None], seconds: float = 90) -> list[int]:
    """Run `work(rank, ranks)` in `ranks` forked processes joined by gloo; their exit codes (-9: killed).

    All are killed when one outlives the time limit.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(rank, ranks, port, work)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(seconds)
            assert process.exitcode is not None, f"a rank of {ranks} did not end within {seconds} s"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def _work(rank: int, ranks: int, port: int, work: Callable[[int, int], None]) -> None:
    # The parent may have trained in one process: nothing of its Accelerate state may be left.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    work(rank, ranks)
    leave()
