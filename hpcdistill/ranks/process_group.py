"""Joining the processes of a run, before Accelerate sees them: it then takes the group that there is."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import DistError

from hpcdistill.errors import UserError
from hpcdistill.ranks.environment import local_rank, rank, ranks
from hpcdistill.ranks.meeting import meet, met
from hpcdistill.ranks.watch import RankWatch, active


def join(cpu: bool, stall: float) -> None:
    """Form the process group (gloo on CPUs, NCCL on GPUs) and watch over its ranks; nothing when there is one.

    `stall`: seconds without progress after which the ranks count as hanging. UserError when the ranks do not find one
    another or do not fit: GPUs on some, or two on one.
    """
    if ranks() < 2 or dist.is_initialized():
        return
    if not cpu:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    watch, group = meet(cpu, lambda board: RankWatch(board, rank(), ranks(), stall))
    watch.start()
    met()
    # The watch says first, and more clearly, who hangs.
    limit = timedelta(seconds=max(1800.0, 2 * stall))
    try:
        dist.init_process_group("gloo" if cpu else "nccl", store=group, rank=rank(), world_size=ranks(), timeout=limit)
        dist.barrier()
    except (DistError, RuntimeError) as error:
        if failure := watch.explain(error):
            watch.leave_for(failure, f"error: {failure.seen_by(watch.rank)}")
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {rank()} of {ranks()} has met the others, but cannot compute with them ({reason}); check that the "
            "nodes reach one another, and that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names their network"
        ) from None


def leave() -> None:
    """End this process's part in the distributed run; once, when no stage follows."""
    if watch := active():
        watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
