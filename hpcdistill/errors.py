"""Errors a user can mend: one clear line that names the file or key and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend; commands print its message as one line and end with exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # libraries quote over several lines; one is promised


def plural(count: int, noun: str, several: str = "") -> str:
    """`1 image`, `2 images`: a number with its noun, which takes an s in the plural unless `several` is it."""
    return f"{count} {noun}" if count == 1 else f"{count} {several or noun + 's'}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt `name`: `did you mean 'x'?`, or the valid names when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"
