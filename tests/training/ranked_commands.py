"""Commands on several ranks as a launcher starts them: real messages, real exit codes, none outlives a time limit."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

from processes import become_rank, free_port

from hpcdistill.command import run_command

Main = Callable[[int, int], int | None]


class Ranks:
    """`main(rank, ranks)` under `run_command` in forked processes; what each says is in `folder/rank-N.txt`.

    A context: what is left at its end is killed.
    """

    def __init__(self, ranks: int, main: Main, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, port = folder, free_port()
        context = multiprocessing.get_context("fork")
        self.processes: list[ForkProcess] = [
            context.Process(target=_command, args=(rank, ranks, port, main, folder / f"rank-{rank}.txt"))
            for rank in range(ranks)
        ]
        self.ended: dict[int, float] = {}  # rank -> when

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def said(self, rank: int) -> str:
        file = self.folder / f"rank-{rank}.txt"
        return file.read_text() if file.exists() else ""

    def codes(self, seconds: float = 60, without: tuple[int, ...] = ()) -> list[int | None]:
        """The exit codes (-9: killed, None: of those in `without` that live) when all others have ended."""
        limit = time.monotonic() + seconds
        waiting = set(range(len(self.processes))) - set(without)
        while waiting:
            for rank in [rank for rank in waiting if self.processes[rank].exitcode is not None]:
                self.ended[rank] = time.monotonic()
                waiting.remove(rank)
            assert time.monotonic() < limit, f"ranks {waiting} did not end within {seconds} s:\n" + "\n".join(
                f"--- {rank}\n{self.said(rank)}" for rank in range(len(self.processes))
            )
            time.sleep(0.01)
        return [process.exitcode for process in self.processes]


def end_of(main: Main, folder: Path, ranks: int = 3, seconds: float = 60) -> tuple[list[int | None], list[str]]:
    """Exit codes, and what each rank said; `pytest -s` shows the time from the first end to the last."""
    with Ranks(ranks, main, folder) as started:
        codes = started.codes(seconds)
        print(f"\nall ranks ended within {max(started.ended.values()) - min(started.ended.values()):.1f} s")
        return codes, [started.said(rank) for rank in range(ranks)]


def _command(rank: int, ranks: int, port: int, main: Main, output: Path) -> None:
    stream = output.open("a", buffering=1)
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout = sys.stderr = stream  # pytest has put its own there
    become_rank(rank, ranks, port)
    run_command(lambda _: main(rank, ranks))
