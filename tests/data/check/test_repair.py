"""A damaged data set becomes the one it was, from a copy in a folder, on a server, or by its recipe."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from damaged_sets import SCALES, contents, damage, flip, script, with_lrs, write_small_set
from packed_sets import noise, write_set
from serving import Faults, Server

from hpcdistill.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small_set(tmp_path / "packed")
    return tmp_path / "packed"


def test_repair_from_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, before = tmp_path / "copy", contents(folder)
    shutil.copytree(folder, copy)
    damage(folder)
    untouched = (folder / "shard-00001.tar").stat()
    (copy / "shard-00001.tar").unlink()  # not needed: only what is damaged is read
    assert script("verify").main([str(folder), "--repair", "--from", str(copy)]) == 0
    assert contents(folder) == before
    assert (folder / "shard-00001.tar").stat().st_mtime_ns == untouched.st_mtime_ns
    assert capsys.readouterr().err.count("mended from") == 2


def test_repair_from_a_damaged_copy(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(folder)
    flip(copy / "shard-00000.tar", 5)
    damaged = (folder / "shard-00000.tar").read_bytes()
    assert script("verify").main([str(folder), "--repair", "--from", str(copy)]) == 1
    printed = capsys.readouterr().err
    assert f"{copy / 'shard-00000.tar'}: its sha256 differs from the index" in printed
    assert (folder / "shard-00000.tar").read_bytes() == damaged  # the evidence is not overwritten
    assert printed.count("fault: ") == 1
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_repair_of_the_index(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, before = tmp_path / "copy", contents(folder)
    shutil.copytree(folder, copy)
    (folder / "index.json").write_bytes(before["index.json"][:500])
    command = script("verify")
    with pytest.raises(UserError, match=r"index.json: damaged .* pack the data set again"):
        command.main([str(folder), "--repair"])
    damage(folder)
    assert command.main([str(folder), "--repair", "--from", str(copy)]) == 0
    assert contents(folder) == before
    digest = hashlib.sha256(before["index.json"]).hexdigest()
    assert f"its sha256 is {digest}" in capsys.readouterr().err


def test_repair_of_splits(folder: Path, tmp_path: Path) -> None:
    for place in ("mine", "theirs"):
        shutil.copytree(folder, tmp_path / place / "train")
    damage(tmp_path / "mine" / "train")
    assert script("verify").main([str(tmp_path / "mine"), "--repair", "--from", str(tmp_path / "theirs")]) == 0
    assert contents(tmp_path / "mine" / "train") == contents(folder)


def test_repair_from_another_data_set(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", "lr-hr", [with_lrs(noise(16, 16, 77), 7)], scales=SCALES)
    damage(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=r"other: holds another data set than .*packed"):
        script("verify").main([str(folder), "--repair", "--from", str(tmp_path / "other")])
    assert contents(folder) == before


def test_repair_by_fetching(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy the recipe is fetched again, into the same folder, and the result is verified."""
    before, asked = contents(folder), []
    shutil.copytree(folder, tmp_path / "copy")

    def refetch(place: Path) -> None:
        asked.append(place)
        shutil.copytree(tmp_path / "copy", place, dirs_exist_ok=True)

    monkeypatch.setattr("hpcdistill.verify.refetch", refetch)
    assert script("verify").main([str(folder), "--repair"]) == 0  # whole: nothing is fetched
    assert asked == []
    damage(folder)
    assert script("verify").main([str(folder), "--repair"]) == 0
    assert asked == [folder]
    assert contents(folder) == before


def test_repair_that_cannot_fetch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refetch(place: Path) -> None:
        raise UserError(f"{place}: no public address")

    monkeypatch.setattr("hpcdistill.verify.refetch", refetch)
    damage(folder)
    broken = contents(folder)
    assert script("verify").main([str(folder), "--repair"]) == 1
    printed = capsys.readouterr().err
    assert f"warning: {folder}: no public address" in printed
    assert printed.count("fault: ") == 2
    assert contents(folder) == broken


def test_repair_from_a_server(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, command = contents(folder), script("verify")
    shutil.copytree(folder, tmp_path / "served" / "set")
    damage(folder)
    (folder / "index.json").unlink()
    with Server(tmp_path / "served") as server:
        again = [str(folder), "--repair", "--from", server.address("set")]
        assert command.main(again) == 0
        assert contents(folder) == before
        assert {request.path for request in server.requests} == {
            f"/set/{name}" for name in ("index.json", "shard-00000.tar", "shard-00002.tar")
        }
        capsys.readouterr()
        damage(folder)
        broken = contents(folder)
        for faults, said in [
            (Faults(status=404), "HTTP 404"),
            (Faults(wrong_bytes=True), "its sha256 differs from the index"),
            (Faults(html=True), "a web page"),
            (Faults(endless=True), "has more bytes instead of"),
        ]:
            server.faults = faults
            assert command.main(again) == 1
            assert said in capsys.readouterr().err
            assert contents(folder) == broken
