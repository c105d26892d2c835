"""Joining the processes of a run, before Accelerate sees them: it then takes the group that there is."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous

from hpcdistill.errors import UserError
from hpcdistill.ranks.environment import rank, ranks
from hpcdistill.ranks.watch import RankWatch, active

_JOIN_LIMIT = timedelta(minutes=5)  # nodes of one job may start minutes apart
_store: Store | None = None  # for all groups of this process: rank 0 serves it
_joined = 0  # how often this process has


def join(cpu: bool, stall: float) -> None:
    """Form the process group (gloo on CPUs, NCCL on GPUs) and watch over its ranks; nothing when there is one.

    `stall`: seconds without progress after which the ranks count as hanging. UserError when the ranks do not find one
    another.
    """
    global _joined, _store
    if ranks() < 2 or dist.is_initialized():
        return
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": port}
    if not cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        if _store is None:
            _store, _, _ = next(rendezvous("env://", timeout=_JOIN_LIMIT))
        # torchrun's agent keeps one store over its restarts: each attempt has keys of its own.
        _joined += 1
        attempt = f"hpcdistill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_joined}"
        # Ours says first, and more clearly, who hangs.
        limit = timedelta(seconds=max(1800.0, 2 * stall))
        group = PrefixStore(f"{attempt}/group", _store)
        dist.init_process_group("gloo" if cpu else "nccl", store=group, rank=rank(), world_size=ranks(), timeout=limit)
        client = TCPStore(address, int(port), is_master=False, wait_for_workers=False, timeout=_JOIN_LIMIT)
    except (DistError, RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {rank()} of {ranks()} did not find the others at {address}:{port} ({reason}); "
            "if another program uses the port, set MASTER_PORT to a free one, and check that all nodes reach the host"
        ) from None
    watch = RankWatch(PrefixStore(f"{attempt}/watch", client), rank(), ranks(), stall)
    dist.barrier()  # every rank has shown a sign of life
    watch.start()


def leave() -> None:
    """End this process's part in the distributed run; once, when no stage follows."""
    if watch := active():
        watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
