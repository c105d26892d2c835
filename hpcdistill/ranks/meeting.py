"""How the ranks find one another and see that they fit, and what one that fails before tells those that wait for it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final, NoReturn

import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore

from hpcdistill.console import err
from hpcdistill.errors import UserError
from hpcdistill.ranks import watch
from hpcdistill.ranks.board import STORE_ERRORS, Board
from hpcdistill.ranks.environment import rank, ranks
from hpcdistill.ranks.failure import EXIT_STOPPED, Failure, leave_at_once

JOIN_LIMIT: Final = 120.0  # seconds: nodes of one job do not start in the same instant
EARLY: Final = 5.0  # seconds that a rank which fails before the others have come spends on telling them
_STORE_LIMIT: Final = timedelta(minutes=5)  # of the process group's own questions

_store: TCPStore | None = None  # for all groups of this process: rank 0 serves it, or torchrun's process does
_meetings = 0  # how many this process has been to


@dataclass(frozen=True)
class Participant:
    """A rank as it presents itself."""

    host: str
    device: str  # cpu or cuda
    gpu: str = ""  # the GPU's UUID


def meet(cpu: bool, make_watch: Callable[[Board], watch.RankWatch]) -> tuple[watch.RankWatch, PrefixStore]:
    """Wait until every rank is there; this rank's watch, not started yet, and the keys for the process group.

    UserError when they do not come together within JOIN_LIMIT, or have devices that do not fit. Ends the process when
    one of them has published why it does not come.
    """
    address, port = _address()
    end = time.monotonic() + JOIN_LIMIT
    own = Participant(socket.gethostname(), *_device(cpu))
    try:
        store = _own_store(JOIN_LIMIT)
        client = _connected(JOIN_LIMIT)
        board = Board(PrefixStore(f"{_prefix()}/watch", client))
        made = make_watch(board)
        everybody = _present(board, own, end)
    except (*STORE_ERRORS, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {rank()} of {ranks()} did not find the others at {address}:{port} ({reason}); "
            "if another program uses the port, set MASTER_PORT to a free one, and check that all nodes reach the host"
        ) from None
    check_devices(everybody)
    group = PrefixStore(f"{_prefix()}/group", store)
    return made, group


def met() -> None:
    """The meeting is over: from here on the watch has its eyes on the ranks."""
    global _meetings
    _meetings += 1


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


def tell(message: str, code: int) -> bool:
    """Tell the ranks that wait for this one why it does not come. True: rank 0 says so, this rank need not."""
    if _meetings:  # it is over: nobody waits
        return False
    try:
        board = Board(PrefixStore(f"{_prefix()}/watch", _own_store(EARLY)))
        counts = board.publish(Failure(rank(), socket.gethostname(), message, code))
        board.set(f"words/{rank()}", message)
        try:
            return rank() == 0 or _said_by_rank_0(board, message, counts)
        finally:
            _hear(board)
    except (*STORE_ERRORS, OSError):
        return False


def _said_by_rank_0(board: Board, message: str, counts: Failure) -> bool:
    """Whether rank 0 prints this, either because it waits for us, or because it has failed in the same way."""
    end = time.monotonic() + EARLY
    while time.monotonic() < end:
        if board.has("words/0"):
            return board.get("words/0") == message
        if board.has("here/0"):
            return counts.message == message
        time.sleep(0.05)
    return False


def _hear(board: Board) -> None:
    """Note that this rank knows; rank 0 may hold the store and waits for the others to know, too."""
    board.set(f"heard/{rank()}")
    if rank() == 0:
        board.await_all([f"heard/{other}" for other in range(1, ranks())], EARLY)


def _present(board: Board, own: Participant, end: float) -> list[Participant]:
    """Every rank as it presents itself."""
    keys = [f"here/{number}" for number in range(ranks())]
    board.set(keys[rank()], json.dumps(asdict(own)))
    while not board.has(*keys):
        if failure := board.failure():
            _end_for(board, failure)
        if watch.told_here():
            said = "stopped by a signal before the ranks had met; the same command goes on"
            _end_for(board, board.publish(Failure(rank(), own.host, said, EXIT_STOPPED)))
        if time.monotonic() > end:
            absent = ", ".join(str(number) for number, key in enumerate(keys) if not board.has(key))
            raise UserError(
                f"rank {rank()} of {ranks()} has waited {JOIN_LIMIT:.0f} s in vain for rank {absent}; see its log, and "
                "check that the launcher has started it"
            )
        time.sleep(0.05)
    return [Participant(**json.loads(board.get(key))) for key in keys]


def _end_for(board: Board, failure: Failure) -> NoReturn:
    """End this process for a failure before the meeting; rank 0 says it, or who failed where rank 0 has not come."""
    if rank() == 0:
        err.print(f"error: {failure.seen_by(0)}", style="bold red", markup=False, soft_wrap=True)
    with contextlib.suppress(*STORE_ERRORS):  # the store's process has ended: it knows
        _hear(board)
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
        if watch.told_here():  # to be passed on, where that is possible
            end = min(end, time.monotonic() + EARLY)
        if time.monotonic() > end:
            if watch.told_here():
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
    """torchrun's process keeps one store over its restarts: each attempt, and each meeting, has keys of its own."""
    return f"hpcdistill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_meetings + 1}"


def _device(cpu: bool) -> tuple[str, str]:
    if cpu:
        return "cpu", ""
    return "cuda", str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
