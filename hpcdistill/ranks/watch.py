"""One rank's failure ends all of them, soon and with that rank's own words.

Every rank has a thread with its own connection to the store by which the ranks found one another. It shows that the
rank is alive, how far it is and what it is doing; and it ends its process when another rank has failed, because the
main thread may be waiting in a collective call that nobody will answer. A second thread sees to it that this also
happens when the store itself no longer answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

from hpcdistill.console import err
from hpcdistill.errors import UserError
from hpcdistill.ranks.board import STORE_ERRORS, Board
from hpcdistill.ranks.environment import local_rank
from hpcdistill.ranks.failure import Failure, is_of_a_collective, leave_at_once

EXIT_RANK_LOST: Final = 71  # EX_OSERR of sysexits.h: a rank died or hangs; the same command goes on from the checkpoint
BEAT: Final = 2.0  # seconds between two signs of life
LOST_AFTER: Final = 60.0  # seconds without one
DEAD_AFTER: Final = 3 * BEAT  # the same, when a collective call has broken already
LAST_WORDS: Final = 10.0  # seconds that others have to say why they failed

_PACKAGE = Path(__file__).parents[1]
_active: RankWatch | None = None
_listeners = 0  # how many have listened for a signal to stop, the same on all ranks
_listener: tuple[int, Callable[[], bool]] | None = None  # its number, and whether this process has received one


class RankWatch:
    """The watch of one rank, by way of a `board` that all share."""

    def __init__(self, board: Board, rank: int, ranks: int, stall: float) -> None:
        self.rank, self.ranks, self.stall = rank, ranks, stall
        self.host = socket.gethostname()
        self._board = board
        self._ending: int | None = None  # the thread that ends this process
        self._ending_lock = threading.Lock()
        self._done = threading.Event()
        self._progress = time.monotonic()  # when the main thread last went on
        self._patient = 0  # depth of `patient`
        self._turns = 0
        self._stopping = 0  # the listener whose ranks are to stop
        self._answered = time.monotonic()  # when the store last did
        self._exit: tuple[float, int] | None = None  # end at this time with this code, whatever still hangs
        self._before_exit: list[Callable[[], None]] = []
        self._main = threading.main_thread().ident
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("rank-watch", self._watch), ("store-watch", self._watch_store))
        ]
        self._board.set(f"beat/{rank}", self._sign_of_life(0))

    def start(self) -> None:
        """Begin, when all ranks have made theirs."""
        global _active
        self._first_host = json.loads(self._board.get("beat/0"))["host"]
        self._progress = self._answered = time.monotonic()
        _active = self
        for thread in self._threads:
            thread.start()

    def progress(self) -> None:
        """The main thread has done something: a step, a test image. When none has for `stall` seconds, they hang."""
        self._progress = time.monotonic()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, no progress is no sign of a hang: rank 0 packs a data set, say."""
        self._patient += 1
        try:
            yield
        finally:
            self.progress()
            self._patient -= 1

    def before_exit(self, work: Callable[[], None]) -> None:
        """Have `work` done before a failure ends this process."""
        self._before_exit.append(work)

    def turn(self) -> int:
        """1, 2, 3, ..., the same on all ranks."""
        self._turns += 1
        return self._turns

    def mark(self, name: str) -> None:
        """Tell all ranks that `name` has happened."""
        self._board.set(f"mark/{name}")

    def wait_for(self, name: str) -> None:
        """Return when a rank has called `mark(name)`. It may be patient meanwhile, this one is not: else none hangs."""
        while not self._board.has(f"mark/{name}"):
            time.sleep(0.05)
        self.progress()

    def stop_wanted(self) -> bool:
        """Whether a rank has received a signal to stop since all began to `listen`."""
        return (listener := _listener) is not None and self._stopping == listener[0]

    def interrupt(self, message: str, code: int) -> None:
        """End all ranks from a thread, though the main thread may be stuck; nothing when that is ending already."""
        if self._ending is None:
            with contextlib.suppress(*STORE_ERRORS):  # the watch finds that out, too
                self._end(self._board.publish(Failure(self.rank, self.host, message, code)))

    def fail(self, message: str, code: int) -> Failure:
        """Publish why this rank ends; what counts: its words, or those of another that has failed before."""
        self._take_the_end(code)
        own = Failure(self.rank, self.host, message, code)
        try:
            return self._board.publish(own)
        except STORE_ERRORS:
            return replace(own, told=False)

    def speaks(self, failure: Failure) -> bool:
        """Whether this is the rank to print `failure`: the first that can."""
        if not failure.told:  # the first of each host, where rank 0 is gone
            local = local_rank()
            return failure.rank == self.rank or local == (1 if self.rank == local else 0)
        return self.rank == min(set(range(self.ranks)) - set(failure.lost), default=self.rank)

    def explain(self, error: BaseException) -> Failure | None:
        """What another rank has to do with `error`; None when it is this rank's own.

        A rank that dies breaks the calls of all others. They note that they were waiting: who does not is the culprit.
        """
        try:
            if not is_of_a_collective(error):
                return self._board.failure(2.0)
            self._board.set(f"waiting/{self.rank}", "1")
            return self._culprit()
        except STORE_ERRORS:
            return self._store_gone()

    def leave_for(self, failure: Failure, line: str | None = None, style: str = "bold red") -> NoReturn:
        """Print `line` if it is this rank's to print, and end this process when the others have had the time to end
        too: a launcher kills who is late."""
        self._take_the_end(failure.code)
        if line and self.speaks(failure):
            with contextlib.suppress(OSError, SystemExit):  # rich's answer to a reader that has left
                err.print(line, style=style, markup=False, soft_wrap=True)
        # The first one, who speaks and may hold the store and the run's lock, lets the others go before: nobody may
        # take the run over while a rank of ours is still in it.
        first, *others = [r for r in range(self.ranks) if r not in failure.lost] or [self.rank]
        with contextlib.suppress(*STORE_ERRORS):
            if failure.told and self.rank == first:
                self._board.set(f"left/{first}")
                self._board.await_all([f"left/{rank}" for rank in others], LAST_WORDS)
        tidying = threading.Thread(target=self._tidy_up, daemon=True)  # what hangs may be the disk
        tidying.start()
        tidying.join(LAST_WORDS / 2)
        with contextlib.suppress(*STORE_ERRORS):
            if failure.told and self.rank != first:
                self._board.await_all([f"left/{first}"], LAST_WORDS)
                self._board.set(f"left/{self.rank}")
        leave_at_once(failure.code)

    def stop(self) -> None:
        """End the watch in good order: together, as a launcher kills who is late, the store's process last."""
        global _active
        others = range(1, self.ranks)
        with contextlib.suppress(*STORE_ERRORS):
            if self.rank == 0:
                self._board.set("left/0")
            while not self._board.has(*(f"left/{rank}" for rank in (others if self.rank == 0 else (0,)))):
                time.sleep(0.05)  # a rank that dies or hangs now is noticed by the thread
            if failure := self._board.failure():  # who fails leaves, too
                self.leave_for(failure, f"error: {failure.seen_by(self.rank)}")
            self._board.set(f"left/{self.rank}")
        self._done.set()
        for thread in self._threads:
            thread.join(2 * BEAT)
        _active = None

    # --- the threads --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        number, next_beat, before = 0, 0.0, time.monotonic()
        seen: tuple[str, float] = ("", before)  # the neighbour's last sign of life, and when it came
        neighbour = (self.rank + 1) % self.ranks
        while not self._done.wait(0.5):
            try:
                if self._ending is not None:
                    return
                if failure := self._board.failure():
                    self._end(failure)
                self._pass_on_the_stop()
                now = time.monotonic()
                if now - before > DEAD_AFTER:  # this process has slept (a suspended job), and so may have the others
                    seen = ("", now)
                    self.progress()
                before = now
                if now >= next_beat:
                    number, next_beat = number + 1, now + BEAT
                    self._board.set(f"beat/{self.rank}", self._sign_of_life(number))
                    sign = self._board.get(f"beat/{neighbour}")
                    if sign != seen[0] or self._board.has(f"left/{neighbour}"):
                        seen = (sign, now)
                    elif now - seen[1] > LOST_AFTER:
                        said = f"{self._name(neighbour)} has given no sign of life for {LOST_AFTER:.0f} s"
                        self._board.publish(Failure(-1, self.host, said, EXIT_RANK_LOST, (neighbour,)))
                    if self._standing() > self.stall:
                        self._judge_stall()
                self._answered = time.monotonic()
            except STORE_ERRORS:
                if not self._done.is_set():
                    self._end(self._store_gone())

    def _pass_on_the_stop(self) -> None:
        """One rank's signal is all ranks' soon, also while they do not talk to one another: in an evaluation, say."""
        if (listener := _listener) is None or self._stopping == listener[0]:
            return
        number, told = listener[0], listener[1]()
        if told:
            self._board.set(f"stop/{number}")
        if told or self._board.has(f"stop/{number}"):
            self._stopping = number

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
                self._end(self._store_gone(f"has given no sign of life for {LOST_AFTER:.0f} s"))

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

    def _tidy_up(self) -> None:
        with contextlib.suppress(OSError, UserError):
            for work in self._before_exit:
                work()

    # --- who is to blame ----------------------------------------------------------------------------------------------

    def _sign_of_life(self, number: int) -> str:
        at = {"beat": number, "host": self.host, "at": self._where()}
        return json.dumps({**at, "stands": round(self._standing(), 1)})

    def _standing(self) -> float:
        """Seconds for which the main thread has not gone on, 0 while that is in order."""
        return 0.0 if self._patient else time.monotonic() - self._progress

    def _where(self) -> str:
        """What the main thread is doing: the innermost line of this package."""
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PACKAGE) and path.parent != Path(__file__).parent:
                return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return "outside hpcdistill"

    def _judge_stall(self) -> None:
        """The ranks hang when none of them goes on: one that does lets the others wait for good reason."""
        there = [rank for rank in range(self.ranks) if rank == self.rank or not self._board.has(f"left/{rank}")]
        signs = {rank: json.loads(self._board.get(f"beat/{rank}")) for rank in there}
        if all(sign["stands"] > self.stall for sign in signs.values()):
            each = "; ".join(f"rank {rank} ({sign['host']}) in {sign['at']}" for rank, sign in signs.items())
            each += "".join(f"; rank {rank} has come to its end" for rank in range(self.ranks) if rank not in signs)
            said = f"no rank has gone on for {self.stall:.0f} s (train.timeout): {each}"
            self._board.publish(Failure(-1, self.host, said, EXIT_RANK_LOST))

    def _culprit(self) -> Failure | None:
        """Who broke the collective call that this rank was waiting in."""
        start = time.monotonic()
        seen: dict[int, tuple[str, float]] = {}  # rank -> its last sign of life, and when it came
        while True:
            if failure := self._board.failure():
                return failure
            silent = [rank for rank in range(self.ranks) if not self._board.has(f"waiting/{rank}")]
            if not silent:
                return None  # all have met it: what it says is what happened
            now = time.monotonic()
            for rank in silent:
                if (sign := self._board.get(f"beat/{rank}")) != seen.get(rank, ("", 0.0))[0]:
                    seen[rank] = (sign, now)
            if dead := [rank for rank in silent if now - seen[rank][1] > DEAD_AFTER]:
                names = ", ".join(map(self._name, dead))
                said = f"{names} died without a word (killed? out of memory?); see its log"
                return self._board.publish(Failure(-1, self.host, said, EXIT_RANK_LOST, dead))
            if now - start > LAST_WORDS:
                break
            time.sleep(0.2)
        each = "; ".join(f"{self._name(rank)} in {json.loads(seen[rank][0])['at']}" for rank in silent)
        said = f"the other ranks waited in vain: {each}"
        return self._board.publish(Failure(-1, self.host, said, EXIT_RANK_LOST))

    def _store_gone(self, how: str = "is gone") -> Failure:
        holder = f"rank 0 ({self._first_host})"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            holder = "torchrun's process"
        said = f"{holder}, which holds the ranks' common store, {how} (killed? out of memory?); see its log"
        return Failure(-1, self.host, said, EXIT_RANK_LOST, (0,), told=False)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({json.loads(self._board.get(f'beat/{rank}'))['host']})"


def active() -> RankWatch | None:
    """The watch of this process; None when it is alone."""
    return _active


def listen(told: Callable[[], bool] | None) -> None:
    """Have `told`, whether this process is to stop, asked about twice a second and passed on; None: no longer."""
    global _listener, _listeners
    _listeners += told is not None
    _listener = (_listeners, told) if told else None


def told_here() -> bool:
    """Whether this process itself has received a signal to stop."""
    return (listener := _listener) is not None and listener[1]()


def stop_wanted() -> bool:
    """`RankWatch.stop_wanted`, where there is a watch."""
    return _active is not None and _active.stop_wanted()


def before_exit(work: Callable[[], None]) -> None:
    """`RankWatch.before_exit`, where there is a watch."""
    if _active is not None:
        _active.before_exit(work)


def progress() -> None:
    """`RankWatch.progress`, where there is a watch."""
    if _active is not None:
        _active.progress()


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """`RankWatch.patient`, where there is a watch."""
    with _active.patient() if _active is not None else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the body first, however long it takes; then the others do. Every rank must come by."""
    if _active is None:
        yield
    elif _active.rank == 0:
        with _active.patient():
            yield
        _active.mark(f"first/{_active.turn()}")
    else:
        _active.wait_for(f"first/{_active.turn()}")
        yield
