"""A packed set comes to the node's scratch once, whole, whoever asks for it and whatever stopped the one before."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from damaged_sets import ROOT, contents, flip, script
from packed_sets import noise, write_set
from serving import Faults, Server

from hpcdistill.data.fetch import location
from hpcdistill.data.fetch.location import digest_at
from hpcdistill.data.read import staging
from hpcdistill.data.read.staging import LOCK, MARKER, StagingStopped, clean, release, stage
from hpcdistill.errors import UserError

SHARDS = [f"shard-{number:05d}.tar" for number in range(5)]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    samples = [{"a.png": noise(8, 8, n)} for n in range(4)] + [{"b.png": noise(8, 8, 99)}]
    write_set(tmp_path / "source", "unpaired", samples, shard_samples=1)
    return tmp_path / "source"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node" / "scratch"
    for folder in list(staging._HELD):
        release(folder)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are copied, one after the other."""
    names: list[str] = []
    copy = location.copy_shard

    def noted(place: str, shard: staging.Shard, target: Path, stop: Callable[[], bool]) -> None:
        names.append(shard.name)
        copy(place, shard, target, stop)

    monkeypatch.setattr(staging, "copy_shard", noted)
    monkeypatch.setattr(staging, "_THREADS", 1)
    return names


def staged(folder: Path) -> dict[str, bytes]:
    """The files without those of staging itself."""
    return {name: content for name, content in contents(folder).items() if name not in (MARKER, LOCK)}


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def started(stack: contextlib.ExitStack, *command: str | Path) -> subprocess.Popen[str]:
    """A process that does not outlive `stack`."""
    pipe = subprocess.PIPE
    command = (sys.executable, *map(str, command))
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def test_a_copy_is_the_same_set_wherever_it_comes_from(source: Path, scratch: Path) -> None:
    digest = hashlib.sha256((source / "index.json").read_bytes()).hexdigest()
    with Server(source.parent, break_after=700, break_times=1) as server:
        folder = stage(server.address("source"), scratch)
    assert folder == stage(str(source), scratch) == scratch / f"test-train-{digest[:12]}"
    assert staged(folder) == contents(source)
    assert digest_at(str(folder)) == digest


def test_intact_is_not_read_again(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stage(str(source), scratch)
    for path in source.glob("*.tar"):
        path.unlink()
    for name in ("is_whole", "copy_shard"):
        monkeypatch.setattr(staging, name, failing(AssertionError("read again")))
    assert stage(str(source), scratch) == folder


def test_only_what_is_damaged_is_copied_again(source: Path, scratch: Path, copied: list[str]) -> None:
    folder = stage(str(source), scratch)
    assert copied == SHARDS
    copied.clear()
    os.utime(folder / SHARDS[0])  # touched, with the same bytes
    flip(folder / SHARDS[1], 600)
    (folder / SHARDS[3]).write_bytes((folder / SHARDS[3]).read_bytes()[:-512])
    (folder / SHARDS[4]).unlink()
    stage(str(source), scratch)
    assert copied == [SHARDS[1], SHARDS[3], SHARDS[4]]
    copied.clear()
    (folder / "index.json").write_bytes(b"{}")
    stage(str(source), scratch)
    (folder / MARKER).write_bytes(b'{"index"')  # without its marker all is verified, and whole
    stage(str(source), scratch)
    assert copied == []
    assert staged(folder) == contents(source)
    state = (folder / SHARDS[2]).stat()
    assert json.loads((folder / MARKER).read_text())["shards"][SHARDS[2]] == [state.st_size, state.st_mtime_ns]


@pytest.mark.parametrize(
    "stop",
    [
        KeyboardInterrupt(),
        OSError(errno.EIO, "broken"),
        OSError(errno.ENOSPC, "full"),
        UserError("no connection"),
        None,
    ],
    ids=["Ctrl-C", "disk", "full", "network", "signal"],
)
def test_stopped_and_resumed(
    source: Path, scratch: Path, copied: list[str], monkeypatch: pytest.MonkeyPatch, stop: BaseException | None
) -> None:
    with monkeypatch.context() as patch:
        copy = staging.copy_shard

        def stopping(place: str, one: staging.Shard, *arguments: object) -> None:
            if one.name == SHARDS[2] and stop:
                raise stop
            copy(place, one, *arguments)

        patch.setattr(staging, "copy_shard", stopping)
        expected = StagingStopped if stop is None else UserError if isinstance(stop, OSError) else type(stop)
        with pytest.raises(expected) as caught:
            stage(str(source), scratch, lambda: stop is None and len(copied) == 3)
    if isinstance(stop, OSError) and stop.errno == errno.ENOSPC:
        assert "the disk is full; free some space" in str(caught.value)
        assert "data.stage=DIR" in str(caught.value)
    (folder,) = scratch.iterdir()
    assert sorted(staged(folder)) == SHARDS[:2]
    copied.clear()
    monkeypatch.setattr(staging, "is_whole", lambda *_: pytest.fail("verified again what was known to be whole"))
    stage(str(source), scratch)
    assert copied == SHARDS[2:]
    assert staged(folder) == contents(source)


KILLED = """
import os, sys
from pathlib import Path
from hpcdistill.data.fetch import location
from hpcdistill.data.read import staging
staging._THREADS = 1
read = location._pieces
def pieces(address, *arguments):
    for piece in read(address, *arguments):
        yield piece[:100]
        if address.endswith("shard-00002.tar"):
            os._exit(9)
        yield piece[100:]
location._pieces = pieces
staging.stage(sys.argv[1], Path(sys.argv[2]))
"""


def test_killed_and_resumed(source: Path, scratch: Path, copied: list[str]) -> None:
    """A process that ends in the middle of a shard: what it had finished is verified and kept, the rest copied."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(source), str(scratch)], cwd=ROOT, timeout=60)
    assert killed.returncode == 9
    (folder,) = scratch.iterdir()
    assert len(list(folder.glob(".shard-00002.tar.*.tmp"))) == 1
    flip(folder / SHARDS[0], 3)
    stage(str(source), scratch)
    assert copied == [SHARDS[0], *SHARDS[2:]]
    assert staged(folder) == contents(source)
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.distributed
def test_two_processes_copy_once(source: Path, scratch: Path) -> None:
    """One shard is a pipe that gives its bytes once: whoever copied it a second time would never end."""
    whole = contents(source)
    pipe = source / SHARDS[3]
    pipe.unlink()
    os.mkfifo(pipe)
    with contextlib.ExitStack() as stack:
        first = started(stack, "shards/stage.py", source, "--to", scratch)
        with open(pipe, "wb") as writer:  # returns when the first reads it
            second = started(stack, "shards/stage.py", source, "--to", scratch)
            line = second.stderr.readline()
            writer.write(whole[SHARDS[3]])
        outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    (folder,) = scratch.iterdir()
    assert line == f"{folder}: another process stages it; waiting\n"
    assert [printed for printed, _ in outputs] == [f"{folder}\n"] * 2
    assert "staging 5 of 5 shards" in outputs[0][1]
    assert outputs[1][1] == ""
    assert staged(folder) == whole


def test_a_signal_is_heard_while_another_process_stages(source: Path, scratch: Path) -> None:
    folder = stage(str(source), scratch)
    release(folder)
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX, 1, 0); print(flush=True)"
    looks: list[int] = []

    def stopping() -> bool:
        looks.append(0)
        return len(looks) == 3

    with contextlib.ExitStack() as stack:
        other = started(stack, "-c", f"{code}; input()", folder / LOCK)
        other.stdout.readline()
        with pytest.raises(StagingStopped):
            stage(str(source), scratch, stopping)
        assert folder not in staging._HELD
        other.communicate("\n", timeout=60)
    assert stage(str(source), scratch) == folder


def test_lock_that_clean_removed(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited for a lock file that was removed meanwhile locks nothing, and has to make a new one."""
    lockf, calls = fcntl.lockf, []

    def removing(handle: object, operation: int, *place: int) -> None:
        lockf(handle, operation, *place)
        if not calls:
            shutil.rmtree(next(scratch.iterdir()))
        calls.append(operation)

    monkeypatch.setattr(fcntl, "lockf", removing)
    folder = stage(str(source), scratch)
    assert staged(folder) == contents(source)
    assert os.path.samestat((folder / LOCK).stat(), os.fstat(staging._HELD[folder].fileno()))


def test_damaged_source(source: Path, scratch: Path) -> None:
    shard = source / SHARDS[1]
    whole = shard.read_bytes()
    for content, said in [
        (whole[:-1] + b"\1", r"its sha256 differs from the index; mend it with"),
        (whole + b"x", r"has more bytes instead of \d+"),
        (whole[:-1], rf"has {len(whole) - 1} bytes instead of \d+"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"source/{SHARDS[1]}: {said}"):
            stage(str(source), scratch)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{SHARDS[1]}: cannot be read \(No such file"):
        stage(str(source), scratch)
    (folder,) = scratch.iterdir()
    assert not (folder / "index.json").exists()
    assert not (folder / SHARDS[1]).exists()
    with pytest.raises(UserError, match="does not exist"):
        stage(str(source / "nothing"), scratch)


def test_server_faults(source: Path, scratch: Path) -> None:
    with Server(source.parent) as server:
        digest_at(server.address("source"))
        for faults, said in [
            (Faults(status=403), "HTTP 403"),
            (Faults(html=True), "web page"),
            (Faults(endless=True), "has more bytes"),
            (Faults(wrong_bytes=True), "sha256 differs"),
        ]:
            server.faults = faults
            with pytest.raises(UserError, match=said):
                stage(server.address("source"), scratch)
            assert not (next(scratch.iterdir()) / "index.json").exists()
        assert server.endless_bytes < 100 << 20  # hung up on; less the buffers on the way


@pytest.mark.parametrize(("old", "new"), [(SHARDS[2], "../../x.tar"), ('"split": "train"', '"split": "../.."')])
def test_index_that_leads_elsewhere(source: Path, scratch: Path, old: str, new: str) -> None:
    (source / "index.json").write_text((source / "index.json").read_text().replace(old, new))
    with pytest.raises(UserError, match="damaged"):
        stage(str(source), scratch)
    assert not scratch.exists()


def test_no_room(source: Path, scratch: Path, copied: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(len(content) for name, content in contents(source).items() if name.endswith(".tar"))
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, needed - 1))
    with pytest.raises(UserError, match=r"staging needs .* MB, .* MB are free; .*\(data\.stage=DIR"):
        stage(str(source), scratch)
    assert copied == []
    assert len(clean(scratch)) == 1, "what is left of a failed start is removed"
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, needed))
    stage(str(source), scratch)


def test_scratch_that_cannot_be_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for scratch in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.*: is a file, not a folder; choose another .*data\.stage=DIR"):
            stage(str(source), scratch)
    for place, name, number, said in [  # permissions do not stop root
        (Path, "mkdir", errno.EROFS, "is read-only"),
        (fcntl, "lockf", errno.ENOLCK, "its file system has no locks"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing(OSError(number, os.strerror(number), "somewhere")))
            with pytest.raises(UserError, match=rf"scratch.*: {said}; .*data\.stage=DIR"):
                stage(str(source), tmp_path / "scratch")
    assert not staging._HELD


def test_foreign_folder_of_the_same_name(source: Path, scratch: Path) -> None:
    folder = scratch / f"test-train-{digest_at(str(source))[:12]}"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("x")
    with pytest.raises(UserError, match="was not made by staging; move it away"):
        stage(str(source), scratch)
    assert contents(folder) == {"mine": b"x"}


def test_clean_leaves_what_is_not_its_own(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stage(str(source), scratch)
    write_set(source.parent / "other", "unpaired", [{"a.png": noise(8, 8, 5)}, {"b.png": noise(8, 8, 6)}])
    with_more = stage(str(source.parent / "other"), scratch)
    (with_more / "notes.txt").write_text("mine")
    named_alike = scratch / "set-train-0123456789ab"
    shutil.copytree(source, named_alike)
    outside = scratch.parent / "x.tar"
    outside.write_text("x")
    false = scratch / "set-train-ba9876543210"
    false.mkdir()
    (false / MARKER).write_text(json.dumps({"index": "ba9876543210", "shards": {"../../x.tar": [1, 1]}}))
    only_a_lock = scratch / "set-train-0123456789ac"
    only_a_lock.mkdir()
    (only_a_lock / LOCK).touch()
    (scratch / "results.csv").write_text("1")
    (scratch / "link-0123456789ab").symlink_to(folder)
    assert clean(scratch) == [only_a_lock]  # the others are in use by this process
    assert staged(folder) == contents(source)
    release(folder)
    release(with_more)
    (folder / f".{SHARDS[1]}.123.tmp").write_text("of a killed copy")
    assert clean(scratch) == [folder]
    assert contents(with_more) == {"notes.txt": b"mine"}
    assert contents(named_alike) == contents(source)
    assert outside.exists()
    left = {"results.csv", "link-0123456789ab", named_alike.name, false.name, with_more.name}
    assert {path.name for path in scratch.iterdir()} == left
    printed = capsys.readouterr().err
    assert f"{folder}: in use by this process, left" in printed
    assert "staging did not make notes.txt" in printed
    assert f"{false}: its {MARKER} is damaged" in printed
    with pytest.raises(UserError, match="no such folder"):
        clean(scratch / "nothing")


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSYS, "no locks"), (errno.EIO, "cannot be removed")])
def test_clean_without_locks_is_one_line(
    number: int, said: str, source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre without `flock`: nothing tells whether a run reads the set, so it stays."""
    folder = stage(str(source), scratch)
    release(folder)
    monkeypatch.setattr(fcntl, "lockf", failing(OSError(number, os.strerror(number))))
    with pytest.raises(UserError, match=rf"{folder.name}: .*{said}.*; remove the folder by hand when no run uses it"):
        script("stage").main(["--clean", "--to", str(scratch)])
    assert (folder / "index.json").is_file()


USER = """
import sys
from pathlib import Path
from hpcdistill.data.read.staging import stage
print(stage(sys.argv[1], Path(sys.argv[2])), flush=True)
sys.stdin.read()
"""


def test_clean_skips_a_set_in_use(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as stack:
        user = started(stack, "-c", USER, source, scratch)
        folder = Path(user.stdout.readline().strip())
        stage(str(source), scratch)  # several may use it at once
        release(folder)
        assert clean(scratch) == []
        assert f"{folder}: in use by a running process, left" in capsys.readouterr().err
        assert staged(folder) == contents(source)
        user.communicate(timeout=60)
    assert clean(scratch) == [folder]
    assert list(scratch.iterdir()) == []


def test_command_line(source: Path, scratch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = script("stage")
    shutil.copytree(source, tmp_path / "split" / "train")
    command.main([str(tmp_path / "split"), "--to", str(scratch)])
    folder = Path(capsys.readouterr().out.strip())
    assert staged(folder) == contents(source)
    release(folder)
    command.main(["--clean", "--to", str(scratch)])
    assert "1 staged data set removed" in capsys.readouterr().err
    for arguments in ([str(source)], ["--to", str(scratch)], [str(source), "--clean", "--to", str(scratch)]):
        with pytest.raises(UserError, match=r"; see .*stage --help"):
            command.main(arguments)
