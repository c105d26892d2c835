"""Unpacking: whole and harmless, or one clear line and nothing under the final name."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import multiprocessing
import os
import random
import signal
import stat
import struct
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcdistill.data.fetch import disk
from hpcdistill.data.fetch.unpacking import MARKER, Limits, unpack
from hpcdistill.errors import UserError

FILES = {
    f"set/{split}/{i}.jpg": random.Random(i).randbytes(3000 + i) for split in ("trainA", "testB") for i in range(6)
}


def make_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content, compression)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=form) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o4755
            archive.addfile(info, io.BytesIO(content))
    return path


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "zip": make_zip,
    "stored": lambda path, files: make_zip(path, files, zipfile.ZIP_STORED),
    "tar": make_tar,
    "gnu": lambda path, files: make_tar(path, files, form=tarfile.GNU_FORMAT),
    "gz": lambda path, files: make_tar(path, files, "w:gz"),
    "xz": lambda path, files: make_tar(path, files, "w:xz"),
    "bz2": lambda path, files: make_tar(path, files, "w:bz2"),
}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, without the marker."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_refused(archive: Path, folder: Path, match: str, **options: object) -> None:
    """One line that names the archive, and no trace on the disk."""
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(UserError, match=match) as caught:
        unpack(archive, folder, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert archive.name in message
    assert sorted(path.name for path in folder.parent.iterdir()) == before


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_gives_the_files_it_was_made_of(tmp_path: Path, kind: str) -> None:
    archive = MAKERS[kind](tmp_path / "no-suffix", FILES)  # told by its content
    folder = tmp_path / "deep" / "out"
    assert unpack(archive, folder) == folder
    assert content(folder) == FILES
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"]
    for path in folder.rglob("*.jpg"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o7133 == 0  # neither executable nor setuid nor writable for all


def test_the_marker_says_what_is_there_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, folder = make_zip(tmp_path / "a.zip", FILES), tmp_path / "out"
    unpack(archive, folder)
    (mark,) = json.loads((folder / MARKER).read_text())["archives"]
    assert (mark["archive"], mark["members"], mark["bytes"]) == ("a.zip", 12, sum(map(len, FILES.values())))
    archive.rename(tmp_path / "renamed.zip")  # the same bytes under another name

    def refuse(*_: object) -> None:
        raise AssertionError("unpacked again")

    monkeypatch.setattr("hpcdistill.data.fetch.unpacking._unpack", refuse)
    unpack(tmp_path / "renamed.zip", folder)
    monkeypatch.undo()
    for path in (folder / "set" / "trainA").iterdir():
        path.unlink()
    unpack(tmp_path / "renamed.zip", folder)  # only what is on top is looked for
    assert len(content(folder)) == 6
    (folder / "set").rename(folder / "moved")
    unpack(tmp_path / "renamed.zip", folder)
    assert set(FILES) <= content(folder).keys()


def test_several_archives_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    unpack(make_zip(tmp_path / "a.zip", {"HR/1.png": b"1", "LR/1.png": b"one"}), folder)
    unpack(make_tar(tmp_path / "b.tar", {"LR/2.png": b"two", "LR/1.png": b"one", "X4/2.png": b"x"}), folder)
    assert content(folder) == {"HR/1.png": b"1", "LR/1.png": b"one", "LR/2.png": b"two", "X4/2.png": b"x"}
    assert [m["archive"] for m in json.loads((folder / MARKER).read_text())["archives"]] == ["a.zip", "b.tar"]
    before = content(folder)
    for files in ({"HR/1.png": b"other", "new/1": b"n"}, {"HR": b"a file"}, {"HR/1.png/2": b"below a file"}):
        assert_refused(make_zip(tmp_path / "c.zip", files), folder, "move it away")
        assert content(folder) == before
    assert not (tmp_path / ".out.partial").exists()


def test_wanted_picks_and_junk_stays_out(tmp_path: Path) -> None:
    files = {
        **FILES,
        "__MACOSX/set/._1.jpg": b"j",
        ".DS_Store": b"j",
        "set/.git/x": b"j",
        "./set/dot.jpg": b"d",
    }
    unpack(make_zip(tmp_path / "a.zip", files), tmp_path / "all")
    assert content(tmp_path / "all") == {**FILES, "set/dot.jpg": b"d"}
    unpack(make_tar(tmp_path / "a.tar", files), tmp_path / "some", wanted=lambda name: name.startswith("set/testB/"))
    assert content(tmp_path / "some") == {name: data for name, data in FILES.items() if "testB" in name}
    assert_refused(tmp_path / "a.zip", tmp_path / "none", "no file that is wanted", wanted=lambda name: False)


NAMES = {
    "absolute": "/etc/passwd",
    "dots": "a/../../b",
    "control": "a\x1b[2Jb",
    "newline": "a\nb",
    "direction": "a\u202egpj.exe",
    "long": "a" * 256,
    "deep": "a/" * 17 + "b",
    "very deep": "a/" * 1500 + "b",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_escape_or_lie_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    archive = MAKERS[kind](tmp_path / "archive", {"set/fine.jpg": b"1", name: b"2"})
    assert_refused(archive, tmp_path / "out", "member '")


def test_a_tar_of_the_folder_itself(tmp_path: Path) -> None:
    """`tar -C FOLDER .` begins with a member "./"."""
    (tmp_path / "files" / "set").mkdir(parents=True)
    (tmp_path / "files" / "set" / "1.jpg").write_bytes(b"1")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "files", arcname="./")
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert content(tmp_path / "out") == {"set/1.jpg": b"1"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o644)])
def test_files_are_never_for_others_to_write_and_the_umask_is_kept(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        unpack(make_zip(tmp_path / "a.zip", {"set/1.jpg": b"1"}), tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "set" / "1.jpg").stat().st_mode) == mode


def test_a_name_that_zipfile_would_cut_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"fine.jpg#.sh": b"1"})
    archive.write_bytes(archive.read_bytes().replace(b"fine.jpg#.sh", b"fine.jpg\0.sh"))
    assert_refused(archive, tmp_path / "out", "not printable")


@pytest.mark.parametrize(
    "names",
    [("a/1", "a/1"), ("a", "a/1"), ("a/1", "a")],
    ids=str,
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path: Path, kind: str, names: tuple[str, str]) -> None:
    archive = tmp_path / "archive"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as opened:
            for name in names:
                opened.writestr(name, name)
    else:
        with tarfile.open(archive, "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
    assert_refused(archive, tmp_path / "out", "is there twice")


TYPES = {
    "symbolic link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "sparse": tarfile.GNUTYPE_SPARSE,
    "unknown": b"Z",
}


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES.keys())
def test_a_tar_with_anything_but_files_is_refused(tmp_path: Path, kind: bytes) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("fine"))
        info = tarfile.TarInfo("set/odd")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert_refused(archive, tmp_path / "out", "member 'set/odd' is (a link|neither)")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_a_zip_with_anything_but_files_is_refused(tmp_path: Path, mode: int) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        info = zipfile.ZipInfo("set/odd")
        info.external_attr = (mode | 0o777) << 16
        opened.writestr(info, "/etc/passwd")
    assert_refused(archive, tmp_path / "out", "member 'set/odd' is (a link|neither)")


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"1.jpg": b"1"})
    data = bytearray(archive.read_bytes())
    data[6] |= 1  # the flag in the local header
    data[data.index(b"PK\1\2") + 8] |= 1  # and in the central directory
    archive.write_bytes(data)
    assert_refused(archive, tmp_path / "out", "member '1.jpg' is encrypted")


@pytest.mark.parametrize("kind", ["zip", "gz", "xz"])
def test_bombs_end_at_the_limits(tmp_path: Path, kind: str) -> None:
    archive = MAKERS[kind](tmp_path / "bomb", {"a": b"1", "b": bytes(20_000_000)})
    assert_refused(archive, tmp_path / "out", r"more than the \d\.\d MB allowed", limits=Limits(ratio_from=1 << 20))
    assert_refused(archive, tmp_path / "out", "more than the 1.0 MB allowed", limits=Limits(bytes=1_000_000))
    assert_refused(archive, tmp_path / "out", "more than the 1 members allowed", limits=Limits(members=1))
    unpack(archive, tmp_path / "out")  # below the size from which the ratio counts


def test_a_zip_that_lies_about_its_sizes_is_found_out(tmp_path: Path) -> None:
    """Declared 10 bytes, deflated 20 MB: at most the 10 are read, and their checksum is wrong."""
    archive = make_zip(tmp_path / "a.zip", {"a": bytes(20_000_000)})
    data = bytearray(archive.read_bytes())
    for place in (data.index(b"PK\3\4") + 22, data.index(b"PK\1\2") + 24):
        data[place : place + 4] = struct.pack("<I", 10)
    archive.write_bytes(data)
    assert_refused(archive, tmp_path / "out", "damaged")


def test_bombs_in_headers_and_skipped_members(tmp_path: Path) -> None:
    info = tarfile.TarInfo("name")
    info.type, info.size = tarfile.XHDTYPE, 50_000_000
    archive = tmp_path / "a.tgz"
    archive.write_bytes(gzip.compress(info.tobuf() + bytes(50_000_000)))
    assert_refused(archive, tmp_path / "out", "a header of 50000000 bytes")
    make_tar(archive, {"a": b"1", ".hidden": bytes(50_000_000)}, "w:gz")
    limits = Limits(members=100, ratio_from=1 << 20)
    assert_refused(archive, tmp_path / "out", "more than the .* allowed for its size", limits=limits)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_truncated_archive_is_never_taken_for_whole(tmp_path: Path, kind: str) -> None:
    data = MAKERS[kind](tmp_path / "whole", FILES).read_bytes()
    # A plain tar is padded with zeros to 10,240 bytes: cut where the end mark begins, and before.
    end = len(data.rstrip(b"\0")) if kind in ("tar", "gnu") else len(data)
    for position, cut in enumerate((0.2, 0.5, 0.9, 0.999)):
        archive = tmp_path / f"cut{position}"
        archive.write_bytes(data[: int(cut * end)])
        assert_refused(archive, tmp_path / "out", "damaged")
    if kind in ("tar", "gnu"):
        (tmp_path / "cut").write_bytes(data[: -(-end // 512) * 512])
        assert_refused(tmp_path / "cut", tmp_path / "out", "cut off")


def test_the_checksum_behind_the_last_file_is_looked_at(tmp_path: Path) -> None:
    """Of 2 MiB, so that the end mark is read before the end of the gzip is."""
    data = make_tar(tmp_path / "a.tar", FILES).read_bytes().ljust(2 << 20, b"\0")
    compressed = bytearray(gzip.compress(data))
    archive = tmp_path / "a.tgz"
    archive.write_bytes(compressed)
    unpack(archive, tmp_path / "fine")
    compressed[-8] ^= 1
    archive.write_bytes(compressed)
    assert_refused(archive, tmp_path / "out", "CRC")


@pytest.mark.parametrize("data", [b"", b"<html>no</html>", b"\x89PNG\r\n\x1a\n" + bytes(600), bytes(1024)])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    assert_refused(tmp_path / "a.zip", tmp_path / "out", "empty|neither a zip nor a tar")
    (tmp_path / "b.xz").write_bytes(lzma.compress(b"no tar inside"))
    assert_refused(tmp_path / "b.xz", tmp_path / "out", "damaged")
    assert_refused(tmp_path / "absent.zip", tmp_path / "out", "no such archive")


def kill_at_the_third(archive: Path, folder: Path) -> None:
    seen: list[str] = []

    def wanted(name: str) -> bool:
        seen.append(name)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    unpack(archive, folder, wanted=wanted)


def kill_in_the_merge(archive: Path, folder: Path) -> None:
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, target)

    Path.rename = rename  # type: ignore[method-assign, assignment]
    unpack(archive, folder)


@pytest.mark.parametrize("killed", [kill_at_the_third, kill_in_the_merge])
def test_killed_half_way_it_begins_again(tmp_path: Path, killed: Callable[[Path, Path], None]) -> None:
    folder = tmp_path / "out"
    unpack(make_zip(tmp_path / "first.zip", {"x": b"1"}), folder)
    archive = make_zip(tmp_path / "a.zip", {f"{top}/{i}": b"%d" % i for top in "abc" for i in range(3)})
    process = multiprocessing.get_context("fork").Process(target=killed, args=(archive, folder))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / ".out.partial").exists()
    assert len(json.loads((folder / MARKER).read_text())["archives"]) == 1
    unpack(archive, folder)
    assert len(content(folder)) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "first.zip", "out"]


def test_room_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    assert_refused(archive, tmp_path / "out", r"unpacking a\.zip needs 0\.0 MB, 0\.0 MB are free")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(UserError, match="a file stands where") as caught:
            unpack(archive, folder)
        assert "\n" not in str(caught.value)
