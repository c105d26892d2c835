"""Rendezvous: the ranks find one another, see that their devices fit, and form the process group.

Why not `init_process_group` alone: when a rank fails before it, say for a wrong setting, the others wait until its
time-out (30 minutes by default), do not learn why, and are deaf to signals (measured with torch 2.13: the handler of a
SIGTERM runs only when the time-out is over). Here a rank that fails early publishes why, and the waiting ranks end
within seconds (tests/ranks/test_rendezvous.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from hpcdistill.console import say_here
from hpcdistill.errors import EXIT_STOPPED, UserError
from hpcdistill.ranks.environment import local_rank, rank, ranks
from hpcdistill.ranks.store import STORE_ERRORS, Failure, RankStore, leave_at_once
from hpcdistill.ranks.watchdog import Watchdog, active, signal_received

JOIN_LIMIT: Final = 120.0  # seconds: nodes of one job do not start in the same instant
EARLY: Final = 5.0  # seconds that a rank which fails before the rendezvous spends on telling the others
_STORE_LIMIT: Final = timedelta(minutes=5)  # of the process group's own questions

_store: TCPStore | None = None  # for all groups of this process: rank 0 serves it, or torchrun's process does
_completed = 0  # rendezvous of this process


@dataclass(frozen=True)
class Participant:
    """A rank as it presents itself."""

    host: str
    device: str  # cpu or cuda
    gpu: str = ""  # the GPU's UUID


def join(cpu: bool, stall: float) -> None:
    """Form the process group (gloo on CPUs, NCCL on GPUs) and start the watchdog; nothing when there is a group.

    Accelerate takes the group that there is. `stall`: seconds without progress after which the ranks count as hanging.
    UserError when the ranks do not find one another within JOIN_LIMIT, do not fit (GPUs on some, or two on one), or
    cannot compute together. Ends the process when a rank has published why it does not come.
    """
    global _completed
    if ranks() < 2 or dist.is_initialized():
        return
    if not cpu:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    watchdog, group = _meet(cpu, stall)
    watchdog.start()
    _completed += 1  # from here on the watchdog looks after the ranks
    # The watchdog says first, and more clearly, who hangs.
    limit = timedelta(seconds=max(1800.0, 2 * stall))
    try:
        dist.init_process_group("gloo" if cpu else "nccl", store=group, rank=rank(), world_size=ranks(), timeout=limit)
        dist.barrier()
    except RuntimeError as error:
        if failure := watchdog.explain(error):
            watchdog.leave_for(failure, f"error: {failure.seen_by(watchdog.rank)}")
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {rank()} of {ranks()} has met the others, but cannot compute with them ({reason}); check that the "
            "nodes reach one another, and that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names their network"
        ) from None


def leave() -> None:
    """End this process's part in the distributed run; once, when no stage follows."""
    if watchdog := active():
        watchdog.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(cpu: bool, stall: float) -> tuple[Watchdog, PrefixStore]:
    """Wait until every rank is there; this rank's watchdog, not started yet, and the store of the process group."""
    address, port = _address()
    end = time.monotonic() + JOIN_LIMIT
    own = Participant(socket.gethostname(), *_device(cpu))
    try:
        store = _own_store(JOIN_LIMIT)
        shared = RankStore(PrefixStore(f"{_prefix()}/watch", _connected(JOIN_LIMIT)))
        watchdog = Watchdog(shared, rank(), ranks(), stall)
        everybody = _present(shared, own, end)
    except (*STORE_ERRORS, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {rank()} of {ranks()} did not find the others at {address}:{port} ({reason}); "
            "if another program uses the port, set MASTER_PORT to a free one, and check that all nodes reach the host"
        ) from None
    check_devices(everybody)
    return watchdog, PrefixStore(f"{_prefix()}/group", store)


def check_devices(everybody: Sequence[Participant]) -> None:
    """Raise UserError, the same on all ranks, when some have a GPU and some have not, or two have the same one."""
    kinds = {kind: [r for r, one in enumerate(everybody) if one.device == kind] for kind in ("cpu", "cuda")}
    if all(kinds.values()):
        without = ", ".join(f"rank {r} ({everybody[r].host})" for r in kinds["cpu"])
        raise UserError(
            f"{without} of {len(everybody)} ranks sees no GPU, the others do; look at nvidia-smi there and at "
            "CUDA_VISIBLE_DEVICES, or take no GPU at all (train.device=cpu, --device cpu)"
        )
    for host in dict.fromkeys(one.host for one in everybody):
        there = [one.gpu for one in everybody if one.host == host and one.gpu]
        if len(set(there)) < len(there):
            raise UserError(
                f"{len(there)} processes on {host} and {len(set(there))} GPU{'s' * (len(set(there)) > 1)}; start one "
                f"process a GPU ({len(set(there))}, with --nproc-per-node, --num_processes or --ntasks-per-node), or "
                "take none (train.device=cpu, --device cpu)"
            )


def publish_early_failure(message: str, code: int) -> bool:
    """Tell the ranks that wait for this one why it does not come. True: rank 0 says so, this rank need not."""
    if _completed:  # nobody waits
        return False
    try:
        shared = RankStore(PrefixStore(f"{_prefix()}/watch", _own_store(EARLY)))
        first = shared.publish(Failure(rank(), socket.gethostname(), message, code))
        shared.set(f"words/{rank()}", message)
        try:
            return rank() == 0 or _said_by_rank_0(shared, message, first)
        finally:
            _acknowledge(shared)
    except (*STORE_ERRORS, OSError):
        return False


def _said_by_rank_0(shared: RankStore, message: str, first: Failure) -> bool:
    """Whether rank 0 prints this, either because it waits for us, or because it has failed in the same way."""
    end = time.monotonic() + EARLY
    while time.monotonic() < end:
        if shared.has("words/0"):
            return shared.get("words/0") == message
        if shared.has("here/0"):
            return first.message == message
        time.sleep(0.05)
    return False


def _acknowledge(shared: RankStore) -> None:
    """Note that this rank knows of the failure. Rank 0, which may hold the store, waits until all others do."""
    shared.set(f"heard/{rank()}")
    if rank() == 0:
        shared.wait([f"heard/{other}" for other in range(1, ranks())], EARLY)


def _present(shared: RankStore, own: Participant, end: float) -> list[Participant]:
    """Every rank as it presents itself."""
    keys = [f"here/{number}" for number in range(ranks())]
    shared.set(keys[rank()], json.dumps(asdict(own)))
    while not shared.has(*keys):
        if failure := shared.failure():
            _end_for(shared, failure)
        if signal_received():
            message = "stopped by a signal before the ranks had met; the same command goes on"
            _end_for(shared, shared.publish(Failure(rank(), own.host, message, EXIT_STOPPED)))
        if time.monotonic() > end:
            absent = ", ".join(str(number) for number, key in enumerate(keys) if not shared.has(key))
            raise UserError(
                f"rank {rank()} of {ranks()} has waited {JOIN_LIMIT:.0f} s in vain for rank {absent}; see its log, and "
                "check that the launcher has started it"
            )
        time.sleep(0.05)
    return [Participant(**json.loads(shared.get(key))) for key in keys]


def _end_for(shared: RankStore, failure: Failure) -> NoReturn:
    """End this process for a failure before the rendezvous. Rank 0 prints it, or its own rank where 0 has not come."""
    if rank() == 0:
        say_here(f"error: {failure.seen_by(0)}", "bold red")
    with contextlib.suppress(*STORE_ERRORS):  # the store's process has ended: it knows
        _acknowledge(shared)
    leave_at_once(failure.code)


def _own_store(seconds: float) -> TCPStore:
    """The store that this process keeps; rank 0 serves it, unless torchrun's process does."""
    global _store
    if _store is None:
        serves = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        _store = _connected(seconds, serves)
    return _store


def _connected(seconds: float, serves: bool = False) -> TCPStore:
    address, port = _address()
    limit, end = timedelta(seconds=seconds), time.monotonic() + seconds
    # torch would wait for the server, too, but with lines of C++ at the end, and deaf to signals.
    while not serves and not _listens(address, port):
        if signal_received():  # to be passed on, where that is possible
            end = min(end, time.monotonic() + EARLY)
        if time.monotonic() > end:
            if signal_received():
                leave_at_once(EXIT_STOPPED)
            raise ConnectionError(f"nobody has listened there for {seconds:.0f} s")
        time.sleep(0.1)
    # Shared with whoever else asks for a store at this port in this process, as torch's own rendezvous has it.
    store = TCPStore(address, port, ranks(), serves, limit, wait_for_workers=False, multi_tenant=serves)
    store.set_timeout(_STORE_LIMIT)
    return store


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2.0):
        return True
    return False


def _address() -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": port}
    return address, int(port)


def _prefix() -> str:
    """torchrun's process keeps one store over its restarts: each attempt, and each rendezvous, has keys of its own."""
    return f"hpcdistill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_completed + 1}"


def _device(cpu: bool) -> tuple[str, str]:
    if cpu:
        return "cpu", ""
    return "cuda", str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
