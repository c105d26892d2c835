"""Several runs side by side in one process: a thread each, every one the run that it is alone.

Read `train_side_by_side`. Each thread runs the unmodified `trainer.train`, with one share of the CPU threads, and on a
GPU with a stream of its own: PyTorch lets go of Python's lock in its operators, so that two cores compute two small
networks without cutting each operator in two. Stacked parameters (`torch.func`) make grouped convolutions of a small
network's, which take 1.6 times the CPU's time (bench/side_by_side.py), and what a run logs, evaluates and saves would
have to be told apart; so runs here need not even have the same architecture. What belongs to the process is shared with
care: random generators (`default_generator`), signals, the terminal (`console.speaking`), PyTorch's switches.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from hpcdistill.command import mendable
from hpcdistill.console import say, say_here, speaking
from hpcdistill.default_generator import sharing
from hpcdistill.errors import EXIT_CRASHED, EXIT_INTERRUPTED, EXIT_STOPPED, Crowded, UserError, plural
from hpcdistill.ranks.environment import ranks
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.run import Run
from hpcdistill.trainer import train
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.determinism import deterministic, prepare_determinism
from hpcdistill.training.run_folder import RunFolder

_ALIKE: Final = ("device", "precision", "deterministic", "threads")  # of train: they belong to the process
_TRACKERS: Final = {"tensorboard"}  # those that keep to a run's folder
_M_ARENA_MAX: Final = -8  # mallopt(3)
_LOOK: Final = 0.2  # seconds between two looks at the threads: a signal is handled in between


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exit code that it would have had alone, its error or its result."""

    code: int
    message: str | None = None
    result: dict[str, Any] | None = None


@dataclass
class Cell:
    """A run among others."""

    run: Run
    log: Path | None = None  # what it says goes there; None: to the terminal, with its identity before each line
    ended: Ended | None = None
    crowded: bool = False  # to be tried again alone
    told: Callable[[Cell], None] = field(default=lambda cell: None)  # called once it has ended

    def end(self, ended: Ended) -> None:
        """It will not be tried again."""
        self.ended = ended
        self.told(self)


def train_side_by_side(cells: Sequence[Cell], signals: StopSignals) -> None:
    """Train (or resume, or find finished) all runs at once; `cell.ended` says how each ended.

    Teachers that are missing are trained before, side by side as well. A run that fails takes no other along: one
    without memory, or whose method draws from PyTorch's default generator, is tried again alone, after the others.
    Runs need not be alike but for what belongs to the process; UserError otherwise, before anything is started.
    """
    check_together([cell.run for cell in cells])
    _teach(cells, signals)
    waiting = [cell for cell in cells if cell.ended is None]
    if len(waiting) > 1:
        _together(waiting, signals)
    else:
        for cell in waiting:
            cell.crowded = True
    for cell in [cell for cell in waiting if cell.crowded]:
        gc.collect()  # what the others held
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        cell.end(Ended(EXIT_STOPPED) if signals.requested() else _outcome(cell, signals))


def check_together(runs: Sequence[Run]) -> None:
    """UserError for runs that cannot share a process."""
    if ranks() > 1:
        raise UserError("runs side by side are one process on one device; start it without a launcher")
    first = runs[0].config
    for config in (run.config for run in runs):
        if config.train.deepspeed:
            raise UserError(f"{config.name}: train.deepspeed: has the process to itself; leave it out")
        if foreign := set(config.train.trackers) - _TRACKERS:
            raise UserError(f"train.trackers: {', '.join(sorted(foreign))} follows one run a process; leave it out")
        for key in _ALIKE:
            one, other = getattr(first.train, key), getattr(config.train, key)
            if one != other:
                raise UserError(
                    f"train.{key}: {first.name} has {one} and {config.name} {other}, but runs side by side share it; "
                    "train them apart"
                )
    folders = [run.folder for run in runs]
    for run in runs:
        if folders.count(run.folder) > 1:
            raise UserError(f"{run.folder}: two of the runs are the same one; name it once")


def _teach(cells: Sequence[Cell], signals: StopSignals) -> None:
    """Train the teachers that are missing, each once; end the runs whose teacher has not come to its end."""
    teachers: dict[Path, Cell] = {}
    for cell in cells:
        for run in _missing_teachers(cell.run):
            teachers.setdefault(run.folder, Cell(run))
    if not teachers:
        return
    say(f"{plural(len(teachers), 'teacher')} to be trained first")
    train_side_by_side(list(teachers.values()), signals)
    for cell in cells:
        for run in _missing_teachers(cell.run):
            ended = teachers[run.folder].ended
            assert ended is not None
            message = ended.message and f"its teacher {run.folder.name} has failed: {ended.message}"
            cell.end(Ended(ended.code, message))
            break


def _missing_teachers(run: Run) -> list[Run]:
    """The runs that must have finished before `run` begins, and have not."""
    if RunFolder(run.folder).result() is not None:
        return []
    roles = run.config.method.roles()
    teachers = (teacher.run for role, teacher in run.teachers.items() if role in roles and roles[role].needed)
    return [teacher for teacher in teachers if teacher and RunFolder(teacher.folder).result() is None]


def _together(cells: Sequence[Cell], signals: StopSignals) -> None:
    """A thread for each cell, until all have ended. Ctrl-C for the second time stops all of them at once."""
    config, before = cells[0].run.config.train, torch.get_num_threads()
    threads = config.threads or max(1, before // len(cells))
    say(f"{len(cells)} runs side by side, each with {plural(threads, 'CPU thread')}")
    _share_an_arena()
    if config.deterministic:
        prepare_determinism()
    working = [threading.Thread(target=_work, args=(cell, signals, threads), name=cell.run.short) for cell in cells]
    with sharing(), deterministic(config.deterministic, _device(config)):
        try:
            for thread in working:
                thread.start()
            _wait(working)
        except BaseException:
            _interrupt(working)
            _wait(working)
            raise
        finally:
            torch.set_num_threads(before)


def _work(cell: Cell, signals: StopSignals, threads: int) -> None:
    """What a thread does: the run, as if it were alone."""
    torch.set_num_threads(threads)  # of this thread; with more than there are cores all would wait for one another
    try:
        with _stream(cell.run.config.train):
            ended = _outcome(cell, signals, beside=True)
    except Crowded as error:
        cell.crowded = True
        say(f"[{cell.run.short}] {error}; it is trained alone, after the others")
        return
    except KeyboardInterrupt:
        ended = Ended(EXIT_INTERRUPTED, "stopped")
    except Exception as error:  # before the run itself: no stream could be made, say
        ended = _failed(error)
    cell.end(ended)


def _outcome(cell: Cell, signals: StopSignals, beside: bool = False) -> Ended:
    """Train the run, say what it has to say, and tell how it ended. `beside` others Crowded is raised."""
    try:
        with speaking(cell.run.short, cell.log):
            try:
                result = train(cell.run, signals)
                return Ended(EXIT_STOPPED if result is None else 0, result=result)
            except Exception as error:
                if beside and isinstance(error, Crowded):
                    raise
                return _failed(error)
    except OSError as error:  # of its log
        return _failed(error)


def _failed(error: Exception) -> Ended:
    """Say what has ended the run: one line for its user, or a traceback for what none can mend. The others go on."""
    if isinstance(error, UserError | OSError):
        with contextlib.suppress(OSError):
            ended = Ended(error.code if isinstance(error, UserError) else UserError.code, mendable(error))
            say_here(f"error: {ended.message}", "bold red")
            return ended
    say_here("".join(traceback.format_exception(error)).rstrip())
    return Ended(EXIT_CRASHED, traceback.format_exception_only(error)[-1].strip())


def _stream(config: TrainConfig) -> contextlib.AbstractContextManager[Any]:
    """On a GPU a stream of the thread's own: what one run launches does not wait for another's."""
    device = _device(config)
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream: contextlib.AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    return stream


def _device(config: TrainConfig) -> torch.device:
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _wait(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        while thread.is_alive():
            thread.join(_LOOK)


def _interrupt(threads: Iterable[threading.Thread]) -> None:
    """Raise KeyboardInterrupt in each thread, as in a run alone: its files and its lock are put in order."""
    for thread in threads:
        if thread.ident is not None and thread.is_alive():
            stopped = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), stopped)


def _share_an_arena() -> None:
    """Have glibc serve all threads from one heap, which keeps its pages; those of threads give theirs back.

    See `training.accelerator.keep_freed_memory`. It counts for heaps that are not there yet.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
