"""Reading http(s) addresses: one request, when to try it again, small files whole, large ones from front to back.

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
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from hpcdistill.console import say
from hpcdistill.data.progress import megabytes
from hpcdistill.errors import UserError

PIECE = 1 << 20  # bytes asked for at a time
RETRIES = 5  # tries in a row without a byte of progress
TIMEOUT = 30.0  # seconds without an answer or a byte
_TRIES_IN_ALL = 20  # times the retries, whatever the progress: a server that sends one byte a time is given up
_LONGEST_PAUSE = 30.0  # seconds
_LONGEST_RETRY_AFTER = 120.0  # seconds; who asks for more is not asked again
_REDIRECTS = 10
_AGAIN = (408, 425, 429)  # HTTP states that may pass, with all from 500 on
_REMEDY = "check the address and the network"
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class TransferFailure(Exception):
    """Why an address did not give what it should; `again`: the next try may do, not before `after` seconds."""

    def __init__(
        self, reason: str, *, again: bool = False, after: float | None = None, tries: int | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.after = " ".join(reason.split()), again, after
        self.tries = tries  # at most in a row, None = as many as usual


class OutOfRange(TransferFailure):
    """HTTP 416: what was asked for begins behind the end of the file, which has `total` bytes (None: not said)."""

    def __init__(self, total: int | None) -> None:
        super().__init__("the file on the server is shorter than what is here", again=True)
        self.total = total


class Attempts:
    """Counts the tries at one address: pauses 1, 2, 4, ... seconds between them, and at some point gives up.

    Not urllib3's Retry: that repeats a request, but does not go on in the middle of a body, where most downloads break;
    it waits without a word, and as long as a server's Retry-After says, be it hours.
    """

    def __init__(self, label: str, retries: int, pause: Callable[[float], None]) -> None:
        self._label, self._retries, self._pause = label, retries, pause
        self._in_a_row = self._in_all = 0

    def again(self, failure: TransferFailure, *, progress: bool = False) -> None:
        """Wait for the next try, or raise a TransferFailure. `progress`: the last try brought some bytes."""
        self._in_a_row = 1 if progress else self._in_a_row + 1
        self._in_all += 1
        if not failure.again:
            raise failure
        most = self._retries if failure.tries is None else min(self._retries, failure.tries - 1)
        if self._in_a_row > most or self._in_all > _TRIES_IN_ALL * self._retries:
            tries = f" ({self._in_all} tries)" if self._in_all > 1 else ""
            raise TransferFailure(f"{failure.reason}{tries}") from None
        seconds = min(2.0 ** (self._in_a_row - 1), _LONGEST_PAUSE)
        if failure.after is not None:
            seconds = max(failure.after, 0.0)
        say(f"{self._label}: {failure.reason}; trying again in {seconds:.0f} s")
        self._pause(seconds)


class Reply:
    """An answered request whose body has not been read yet. Use it in a `with`."""

    def __init__(
        self, session: requests.Session, response: requests.Response, first: int, total: int | None, timeout: float
    ) -> None:
        self.first = first  # the body's first byte is this one of the file
        self.total = total  # bytes of the whole file, None if the server does not say
        self._session, self._response, self._timeout = session, response, timeout

    @property
    def validator(self) -> str | None:
        """What tells this version of the file from another one (RFC 9110: a strong ETag, or the date)."""
        etag = self._response.headers.get("ETag")
        if etag and not etag.startswith("W/"):
            return etag
        return self._response.headers.get("Last-Modified")

    @property
    def is_html(self) -> bool:
        """True when the server calls the body a web page."""
        kind = self._response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        return kind in ("text/html", "application/xhtml+xml")

    def read(self, size: int = PIECE) -> bytes:
        """At most `size` bytes of the body as they come in, b"" at its end; TransferFailure if it breaks off."""
        try:
            # Undecoded: some servers label a .tar.gz as gzip-encoded, and its checksum is that of the bytes as sent.
            piece: bytes = self._response.raw.read1(size, decode_content=False)
        except (urllib3.exceptions.ReadTimeoutError, TimeoutError):
            raise TransferFailure(f"nothing came for {self._timeout:g} s", again=True) from None
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError):
            raise TransferFailure("the connection broke off", again=True) from None
        return piece

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._response.close()
        self._session.close()


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


def open_at(address: str, first: int = 0, *, validator: str | None = None, timeout: float = TIMEOUT) -> Reply:
    """Ask for the file at `address` from byte `first` on, if its version is still `validator`.

    The reply may begin at byte 0 all the same (`Reply.first`). Raises TransferFailure, OutOfRange.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "hpcdistill"}
    if first:
        headers["Range"] = f"bytes={first}-"
        if validator:
            headers["If-Range"] = validator
    session = requests.Session()
    try:
        response = _follow(session, address, headers, timeout)
        try:
            begin, total = _range_of(response, first)
        except TransferFailure:
            response.close()
            raise
        return Reply(session, response, begin, total, timeout)
    except requests.RequestException as error:
        session.close()
        raise _failure(error, timeout) from None
    except (urllib3.exceptions.HTTPError, UnicodeError) as error:
        session.close()
        raise TransferFailure(str(error)) from None
    except BaseException:
        session.close()
        raise


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
        except TransferFailure as failure:
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


def _follow(session: requests.Session, address: str, headers: dict[str, str], timeout: float) -> requests.Response:
    for _ in range(_REDIRECTS + 1):
        host = urlsplit(address).hostname or ""
        session.trust_env = not (host == "localhost" or host == "::1" or host.startswith("127."))
        try:
            response = session.get(address, headers=headers, stream=True, timeout=timeout, allow_redirects=False)
        except (requests.RequestException, UnicodeError):
            raise
        except ValueError as error:  # requests looks at the address of a redirect, whether it follows or not
            raise TransferFailure(f"redirects to a malformed address ({error})") from None
        if not response.is_redirect:
            return response
        response.close()
        target = response.headers["Location"]
        try:
            address = urljoin(address, target)
            check_scheme(address)
        except ValueError:  # UserError, too
            raise TransferFailure(f"redirects to {shown(target)}, which is neither http nor https") from None
    raise TransferFailure(f"redirects more than {_REDIRECTS} times")


def _range_of(response: requests.Response, first: int) -> tuple[int, int | None]:
    """First byte of the body, and bytes of the whole file."""
    status = response.status_code
    if status == 200:
        length = response.headers.get("Content-Length", "")
        return 0, _bytes(length)
    if status == 206:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if not found or int(found[1]) != first:
            raise TransferFailure("sends another part of the file than it was asked for")
        return first, _bytes(found[3])
    if status == 416 and first:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        raise OutOfRange(_bytes(total))
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


def _failure(error: requests.RequestException, timeout: float) -> TransferFailure:
    if isinstance(error, requests.Timeout):
        return TransferFailure(f"no answer within {timeout:g} s", again=True)
    if isinstance(error, requests.exceptions.SSLError) and "certificate" in str(error).lower():
        return TransferFailure("its certificate is not accepted; is this machine's clock right, or a proxy in between?")
    root: BaseException = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__ or root
    reason = getattr(root, "strerror", None) or str(root) or type(root).__name__
    if isinstance(error, requests.ConnectionError):
        # Who refuses, or is not known by name, will hardly do otherwise a minute later; a broken network may.
        hopeless = isinstance(root, (ConnectionRefusedError, socket.gaierror))
        return TransferFailure(f"no connection ({reason})", again=True, tries=2 if hopeless else None)
    return TransferFailure(str(reason))


def _try_again(address: str, attempts: Attempts, failure: TransferFailure, *, progress: bool = False) -> None:
    try:
        attempts.again(failure, progress=progress)
    except TransferFailure as last:
        raise UserError(f"{shown(address)}: {last.reason}; {_REMEDY}") from None


def _differ(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other


def _whole(address: str, limit: int, timeout: float) -> bytes:
    with open_at(address, timeout=timeout) as reply:
        if reply.is_html:
            raise TransferFailure("sends a web page instead of the file")
        content = bytearray()
        while piece := reply.read(min(PIECE, limit + 1)):
            content += piece
            if len(content) > limit:
                raise TransferFailure(f"sends more than the {limit} bytes that are read")
        if reply.total is not None and len(content) != reply.total:
            raise TransferFailure("the connection broke off", again=True)
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
            except TransferFailure as failure:
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
                raise TransferFailure(f"the connection broke off at {at}", again=True)
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
                raise TransferFailure(f"has no byte {self._position}, the file is shorter") from None
            self._ended = True
            return b""
        self._reply = reply
        if reply.is_html:
            raise TransferFailure("sends a web page instead of the file")
        if self._opened and (_differ(reply.validator, self._validator) or _differ(reply.total, self._total)):
            raise TransferFailure("has changed while it was read; read it again from the beginning")
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
                    raise TransferFailure(f"has no byte {self._position}, the file is shorter")
                raise TransferFailure("the connection broke off", again=True)
            count -= len(piece)

    def _drop(self) -> None:
        if self._reply is not None:
            self._reply.close()
            self._reply = None
