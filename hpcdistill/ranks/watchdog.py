"""One rank's failure ends all of them, soon and with that rank's own words.

Every rank has a thread with its own connection to the store of the rendezvous. The thread publishes a heartbeat: that
the rank is alive, how far it is and what it is doing. It ends the process when another rank has failed, because the
main thread may be waiting in a collective call that nobody will answer. A second thread sees to it that this also
happens when the store itself no longer answers.

Why not torchrun's own teardown, `torch.distributed.elastic`'s `record`, `srun --kill-on-bad-exit` and gloo's time-out?
Measured with these alone (torch 2.13, 3 ranks, gloo, under torchrun):
- a killed rank gives 105 lines with 5 tracebacks, a user's error on one rank 124 lines with 7;
- every exit code becomes 1, by which no job can tell what is worth a requeue;
- where a rank hangs, torchrun names another one as "Root Cause", the first whose call timed out, and ends the one that
  hangs by SIGTERM, without a word on where it was;
- a stopped process holds the others for gloo's time-out and 30 s more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

from torch.distributed import DistError

from hpcdistill.console import say_here
from hpcdistill.errors import EXIT_RANK_LOST, UserError
from hpcdistill.ranks.environment import local_rank
from hpcdistill.ranks.store import STORE_ERRORS, Failure, RankStore, leave_at_once

HEARTBEAT: Final = 2.0  # seconds between two
LOST_AFTER: Final = 60.0  # seconds without one
DEAD_AFTER: Final = 3 * HEARTBEAT  # the same, when a collective call has broken already
LAST_WORDS: Final = 10.0  # seconds that others have to say why they failed

_PACKAGE = Path(__file__).parents[1]
_active: Watchdog | None = None
_listeners = 0  # how many have listened for a signal to stop, the same on all ranks
_listener: tuple[int, Callable[[], bool]] | None = None  # its number, and whether this process has received one


class Watchdog:
    """The watchdog of one rank; `store` is common to all ranks."""

    def __init__(self, store: RankStore, rank: int, ranks: int, stall: float) -> None:
        self.rank, self.ranks, self.stall, self.store = rank, ranks, stall, store
        self.host = socket.gethostname()
        self.last_progress = time.monotonic()  # when the main thread last went on
        self.patience = 0  # depth of `patient`
        self.turns = 0  # of `main_first`
        self.stop_requested_by = 0  # the listener whose ranks are to stop
        self.before_exit: list[Callable[[], None]] = []
        self._ending: int | None = None  # the thread that ends this process
        self._ending_lock = threading.Lock()
        self._done = threading.Event()
        self._answered = time.monotonic()  # when the store last did
        self._exit: tuple[float, int] | None = None  # end at this time with this code, whatever still hangs
        self._main = threading.main_thread().ident
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("rank-watchdog", self._watch_ranks), ("store-watchdog", self._watch_store))
        ]
        store.set(f"beat/{rank}", self._heartbeat(0))

    def start(self) -> None:
        """Begin, when all ranks have made theirs."""
        global _active
        self._first_host = json.loads(self.store.get("beat/0"))["host"]
        self.last_progress = self._answered = time.monotonic()
        _active = self
        for thread in self._threads:
            thread.start()

    def interrupt(self, message: str, code: int) -> None:
        """End all ranks from a thread, though the main thread may be stuck; nothing when that is ending already."""
        if self._ending is None:
            with contextlib.suppress(*STORE_ERRORS):  # the rank-watchdog finds that out, too
                self._end(self.store.publish(Failure(self.rank, self.host, message, code)))

    def fail(self, message: str, code: int) -> Failure:
        """Publish why this rank ends; what counts: its words, or those of another that has failed before."""
        self._take_the_end(code)
        own = Failure(self.rank, self.host, message, code)
        try:
            return self.store.publish(own)
        except STORE_ERRORS:
            return replace(own, published=False)

    def explain(self, error: BaseException) -> Failure | None:
        """What another rank has to do with `error`; None when it is this rank's own.

        A rank that dies breaks the collective calls of all others. Those note that they were waiting: the culprit is
        the rank that has noted nothing.
        """
        try:
            if not _is_of_a_collective(error):
                return self.store.failure(2.0)
            self.store.set(f"waiting/{self.rank}", "1")
            return self._culprit()
        except STORE_ERRORS:
            return self._store_lost()

    def leave_for(self, failure: Failure, line: str | None = None, style: str = "bold red") -> NoReturn:
        """Print `line` if it is this rank's to print, and end this process when the others have had the time to end
        too: a launcher kills who is late."""
        self._take_the_end(failure.code)
        if line and self._speaks(failure):
            with contextlib.suppress(OSError, SystemExit):  # rich's answer to a reader that has left
                say_here(line, style)
        # The first rank left alive, which speaks and may hold the store and the run's lock, lets the others go before:
        # nobody may take the run over while a rank of ours is still in it.
        first, *others = [r for r in range(self.ranks) if r not in failure.lost] or [self.rank]
        with contextlib.suppress(*STORE_ERRORS):
            if failure.published and self.rank == first:
                self.store.set(f"left/{first}")
                self.store.wait([f"left/{rank}" for rank in others], LAST_WORDS)
        tidying = threading.Thread(target=self._tidy_up, daemon=True)  # what hangs may be the disk
        tidying.start()
        tidying.join(LAST_WORDS / 2)
        with contextlib.suppress(*STORE_ERRORS):
            if failure.published and self.rank != first:
                self.store.wait([f"left/{first}"], LAST_WORDS)
                self.store.set(f"left/{self.rank}")
        leave_at_once(failure.code)

    def stop(self) -> None:
        """End in good order: together, as a launcher kills who is late, the store's process last."""
        global _active
        awaited = [f"left/{rank}" for rank in (range(1, self.ranks) if self.rank == 0 else (0,))]
        with contextlib.suppress(*STORE_ERRORS):
            if self.rank == 0:
                self.store.set("left/0")
            while not self.store.has(*awaited):
                time.sleep(0.05)  # a rank that dies or hangs now is noticed by the thread
            if failure := self.store.failure():  # who fails leaves, too
                self.leave_for(failure, f"error: {failure.seen_by(self.rank)}")
            self.store.set(f"left/{self.rank}")
        self._done.set()
        for thread in self._threads:
            thread.join(2 * HEARTBEAT)
        _active = None

    # --- the threads --------------------------------------------------------------------------------------------------

    def _watch_ranks(self) -> None:
        number, next_beat, before = 0, 0.0, time.monotonic()
        seen: tuple[str, float] = ("", before)  # the neighbour's last heartbeat, and when it came
        neighbour = (self.rank + 1) % self.ranks
        while not self._done.wait(0.5):
            try:
                if self._ending is not None:
                    return
                if failure := self.store.failure():
                    self._end(failure)
                self._share_the_stop()
                now = time.monotonic()
                if now - before > DEAD_AFTER:  # this process has slept (a suspended job), and so may have the others
                    seen = ("", now)
                    self.last_progress = now
                before = now
                if now >= next_beat:
                    number, next_beat = number + 1, now + HEARTBEAT
                    self.store.set(f"beat/{self.rank}", self._heartbeat(number))
                    beat = self.store.get(f"beat/{neighbour}")
                    if beat != seen[0] or self.store.has(f"left/{neighbour}"):
                        seen = (beat, now)
                    elif now - seen[1] > LOST_AFTER:
                        message = f"{self._name(neighbour)} has given no sign of life for {LOST_AFTER:.0f} s"
                        self._publish_loss(message, [neighbour])
                    if self._standing() > self.stall:
                        self._check_stall()
                self._answered = time.monotonic()
            except STORE_ERRORS:
                if not self._done.is_set():
                    self._end(self._store_lost())

    def _share_the_stop(self) -> None:
        """One rank's signal is all ranks' soon, also while they share no collective call: in an evaluation, say."""
        if (listener := _listener) is None or self.stop_requested_by == listener[0]:
            return
        number, received = listener[0], listener[1]()
        if received:
            self.store.set(f"stop/{number}")
        if received or self.store.has(f"stop/{number}"):
            self.stop_requested_by = number

    def _watch_store(self) -> None:
        """A store whose process is stopped leaves its clients waiting without a limit."""
        before = time.monotonic()
        while not self._done.wait(0.5):
            now = time.monotonic()
            if now - before > DEAD_AFTER:
                self._answered = now
            before = now
            if self._exit and now > self._exit[0]:
                os._exit(self._exit[1])  # nothing else: the terminal may be what hangs
            if now - self._answered > LOST_AFTER and self._ending is None:
                self._end(self._store_lost(f"has given no sign of life for {LOST_AFTER:.0f} s"))

    # --- the end of this process --------------------------------------------------------------------------------------

    def _end(self, failure: Failure) -> None:
        """End this process although its main thread may be stuck; nothing when another thread is doing so."""
        if self._claims_the_end(failure.code):
            self.leave_for(failure, f"error: {failure.seen_by(self.rank)}")

    def _claims_the_end(self, code: int) -> bool:
        """Whether it is this thread that ends the process."""
        with self._ending_lock:
            if self._ending is None:
                self._ending = threading.get_ident()
                self._exit = (time.monotonic() + 3 * LAST_WORDS, code)
            return self._ending == threading.get_ident()

    def _take_the_end(self, code: int) -> None:
        if not self._claims_the_end(code):
            while True:  # until that thread has done it
                time.sleep(LAST_WORDS)

    def _speaks(self, failure: Failure) -> bool:
        """Whether this is the rank to print `failure`: the first that can."""
        if not failure.published:  # the first of each host, where rank 0 is gone
            local = local_rank()
            return failure.rank == self.rank or local == (1 if self.rank == local else 0)
        return self.rank == min(set(range(self.ranks)) - set(failure.lost), default=self.rank)

    def _tidy_up(self) -> None:
        with contextlib.suppress(OSError, UserError):
            for work in self.before_exit:
                work()

    # --- who is to blame ----------------------------------------------------------------------------------------------

    def _heartbeat(self, number: int) -> str:
        at = {"beat": number, "host": self.host, "at": self._where()}
        return json.dumps({**at, "stands": round(self._standing(), 1)})

    def _standing(self) -> float:
        """Seconds for which the main thread has not gone on, 0 while that is in order."""
        return 0.0 if self.patience else time.monotonic() - self.last_progress

    def _where(self) -> str:
        """What the main thread is doing: the innermost line of this package, but for this room's."""
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PACKAGE) and path.parent != Path(__file__).parent:
                return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return "outside hpcdistill"

    def _check_stall(self) -> None:
        """Publish that the ranks hang, when none of them goes on. While one does, the others may well wait for it."""
        there = [rank for rank in range(self.ranks) if rank == self.rank or not self.store.has(f"left/{rank}")]
        beats = {rank: json.loads(self.store.get(f"beat/{rank}")) for rank in there}
        if all(beat["stands"] > self.stall for beat in beats.values()):
            each = "; ".join(f"rank {rank} ({beat['host']}) in {beat['at']}" for rank, beat in beats.items())
            each += "".join(f"; rank {rank} has come to its end" for rank in range(self.ranks) if rank not in beats)
            self._publish_loss(f"no rank has gone on for {self.stall:.0f} s (train.timeout): {each}")

    def _culprit(self) -> Failure | None:
        """Who broke the collective call that this rank was waiting in."""
        start = time.monotonic()
        seen: dict[int, tuple[str, float]] = {}  # rank -> its last heartbeat, and when it came
        while True:
            if failure := self.store.failure():
                return failure
            silent = [rank for rank in range(self.ranks) if not self.store.has(f"waiting/{rank}")]
            if not silent:
                return None  # all have met it: what it says is what happened
            now = time.monotonic()
            for rank in silent:
                if (beat := self.store.get(f"beat/{rank}")) != seen.get(rank, ("", 0.0))[0]:
                    seen[rank] = (beat, now)
            if dead := [rank for rank in silent if now - seen[rank][1] > DEAD_AFTER]:
                names = ", ".join(map(self._name, dead))
                return self._publish_loss(f"{names} died without a word (killed? out of memory?); see its log", dead)
            if now - start > LAST_WORDS:
                break
            time.sleep(0.2)
        each = "; ".join(f"{self._name(rank)} in {json.loads(seen[rank][0])['at']}" for rank in silent)
        return self._publish_loss(f"the other ranks waited in vain: {each}")

    def _publish_loss(self, message: str, lost: Sequence[int] = ()) -> Failure:
        """Publish what this rank has noticed of others; the ranks `lost` cannot hear of it. Returns what counts."""
        return self.store.publish(Failure(-1, self.host, message, EXIT_RANK_LOST, lost))

    def _store_lost(self, how: str = "is gone") -> Failure:
        holder = f"rank 0 ({self._first_host})"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            holder = "torchrun's process"
        message = f"{holder}, which holds the ranks' common store, {how} (killed? out of memory?); see its log"
        return Failure(-1, self.host, message, EXIT_RANK_LOST, (0,), published=False)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({json.loads(self.store.get(f'beat/{rank}'))['host']})"


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether `error` comes out of torch.distributed: gloo raises plain RuntimeErrors."""
    if isinstance(error, DistError):
        return True
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


# --- for the rest of the package; each works in a process without other ranks, too -----------------------------------


def active() -> Watchdog | None:
    """The watchdog of this process; None when it is alone."""
    return _active


def progress() -> None:
    """The main thread has done something: a step, a test image. When no rank has for `stall` seconds, they hang."""
    if _active is not None:
        _active.last_progress = time.monotonic()


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Inside, no progress is no sign of a hang: rank 0 packs a data set, say."""
    if (watchdog := _active) is None:
        yield
        return
    watchdog.patience += 1
    try:
        yield
    finally:
        progress()
        watchdog.patience -= 1


def before_exit(work: Callable[[], None]) -> None:
    """Have `work` done before a failure ends this process."""
    if _active is not None:
        _active.before_exit.append(work)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the body first, however long it takes; then the others do. Every rank must come by."""
    if (watchdog := _active) is None:
        yield
        return
    watchdog.turns += 1  # the same on all ranks
    done = f"first/{watchdog.turns}"
    if watchdog.rank == 0:
        with patient():
            yield
        watchdog.store.set(done)
        return
    # Not `patient`: where rank 0 hangs before it comes here, all ranks stand still, by which the hang is found.
    while not watchdog.store.has(done):
        time.sleep(0.05)
    progress()
    yield


def listen(received: Callable[[], bool] | None) -> None:
    """Ask `received`, whether this process is to stop, about twice a second and tell all ranks; None: no longer."""
    global _listener, _listeners
    _listeners += received is not None
    _listener = (_listeners, received) if received else None


def signal_received() -> bool:
    """Whether this process itself has received a signal to stop."""
    return (listener := _listener) is not None and listener[1]()


def stop_requested() -> bool:
    """Whether any rank has received a signal to stop since all began to `listen`. The ranks hear of it one by one."""
    watchdog, listener = _active, _listener
    return watchdog is not None and listener is not None and watchdog.stop_requested_by == listener[0]
