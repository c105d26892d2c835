"""Pairs of two folders (`--a`, `--b`): what is packed, and what is said of folders that do not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed_sets import noise
from PIL import Image

from hpcdistill.data.index import load_index
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.errors import UserError
from hpcdistill.pack import main


def write(folder: Path, names: str, first: int = 0, size: tuple[int, int] = (12, 20)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names.split(), first):
        Image.fromarray(noise(*size, seed)).save(folder / name)
    return folder


def packed(a: Path, b: Path, out: Path, *more: str) -> None:
    main(["paired", "--a", str(a), "--b", str(b), "--out", str(out), "--processes", "1", *more])


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write(tmp_path / "horses", "n1.jpg n2.png n10.webp")


def test_the_packed_pairs_are_the_files(a: Path, tmp_path: Path) -> None:
    b = write(tmp_path / "elsewhere" / "made", "n10.png n2.png n1.jpg", 10)
    out = tmp_path / "taught" / "train"
    packed(a, b, out)
    index = load_index(out)
    assert (index.recipe, index.kind, index.split) == ("paired", "paired", "all")
    assert [sample.source for sample in index.samples] == ["n1.jpg", "n2.png", "n10.webp"]
    partners = {"n1.jpg": "n1.jpg", "n2.png": "n2.png", "n10.webp": "n10.png"}
    for sample in index.samples:
        shard = (out / index.shards[sample.shard].name).read_bytes()
        held = {suffix[0]: shard[m.offset :][: m.length] for suffix, m in sample.members.items()}
        assert held == {"a": (a / sample.source).read_bytes(), "b": (b / partners[sample.source]).read_bytes()}
    assert str(tmp_path) not in (out / "index.json").read_text()  # no path of this machine
    # Another split beside it, the same set as that of folders A and B in one, and nothing to do the second time.
    packed(a, b, out.parent / "test")
    before = (out / "index.json").read_bytes()
    packed(a, b, out)
    write(tmp_path / "one" / "A", "").rmdir()
    (tmp_path / "one" / "A").symlink_to(a)
    (tmp_path / "one" / "B").symlink_to(b)
    pack(load_recipe("paired"), tmp_path / "one", tmp_path / "same", processes=1)
    assert (tmp_path / "same" / "index.json").read_bytes() == (out / "index.json").read_bytes() == before


def test_with_folders_below(tmp_path: Path) -> None:
    a, b = (write(tmp_path / side / "deep", "1.png 2.png", seed).parent for seed, side in ((0, "x"), (5, "y")))
    packed(a, b, tmp_path / "out", "--recursive")
    assert [sample.source for sample in load_index(tmp_path / "out").samples] == ["deep/1.png", "deep/2.png"]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ("n1.png n2.png", r"horses/n10\.webp: has no partner n10\.\* in .*/made \(a and b belong together\); add it"),
        (
            "n2.png",
            r"horses/n1\.jpg: has no partner n1\.\* in .*/made \(.*; 2 of 3 images have none\); add them",
        ),
        ("x1.png x2.png", r"horses/n1\.jpg: has no partner n1\.\* in .*/made \(.*; 3 of 3 images have none\)"),
        ("n1.png n2.png n10.png n3.png n4.png", r"made/n3\.png: .* n3\.\* in .*/horses \(.*; 2 of 5 images have none"),
        ("n1.png n1.jpg n2.png n10.png", r"made/n1\.png: has the same name as .*/made/n1\.jpg"),
    ],
)
def test_names_that_do_not_pair(a: Path, names: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line) as error:
        packed(a, write(tmp_path / "made", names), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="made: no images in this folder; expected files ending in"):
        packed(a, tmp_path / "made", out)
    with pytest.raises(UserError, match="made: no images in this folder"):
        packed(tmp_path / "made", tmp_path / "absent", out)
    with pytest.raises(UserError, match="absent: no such folder; check the path"):
        packed(tmp_path / "absent", tmp_path / "made", out)
    with pytest.raises(UserError, match="horses: is the folder of the images A too"):
        packed(a, a, out)
    with pytest.raises(UserError, match="horses: is where the images are that are packed"):
        packed(a, write(tmp_path / "made", "n1.png n2.png n10.png"), a)
    write(tmp_path / "made", "n2.png", size=(24, 40))
    with pytest.raises(
        UserError,
        match=r"made/n2\.png: is 40 x 24 pixels, its partner .*/n2\.png is 20 x 12; a pair must have one size",
    ):
        packed(a, tmp_path / "made", out)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["paired", "--a", "x", "--out", "o"], "--a x: pairs are of two folders; add --b DIR"),
        (["paired", "--b", "x", "--out", "o"], "--b x: pairs are of two folders; add --a DIR"),
        (
            ["unpaired", "--a", "x", "--b", "y", "--out", "o"],
            "--a x: is for the recipe paired; the recipe unp",
        ),
        (["paired", "--a", "x", "--b", "y", "--out", "o", "--source", "s"], "--a x: .*leave --source s out"),
        (["paired", "--a", "x", "--b", "y"], "--a x: .*say with --out DIR"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        main(arguments)
