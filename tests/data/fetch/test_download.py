"""Downloads from a server that misbehaves in every way there is: right bytes in the end, or one clear line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
from serving import Faults, Server

from hpcdistill import file_lock
from hpcdistill.data.fetch import disk, download, transfer
from hpcdistill.data.fetch.download import Download, check_file, fetch_file
from hpcdistill.data.fetch.transfer import check_scheme, fetch_bytes, open_stream
from hpcdistill.errors import UserError

CONTENT = random.Random(20240620).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "set.zip"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the server serves."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(CONTENT)
    return tmp_path / "served"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder) as running:
        yield running


class Pauses(list[float]):
    """A `pause` that does not wait and remembers how long it would have."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


def wanted(*addresses: str, **known: Any) -> Download:
    return Download(file=NAME, addresses=addresses, **known)


def left(cache: Path) -> list[str]:
    """What lies in the cache, without the remembered digest."""
    return sorted(path.name for path in cache.iterdir() if path.name != f".{NAME}.verified.json")


def assert_one_line(message: object) -> str:
    text = str(message)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_comes_whole_once_and_then_from_the_disk_alone(
    folder: Path, cache: Path, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(folder) as server:
        file = wanted(server.address(NAME), bytes=len(CONTENT), sha256=SHA256)
        path = fetch_file(file, cache, pause=pauses)
        assert (path, path.read_bytes()) == (cache / NAME, CONTENT)
        assert left(cache) == [NAME]
        assert server.requests[0].headers["accept-encoding"] == "identity"
        monkeypatch.setattr("hpcdistill.data.fetch.digests.sha256_file", lambda _: pytest.fail("hashed again"))
        assert fetch_file(file, cache) == path
        monkeypatch.undo()
        damaged = bytearray(CONTENT)
        damaged[1000] ^= 1
        path.write_bytes(damaged)  # same size, another time: hashed, found wrong, fetched again
        os.utime(path, ns=(0, 0))
        assert fetch_file(file, cache).read_bytes() == CONTENT
        assert len(server.requests) == 2
    assert fetch_file(file, cache) == path  # the server is gone
    assert not pauses


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {}], ids=["digest", "no digest"])
@pytest.mark.parametrize(
    ("faults", "ranges", "waits"),  # a try that brings something lets the back-off begin anew
    [
        ({"break_times": 2}, [None, "bytes=100000-", "bytes=200000-"], [1, 1]),
        ({"break_times": 2, "ignore_ranges": True}, [None, "bytes=100000-", "bytes=100000-"], [1, 2]),
        ({"break_times": 1, "no_length": True}, [None, "bytes=100000-"], [1]),
        ({"break_times": 2, "changing_etag": True}, [None, "bytes=100000-", None], [1, 2]),
        ({"break_times": 0, "length_error": 7}, [None, "bytes=300000-"], [1]),
    ],
    ids=["ranges", "no ranges", "no length", "another file", "length too long"],
)
def test_a_broken_connection_goes_on_where_it_broke(
    server: Server,
    cache: Path,
    pauses: Pauses,
    known: dict[str, Any],
    faults: dict[str, Any],
    ranges: list[str | None],
    waits: list[int],
) -> None:
    server.faults = Faults(break_after=100_000, **faults)
    if "no_length" in faults:
        known = {**known, "bytes": len(CONTENT)}
    path = fetch_file(wanted(server.address(NAME), **known), cache, pause=pauses)
    assert path.read_bytes() == CONTENT
    assert server.ranges() == ranges
    assert server.requests[1].headers["if-range"].startswith(f'"{len(CONTENT)}-')
    assert pauses == waits


def test_a_later_call_resumes_an_earlier_one(folder: Path, server: Server, cache: Path, pauses: Pauses) -> None:
    server.faults = Faults(break_after=100_000)
    file = wanted(server.address(NAME))
    with pytest.raises(UserError, match=r"set\.zip could not be fetched .*broke off at 0\.1 MB of 0\.3 MB"):
        fetch_file(file, cache, retries=0, pause=pauses)
    assert left(cache) == [f".{NAME}.part", f".{NAME}.part.json"]
    changed = [shutil.copytree(cache, cache.with_name(name)) for name in ("renamed", "without a name")]
    server.faults = Faults()
    assert fetch_file(file, cache).read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=100000-"]
    assert left(cache) == ["recorded.json", NAME]
    other = bytes(reversed(CONTENT))  # published anew: nothing of the old one is mixed in
    (folder / NAME).write_bytes(other)
    for earlier, faults in zip(changed, (Faults(changing_etag=True), Faults(no_etag=True)), strict=True):
        server.faults = faults
        assert fetch_file(file, earlier, pause=pauses).read_bytes() == other


@pytest.mark.parametrize(("known", "ranges"), [({"bytes": len(CONTENT)}, []), ({}, [f"bytes={len(CONTENT)}-"])])
def test_a_part_that_is_whole_is_not_read_again(
    server: Server, cache: Path, known: dict[str, Any], ranges: list[str]
) -> None:
    cache.mkdir()
    (cache / f".{NAME}.part").write_bytes(CONTENT)
    fetch_file(wanted(server.address(NAME), sha256=SHA256, **known), cache)
    assert server.ranges() == ranges  # where the size is not known, status 416 tells
    assert left(cache) == [NAME]


@pytest.mark.parametrize("size", [100_000, 300_000, 400_000])
def test_a_part_of_other_bytes_is_thrown_away(folder: Path, cache: Path, pauses: Pauses, size: int) -> None:
    cache.mkdir()
    (cache / f".{NAME}.part").write_bytes(bytes(size))
    with Server(folder) as server:
        assert fetch_file(wanted(server.address(NAME), sha256=SHA256), cache, pause=pauses).read_bytes() == CONTENT
    assert left(cache) == [NAME]


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"status": 500, "status_times": 3}, [1.0, 2.0, 4.0]),
        ({"status": 429, "status_times": 2, "retry_after": "11"}, [11.0, 11.0]),
        ({"hang": True, "hang_times": 1}, [1.0]),
    ],
    ids=["500", "429", "hanging"],
)
def test_passing_trouble_is_waited_out(
    folder: Path, cache: Path, pauses: Pauses, faults: dict[str, Any], expected: list[float]
) -> None:
    with Server(folder, **faults) as server:
        file = wanted(server.address(NAME), sha256=SHA256)
        assert fetch_file(file, cache, pause=pauses, timeout=0.3).read_bytes() == CONTENT
    assert pauses == expected


@pytest.mark.parametrize(
    ("faults", "line", "tries"),
    [
        ({"status": 404}, "HTTP 404 Not Found", 1),
        ({"status": 500}, r"HTTP 500 Internal Server Error \(4 tries\)", 4),
        ({"status": 429, "retry_after": "3600"}, "asks to come back in 3600 s", 1),
        ({"hang": True}, r"no answer within 0\.2 s \(4 tries\)", 4),
        ({"break_after": 0}, r"broke off at 0\.0 MB of 0\.3 MB \(4 tries\)", 4),
        ({"html": True}, "a web page instead of the file", 1),
        ({"html": True, "html_type": "application/zip"}, "a web page instead of the file", 1),
        ({"content_type": "text/html"}, "a web page instead of the file", 1),
        ({"wrong_bytes": True}, f"has the sha256 [0-9a-f]{{64}} instead of {SHA256}", 1),
        ({"endless": True}, "sends more than the 300000 bytes expected", 1),
        ({"length_error": 5}, "has 300005 bytes instead of 300000", 1),
        ({"length_error": -5}, "has 299995 bytes instead of 300000", 1),
        ({"redirect": "file:///etc/passwd"}, r"leads to an address that is not read .*file:///etc/passwd", 1),
        ({"redirect": "/set.zip"}, "redirects more than 10 times", 11),
        ({"redirect": "http://[bad"}, r"leads to an address that is not read .*Invalid IPv6 URL", 1),
        ({"redirect": "//host:port/a"}, "leads to an address that is not read", 1),
        ({"status": 429, "retry_after": "9" * 5000}, "HTTP 429", 4),
        ({"status": 429, "retry_after": "Thu, 01 Jan 9999999999 00:00:00 GMT"}, "HTTP 429", 4),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_server_that_never_gives_the_file_is_one_line(
    folder: Path, cache: Path, pauses: Pauses, faults: dict[str, Any], line: str, tries: int
) -> None:
    with Server(folder, **faults) as server:
        file = wanted(server.address(NAME), bytes=len(CONTENT), sha256=SHA256)
        with pytest.raises(UserError, match=line) as caught:
            fetch_file(file, cache, retries=3, timeout=0.2, pause=pauses)
        assert len(server.requests) == tries
    assert server.endless_bytes < 100 << 20  # hung up on; less the buffers on the way
    message = assert_one_line(caught.value)
    assert server.address(NAME) in message
    assert "--from FILE" in message
    assert "--mirror URL" in message
    assert left(cache) == []


def test_endless_data_without_any_known_size_stop_at_the_limit(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LARGEST", 400_000)
    with Server(folder, endless=True) as server, pytest.raises(UserError, match="more than the 400000 bytes"):
        fetch_file(wanted(server.address(NAME)), cache, retries=0)
    assert left(cache) == []


def test_tries_are_bounded_even_with_progress(folder: Path, cache: Path, pauses: Pauses) -> None:
    with Server(folder, break_after=1000) as server:
        with pytest.raises(UserError, match="broke off at"):
            fetch_file(wanted(server.address(NAME), sha256=SHA256), cache, retries=2, pause=pauses)
        assert len(server.requests) == 41  # the first, and 20 times the retries
    assert (cache / f".{NAME}.part").stat().st_size == 41_000  # the next call goes on here


def test_nobody_there_is_named_and_the_next_mirror_is_tried(folder: Path, cache: Path, pauses: Pauses) -> None:
    with Server(folder) as gone:
        dead = gone.address(NAME)
    with Server(folder, html=True) as portal, Server(folder, wrong_bytes=True) as wrong, Server(folder) as good:
        addresses = (dead, portal.address(NAME), wrong.address(NAME), good.address(NAME))
        file = wanted(*addresses, sha256=SHA256)
        assert fetch_file(file, cache, retries=2, pause=pauses).read_bytes() == CONTENT
        assert pauses == [1.0], "who refuses is asked once more only, then the next one is asked"
        file = wanted(*addresses[:3], sha256=SHA256)
        with pytest.raises(UserError, match=r"no connection \(Connection refused\).*web page.*sha256") as caught:
            fetch_file(file, cache.with_name("other"), retries=0)
    message = assert_one_line(caught.value)
    assert all(address in message for address in addresses[:3])


def test_a_part_goes_on_at_another_mirror(folder: Path, cache: Path, pauses: Pauses) -> None:
    with Server(folder, break_after=100_000) as first, Server(folder) as second:
        file = wanted(first.address(NAME), second.address(NAME), sha256=SHA256)
        assert fetch_file(file, cache, retries=0, pause=pauses).read_bytes() == CONTENT
        assert second.ranges() == ["bytes=100000-"]
    with Server(folder, break_after=100_000) as first, Server(folder) as second:  # no digest to tell: all from one
        file = wanted(first.address(NAME), second.address(NAME))
        assert fetch_file(file, cache.with_name("other"), retries=0, pause=pauses).read_bytes() == CONTENT
        assert second.ranges() == [None]


def test_what_a_bad_mirror_left_does_not_spoil_a_good_one(folder: Path, cache: Path, pauses: Pauses) -> None:
    with Server(folder, wrong_bytes=True, break_after=100_000) as bad, Server(folder) as good:
        file = wanted(bad.address(NAME), good.address(NAME), sha256=SHA256)
        assert fetch_file(file, cache, retries=0, pause=pauses).read_bytes() == CONTENT
        assert good.ranges() == ["bytes=100000-", None]


@pytest.mark.parametrize("slash", ["", "/", f"/{NAME}"])
def test_a_mirror_of_the_users_own_comes_first(folder: Path, cache: Path, slash: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / NAME).write_bytes(CONTENT)
    with Server(folder) as server:
        fetch_file(wanted(server.address("absent")), cache, mirror=server.address("sub") + slash)
        assert [request.path for request in server.requests] == [f"/sub/{NAME}"]


def test_no_address_at_all_says_what_to_give(cache: Path) -> None:
    with pytest.raises(UserError, match=r"set\.zip: missing, and has no public address.*--from FILE"):
        fetch_file(wanted(), cache)
    cache.mkdir()
    (cache / NAME).write_bytes(b"other")
    with pytest.raises(UserError, match=r"has 5 bytes instead of 300000.*no public address"):
        fetch_file(wanted(bytes=len(CONTENT)), cache)


def test_an_unknown_digest_is_recorded_and_compared(folder: Path, cache: Path) -> None:
    with Server(folder) as server:
        file = wanted(server.address(NAME))
        path = fetch_file(file, cache)
        entry = json.loads((cache / "recorded.json").read_text())[NAME]
        assert entry["sha256"] == SHA256
        assert (entry["bytes"], entry["address"]) == (len(CONTENT), server.address(NAME))
        path.unlink()
        (folder / NAME).write_bytes(b"PK" + bytes(1000))
        new = hashlib.sha256(b"PK" + bytes(1000)).hexdigest()
        with pytest.raises(UserError, match=f"{new} instead of {SHA256}.*remove the entry {NAME} from"):
            fetch_file(file, cache)
        assert left(cache) == ["recorded.json"]
        (cache / "recorded.json").write_text("{}")
        assert fetch_file(file, cache).read_bytes() == b"PK" + bytes(1000)
        (cache / "recorded.json").write_text("[1]")
        with pytest.raises(UserError, match=r"recorded\.json: damaged"):
            fetch_file(file, cache)


def test_a_prefix_of_the_digest_is_enough_to_refuse(folder: Path, cache: Path) -> None:
    with Server(folder) as server:
        file = wanted(server.address(NAME), sha256_prefix="00000000")
        with pytest.raises(UserError, match="which should begin with 00000000"):
            fetch_file(file, cache)
        fetch_file(wanted(server.address(NAME), sha256_prefix=SHA256[:8]), cache)


def test_a_third_partys_md5_is_only_a_warning(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(folder) as server:
        fetch_file(wanted(server.address(NAME), md5_third_party="0" * 32), cache)
        assert "third party" in capsys.readouterr().err
        right = hashlib.md5(CONTENT).hexdigest()
        fetch_file(wanted(server.address(NAME), md5_third_party=right), cache.with_name("other"))
        assert "third party" not in capsys.readouterr().err


def test_a_local_copy_is_checked_and_recorded(folder: Path, cache: Path) -> None:
    check_file(wanted(sha256=SHA256), folder / NAME, cache)
    check_file(wanted(), folder / NAME, cache)
    (folder / "other.zip").write_bytes(b"other")
    with pytest.raises(UserError, match="instead of"):
        check_file(wanted(sha256=SHA256), folder / "other.zip", cache)
    with pytest.raises(UserError, match=f"instead of {SHA256}, recorded on"):
        check_file(wanted(), folder / "other.zip", cache)
    with pytest.raises(UserError, match="no such file"):
        check_file(wanted(), folder / "absent.zip", cache)
    assert sorted(path.name for path in folder.iterdir()) == ["other.zip", NAME]  # nothing is left beside it


def test_room_is_checked_before_anything_is_written(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 200_000))
    with Server(folder) as server:
        with pytest.raises(UserError, match=r"set\.zip needs 0\.3 MB, 0\.2 MB are free"):
            fetch_file(wanted(server.address(NAME), bytes=len(CONTENT)), cache)
        assert not server.requests
        with pytest.raises(UserError, match=r"needs 0\.3 MB, 0\.2 MB are free"):
            fetch_file(wanted(server.address(NAME)), cache)
    assert left(cache) == []


def test_a_full_disk_is_one_line_and_keeps_the_part(folder: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / f".{NAME}.part").write_bytes(CONTENT[:1000])
    limit = resource_limit(2000)
    with Server(folder) as server, limit, pytest.raises(UserError, match=r"set\.zip: .*(full|larger)") as caught:
        fetch_file(wanted(server.address(NAME), sha256=SHA256), cache)
    assert_one_line(caught.value)
    assert (cache / f".{NAME}.part").read_bytes() == CONTENT[:2000]


class resource_limit:
    """No file of this process grows beyond `size` bytes: a disk that is full at that moment (EFBIG)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        import resource

        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error: object) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_enospc_is_named() -> None:
    line = str(disk.cannot_write(Path("cache/a"), OSError(errno.ENOSPC, "No space left on device")))
    assert line == "cache/a: the disk is full; free some space and run the same command again"


@pytest.mark.parametrize("place", ["file", "below a file", "read-only"])
def test_a_cache_that_cannot_be_written_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "cache"}.get(place, tmp_path / "ro")
    if place == "read-only":  # root may write everywhere
        cache.mkdir()
        opened = os.open

        def refuse(path: Any, flags: int, *mode: Any, **more: Any) -> int:
            if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY) and str(path).startswith(str(cache)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return opened(path, flags, *mode, **more)

        monkeypatch.setattr(os, "open", refuse)
    with Server(folder) as server, pytest.raises(UserError, match=f"{cache}.*(folder|written)") as caught:
        fetch_file(wanted(server.address(NAME), sha256=SHA256), cache)
    assert_one_line(caught.value)
    assert not server.requests


def fetch_reporting(file: Download, cache: Path, start: Any, lines: Queue[str]) -> None:
    """A forked process: fetch when told to, and send every line that is said."""
    for module in (file_lock, transfer):
        module.say = lines.put  # type: ignore[attr-defined]
    assert start.wait(30)
    lines.put(f"done {fetch_file(file, cache)}")


def test_two_processes_download_once(folder: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    starts = [context.Event(), context.Event()]
    lines: list[Queue[str]] = [context.Queue(), context.Queue()]
    server = Server(folder, hold_after=100_000)
    file = wanted(server.address(NAME), sha256=SHA256)
    processes = [
        context.Process(target=fetch_reporting, args=(file, cache, start, line))
        for start, line in zip(starts, lines, strict=True)
    ]
    for process in processes:  # before the server has threads
        process.start()
    try:
        with server:
            starts[0].set()
            server.wait_for_request()
            starts[1].set()
            assert "another process is fetching it; waiting" in lines[1].get(timeout=30)
            server.release()
            assert [line.get(timeout=30) for line in lines] == [f"done {cache / NAME}"] * 2
            for process in processes:
                process.join(30)
            assert [process.exitcode for process in processes] == [0, 0]
            assert len(server.requests) == 1
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert (cache / NAME).read_bytes() == CONTENT
    assert left(cache) == [NAME]


def test_a_file_system_without_locks_is_a_warning(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with Server(folder) as server:
        fetch_file(wanted(server.address(NAME), sha256=SHA256), cache)
    assert "has no locks" in capsys.readouterr().err


def test_a_proxy_is_not_asked_for_this_machine(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(folder) as server:
        fetch_file(wanted(server.address(NAME)), cache, retries=0)


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "ftp://a.b/c",
        "pipe:cat /etc/passwd",
        "/etc/passwd",
        "http://",
        "http://[::1",
        "",
        "s3://a/b",
    ],
)
def test_other_schemes_are_refused(address: str, cache: Path) -> None:
    for refuse in (check_scheme, open_stream, lambda it: fetch_bytes(it, limit=10), lambda it: wanted(it)):
        with pytest.raises(ValueError, match="must begin with https:// or http://"):
            refuse(address)
    with pytest.raises(UserError, match="must begin with https://"):
        fetch_file(wanted(), cache, mirror=address)


@pytest.mark.parametrize("file", ["../a", "a/b", ".hidden", "", "a b"])
def test_file_names_are_plain(file: str) -> None:
    with pytest.raises(ValueError, match="file"):
        Download(file=file)


def test_messages_show_neither_passwords_nor_signatures() -> None:
    assert transfer.shown("https://me:secret@a.b/c.zip?X-Amz-Signature=0123456789abcdef") == "https://a.b/c.zip?..."


def test_small_files_come_whole_or_not_at_all(folder: Path, pauses: Pauses) -> None:
    (folder / "index.json").write_bytes(b"{}" * 500)
    with Server(folder, break_after=300, break_times=2) as server:
        address = server.address("index.json")
        assert fetch_bytes(address, limit=1000, pause=pauses) == b"{}" * 500
        with pytest.raises(UserError, match="more than the 999 bytes"):
            fetch_bytes(address, limit=999)
        for faults, line in [
            (Faults(endless=True), "more than the 1000 bytes"),
            (Faults(html=True), "web page"),
            (Faults(status=404), "HTTP 404"),
            (Faults(hang=True), r"no answer within 0\.2 s"),
            (Faults(redirect="file:///etc/passwd"), "an address that is not read"),
        ]:
            server.faults = faults
            with pytest.raises(UserError, match=line) as caught:
                fetch_bytes(address, limit=1000, retries=1, timeout=0.2, pause=pauses)
            assert address in assert_one_line(caught.value)


@pytest.mark.parametrize("first", [0, 299_999])
@pytest.mark.parametrize(
    "faults",
    [
        {},
        {"break_after": 100_000, "break_times": 2, "ignore_ranges": True},
        {"break_after": 100_000, "break_times": 2, "no_etag": True},
        {"no_length": True},
        {"break_after": 100_000, "break_times": 2, "chunked": True},
    ],
    ids=["good", "breaks without ranges", "no etag", "no length", "breaks in chunks"],
)
def test_a_stream_gives_every_byte_once(server: Server, pauses: Pauses, first: int, faults: dict[str, Any]) -> None:
    server.faults = Faults(**faults)
    with open_stream(server.address(NAME), first=first, pause=pauses) as stream:
        pieces = [stream.read(70_001)]
        while piece := stream.read(70_001):
            pieces.append(piece)
    assert b"".join(pieces) == CONTENT[first:]
    assert all(len(piece) == 70_001 for piece in pieces[:-1])


def test_a_stream_that_cannot_go_on_says_so(server: Server, pauses: Pauses) -> None:
    address = server.address(NAME)
    server.faults = Faults(break_after=100_000, changing_etag=True)
    with open_stream(address, pause=pauses) as stream, pytest.raises(UserError, match="has changed"):
        stream.read()
    server.faults = Faults(break_after=100_000)
    with open_stream(address, retries=2, pause=pauses) as stream:
        assert stream.read(50_000) == CONTENT[:50_000]
        server.faults = Faults(status=500)
        with pytest.raises(UserError, match=r"HTTP 500.*\(3 tries\)"):
            stream.read()
    server.faults = Faults()
    with pytest.raises(UserError, match="the file on the server is shorter"):
        open_stream(address, first=400_000, pause=pauses)
    server.faults = Faults(html=True, html_type="application/zip")
    with open_stream(address, pause=pauses) as stream, pytest.raises(UserError, match="web page"):
        stream.read()
