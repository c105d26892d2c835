"""Packing pairs, unpaired images and official LRs: the source's own bytes, sides apart, one line for what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from packed_sets import files, noise
from PIL import Image

from hpcdistill.data.index import Index, load_index
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import Recipe, load_recipe
from hpcdistill.errors import UserError

FOLDER, PAIRED, UNPAIRED = (load_recipe(name) for name in ("folder", "paired", "unpaired"))
OFFICIAL = Recipe(
    name="mine",
    title="t",
    licence="l",
    origin="o",
    layouts=({"all": {"hr": "HR", "lr2": "X2", "lr4": "X4"}},),  # type: ignore[dict-item]
)


def save(path: Path, seed: int, size: tuple[int, int] = (16, 24), **options: object) -> bytes:
    """A file of noise, in the format of its suffix unless `format` says another; its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*size, seed)).save(path, **options)  # type: ignore[arg-type]
    return path.read_bytes()


def contents(folder: Path, index: Index) -> list[dict[str, bytes]]:
    """suffix -> bytes of each sample, read at the places that the index gives."""
    return [
        {
            suffix: (folder / index.shards[sample.shard].name).read_bytes()[member.offset :][: member.length]
            for suffix, member in sample.members.items()
        }
        for sample in index.samples
    ]


@pytest.fixture
def sides(tmp_path: Path) -> Path:
    """Three A of three formats and two B, unpaired."""
    root = tmp_path / "sides"
    for number, name in enumerate(("A/1.jpeg", "A/2.webp", "A/10.png", "B/1.jpg", "B/2.bmp")):
        save(root / name, number)
    return root


def test_unpaired_images_keep_their_bytes_and_their_sides(sides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(UNPAIRED, sides, out, shard_samples=2)
    index = load_index(out)
    assert (index.kind, index.scales, index.split) == ("unpaired", (), "all")
    assert "resize" not in index.notes
    assert [sample.source for sample in index.samples] == ["A/1.jpeg", "A/2.webp", "A/10.png", "B/1.jpg", "B/2.bmp"]
    assert [list(sample.members) for sample in index.samples] == [
        ["a.jpg"], ["a.webp"], ["a.png"], ["b.jpg"], ["b.png"]
    ]  # fmt: skip
    assert [sample.shard for sample in index.samples] == [0, 0, 1, 2, 2], "a shard holds one side only"
    packed = contents(out, index)
    for sample, members in zip(index.samples[:4], packed[:4], strict=True):
        assert list(members.values()) == [(sides / sample.source).read_bytes()]
    with Image.open(io.BytesIO(packed[4]["b.png"])) as image:
        np.testing.assert_array_equal(np.asarray(image), noise(16, 24, 4))  # BMP is packed as PNG
    shards = [str(out / shard.name) for shard in index.shards]
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{number:06d}" for number in range(5)]
    assert read[0]["a.jpg"] == (sides / "A" / "1.jpeg").read_bytes()
    sha256 = hashlib.sha256((sides / "A" / "1.jpeg").read_bytes()).hexdigest()
    assert json.loads(read[0]["json"]) == {"source": "A/1.jpeg", "sha256": sha256, "sizes": {"a.jpg": [16, 24]}}


def test_what_a_file_holds_counts_and_not_its_name(tmp_path: Path) -> None:
    content = save(tmp_path / "A" / "1.jpg", 1, format="PNG")
    save(tmp_path / "B" / "1.jpg", 1)
    pack(UNPAIRED, tmp_path, tmp_path / "out")
    assert contents(tmp_path / "out", load_index(tmp_path / "out"))[0] == {"a.png": content}


def test_exif_turns_the_recorded_size_and_not_the_bytes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    content = save(tmp_path / "A" / "1.jpg", 1, (16, 24), exif=exif)
    save(tmp_path / "B" / "1.jpg", 1, (24, 16))
    pack(PAIRED, tmp_path, tmp_path / "out")  # a pair: of one size as it is seen
    index = load_index(tmp_path / "out")
    member = index.samples[0].members["a.jpg"]
    assert (member.height, member.width) == (24, 16)
    assert contents(tmp_path / "out", index)[0]["a.jpg"] == content


def test_pairs_of_two_files(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path / "A" / f"{number}.png", number)
        save(tmp_path / "B" / f"{number}.jpg", number + 10)
    out = tmp_path / "out"
    pack(PAIRED, tmp_path, out)
    index = load_index(out)
    assert (index.kind, index.scales, len(index.shards)) == ("paired", (), 1)
    for number, members in enumerate(contents(out, index), 1):
        assert members == {
            "a.png": (tmp_path / "A" / f"{number}.png").read_bytes(),
            "b.jpg": (tmp_path / "B" / f"{number}.jpg").read_bytes(),
        }
    with tarfile.open(out / "shard-00000.tar") as tar:
        content = tar.extractfile("000000.json")
        assert content is not None
        about = json.loads(content.read())
    assert about["source"] == "1.png"
    assert about["files"]["b"] == {
        "name": "1.jpg",
        "sha256": hashlib.sha256((tmp_path / "B" / "1.jpg").read_bytes()).hexdigest(),
    }
    assert about["sizes"] == {"a.png": [16, 24], "b.jpg": [16, 24]}
    before = files(out)
    pack(PAIRED, tmp_path, out)  # complete: left alone
    assert files(out) == before
    save(tmp_path / "B" / "1.jpg", 99)
    with pytest.raises(UserError, match="holds another data set, the same recipe with other images"):
        pack(PAIRED, tmp_path, out)


def test_pairs_in_one_file(tmp_path: Path) -> None:
    train, val = save(tmp_path / "train" / "1.jpg", 1, (16, 32)), save(tmp_path / "val" / "1.jpg", 2, (16, 32))
    pack(PAIRED, tmp_path, tmp_path / "out")
    for split, content in (("train", train), ("test", val)):
        index = load_index(tmp_path / "out" / split)
        assert (index.kind, index.split) == ("paired", split)
        assert contents(tmp_path / "out" / split, index) == [{"ab.jpg": content}]
        assert index.samples[0].members["ab.jpg"].width == 32


def test_pairs_of_different_sizes(tmp_path: Path) -> None:
    save(tmp_path / "A" / "1.png", 1, (16, 24))
    save(tmp_path / "B" / "1.jpg", 1, (16, 23))
    with pytest.raises(UserError, match=r"B/1\.jpg: is 23 x 16 pixels, its partner .*A/1\.png is 24 x 16; a pair must"):
        pack(PAIRED, tmp_path, tmp_path / "out")


def test_two_images_side_by_side_have_an_even_width(tmp_path: Path) -> None:
    save(tmp_path / "1.png", 1, (16, 31))
    with pytest.raises(UserError, match=r"1\.png: 31 pixels wide, which two images of the same size side by side can"):
        pack(PAIRED, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["A/1.png", "B/1.png"])
def test_all_refusals_of_single_images_apply_to_pairs(tmp_path: Path, name: str) -> None:
    save(tmp_path / "A" / "1.png", 1)
    save(tmp_path / "B" / "1.png", 2)
    Image.fromarray(np.zeros((16, 24, 4), np.uint8)).save(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: has an alpha channel"):
        pack(PAIRED, tmp_path, tmp_path / "out")
    (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0 not a JPEG")
    with pytest.raises(UserError, match=rf"{name}: cannot be decoded"):
        pack(PAIRED, tmp_path, tmp_path / "out")


class Killed(BaseException):
    pass


def test_sides_swapped_in_the_recipe_are_another_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, lengths and contents are the same, only what is A and what is B differs."""
    once = Recipe(**{**UNPAIRED.model_dump(), "layouts": ({"all": {"a": ("A", "B"), "b": "C"}},)})
    other = Recipe(**{**UNPAIRED.model_dump(), "layouts": ({"all": {"a": "A", "b": ("B", "C")}},)})
    for number, folder in enumerate("ABC"):
        save(tmp_path / folder / "1.png", number)
    pack(once, tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="holds another data set"):
        pack(other, tmp_path, tmp_path / "out")

    def interrupted(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("hpcdistill.data.index.Index.save", interrupted)
    with pytest.raises(Killed):
        pack(once, tmp_path, tmp_path / "half", shard_samples=1)
    monkeypatch.undo()
    pack(other, tmp_path, tmp_path / "half", shard_samples=1)
    pack(other, tmp_path, tmp_path / "expected", shard_samples=1)
    assert files(tmp_path / "half") == files(tmp_path / "expected")


def official(root: Path) -> Path:
    save(root / "HR" / "1.png", 1, (33, 26))
    save(root / "X2" / "1x2.png", 2, (16, 13))
    save(root / "X4" / "1x4.png", 3, (8, 6), optimize=True)
    return root


def test_official_lr_images_are_taken_as_they_are(tmp_path: Path) -> None:
    root, out = official(tmp_path / "source"), tmp_path / "out"
    pack(OFFICIAL, root, out, official_lr=True)
    index = load_index(out)
    assert (index.kind, index.scales, index.notes["resize"]) == ("lr-hr", (2, 4), "official")
    (members,) = contents(out, index)
    assert members["lr2.png"] == (root / "X2" / "1x2.png").read_bytes()
    assert members["lr4.png"] == (root / "X4" / "1x4.png").read_bytes()
    with Image.open(io.BytesIO(members["hr.png"])) as image:
        np.testing.assert_array_equal(np.asarray(image), noise(33, 26, 1))
    pack(OFFICIAL, root, out, official_lr=True)  # complete
    with pytest.raises(UserError, match="holds another data set"):
        pack(OFFICIAL, root, out)
    pack(OFFICIAL, root, tmp_path / "computed")
    index = load_index(tmp_path / "computed")
    assert (index.scales, index.lr) == ((2, 3, 4), "newer")


def test_an_official_image_that_is_no_8_bit_rgb_png_becomes_one(tmp_path: Path) -> None:
    root = official(tmp_path / "source")
    gray = Image.fromarray(noise(16, 13, 5)[..., 0])
    gray.save(root / "X2" / "1x2.png")
    pack(OFFICIAL, root, tmp_path / "out", official_lr=True)
    content = contents(tmp_path / "out", load_index(tmp_path / "out"))[0]["lr2.png"]
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image)[..., 1], np.asarray(gray))


def test_an_official_image_of_the_wrong_size(tmp_path: Path) -> None:
    root = official(tmp_path / "source")
    save(root / "X4" / "1x4.png", 3, (9, 6))
    line = r"X4/1x4\.png: is 6 x 9 pixels, .*HR/1\.png of 26 x 33 needs 6 x 8 at 1/4; copy the official image again"
    with pytest.raises(UserError, match=line):
        pack(OFFICIAL, root, tmp_path / "out", official_lr=True)


def test_real_pairs(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "i2i" / "edges2shoes"
    pack(PAIRED, source, tmp_path / "shoes")
    index = load_index(tmp_path / "shoes" / "test")
    for sample, members in zip(index.samples, contents(tmp_path / "shoes" / "test", index), strict=True):
        assert members == {"ab.jpg": (source / "val" / sample.source).read_bytes()}
        assert (sample.members["ab.jpg"].height, sample.members["ab.jpg"].width) == (256, 512)


def with_alpha(path: Path, seed: int, alpha: int) -> np.ndarray:
    """A PNG of noise, its upper half of this alpha, the rest opaque; its colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = noise(16, 24, seed)
    planes = np.full((16, 24, 1), 255, np.uint8)
    planes[:8] = alpha
    Image.fromarray(np.concatenate([rgb, planes], axis=2)).save(path)
    return rgb


@pytest.mark.parametrize("recipe", [FOLDER, PAIRED, UNPAIRED])
def test_opaque_alpha_is_packed_as_rgb(recipe: Recipe, tmp_path: Path) -> None:
    """Whoever reads the shards finds three channels; what has no alpha keeps its bytes."""
    source, folders = tmp_path / "in", ("A", "B") if recipe is not FOLDER else (".",)
    plain = [save(source / folder / "1.png", 1) for folder in folders]
    rgb = [with_alpha(source / folder / "2.png", 2 + number, 255) for number, folder in enumerate(folders)]
    pack(recipe, source, tmp_path / "out", processes=1)
    index = load_index(tmp_path / "out")
    packed = [
        content
        for members in contents(tmp_path / "out", index)
        for suffix, content in members.items()
        if not suffix.startswith("lr")
    ]
    decoded = [Image.open(io.BytesIO(content)) for content in packed]
    assert {image.mode for image in decoded} == {"RGB"}
    for expected in rgb:
        assert any(np.array_equal(np.asarray(image), expected) for image in decoded)
    if recipe is not FOLDER:
        assert set(plain) <= set(packed)


@pytest.mark.parametrize("recipe", [FOLDER, PAIRED])
def test_transparent_images_need_a_colour(recipe: Recipe, tmp_path: Path) -> None:
    source, folders = tmp_path / "in", ("A", "B") if recipe is PAIRED else (".",)
    rgb = [with_alpha(source / folder / "1.png", number, 0) for number, folder in enumerate(folders)]
    with pytest.raises(UserError, match=r"1\.png: has an alpha channel with transparent pixels; .* --flatten white"):
        pack(recipe, source, tmp_path / "out", processes=1)
    pack(recipe, source, tmp_path / "out", processes=1, flatten=(255, 0, 128))
    index = load_index(tmp_path / "out")
    assert index.notes["flatten"] == "#ff0080"
    role = "hr.png" if recipe is FOLDER else "a.png"
    hr = np.asarray(Image.open(io.BytesIO(contents(tmp_path / "out", index)[0][role])))
    assert (hr[:8] == (255, 0, 128)).all()
    np.testing.assert_array_equal(hr[8:], rgb[0][8:])
    with pytest.raises(UserError, match="holds another data set"):  # another colour, another set
        pack(recipe, source, tmp_path / "out", processes=1, flatten=(0, 0, 0))


def test_a_colour_that_nobody_gave_is_in_no_index(tmp_path: Path) -> None:
    save(tmp_path / "in" / "1.png", 1)
    pack(FOLDER, tmp_path / "in", tmp_path / "out", processes=1)
    assert set(load_index(tmp_path / "out").notes) == {"packer", "resize", "lr", "sources_sha256"}


def test_lr_images_of_the_names_of_their_hr(tmp_path: Path) -> None:
    recipe = Recipe(**{**OFFICIAL.model_dump(), "layouts": ({"all": {"hr": ("HR",), "lr2": ("LR",)}},)})
    save(tmp_path / "in" / "HR" / "0.png", 1)
    lr = save(tmp_path / "in" / "LR" / "0.png", 2, (8, 12))
    pack(recipe, tmp_path / "in", tmp_path / "out", official_lr=True, processes=1)
    assert contents(tmp_path / "out", load_index(tmp_path / "out"))[0]["lr2.png"] == lr
    with_alpha(tmp_path / "in" / "LR" / "0.png", 3, 255)
    Image.open(tmp_path / "in" / "LR" / "0.png").resize((12, 8)).save(tmp_path / "in" / "LR" / "0.png")
    pack(recipe, tmp_path / "in", tmp_path / "again", official_lr=True, processes=1)
    content = contents(tmp_path / "again", load_index(tmp_path / "again"))[0]["lr2.png"]
    assert Image.open(io.BytesIO(content)).mode == "RGB"
