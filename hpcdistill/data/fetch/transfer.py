"""Reading http(s) addresses from front to back, whatever happens to the connections.

Only http and https, also after a redirect. Proxies of the environment are used except for this machine itself.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
import urllib3

from hpcdistill.console import say
from hpcdistill.data.progress import megabytes
from hpcdistill.errors import UserError

PIECE = 1 << 20  # bytes asked for at a time, of a server or an archive
RETRIES = 5  # tries in a row without a byte of progress
TIMEOUT = 30.0  # seconds without an answer or a byte
_TRIES_IN_ALL = 20  # times the retries, whatever the progress: a server that sends one byte a time is given up
_LONGEST_PAUSE = 30.0  # seconds
_LONGEST_RETRY_AFTER = 120.0  # seconds; who asks for more is not asked again
_REDIRECTS = 10
_AGAIN = (408, 425, 429)  # HTTP states that may pass, with all from 500 on
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body")
_WEB_PAGE = "sends a web page instead of the file"


class TransferFailure(Exception):
    """Why one try failed; `again`: the next may not, after `after` seconds, but no more than `tries` in a row."""

    def __init__(
        self, reason: str, *, again: bool = False, after: float | None = None, tries: int | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.after, self.tries = " ".join(reason.split()), again, after, tries


class Changed(TransferFailure):
    """What has come so far belongs to another file than the one that the server has now."""


class GaveUp(UserError):
    """The address does not give the file: one line, and its `reason` alone."""

    def __init__(self, label: str, reason: str, failure: TransferFailure) -> None:
        super().__init__(f"{label}: {reason}; check the address and the network")
        self.reason, self.failure = reason, failure


class Attempts:
    """Counts the tries at one address: pauses 1, 2, 4, ... seconds between them, and at some point gives up.

    Not urllib3's Retry: that repeats a request, but does not go on in the middle of a body, where most downloads break;
    it waits without a word, and as long as a server's Retry-After says, be it hours.
    """

    def __init__(self, label: str, retries: int, pause: Callable[[float], None]) -> None:
        self._label, self._retries, self._pause = label, retries, pause
        self._in_a_row = self._in_all = 0

    def again(self, failure: TransferFailure, *, progress: bool = False) -> None:
        """Wait for the next try, or raise GaveUp. `progress`: the last try brought some bytes."""
        if not failure.again:
            self.give_up(failure)
        self._in_a_row = 1 if progress else self._in_a_row + 1
        self._in_all += 1
        most = self._retries if failure.tries is None else min(self._retries, failure.tries - 1)
        if self._in_a_row > most or self._in_all > _TRIES_IN_ALL * self._retries:
            tries = f" ({self._in_all} tries)" if self._in_all > 1 else ""
            self.give_up(failure, tries)
        seconds = min(2.0 ** (self._in_a_row - 1), _LONGEST_PAUSE)
        if failure.after is not None:
            seconds = max(failure.after, 0.0)
        say(f"{self._label}: {failure.reason}; trying again in {seconds:.0f} s")
        self._pause(seconds)

    def give_up(self, failure: TransferFailure, tries: str = "") -> NoReturn:
        """Raise GaveUp."""
        raise GaveUp(self._label, f"{failure.reason}{tries}", failure) from None


def check_scheme(address: str) -> None:
    """UserError unless `address` is one of http or https with a host."""
    try:
        parts = urlsplit(address)
        port_is_a_number = parts.port is None or parts.port >= 0
    except ValueError:
        parts, port_is_a_number = urlsplit(""), False
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname or not port_is_a_number:
        raise UserError(f"{shown(address)}: not an address that is read; it must begin with https:// or http://")


def shown(address: str) -> str:
    """`address` as messages show it: without a password, and without a query, which may be a signature."""
    before, found, after = address.partition("?")
    return re.sub(r"//[^/@]*@", "//", before) + (f"?{after}" if found and len(after) < 20 else "?..." if found else "")


def fetch_bytes(
    address: str,
    *,
    limit: int,
    retries: int = RETRIES,
    timeout: float = TIMEOUT,
    pause: Callable[[float], None] = time.sleep,
) -> bytes:
    """The whole file at `address`; UserError when it has more than `limit` bytes, and as of `open_stream`."""
    with open_stream(address, retries=retries, timeout=timeout, pause=pause) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{shown(address)}: sends more than the {limit} bytes that are read; check the address")
    return content


def open_stream(
    address: str,
    *,
    first: int = 0,
    retries: int = RETRIES,
    timeout: float = TIMEOUT,
    pause: Callable[[float], None] = time.sleep,
) -> io.BufferedReader:
    """The file at `address` from byte `first` on, for `read(n)`; see `RemoteFile`, and `Attempts` for the options.

    Opening and reading raise GaveUp, a UserError, when the address cannot be read, sends a web page, or holds another
    file than at the beginning.
    """
    check_scheme(address)
    attempts = Attempts(shown(address), retries, pause)
    return io.BufferedReader(RemoteFile(address, first, attempts, timeout), PIECE)


class RemoteFile(io.RawIOBase):
    """Delivers a file's bytes in order from `position` on; it cannot seek.

    After a dropped connection it goes on where it was. `validator` (RFC 9110: a strong ETag, or the date) tells this
    version of the file from another, `total` is its number of bytes, where they are known.
    """

    def __init__(
        self,
        address: str,
        position: int,
        attempts: Attempts,
        timeout: float,
        *,
        validator: str | None = None,
        total: int | None = None,
    ) -> None:
        """Connect; raises GaveUp, whose `failure` is Changed when the file is not the one that is known."""
        self._address, self._attempts, self._timeout = address, attempts, timeout
        self.position, self.validator, self.total = position, validator, total
        self._reply: _Reply | None = None
        self._progress = self._ended = False
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
            except TransferFailure as failure:
                self._drop()
                progress, self._progress = self._progress, False
                self._attempts.again(failure, progress=progress)

    def _next(self, size: int) -> bytes:
        if self._reply is None and not self._ended:
            self._open()
        if self._reply is None or self._ended:
            return b""
        try:
            piece = self._reply.read(size)
            if not piece and self.total is not None and self.position < self.total:
                raise TransferFailure("the connection broke off", again=True)
        except TransferFailure as failure:
            at = megabytes(self.position) + ("" if self.total is None else f" of {megabytes(self.total)}")
            raise TransferFailure(f"{failure.reason} at {at}", again=True) from None
        if not self.position and piece.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith(_HTML):
            raise TransferFailure(_WEB_PAGE)
        if self._reply.total not in (None, self.total):
            raise TransferFailure(f"has {self._reply.total} bytes instead of {self.total}")
        if not piece:
            self._ended = True
            self._drop()
        self.position += len(piece)
        self._progress = self._progress or bool(piece)
        return piece

    def _open(self) -> bytes:
        """Connect at the position; nothing is delivered yet."""
        reply = _ask(self._address, self.position, self.validator, self._timeout)
        if reply is None:  # nothing behind the position
            self._ended = True
            return b""
        self._reply = reply
        if reply.is_html:
            raise TransferFailure(_WEB_PAGE)
        if None not in (reply.validator, self.validator) and reply.validator != self.validator:
            raise Changed("the file on the server has changed")
        if self.position and self.validator and not reply.first and reply.validator is None:
            # From the beginning, where the rest was asked for if nothing has changed: and no word that it has not.
            raise Changed("the file on the server has changed")
        self.validator = reply.validator or self.validator
        if self.total is None:
            self.total = reply.total
        self._skip(reply, self.position - reply.first)
        return b""

    def _skip(self, reply: _Reply, count: int) -> None:
        """A server that knows no ranges sends everything again: leave out what was delivered."""
        while count:
            piece = reply.read(min(PIECE, count))
            if not piece:
                if reply.total is not None and reply.total < self.position:
                    raise Changed("the file on the server is shorter than what is here")
                raise TransferFailure("the connection broke off", again=True)
            count -= len(piece)

    def _drop(self) -> None:
        if self._reply is not None:
            self._reply.close()
            self._reply = None


class _Reply:
    """An answered request whose body has not been read yet."""

    def __init__(self, session: requests.Session, response: requests.Response, timeout: float) -> None:
        self._session, self._response, self._timeout = session, response, timeout
        self.first = 0  # the body's first byte is this one of the file
        self.total: int | None = None  # bytes of the whole file, None if the server does not say
        headers = response.headers
        etag = headers.get("ETag")
        self.validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        kind = headers.get("Content-Type", "").split(";")[0].strip().lower()
        self.is_html = kind in ("text/html", "application/xhtml+xml")

    def read(self, size: int) -> bytes:
        """At most `size` bytes of the body as they come in, b"" at its end; TransferFailure if it breaks off."""
        try:
            # Undecoded: some servers label a .tar.gz as gzip-encoded, and its checksum is that of the bytes as sent.
            piece: bytes = self._response.raw.read1(size, decode_content=False)
        except (urllib3.exceptions.ReadTimeoutError, TimeoutError):
            raise TransferFailure(f"nothing came for {self._timeout:g} s", again=True) from None
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError):
            raise TransferFailure("the connection broke off", again=True) from None
        return piece

    def close(self) -> None:
        self._response.close()
        self._session.close()


def _ask(address: str, first: int, validator: str | None, timeout: float) -> _Reply | None:
    """Ask for the file at `address` from byte `first` on, if its version is still `validator`.

    The reply may begin at byte 0 all the same; None when the file ends just before `first`. Raises TransferFailure.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "hpcdistill"}
    if first:
        headers["Range"] = f"bytes={first}-"
        if validator:
            headers["If-Range"] = validator
    session = requests.Session()
    session.max_redirects = _REDIRECTS
    host = urlsplit(address).hostname or ""
    session.trust_env = not (host == "localhost" or host == "::1" or host.startswith("127."))  # proxies, netrc
    try:
        response = session.get(address, headers=headers, stream=True, timeout=timeout)
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        session.close()
        raise _failure(error, timeout) from None
    reply = _Reply(session, response, timeout)
    try:
        if _check_status(reply, response, first):
            return reply
    except TransferFailure:
        reply.close()
        raise
    reply.close()
    return None


def _check_status(reply: _Reply, response: requests.Response, first: int) -> bool:
    """Note what the body is; False when nothing lies behind byte `first`, TransferFailure when no file comes."""
    status = response.status_code
    place = response.headers.get("Content-Range", "").strip()
    if status == 200:
        reply.total = _bytes(response.headers.get("Content-Length", ""))
        return True
    if status == 206:
        found = _RANGE.fullmatch(place)
        if not found or int(found[1]) != first:
            raise TransferFailure("sends another part of the file than it was asked for")
        reply.first, reply.total = first, _bytes(found[3])
        return True
    if status == 416 and first:
        if _bytes(place.rpartition("/")[2]) not in (None, first):
            raise Changed("the file on the server is shorter than what is here")
        return False
    reason = f"HTTP {status} {response.reason or ''}".strip()
    if status not in _AGAIN and status < 500:
        raise TransferFailure(reason)
    after = _retry_after(response.headers.get("Retry-After"))
    if after is not None and after > _LONGEST_RETRY_AFTER:
        raise TransferFailure(f"{reason}, asks to come back in {after:.0f} s")
    raise TransferFailure(reason, again=True, after=after)


def _bytes(text: str) -> int | None:
    """A number of bytes of a header; None where it is none, or none that a file can have."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if value is None:
        return None
    if re.fullmatch("[0-9]{1,18}", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):  # no date, or one beyond the clock's
        return None


def _failure(error: Exception, timeout: float) -> TransferFailure:
    """What requests says, which for the address of a redirect may be any ValueError."""
    if isinstance(error, requests.Timeout):
        return TransferFailure(f"no answer within {timeout:g} s", again=True)
    if isinstance(error, requests.exceptions.SSLError) and "certificate" in str(error).lower():
        return TransferFailure("its certificate is not accepted; is this machine's clock right, or a proxy in between?")
    if isinstance(error, requests.TooManyRedirects):
        return TransferFailure(f"redirects more than {_REDIRECTS} times")
    if isinstance(error, ValueError):
        return TransferFailure(f"leads to an address that is not read ({error})")
    root: BaseException = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__ or root
    reason = getattr(root, "strerror", None) or str(root) or type(root).__name__
    if isinstance(error, requests.ConnectionError):
        # Who refuses, or is not known by name, will hardly do otherwise a minute later; a broken network may.
        hopeless = isinstance(root, (ConnectionRefusedError, socket.gaierror))
        return TransferFailure(f"no connection ({reason})", again=True, tries=2 if hopeless else None)
    return TransferFailure(str(reason))
