"""Packing in processes: the same bytes whatever their number, and nothing left behind however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
from packed_sets import files
from PIL import Image

from hpcdistill.data.pack import pack_pool
from hpcdistill.data.pack.pack_pool import available_cores, packed_ahead
from hpcdistill.data.pack.packed_image import pack_image
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import Recipe, load_recipe
from hpcdistill.data.pack.sources import Source
from hpcdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
FOLDER, UNPAIRED = load_recipe("folder"), load_recipe("unpaired")
PATIENCE = 60  # seconds for what takes about one


def draw(folder: Path, count: int, side: int = 24) -> list[Source]:
    folder.mkdir(parents=True)
    random = np.random.default_rng(count)
    for number in range(count):
        shape = (side + number % 3, side + number % 5, 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number}.png")
    return [Source(f"{number}.png", (("hr", folder / f"{number}.png"),)) for number in range(count)]


def packers() -> list[str]:
    """The processes of ours that pack; other tests may have some of their own."""
    return [process.name for process in multiprocessing.active_children() if process.name == "pack"]


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # of which nobody here may be the parent
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process gets some of a small set."""
    monkeypatch.setattr(pack_pool, "_BATCH_SECONDS", 0)


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("recipe", [FOLDER, UNPAIRED], ids=["lr-hr", "unpaired"])
def test_same_bytes_whatever_the_number_of_processes(recipe: Recipe, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if recipe.kind == "unpaired":
        draw(source / "A", 6)
        draw(source / "B", 5)
        (source / "B" / "2.png").write_bytes(b"bad")
    else:
        draw(source, 11)
        (source / "2.png").write_bytes(b"bad")
    results = []
    for processes in (1, None, 2, 3):  # None: threads, for so small a set
        out = tmp_path / f"{processes}"
        pack(recipe, source, out, processes=processes, on_error="skip", shard_samples=4)
        results.append(files(out))
        assert not packers()
    assert len(results[0]) >= 4
    assert all(result == results[0] for result in results)


@pytest.mark.usefixtures("one_at_a_time")
def test_in_order_and_equal_to_packing_one_by_one(tmp_path: Path) -> None:
    sources = draw(tmp_path / "source", 9)
    expected = [pack_image(source, "lr-hr") for source in sources]
    assert list(packed_ahead(sources, "lr-hr", processes=2)) == expected
    assert list(packed_ahead(sources, "lr-hr")) == expected
    assert list(packed_ahead([], "lr-hr", processes=2)) == []


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(("pixels", "ahead"), [(0, 0), (3 * 26 * 28, 3), (10**9, 5)])  # 26 x 28 are the largest
def test_no_more_than_a_few_images_are_made_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int, ahead: int
) -> None:
    sources = draw(tmp_path / "source", 20)
    submit, submitted = pack_pool._Workers.submit, 0

    def count(*arguments: object) -> object:
        nonlocal submitted
        submitted += 1
        return submit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_pool._Workers, "submit", count)
    monkeypatch.setattr(pack_pool, "available_cores", lambda: 3)
    monkeypatch.setattr(pack_pool, "_PIXELS_IN_FLIGHT", pixels)
    monkeypatch.setattr(pack_pool, "_PIXELS_PER_PROCESS", 0)
    made = packed_ahead(sources, "lr-hr")
    for taken in range(1, 12):
        next(made)
        assert submitted <= taken + ahead
    made.close()


@pytest.mark.parametrize(("seconds", "processes", "starts"), [(8.0, None, False), (0, None, True), (0, 1, False)])
def test_a_small_set_starts_no_process_and_a_large_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, processes: int | None, starts: bool
) -> None:
    monkeypatch.setattr(pack_pool, "available_cores", lambda: 2)
    monkeypatch.setattr(pack_pool, "_POOL_SECONDS", seconds)
    made = packed_ahead(draw(tmp_path / "source", 40), "lr-hr", processes=processes)
    next(made)
    assert bool(packers()) == starts
    made.close()
    assert packers() == []


def test_a_process_that_packs_does_without_torch() -> None:
    """Importing it takes seconds and 200 MB, for each process."""
    check = "import sys, hpcdistill.data.pack.packing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False, timeout=PATIENCE).returncode == 0


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7}, raising=False)
    assert available_cores() == 3


def die_while_handing_over(connection: Connection) -> None:
    """In place of a packing process: killed with half of its result in the pipe."""
    connection.recv()
    os.write(connection.fileno(), struct.pack("!i", 1000) + bytes(500))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_while_it_hands_over_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_pool, "_serve", die_while_handing_over)
    with pytest.raises(UserError, match=r"a process that packs images ended, most likely killed for want of memory;"):
        list(packed_ahead(draw(tmp_path / "source", 2), "lr-hr", processes=2))
    assert packers() == []


def test_a_fault_of_ours_is_not_hidden() -> None:
    broken = Source("x.png", (("hr", None),))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"AttributeError: 'NoneType'"):
        list(packed_ahead([broken], "lr-hr", processes=2))
    assert packers() == []


KILLED = """
import os, signal, sys, tarfile
from pathlib import Path
import psutil
from hpcdistill.data.pack import pack_pool, packing
from hpcdistill.data.pack.recipes import load_recipe
pack_pool._BATCH_SECONDS = 0
addfile, added = tarfile.TarFile.addfile, 0
def add(*arguments):
    global added
    added += 1
    if added == 13:
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    addfile(*arguments)
tarfile.TarFile.addfile = add
packing.pack(load_recipe("folder"), Path(sys.argv[1]), Path(sys.argv[2]), shard_samples=2, processes=2)
"""


def test_killed_in_the_middle_its_processes_end_and_it_goes_on(tmp_path: Path) -> None:
    draw(tmp_path / "source", 9)
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source, out], cwd=ROOT, check=False, timeout=PATIENCE, stdout=subprocess.PIPE
    )
    assert done.returncode == -signal.SIGKILL
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) >= 2
    assert wait_until(lambda: not any(map(alive, children)))
    assert len(list(Path(out).glob("shard-*.tar"))) == 1, "ten members a shard: killed in the second"
    assert len(list(Path(out).glob(".shard-*.tmp"))) == 1
    assert not (Path(out) / "index.json").exists()
    pack(FOLDER, Path(source), Path(out), shard_samples=2, processes=1)
    pack(FOLDER, Path(source), tmp_path / "expected", shard_samples=2, processes=1)
    assert files(Path(out)) == files(tmp_path / "expected")


@pytest.mark.usefixtures("one_at_a_time")
def test_processes_leave_ctrl_c_to_the_one_that_started_them(tmp_path: Path) -> None:
    """A terminal sends it to all of them; each would print a traceback."""
    sources = draw(tmp_path / "source", 30)
    made = packed_ahead(sources, "lr-hr", processes=2)
    first = next(made)
    for process in multiprocessing.active_children():
        if process.name == "pack":
            assert process.pid
            os.kill(process.pid, signal.SIGINT)
    assert [first, *made] == [pack_image(source, "lr-hr") for source in sources]


def test_ctrl_c_ends_all_processes_without_a_traceback(tmp_path: Path) -> None:
    draw(tmp_path / "drawn", 2, side=600)
    (tmp_path / "source").mkdir()
    for number in range(400):  # a minute of work
        os.link(tmp_path / "drawn" / f"{number % 2}.png", tmp_path / "source" / f"{number}.png")
    command = [sys.executable, str(ROOT / "shards" / "pack.py"), "folder", "--source", str(tmp_path / "source")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--processes", "2"],
        start_new_session=True,  # a process group of its own, as a terminal gives it
        stderr=subprocess.PIPE,
        text=True,
    )
    packer = psutil.Process(process.pid)
    try:
        # Both packers and multiprocessing's tracker; one of them may still be importing.
        assert wait_until(lambda: len(packer.children()) >= 3)
        children = [child.pid for child in packer.children()]
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert wait_until(lambda: not any(map(alive, children)))
    assert not (tmp_path / "out" / "index.json").exists()
