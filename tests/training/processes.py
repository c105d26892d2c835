"""Real processes for the tests of distributed training: forked, joined by gloo, and never outliving a time limit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
from collections.abc import Callable

import torch
import torch._dynamo  # which the first optimizer imports, for more than a second: once here, not in each forked rank
from accelerate.state import AcceleratorState, GradientState

from hpcdistill.ranks.rendezvous import leave


def free_port() -> int:
    """Below those that the system hands out: it could give one of them away before rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def become_rank(rank: int, ranks: int, port: int) -> None:
    """In a forked process: what a launcher tells a rank, and nothing left of what the parent has trained."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)
    if ranks > 1:
        own, all_of_them = str(rank), str(ranks)
        os.environ |= {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": all_of_them, "LOCAL_WORLD_SIZE": all_of_them}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def launch(ranks: int, work: Callable[[int, int], None], seconds: float = 90) -> list[int]:
    """Run `work(rank, ranks)` in `ranks` forked processes joined by gloo; their exit codes (-9: killed).

    All are killed when one outlives the time limit.
    """
    port = free_port()
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
    become_rank(rank, ranks, port)
    work(rank, ranks)
    leave()
