"""How every command ends: a user's error is one line and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hpcdistill.console import say_here
from hpcdistill.errors import EXIT_CRASHED, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from hpcdistill.ranks.environment import adopt_slurm, check_ranks, rank, ranks
from hpcdistill.storage import user_path

if TYPE_CHECKING:
    from hpcdistill.ranks.watchdog import Watchdog

SCRIPTS = ("shards", "slurm")  # folders of the clone
_SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EPERM: "the system does not permit it there; choose a folder you may write to",
    errno.ENOENT: "no such file or folder, and none can be made there; check the path",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder",
    errno.EISDIR: "a folder stands where a file is needed; name a file",
    errno.ENAMETOOLONG: "a name is longer than the file system takes; choose a shorter one",
    errno.EIO: "the disk cannot be read or written (input/output error); check it, or use another one",
}


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Call `main` with the command line and turn what a user can mend into one line on stderr.

    With several ranks that line comes once, and names the rank that it is from; see `ranks.watchdog`.
    """
    try:
        adopt_slurm()
        check_ranks()
    except UserError as error:  # which rank this is, and who could speak for all, is not known
        say_here(f"error: {error}", "bold red")
        sys.exit(EXIT_USER_ERROR)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        _part()
    except UserError as error:
        fail(str(error), error.code)
    except BrokenPipeError:  # the reader of a pipe (head, less) has left; silence the flush at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end_unread()
        sys.exit(0)
    except SystemExit as error:  # rich makes it of a BrokenPipeError
        if isinstance(error.__context__, BrokenPipeError):
            _end_unread()
        raise
    except OSError as error:
        if error.errno not in _SYSTEM_ERRORS:
            crash(error)
        fail(mendable(error))
    except KeyboardInterrupt:
        end("stopped", EXIT_INTERRUPTED, "yellow")
    except Exception as error:
        crash(error)
    sys.exit(code or 0)


def end_in_order_when_terminated() -> None:
    """Have SIGTERM end this command as Ctrl-C does, so that what is half written is removed: for short commands.

    A training has its own way: it saves first.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def program(word: str) -> str:
    """What usage lines call the command `word`: as the user has typed it.

    A command can be reached as `hpcdistill evaluate`, `python -m hpcdistill evaluate`, `python -m hpcdistill.evaluate`
    and, some of them, as a script of the clone; called from Python it is the first.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec is not None else ""
    if module == "hpcdistill.__main__":
        return f"python -m hpcdistill {word}"
    if module.startswith("hpcdistill."):
        return f"python -m {module}"
    if spec is None and Path(sys.argv[0]).parent.name in SCRIPTS:
        return f"python {sys.argv[0]}"
    return f"hpcdistill {word}"


def whole(text: str) -> int:
    """For argparse: an integer in plain digits. int() itself takes 010 for 10, and 1_0."""
    if not re.fullmatch("-?(0|[1-9][0-9]{0,17})", text):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number in plain digits")
    return int(text)


def mendable(error: UserError | OSError) -> str:
    """The line for an error that a user can mend; any other is raised again."""
    if isinstance(error, UserError):
        return str(error)
    if error.errno not in _SYSTEM_ERRORS:
        raise error
    return f"{error.filename or 'writing'}: {_SYSTEM_ERRORS[error.errno]}"


def positive(text: str) -> int:
    """For argparse: an integer of 1 or more, in plain digits."""
    if not re.fullmatch("[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 or more")
    return int(text)


class Parser(argparse.ArgumentParser):
    """A command's options. What it refuses is one line, as any user's error is: argparse would print its usage too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class UserPath(argparse.Action):
    """For argparse: a path, or a list of them, read by `user_path`. A `type` could not say its error in one line."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        name = option or ""
        paths = [user_path(value, name) for value in values] if isinstance(values, list) else values
        setattr(namespace, self.dest, user_path(paths, name) if isinstance(paths, str) else paths)


def fail(message: str, code: int = EXIT_USER_ERROR) -> NoReturn:
    """Print `error: message` as one line and end with `code`."""
    end(f"error: {message}", code, "bold red")


def crash(error: Exception) -> NoReturn:
    """A traceback, for what no user can mend; but one line when another rank is behind it."""
    watchdog = _watchdog()
    last = traceback.format_exception_only(error)[-1].strip()
    if watchdog is None:
        if ranks() > 1:
            traceback.print_exception(error)
            _publish_early_failure(f"{last} (a traceback is in its log)", EXIT_CRASHED)
            sys.exit(EXIT_CRASHED)
        raise error
    _stay()
    failure = watchdog.explain(error)
    if failure is None:
        failure = watchdog.fail(f"{last} (a traceback is in its log)", EXIT_CRASHED)
        if failure.rank == watchdog.rank:
            traceback.print_exception(error)
            watchdog.leave_for(failure)
    watchdog.leave_for(failure, f"error: {failure.seen_by(watchdog.rank)}")


def end(message: str, code: int, style: str) -> NoReturn:
    """Print one line and end. With several ranks one of them prints, and says which it is from."""
    watchdog, plain = _watchdog(), message.removeprefix("error: ")
    if watchdog is None:
        if rank() == 0:
            say_here(message, style)
        # Ranks that fail before they have met fail alike, mostly: the others speak where they have something to add.
        rank_0_speaks = code == EXIT_INTERRUPTED or (ranks() > 1 and _publish_early_failure(plain, code))
        if rank() > 0 and not rank_0_speaks:
            say_here(f"rank {rank()}: {message}", style)
        sys.exit(code)
    _stay()
    failure = watchdog.fail(plain, code)
    if failure.rank == watchdog.rank and not failure.published:
        message = f"rank {watchdog.rank}: {message}"
    elif failure.rank != watchdog.rank and failure.message != plain:  # all may have met the same
        message = f"error: {failure.seen_by(watchdog.rank)}"
    watchdog.leave_for(failure, message, style)


def _part() -> None:
    """Leave the other ranks in good order, where there are any."""
    if _watchdog() is not None:
        sys.modules["hpcdistill.ranks.rendezvous"].leave()


def _end_unread() -> None:
    """End all ranks when the reader of this one's output has left: nothing where it is alone, or has parted."""
    if watchdog := _watchdog():
        _stay()
        failure = watchdog.fail("the reader of its output has left", EXIT_CRASHED)
        watchdog.leave_for(
            failure, None if failure.rank == watchdog.rank else f"error: {failure.seen_by(watchdog.rank)}"
        )


def _stay() -> None:
    """A launcher that sees one rank end ends the others by a signal: from here on they do so by themselves, and soon.

    The words of the one that failed, or who it was that died, would be lost.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _publish_early_failure(message: str, code: int) -> bool:
    """For a rank that fails before the rendezvous; without importing torch for commands that do without."""
    from hpcdistill.ranks.rendezvous import publish_early_failure

    return publish_early_failure(message, code)


def _watchdog() -> Watchdog | None:
    """The watchdog of this rank, where there is one; without importing torch for commands that do without."""
    module = sys.modules.get("hpcdistill.ranks.watchdog")
    return module.active() if module else None
