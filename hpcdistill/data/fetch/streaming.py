"""Reading an http(s) address without a copy on the disk: small files whole, large ones from front to back."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

from hpcdistill.data.fetch.transfer import (
    PIECE,
    RETRIES,
    TIMEOUT,
    Attempts,
    Failure,
    OutOfRange,
    Reply,
    check_scheme,
    open_at,
    shown,
)
from hpcdistill.data.progress import megabytes
from hpcdistill.errors import UserError

_REMEDY = "check the address and the network"


def fetch_bytes(
    address: str,
    *,
    limit: int,
    retries: int = RETRIES,
    timeout: float = TIMEOUT,
    pause: Callable[[float], None] = time.sleep,
) -> bytes:
    """The whole file at `address`, of at most `limit` bytes; UserError when it cannot be had, is larger or a web page.

    `timeout` is in seconds without a byte; `pause` waits between the tries.
    """
    check_scheme(address)
    attempts = Attempts(shown(address), retries, pause)
    while True:
        try:
            return _whole(address, limit, timeout)
        except Failure as failure:
            _try_again(address, attempts, failure)


def open_stream(
    address: str,
    *,
    first: int = 0,
    retries: int = RETRIES,
    timeout: float = TIMEOUT,
    pause: Callable[[float], None] = time.sleep,
) -> io.BufferedReader:
    """The file at `address` from byte `first` on, for `read(n)`; it cannot seek.

    After a dropped connection it goes on where it was. Opening and reading raise UserError when the address cannot be
    read, sends a web page, or holds another file than at the beginning.
    """
    check_scheme(address)
    return io.BufferedReader(_Stream(address, first, Attempts(shown(address), retries, pause), timeout), PIECE)


def _try_again(address: str, attempts: Attempts, failure: Failure, *, progress: bool = False) -> None:
    try:
        attempts.again(failure, progress=progress)
    except Failure as last:
        raise UserError(f"{shown(address)}: {last.reason}; {_REMEDY}") from None


def _differ(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other


def _whole(address: str, limit: int, timeout: float) -> bytes:
    with open_at(address, timeout=timeout) as reply:
        if reply.is_html:
            raise Failure("sends a web page instead of the file")
        content = bytearray()
        while piece := reply.read(min(PIECE, limit + 1)):
            content += piece
            if len(content) > limit:
                raise Failure(f"sends more than the {limit} bytes that are read")
        if reply.total is not None and len(content) != reply.total:
            raise Failure("the connection broke off", again=True)
        return bytes(content)


class _Stream(io.RawIOBase):
    """Delivers the file's bytes in order, whatever happens to the connections under it."""

    def __init__(self, address: str, first: int, attempts: Attempts, timeout: float) -> None:
        self._address, self._position = address, first
        self._attempts, self._timeout = attempts, timeout
        self._reply: Reply | None = None
        self._validator: str | None = None
        self._total: int | None = None
        self._ended = self._progress = False
        self._opened = False
        self._keep_trying(self._open)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        piece = self._keep_trying(lambda: self._next(len(view)))
        view[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()

    def _keep_trying(self, step: Callable[[], bytes]) -> bytes:
        while True:
            try:
                return step()
            except Failure as failure:
                self._drop()
                progress, self._progress = self._progress, False
                _try_again(self._address, self._attempts, failure, progress=progress)

    def _next(self, size: int) -> bytes:
        if self._ended:
            return b""
        if self._reply is None:
            self._open()
        if self._ended or self._reply is None:
            return b""
        piece = self._reply.read(size)
        if not piece:
            if self._total is not None and self._position < self._total:
                at = f"{megabytes(self._position)} of {megabytes(self._total)}"
                raise Failure(f"the connection broke off at {at}", again=True)
            self._ended = True
            self._drop()
        self._position += len(piece)
        self._progress = self._progress or bool(piece)
        return piece

    def _open(self) -> bytes:
        """Connect at the position; nothing is delivered yet."""
        try:
            reply = open_at(self._address, self._position, validator=self._validator, timeout=self._timeout)
        except OutOfRange as failure:
            if failure.total != self._position:
                raise Failure(f"has no byte {self._position}, the file is shorter") from None
            self._ended = True
            return b""
        self._reply = reply
        if reply.is_html:
            raise Failure("sends a web page instead of the file")
        if self._opened and (_differ(reply.validator, self._validator) or _differ(reply.total, self._total)):
            raise Failure("has changed while it was read; read it again from the beginning")
        self._validator, self._opened = reply.validator or self._validator, True
        self._total = self._total if reply.total is None else reply.total
        self._skip(reply, self._position - reply.first)
        return b""

    def _skip(self, reply: Reply, count: int) -> None:
        """A server that knows no ranges sends everything again: leave out what was delivered."""
        while count:
            piece = reply.read(min(PIECE, count))
            if not piece:
                if reply.total is not None and reply.total < self._position:
                    raise Failure(f"has no byte {self._position}, the file is shorter")
                raise Failure("the connection broke off", again=True)
            count -= len(piece)

    def _drop(self) -> None:
        if self._reply is not None:
            self._reply.__exit__(None, None, None)
            self._reply = None
