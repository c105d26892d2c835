"""Images that choose the best weights and are trained on as well, found in sets that the packer wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from packed_sets import noise, write_set
from PIL import Image
from streams import lr_hr

from hpcdistill.data.check import overlap
from hpcdistill.data.check.overlap import find_overlap
from hpcdistill.data.index import load_index
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe


def images(folder: Path, *seeds: int, suffix: str = "png") -> Path:
    """A folder of images, each called by its number in the folder: equal pictures have different names."""
    folder.mkdir(parents=True)
    for number, seed in enumerate(seeds):
        Image.fromarray(noise(24, 36, seed)).save(folder / f"{number}.{suffix}")
    return folder


def packed(folder: Path, *seeds: int) -> str:
    """The same, packed."""
    out = folder.with_name(f"{folder.name}-packed")
    pack(load_recipe("folder"), images(folder, *seeds), out, processes=1, shard_samples=2)
    return str(out)


@pytest.mark.parametrize("kind", ["packed", "folder"])
def test_an_equal_file_is_found_whatever_its_name(tmp_path: Path, kind: str) -> None:
    train = [packed(tmp_path / "one", 1, 2), packed(tmp_path / "two", 3, 4, 5)]
    make = packed if kind == "packed" else lambda folder, *seeds: str(images(folder, *seeds))
    place = make(tmp_path / "mine", 7, 8, 5, 1)
    assert find_overlap(train, 0, "mine", place) == (
        f"{place}: '2.png' of the set mine, which chooses the best weights, is trained on as well, as '2.png' of "
        f"{train[1]} (and 1 more); name another under eval.select, or set data.held_out=10"
    )
    assert find_overlap(train, 0, "other", make(tmp_path / "other", 7, 8)) is None


def test_the_digest_is_that_of_the_source_file(tmp_path: Path) -> None:
    place = Path(packed(tmp_path / "one", 1, 2, 3))
    found = dict(overlap._digests(place, load_index(place)))
    assert found == {
        number: hashlib.sha256((tmp_path / "one" / f"{number}.png").read_bytes()).hexdigest() for number in range(3)
    }


def test_official_lr_images_do_not_hide_the_hr_image(tmp_path: Path) -> None:
    source = tmp_path / "DIV2K"
    images(source / "DIV2K_train_HR", 1, 2)
    images(source / "DIV2K_valid_HR", 3)
    recipe = load_recipe("div2k").model_copy(update={"images": {}})
    for split, seeds in (("train", (1, 2)), ("valid", (3,))):
        for scale in (2, 3, 4):
            folder = source / f"DIV2K_{split}_LR_bicubic" / f"X{scale}"
            folder.mkdir(parents=True)
            for number, seed in enumerate(seeds):
                small = noise(24, 36, seed)[::scale, ::scale]
                Image.fromarray(np.ascontiguousarray(small)).save(folder / f"{number}x{scale}.png")
    pack(recipe, source, tmp_path / "div2k", official_lr=True, processes=1)
    found = find_overlap([str(tmp_path / "div2k" / "train")], 0, "mine", str(images(tmp_path / "mine", 9, 2)))
    assert found is not None
    assert "'1.png' of the set mine" in found


def test_what_is_held_out_may_not_be_there_twice(tmp_path: Path) -> None:
    """Of four images two are held out: the second of each half."""
    apart = packed(tmp_path / "apart", 1, 2, 3, 4)
    assert find_overlap([apart], 2, "held_out", None) is None
    twice = packed(tmp_path / "twice", 1, 2, 3, 2)
    assert find_overlap([twice], 2, "held_out", None) is None  # both copies are held out
    again = packed(tmp_path / "again", 2, 2, 3, 4)
    found = find_overlap([again], 2, "held_out", None)
    assert found is not None
    assert found.startswith("data.held_out: '1.png' of the set held_out")
    assert found.endswith(f"as '0.png' of {again}; hold out another number")
    assert find_overlap([apart, apart], 3, "held_out", None) is not None  # a set that is joined with itself


def test_a_held_out_image_may_be_in_the_set_that_validates(tmp_path: Path) -> None:
    train = packed(tmp_path / "one", 1, 2, 3, 4)
    place = str(images(tmp_path / "mine", 2))
    assert find_overlap([train], 0, "mine", place) is not None
    assert find_overlap([train], 2, "mine", place) is None


def test_what_has_no_digests_is_passed_over(tmp_path: Path) -> None:
    """Shards of another packer, an address, a shard that is gone: who reads them says what is wrong."""
    write_set(tmp_path / "foreign", "lr-hr", lr_hr([noise(24, 36, 1)]), scales=(2, 4))
    place = str(images(tmp_path / "mine", 1))
    assert find_overlap([str(tmp_path / "foreign"), "https://data.example/set"], 0, "mine", place) is None
    train = packed(tmp_path / "one", 1)
    (Path(train) / "shard-00000.tar").unlink()
    assert find_overlap([train], 0, "mine", place) is None
