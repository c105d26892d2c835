"""A web server on this machine that serves a folder, with Range, and misbehaves as it is told.

    with Server(folder, break_after=1000, break_times=2) as server:
        fetch_file(Download(file="a.zip", addresses=(server.address("a.zip"),)), cache)
        assert server.requests[1].headers["range"] == "bytes=1000-"

Faults can be changed between requests: `server.faults = Faults(status=500)`.
"""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

HTML = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"
_PIECE = 1 << 16
_ENDLESS = 256 << 20  # bytes after which even endless data end, in case nobody hangs up
_LONGEST_WAIT = 60.0  # seconds


@dataclass
class Faults:
    """What the server does wrong; `..._times` is the number of requests it does so for, None: always."""

    break_after: int | None = None  # bytes of the body, then the connection is cut
    break_times: int | None = None
    ignore_ranges: bool = False  # always 200 and the whole file
    html: bool = False  # status 200 and a web page
    html_type: str = "text/html; charset=utf-8"
    content_type: str = "application/octet-stream"  # of the file itself
    status: int | None = None  # this status and no file
    status_times: int | None = None
    retry_after: str | None = None  # header that goes with `status`
    wrong_bytes: bool = False  # the first byte is another one
    endless: bool = False  # no length, and no end
    no_length: bool = False  # no length, the end of the connection is the end of the file
    chunked: bool = False  # no length, but the end is marked
    length_error: int = 0  # added to the Content-Length
    changing_etag: bool = False  # another version at each request
    no_etag: bool = False
    hang: bool = False  # takes the request and never answers
    hang_times: int | None = None
    hold_after: int | None = None  # bytes of the body, then it waits for `Server.release`
    redirect: str | None = None  # the Location it sends everybody to
    redirect_times: int | None = None


@dataclass(frozen=True)
class Request:
    """One request as it came; the headers' names are in lower case."""

    path: str
    headers: dict[str, str]


class Server:
    """Serves `folder` on 127.0.0.1 while in a `with`; `requests` is the record of what was asked."""

    def __init__(self, folder: Path, **faults: Any) -> None:
        self.folder = folder
        self.faults = Faults(**faults)
        self.requests: list[Request] = []
        self.endless_bytes = 0  # sent beyond the file's end
        self._used: dict[str, int] = {}
        self._lock = threading.Lock()
        self._released, self._asked = threading.Event(), threading.Event()

        class Handler(_Handler):
            outer = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # joined at the end
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._server.shutdown()
        self._thread.join(_LONGEST_WAIT)
        self._server.server_close()

    def address(self, name: str = "") -> str:
        """The address of the file `name` in the folder."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"

    def release(self) -> None:
        """Let go of all requests that hang or hold."""
        self._released.set()

    def wait_for_request(self, seconds: float = 30) -> None:
        """Return when there was a request."""
        assert self._asked.wait(seconds), "nobody asked the server for anything"

    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [request.headers.get("range") for request in self.requests]

    def applies(self, fault: str) -> bool:
        """True while the fault of this name is on and its times are not used up; counts one."""
        value = getattr(self.faults, fault)
        if value is None or value is False:
            return False
        times = getattr(self.faults, fault.removesuffix("_after") + "_times", None)
        with self._lock:
            self._used[fault] = self._used.get(fault, 0) + 1
            return times is None or self._used[fault] <= times

    def note(self, request: Request) -> int:
        """Record a request and return its number, from 1 on."""
        with self._lock:
            self.requests.append(request)
            self._asked.set()
            return len(self.requests)

    def wait(self) -> None:
        """Hold a request until `release`, or until the server closes."""
        self._released.wait(_LONGEST_WAIT)


class _Handler(BaseHTTPRequestHandler):
    """One connection, one request (HTTP/1.0)."""

    outer: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the test's output is not the place

    def do_GET(self) -> None:
        number = self.outer.note(Request(self.path, {k.lower(): v for k, v in self.headers.items()}))
        try:
            self._answer(number)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has seen enough

    def _answer(self, number: int) -> None:
        server, faults = self.outer, self.outer.faults
        if server.applies("hang"):
            server.wait()
            return
        if faults.redirect is not None and server.applies("redirect"):
            self._head(302, {"Location": faults.redirect})
            return
        if faults.status is not None and server.applies("status"):
            self._head(faults.status, {"Retry-After": faults.retry_after} if faults.retry_after else {})
            return
        if faults.html:
            self._head(200, {"Content-Type": faults.html_type, "Content-Length": str(len(HTML))})
            self.wfile.write(HTML)
            return
        path = server.folder / unquote(self.path.partition("?")[0].lstrip("/"))
        if not path.is_file():
            self._head(404, {"Content-Type": "text/html"})
            self.wfile.write(b"<html>not found</html>")
            return
        content = path.read_bytes()
        etag = f'"{len(content)}-{number if faults.changing_etag else 0}"'
        self._send(content, None if faults.no_etag else etag)

    def _send(self, content: bytes, etag: str | None) -> None:
        faults, size = self.outer.faults, len(content)
        headers = {"Content-Type": faults.content_type} | ({"ETag": etag} if etag else {})
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first, status = 0, 200
        if found and not faults.ignore_ranges and self.headers.get("If-Range") in (None, etag):
            first, status = int(found[1]), 206
            if first >= size:
                self._head(416, {"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        if faults.wrong_bytes and content:
            content = bytes([content[0] ^ 0xFF]) + content[1:]
        if faults.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif not (faults.endless or faults.no_length):
            headers["Content-Length"] = str(size - first + faults.length_error)
        self._head(status, headers)
        self._body(content[first:])

    def _body(self, body: bytes) -> None:
        faults, server = self.outer.faults, self.outer
        if faults.chunked:
            self.wfile.write(b"%x\r\n" % len(body))
        if faults.hold_after is not None:
            self.wfile.write(body[: faults.hold_after])
            server.wait()
            body = body[faults.hold_after :]
        if faults.break_after is not None and server.applies("break_after"):
            self.wfile.write(body[: faults.break_after])
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)
        if faults.chunked:
            self.wfile.write(b"\r\n0\r\n\r\n")
        while faults.endless and server.endless_bytes < _ENDLESS:
            self.wfile.write(bytes(_PIECE))
            server.endless_bytes += _PIECE

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
