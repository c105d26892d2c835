"""How every command ends: a user's error is one line and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable

from hpcdistill.console import err
from hpcdistill.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shell's convention

_SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder",
    errno.EISDIR: "a folder stands where a file is needed; name a file",
    errno.EIO: "the disk cannot be read or written (input/output error); check it, or use another one",
}


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Call `main` with the command line and turn what a user can mend into one line on stderr."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of a pipe (head, less) has left; silence the flush at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _SYSTEM_ERRORS:
            raise
        fail(f"{error.filename or 'writing'}: {_SYSTEM_ERRORS[error.errno]}")
    except KeyboardInterrupt:
        err.print("stopped", style="yellow")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)


def positive(text: str) -> int:
    """For argparse: an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 or more")
    return int(text)


def fail(message: str) -> None:
    """Print `error: message` as one line and end with `EXIT_USER_ERROR`."""
    err.print(f"error: {message}", style="bold red", markup=False, soft_wrap=True)
    sys.exit(EXIT_USER_ERROR)
