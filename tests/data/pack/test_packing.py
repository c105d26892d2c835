"""Packing: equal pixels, equal bytes whatever happened on the way, and one clear line for what cannot be packed."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from damaged_sets import script
from packed_sets import files, noise
from PIL import Image

from hpcdistill.data.index import load_index
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe, recipe_names
from hpcdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
FOLDER = load_recipe("folder")
SIZES = [(24, 30), (13, 12), (48, 25), (25, 25), (36, 36), (12, 40), (31, 17)]


def image(number: int) -> np.ndarray:
    height, width = SIZES[number % len(SIZES)]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(len(SIZES)):
        Image.fromarray(image(number)).save(folder / f"photo{number + 7}.png")  # 7 .. 13: natural order matters
    return folder


def packed(source: Path, out: Path, **options: object) -> dict[str, bytes]:
    pack(FOLDER, source, out, **{"shard_samples": 2, **options})  # type: ignore[arg-type]
    return files(out)


def reference_lr(hr: np.ndarray, scale: int) -> np.ndarray:
    """MATLAB's imresize(hr, 1/scale) with dense float64 matrices, rounded half up after each axis."""

    def matrix(length: int) -> np.ndarray:
        centres = (np.arange(length // scale) + 0.5) * scale - 0.5
        places = np.arange(-3 * length, 4 * length)  # mirrored copies to all sides
        x = np.abs(centres[:, None] - places) / scale
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x <= 1, near, np.where(x <= 2, far, 0))
        weights /= weights.sum(axis=1, keepdims=True)
        dense = np.zeros((length // scale, length))
        for column, place in enumerate(places % (2 * length)):
            dense[:, min(place, 2 * length - 1 - place)] += weights[:, column]
        return dense

    height, width = (length - length % scale for length in hr.shape[:2])
    rows = np.einsum("ij,jkc->ikc", matrix(height), hr[:height, :width].astype(np.float64))
    rounded = np.floor(rows.clip(0, 255) + 0.5 + 1e-9)
    both = np.einsum("lk,ikc->ilc", matrix(width), rounded)
    return np.floor(both.clip(0, 255) + 0.5 + 1e-9).astype(np.uint8)


def test_webdataset_reads_equal_pixels(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    names = packed(source, out)
    assert sorted(names) == ["index.json", *(f"shard-{n:05d}.tar" for n in range(4))]
    shards = [str(out / f"shard-{n:05d}.tar") for n in range(4)]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{n:06d}" for n in range(7)]
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["hr.png"], image(number))
        for scale in (2, 3, 4):
            np.testing.assert_array_equal(sample[f"lr{scale}.png"], reference_lr(image(number), scale))
        assert sample["json"]["source"] == f"photo{number + 7}.png"
        assert sample["json"]["sizes"]["lr4.png"] == [length // 4 for length in SIZES[number]]


def test_index_says_where_each_byte_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    packed(source, out)
    index = load_index(out)
    assert (index.recipe, index.split, index.kind, index.scales) == ("folder", "all", "lr-hr", (2, 3, 4))
    assert [sample.source for sample in index.samples] == [f"photo{n}.png" for n in range(7, 14)]
    assert [sample.shard for sample in index.samples] == [0, 0, 1, 1, 2, 2, 3]
    for sample in index.samples:
        path = out / index.shards[sample.shard].name
        with tarfile.open(path) as tar:
            for suffix, member in sample.members.items():
                inside = tar.getmember(f"{sample.key}.{suffix}")
                assert (inside.offset_data, inside.size) == (member.offset, member.length)
                assert (inside.mtime, inside.uid, inside.gid, inside.mode) == (0, 0, 0, 0o644)
        content = path.read_bytes()
        hr = sample.members["hr.png"]
        with Image.open(io.BytesIO(content[hr.offset : hr.offset + hr.length])) as decoded:
            assert decoded.size == (hr.width, hr.height)


def test_shards_are_cut_by_bytes_too(source: Path, tmp_path: Path) -> None:
    pack(FOLDER, source, tmp_path / "packed", shard_bytes=10_000)
    index = load_index(tmp_path / "packed")
    assert len(index.shards) > 1
    # Content only: a tar is padded to 10 KiB records.
    for number in range(len(index.shards)):
        members = [m for s in index.samples if s.shard == number for m in s.members.values()]
        assert sum(member.length for member in members) <= 10_000


def test_complete_set_is_left_alone_wherever_its_images_lie(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    first = packed(source, out)
    elsewhere = source.rename(tmp_path / "elsewhere")
    for path in elsewhere.iterdir():
        os.utime(path, (1, 1))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    packed(elsewhere, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "already holds these 7 images" in capsys.readouterr().err
    assert packed(elsewhere, tmp_path / "b" / "deeper") == first


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["lr-hr", "unpaired"])
def test_stopped_before_any_rename_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipe = load_recipe("folder" if kind == "lr-hr" else "unpaired")
    if kind == "unpaired":  # photo7 .. photo10 are of A, the others of B
        for number in range(7, 14):
            side = source / ("A" if number < 11 else "B")
            side.mkdir(exist_ok=True)
            (source / f"photo{number}.png").rename(side / f"{number}.png")
        (source / "A" / "8.png").write_bytes(b"bad")  # skipped ones take part in the cuts

    def go(out: Path) -> dict[str, bytes]:
        pack(recipe, source, out, shard_samples=2, on_error="skip")
        return files(out)

    expected = go(tmp_path / "expected")
    rename, renames = os.replace, 0
    for stop in range(9):  # four shards with a sidecar each, and the index
        out, renames = tmp_path / f"out{stop}", 0

        def replace(old: Path, new: Path, stop: int = stop) -> None:
            nonlocal renames
            if renames == stop:
                raise Killed
            renames += 1
            rename(old, new)

        monkeypatch.setattr("hpcdistill.storage.os.replace", replace)
        with pytest.raises(Killed):
            go(out)
        monkeypatch.undo()
        assert not (out / "index.json").exists()
        kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
        assert len(kept) == stop // 2
        assert go(out) == expected
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "finished shards are packed again"


def interrupt(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Pack all shards, but stop before the index."""

    def save(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("hpcdistill.data.index.Index.save", save)
    with pytest.raises(Killed):
        packed(source, out, **options)
    monkeypatch.undo()


def change(source: Path, name: str = "photo9.png") -> None:
    Image.fromarray(image(50)).save(source / name)


@pytest.mark.parametrize("name", ["photo9.png", "photo99.png", "photo1.png", None])
def test_changed_sources_of_a_half_packed_set(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """One changed, added at the end, added in front, or the last one removed."""
    interrupt(source, tmp_path / "out", monkeypatch)
    if name:
        change(source, name)
    else:
        (source / "photo13.png").unlink()
    assert packed(source, tmp_path / "out") == packed(source, tmp_path / "expected")


def test_a_smaller_image_after_a_cut_moves_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):  # 3.5 to 4 kB of noise each, with LR and headers about 10 kB: two a shard
        Image.fromarray(noise(36, 36, number)).save(source / f"{number}.png")
    options = {"shard_bytes": 26_000}  # the blank image takes 5 kB
    interrupt(source, tmp_path / "out", monkeypatch, shard_samples=100, **options)
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(source / "2.png")  # now fits behind the first two
    pack(FOLDER, source, tmp_path / "out", **options)
    pack(FOLDER, source, tmp_path / "expected", **options)
    assert [sample.shard for sample in load_index(tmp_path / "expected").samples] == [0, 0, 0, 1]
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("name", ["shard-00001.tar", ".shard-00002.json", "no settings", None])
def test_a_damaged_or_missing_shard_or_sidecar_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, complete: bool
) -> None:
    expected, out = packed(source, tmp_path / "expected"), tmp_path / "out"
    interrupt(source, out, monkeypatch)
    sidecar = out / ".shard-00002.json"
    content = json.loads(sidecar.read_bytes()) | {"settings": {}}  # of another version
    if complete:
        packed(source, out)
    if name is None:
        (out / "shard-00001.tar").unlink()
    elif name == "no settings":
        sidecar.write_text(json.dumps(content))
    else:
        (out / name).write_bytes((out / name).read_bytes()[:-1] + b"\1" if (out / name).exists() else b"{}")
    assert packed(source, out) == expected


def test_another_data_set_is_not_replaced_unasked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = packed(source, out)
    change(source)
    with pytest.raises(UserError, match=r"out: holds another data set.*another --out, or replace it with --overwrite"):
        packed(source, out)
    assert files(out) == before
    assert packed(source, out, overwrite=True) == packed(source, tmp_path / "expected")


def test_foreign_tar_files_are_not_replaced_unasked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-00000.tar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"holds a tar file that was not packed here \(shard-00000.tar\)"):
        packed(source, out)
    assert files(out) == {"shard-00000.tar": b"somebody's"}


def test_half_packed_set_of_another_recipe(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, tmp_path / "out", monkeypatch)
    other = FOLDER.model_copy(update={"name": "mine"})
    with pytest.raises(UserError, match="holds half of folder; choose another --out"):
        pack(other, source, tmp_path / "out")
    pack(other, source, tmp_path / "out", overwrite=True)
    assert load_index(tmp_path / "out").recipe == "mine"


@pytest.mark.parametrize("number", [1, 7, 23, "index"])
def test_full_disk_is_one_line_and_packing_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | str
) -> None:
    expected, out = packed(source, tmp_path / "expected"), tmp_path / "out"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    addfile, added = tarfile.TarFile.addfile, 0

    def add(tar: tarfile.TarFile, member: tarfile.TarInfo, content: io.BytesIO) -> None:
        nonlocal added
        added += 1
        if added == number:
            raise full
        addfile(tar, member, content)

    def save(*_: object) -> None:
        raise full

    if number == "index":
        monkeypatch.setattr("hpcdistill.data.index.Index.save", save)
    else:
        monkeypatch.setattr(tarfile.TarFile, "addfile", add)
    with pytest.raises(UserError, match=r"out: the disk is full; free some space and run the same command again"):
        packed(source, out)
    monkeypatch.undo()
    assert not (out / "index.json").exists()
    assert not list(out.glob("*.tmp"))
    assert packed(source, out) == expected


def test_bad_image_stops_or_is_skipped(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "photo8.png").write_bytes((source / "photo8.png").read_bytes()[:60])
    Image.fromarray(image(0)[:11]).save(source / "photo13.png")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"photo8\.png: cannot be decoded.*--on-error skip"):
        packed(source, out)
    assert not (out / "index.json").exists()
    content = packed(source, out, on_error="skip")
    index = load_index(out)
    assert index.skipped == ("photo8.png", "photo13.png")
    assert [sample.key for sample in index.samples] == ["000000", "000002", "000003", "000004", "000005"]
    said = " ".join(capsys.readouterr().err.split())
    assert "2 images were skipped: photo8.png, photo13.png" in said
    assert "the smallest side must be 12" in said
    (source / "photo8.png").unlink()
    (source / "photo13.png").unlink()
    clean = packed(source, tmp_path / "clean")
    assert content != clean, "keys tell that something is missing"


def test_skipping_survives_a_restart(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("photo7.png", "photo10.png", "photo13.png"):
        (source / name).write_bytes(b"bad")
    expected = packed(source, tmp_path / "expected", on_error="skip")
    interrupt(source, tmp_path / "out", monkeypatch, on_error="skip")
    assert packed(source, tmp_path / "out", on_error="skip") == expected


def test_what_cannot_be_packed_at_all(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"bad")
    with pytest.raises(UserError, match="none of the 1 images could be packed"):
        pack(FOLDER, tmp_path, tmp_path / "out", on_error="skip")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file: is a file; choose another --out"):
        packed(source, tmp_path / "file")


def test_photos_need_nothing_and_have_two_splits(tmp_path: Path) -> None:
    # Sizes and names as skimage.data documents them.
    pack(load_recipe("photos"), None, tmp_path)
    train, test = load_index(tmp_path / "train"), load_index(tmp_path / "test")
    sizes = {s.source: (s.members["hr.png"].height, s.members["hr.png"].width) for s in test.samples}
    assert sizes == {"chelsea.png": (300, 451), "coffee.png": (400, 600), "rocket.jpg": (427, 640)}
    assert len(train.samples) == 6
    assert not {s.source for s in train.samples} & set(sizes)


def test_splits_and_an_unsplit_set_do_not_share_a_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(source, out / "train")
    with pytest.raises(UserError, match="holds the splits train of another data set"):
        packed(source, out)
    with pytest.raises(UserError, match="holds a data set without splits"):
        pack(load_recipe("photos"), None, out / "train")


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        script("pack").main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())


def test_folders_by_default(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "root"))
    with pytest.raises(UserError, match=r"needs the folder of its images: --source DIR$"):
        script("pack").main(["folder"])
    (tmp_path / "root" / "sources").mkdir(parents=True)
    source.rename(tmp_path / "root" / "sources" / "folder")
    script("pack").main(["folder"])
    assert len(load_index(tmp_path / "root" / "folder").samples) == 7
    with pytest.raises(UserError, match="--processes: 0: must be a whole number, 1 or more"):
        script("pack").main(["folder", "--processes", "0"])


def test_command_line(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "shards" / "pack.py")]
    wrong = subprocess.run([*command, "fotos", "--out", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: no recipe 'fotos'; did you mean 'photos'?\n"
    out = tmp_path / "packed"
    right = subprocess.run(
        [*command, "folder", "--source", str(source), "--out", str(out)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert right.returncode == 0, right.stderr
    assert right.stdout == ""
    assert "7 images" in right.stderr
    assert json.loads((out / "index.json").read_text())["schema"] == 1


def test_command_line_for_images_as_people_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mine"
    (source / "holiday").mkdir(parents=True)
    Image.fromarray(image(0)).save(source / "a.png")
    Image.fromarray(image(1)).save(source / "b.jfif", "JPEG")
    (source / "c.tif").write_bytes(b"")
    Image.fromarray(np.dstack([image(2), image(2)[..., :1]])).save(source / "holiday" / "d.png")
    arguments = ["folder", "--source", str(source), "--processes", "1", "--out"]
    script("pack").main([*arguments, str(tmp_path / "flat")])
    assert [sample.source for sample in load_index(tmp_path / "flat").samples] == ["a.png", "b.jfif"]
    line = (
        f"{source}: not read: holiday/ (1 image), 1 .tif file; take folders too with --recursive, convert files to PNG"
    )
    assert line in capsys.readouterr().err
    options = ["--recursive", "--flatten", "white"]
    for command, name in (("pack", "deep"), ("fetch", "fetched")):
        given = arguments if command == "pack" else ["folder", "--from", str(source), "--processes", "1", "--out"]
        script(command).main([*given, str(tmp_path / name), *options])
        names = [sample.source for sample in load_index(tmp_path / name).samples]
        assert names == ["a.png", "b.jfif", "holiday/d.png"]
        assert "holiday/ (1" not in capsys.readouterr().err
    script("pack").main([*arguments, str(tmp_path / "skip"), "--recursive", "--on-error", "skip"])
    assert "1 image was skipped: holiday/d.png" in capsys.readouterr().err


def test_real_sets(test_data: Path, tmp_path: Path) -> None:
    pack(load_recipe("set5"), test_data / "sr_test" / "Set5", tmp_path / "set5")
    index = load_index(tmp_path / "set5")
    butterfly = next(sample for sample in index.samples if "butterfly" in sample.source)
    hr, lr = butterfly.members["hr.png"], butterfly.members["lr4.png"]
    assert (hr.height, hr.width, lr.height, lr.width) == (256, 256, 64, 64)
