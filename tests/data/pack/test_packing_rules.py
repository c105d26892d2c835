"""The rule that LR images are computed by: in the index, kept where a set is packed again, exact for earlier sets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaged_sets import script
from packed_sets import files
from PIL import Image

from hpcdistill.data.images import is_gray
from hpcdistill.data.index import LR_RULES, Index, load_index
from hpcdistill.data.pack.fetching import refetch, refetch_named
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import Recipe, load_recipe
from hpcdistill.errors import UserError
from hpcdistill.ops.downsampling import ResizeRule

FOLDER = load_recipe("folder")
# What the notes of every set packed before the rules said, and all that they said of its LR images.
EARLIER_NOTES = {"packer": 1, "resize": "MATLAB bicubic, antialiased, rounded half up"}
# An 8 beside zeros, halved: 8 * 0.43359375 = 3.469 on one axis; rounded there to 3 it becomes 1, else 2 (1.504).
DOT = {"newer": 1, "older": 1, "exact": 2}


def dotted(value: int = 8) -> np.ndarray:
    image = np.zeros((16, 16, 3), np.uint8)
    image[7, 7] = value
    return image


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(dotted(8 + 32 * number)).save(folder / f"{number}.png")
    return folder


def member(folder: Path, suffix: str, number: int = 0) -> Image.Image:
    index = load_index(folder)
    sample = index.samples[number]
    place = sample.members[suffix]
    content = (folder / index.shards[sample.shard].name).read_bytes()[place.offset :][: place.length]
    return Image.open(io.BytesIO(content))


def dot(folder: Path) -> int:
    """The pixel of LR that tells two roundings from one."""
    return int(np.asarray(member(folder, "lr2.png"))[3, 3, 0])


def packed(source: Path, out: Path, **options: Any) -> dict[str, bytes]:
    pack(FOLDER, source, out, processes=1, **options)
    return files(out)


@pytest.mark.parametrize("rule", [None, "newer", "older", "exact"])
def test_the_rule_stands_in_the_index(rule: ResizeRule | None, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(source, out, resize=rule)
    assert load_index(out).lr == (rule or "newer")
    assert dot(out) == DOT[rule or "newer"]


def test_the_border_s_rule_is_packed_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / "in/1.png")
    lrs = []
    for rule in ("newer", "older"):
        packed(tmp_path / "in", tmp_path / rule, resize=rule)
        lrs.append(np.asarray(member(tmp_path / rule, "lr3.png")))
    same = (lrs[0] == lrs[1]).all(axis=2)
    assert same[2:-2, 2:-2].all()
    assert not same[0].all()


def test_an_earlier_set_s_index_is_written_again_as_it_was(source: Path, tmp_path: Path) -> None:
    """Its digest is part of the identities of the runs that use it."""
    packed(source, tmp_path / "out", resize="exact")
    notes = load_index(tmp_path / "out").notes
    assert set(notes) == {*EARLIER_NOTES, "sources_sha256"}
    assert EARLIER_NOTES.items() <= notes.items()


@pytest.mark.parametrize(
    ("kind", "notes", "expected"),
    [
        ("lr-hr", {**EARLIER_NOTES, "sources_sha256": "0"}, "exact"),
        ("lr-hr", {"packer": 1, "resize": "official"}, "official"),
        ("lr-hr", {"packer": 2, "resize": "official"}, "official"),
        ("lr-hr", {"packer": 2, "resize": "MATLAB", "lr": "older"}, "older"),
        ("lr-hr", {"packer": 9, "resize": "MATLAB", "lr": "2031"}, "2031"),  # of a later version: read, and called so
        ("lr-hr", {}, None),  # not packed by us
        ("paired", {"packer": 1}, None),
    ],
)
def test_a_set_is_called_by_its_rule(kind: Any, notes: dict[str, Any], expected: str | None) -> None:
    assert Index("r", "all", kind, (), "l", "o", (), (), notes=notes).lr == expected
    assert expected in {*LR_RULES, "2031", None}


def test_a_rule_that_is_no_text_is_a_damaged_index(source: Path, tmp_path: Path) -> None:
    packed(source, tmp_path / "out")
    path = tmp_path / "out" / "index.json"
    raw = json.loads(path.read_text())
    raw["notes"]["lr"] = ["newer"]
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        load_index(tmp_path / "out")


@pytest.mark.parametrize("rule", ["exact", "older"])
def test_a_set_is_left_alone_and_mended_by_its_own_rule(
    rule: ResizeRule, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = packed(source, out, resize=rule, shard_samples=2)
    assert packed(source, out, shard_samples=2) == before
    assert f"already holds these 3 images, LR images {rule}, nothing to do" in " ".join(capsys.readouterr().err.split())
    (out / "shard-00001.tar").unlink()
    assert packed(source, out, shard_samples=2) == before


def test_another_rule_is_another_data_set(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = packed(source, out, resize="exact")
    with pytest.raises(
        UserError, match=r"the same recipe with LR images of rule exact, not newer; choose another --out"
    ):
        packed(source, out, resize="newer")
    assert files(out) == before
    packed(source, out, overwrite=True)
    assert (load_index(out).lr, dot(out)) == ("newer", 1)


def test_a_half_packed_set_is_not_completed_by_another_rule(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hpcdistill.data.index.Index.save", stopped)
    with pytest.raises(KeyboardInterrupt):
        packed(source, out, resize="older")
    monkeypatch.undo()
    assert packed(source, out, resize="newer") == packed(source, tmp_path / "expected", resize="newer")


def test_a_missing_split_takes_the_rule_of_the_one_beside_it(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(**{**FOLDER.model_dump(), "layouts": ({"train": {"hr": "train"}, "test": {"hr": "test"}},)})
    for split in ("train", "test"):
        (source / split).mkdir()
        Image.fromarray(dotted()).save(source / split / "1.png")
    out = tmp_path / "out"
    pack(recipe, source, out, processes=1, resize="exact")
    expected = files(out / "train")
    for path in (out / "train").iterdir():
        path.unlink()
    pack(recipe, source, out, processes=1)
    assert files(out / "train") == expected


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe that needs no network, made small, packed as it was before the rules."""
    recipe = load_recipe("photos")
    few = Recipe(**{**recipe.model_dump(), "files": {split: names[:1] for split, names in recipe.files.items()}})
    few = Recipe(**{**few.model_dump(), "images": {}})
    monkeypatch.setattr("hpcdistill.data.pack.fetching.load_recipe", lambda name: few)
    pack(few, None, tmp_path / "photos", processes=1, resize="exact")
    return tmp_path / "photos"


def test_repair_by_the_recipe_gives_the_earlier_bytes(photos: Path) -> None:
    before = files(photos / "test")
    (photos / "test" / "shard-00000.tar").write_bytes(b"damaged")
    refetch(photos / "test")
    assert files(photos / "test") == before
    (photos / "test" / "index.json").write_bytes(before["index.json"][:300])  # the rule is in it, and is lost
    assert refetch_named(photos / "test")
    assert files(photos / "test") == before


def test_verify_names_the_rule(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(source, tmp_path / "a", resize="exact")
    packed(source, tmp_path / "b", resize="older")
    command = script("verify")
    assert command.main([str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert [about["lr"] for about in json.loads(capsys.readouterr().out)["data_sets"]] == ["exact", "older"]
    assert command.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "exact" in printed
    assert "older" in printed


@pytest.mark.parametrize("rule", ["newer", "older", "exact", "computed"])
def test_the_command_takes_a_rule(rule: str, source: Path, tmp_path: Path) -> None:
    script("pack").main(["folder", "--source", str(source), "--out", str(tmp_path / "out"), "--lr", rule])
    assert load_index(tmp_path / "out").lr == ("newer" if rule == "computed" else rule)


def gray_files(folder: Path) -> dict[str, bool]:
    """Files of every form; whether each stores gray."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20), dtype=np.uint8)
    gray = Image.fromarray(pixels)
    gray.save(folder / "1.png")
    gray.save(folder / "2.jpg")
    gray.save(folder / "3.bmp")
    gray.convert("LA").save(folder / "4.png")
    gray.convert("RGB").save(folder / "5.png")  # of equal channels, as Set14's man.png
    Image.fromarray(np.stack([pixels, pixels.T[:16, :20].repeat(2, 1)[:16, :20], pixels], -1)).save(folder / "6.png")
    return {"1.png": True, "2.jpg": True, "3.bmp": True, "4.png": True, "5.png": False, "6.png": False}


def test_what_stores_gray(tmp_path: Path) -> None:
    expected = gray_files(tmp_path / "in")
    assert {path.name: is_gray(path.read_bytes()) for path in sorted((tmp_path / "in").iterdir())} == expected
    assert is_gray((tmp_path / "in" / "1.png").read_bytes()[:26])


@pytest.mark.parametrize("rule", ["newer", "exact"])
def test_a_gray_image_stays_gray_but_in_an_earlier_set(rule: ResizeRule, tmp_path: Path) -> None:
    expected = gray_files(tmp_path / "in")
    out = tmp_path / "out"
    packed(tmp_path / "in", out, resize=rule)
    for number, sample in enumerate(load_index(out).samples):
        hr = member(out, "hr.png", number)
        assert hr.mode == ("L" if expected[sample.source] and rule == "newer" else "RGB")
        assert member(out, "lr2.png", number).mode == "RGB"
        with Image.open(tmp_path / "in" / sample.source) as image:
            np.testing.assert_array_equal(np.asarray(hr.convert("RGB")), np.asarray(image.convert("RGB")))


def test_gray_laid_over_a_colour_is_rgb(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, alpha in (("1.png", 0), ("2.png", 255)):
        Image.fromarray(np.full((16, 16, 2), (90, alpha), np.uint8)).save(tmp_path / "in" / name)
    packed(tmp_path / "in", tmp_path / "out", flatten=(255, 0, 0))
    assert [member(tmp_path / "out", "hr.png", number).mode for number in (0, 1)] == ["RGB", "L"]
    assert np.asarray(member(tmp_path / "out", "hr.png", 0))[0, 0].tolist() == [255, 0, 0]


def test_official_lr_images_keep_gray_too_unless_they_were_packed_before(tmp_path: Path) -> None:
    recipe = Recipe(**{**FOLDER.model_dump(), "layouts": ({"all": {"hr": ("HR",), "lr2": ("LR",)}},)})
    for name, side in (("HR", 16), ("LR", 8)):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(np.full((side, side), 9, np.uint8)).save(tmp_path / "in" / name / "1.png")
    out = tmp_path / "out"
    pack(recipe, tmp_path / "in", out, official_lr=True, processes=1)
    assert member(out, "hr.png").mode == "L"
    assert load_index(out).lr == "official"
    raw = json.loads((out / "index.json").read_text())
    raw["notes"]["packer"] = 1
    (out / "index.json").write_text(json.dumps(raw))
    (out / "shard-00000.tar").unlink()
    pack(recipe, tmp_path / "in", out, official_lr=True, processes=1)
    assert member(out, "hr.png").mode == "RGB"
    assert load_index(out).notes["packer"] == 1
