"""One lock between threads and processes, whose file may go with its holder."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpcdistill import file_lock
from hpcdistill.file_lock import is_at, locked, try_lock, unlock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def attempt(path: Path) -> bool | None:
    with locked(path, waiting="waiting") as held:
        return held


def in_process(work: Callable[[], object]) -> object:
    """What `work` returns in a process of its own."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: writer.send(work()))
    process.start()
    found = reader.recv() if reader.poll(60) else None
    process.join()
    return found


def in_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("elsewhere", [in_process, in_thread])
def test_one_at_a_time(
    elsewhere: Callable[[Callable[[], object]], object], path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with locked(path) as held:
        assert held
        assert elsewhere(lambda: attempt(path)) is False
        assert capfd.readouterr().err.splitlines() == ["waiting"]
    assert elsewhere(lambda: attempt(path)) is True
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("remove", [False, True])
def test_who_waits_gets_it(remove: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the holder removes the file: then the one that waited holds a new one."""
    waits = multiprocessing.get_context("fork").Event()
    monkeypatch.setattr(file_lock, "say", lambda said: waits.set())

    def wait() -> tuple[bool | None, bool]:
        with locked(path, 60, "waiting") as held:
            return held, path.exists()

    with ThreadPoolExecutor(1) as pool:
        with locked(path, remove=remove):
            waiting = pool.submit(in_process, wait)
            assert waits.wait(60)
        assert waiting.result() == (True, True)


def test_a_killed_holder_keeps_nobody_out(path: Path) -> None:
    def killed() -> None:
        with locked(path):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert attempt(path) is True


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert attempt(path) is None


def test_any_other_error_is_passed_on(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # no sign of another holder

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", refuse)
        with pytest.raises(PermissionError):
            attempt(path)
    path.unlink()
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing" / "lock"):
        pass
    path.mkdir()
    with pytest.raises(IsADirectoryError), locked(path):
        pass


def test_a_byte_of_a_file_is_locked_alone_or_shared(path: Path) -> None:
    def tries() -> list[bool]:
        with path.open("r+") as other:
            return [try_lock(other.fileno(), byte, shared=shared) for byte in (0, 1) for shared in (True, False)]

    with path.open("w+") as file:
        assert try_lock(file.fileno(), 0)
        assert try_lock(file.fileno(), 1, shared=True)
        assert in_process(tries) == [False, False, True, False]
        unlock(file.fileno(), 0)
        assert in_process(tries) == [True, True, True, False]


def test_a_removed_file_is_not_at_its_path(path: Path) -> None:
    with path.open("w") as file:
        assert is_at(path, file.fileno())
        path.unlink()
        assert not is_at(path, file.fileno())
        path.touch()
        assert not is_at(path, file.fileno())
