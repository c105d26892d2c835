"""Image-to-image batches against Pillow and the packed files, and their order against its definition."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import Rgb, noise, numbered, write_set
from PIL import Image
from streams import epoch_order, fails, numbers, philox
from streams import same_batch as same

from hpcdistill.data.config import DataConfig
from hpcdistill.data.counter import AUGMENTATION, ORDER, ORDER_OF_TARGETS
from hpcdistill.data.index import Kind
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.reader import TranslationReader

LOAD, CROP = 20, 12
PAIRS, A, B = 7, 7, 3  # an epoch of 7 draws in each set
SETS: dict[str, Kind] = {"pairs": "paired", "ab": "paired", "mixed": "paired", "unpaired": "unpaired"}


def side_by_side(a: Rgb, b: Rgb) -> Rgb:
    return np.concatenate((a, b), axis=1)


def samples_of(name: str, image: Callable[[int, int], Rgb | bytes]) -> list[dict[str, Any]]:
    """`image(domain, number)` as the samples of a set; "mixed" has both ways to store a pair."""
    if name == "unpaired":
        return [{"a.png": image(0, n)} for n in range(A)] + [{"b.png": image(1, n)} for n in range(B)]
    joined = {"pairs": range(0), "ab": range(PAIRS), "mixed": range(0, PAIRS, 2)}[name]
    return [
        {"ab.png": side_by_side(image(0, n), image(1, n))}
        if n in joined
        else {"a.png": image(0, n), "b.png": image(1, n)}
        for n in range(PAIRS)
    ]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random images of the same contents in all sets, of which b is smaller than a in none but `unpaired`."""
    folder = tmp_path_factory.mktemp("sets")
    for name, kind in SETS.items():

        def image(domain: int, number: int, kind: Kind = kind) -> Rgb:
            height = 16 + 2 * number
            return noise(height, height + (6 if kind == "unpaired" and domain else 4), 100 * domain + number)

        write_set(folder / name, kind, samples_of(name, image))
    return {name: folder / name for name in SETS}


def reader(folders: Path | Sequence[Path], kind: Kind = "paired", **options: Any) -> TranslationReader:
    loop = {name: options.pop(name) for name in ("seed", "batch_size", "rank", "ranks") if name in options}
    config = DataConfig(**{"load_size": LOAD, "crop": CROP, **options})
    folders = [folders] if isinstance(folders, Path) else list(folders)
    return TranslationReader(folders, Needs(kind=kind), config, **{"seed": 3, "batch_size": 1, **loop})


# An independent reference: Philox in plain integers (`epoch_order`), tarfile, Pillow.


def domains_by_hand(folder: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """The two domains, as tarfile and Pillow read them, in the order of the shards."""
    found: dict[str, list[Image.Image]] = {"a": [], "b": []}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for entry in tar:
                file = tar.extractfile(entry)
                assert file is not None
                image = Image.open(io.BytesIO(file.read())).convert("RGB")
                role = entry.name.split(".")[1]
                if role == "ab":
                    middle = image.width // 2
                    found["a"].append(image.crop((0, 0, middle, image.height)))
                    found["b"].append(image.crop((middle, 0, image.width, image.height)))
                else:
                    found[role].append(image)
    return found["a"], found["b"]


def by_hand(
    folder: Path, kind: Kind, draw: int, *, seed: int = 3, load: int = LOAD, crop: int = CROP, flip: bool = True
) -> dict[str, torch.Tensor]:
    """The pair of one draw, from the definition of order and augmentation."""
    one, other = domains_by_hand(folder)
    epoch, place = divmod(draw, max(len(one), len(other)))
    length = max(len(one), len(other))
    a = epoch_order(len(one), length, epoch, seed, ORDER)[place]
    b = a if kind == "paired" else epoch_order(len(other), length, epoch, seed, ORDER_OF_TARGETS)[place]
    result = {}
    for name, image, part in (("a", one[a], 0), ("b", other[b], 0 if kind == "paired" else 1)):
        words = philox([draw, 0, part, AUGMENTATION], [seed, 0])
        top, left = (word * (load - crop + 1) >> 32 for word in words[:2])
        cut = image.resize((load, load), Image.Resampling.BICUBIC).crop((left, top, left + crop, top + crop))
        if flip and words[2] >> 31:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        result[name] = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 127.5 - 1
    return result


# What a batch holds.


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
@pytest.mark.parametrize("name", SETS)
def test_every_draw_of_two_epochs_is_what_pillow_gives(sets: dict[str, Path], name: str, cache: str) -> None:
    found = reader(sets[name], SETS[name], cache=cache)
    assert found.samples == 7
    for draw in range(14):
        batch = found[draw]
        assert {key: tuple(tensor.shape) for key, tensor in batch.items()} == dict.fromkeys("ab", (1, 3, CROP, CROP))
        expected = by_hand(sets[name], SETS[name], draw)
        for domain in "ab":
            assert batch[domain].dtype == torch.float32
            assert torch.equal(batch[domain][0], expected[domain]), (draw, domain)


def test_ab_and_two_files_give_the_same_batches(sets: dict[str, Path]) -> None:
    for cache in ("none", "ram", "device"):
        one, *others = (reader(sets[name], cache=cache, batch_size=5) for name in ("pairs", "ab", "mixed"))
        assert all(same(one[step], other[step]) for other in others for step in range(4))


def test_a_pair_is_cropped_and_flipped_together(tmp_path: Path) -> None:
    pairs = [(image, 255 - image) for image in (noise(LOAD, LOAD, n) for n in range(4))]  # of the size loaded: exact
    write_set(tmp_path / "ab", "paired", [{"ab.png": side_by_side(*pair)} for pair in pairs])
    write_set(tmp_path / "two", "paired", [dict(zip(("a.png", "b.png"), pair, strict=True)) for pair in pairs])
    for folder in ("ab", "two"):
        found = reader(tmp_path / folder, batch_size=4)
        flips = set()
        for step in range(10):
            batch = found[step]
            assert torch.allclose(batch["a"], -batch["b"], atol=2e-7, rtol=0)
            flips |= set(found.draws(4 * step, 4)[3].tolist())
        assert flips == {0, 1}


def test_unpaired_images_are_cropped_and_flipped_on_their_own(sets: dict[str, Path]) -> None:
    draws = reader(sets["unpaired"], "unpaired").draws(0, 20_000).T
    starts = LOAD - CROP + 1
    cells = np.zeros((starts, starts, 2, 2), int)
    np.add.at(cells, (draws[:, 1], draws[:, 5], draws[:, 3], draws[:, 7]), 1)
    mean = 20_000 / cells.size  # equally likely and independent: chi-square with 323 degrees of freedom
    assert abs(((cells - mean) ** 2 / mean).sum() - (cells.size - 1)) < 5 * (2 * (cells.size - 1)) ** 0.5
    assert set(draws[:, 2]) == set(draws[:, 6]) == set(range(starts))


def test_no_flip_on_request_and_no_crop_where_the_image_is_loaded_at_its_size(sets: dict[str, Path]) -> None:
    found = reader(sets["unpaired"], "unpaired", flip=False)
    assert not found.draws(0, 200)[[3, 7]].any()
    for draw in range(7):
        expected = by_hand(sets["unpaired"], "unpaired", draw, flip=False)
        assert all(torch.equal(found[draw][name][0], expected[name]) for name in "ab")
    whole = reader(sets["ab"], load_size=CROP)
    assert not whole.draws(0, 100)[1:3].any()
    assert torch.equal(whole[2]["b"][0], by_hand(sets["ab"], "paired", 2, load=CROP)["b"])


@pytest.mark.parametrize("name", ["ab", "unpaired"])
def test_direction_exchanges_the_domains(sets: dict[str, Path], name: str) -> None:
    kind = SETS[name]
    there, back = (reader(sets[name], kind, direction=way, cache="ram", flip=False) for way in ("AtoB", "BtoA"))
    assert there.samples == back.samples == 7
    if kind == "paired":
        for step in range(14):
            one, other = there[step], back[step]
            assert torch.equal(one["a"], other["b"])
            assert torch.equal(one["b"], other["a"])
        return
    draws = back.draws(0, 14).T.tolist()
    for epoch in (draws[:7], draws[7:]):  # what is translated has 3 images now, the other domain 7
        assert sorted(np.bincount([draw[0] for draw in epoch])) == [2, 2, 3]
        assert sorted(draw[4] for draw in epoch) == list(range(7))
    one, other = domains_by_hand(sets[name])
    number, top, left, *_ = draws[0]
    cut = np.asarray(other[number].resize((LOAD, LOAD), Image.Resampling.BICUBIC))[top:, left:][:CROP, :CROP]
    assert torch.equal(back[0]["a"][0], torch.from_numpy(cut.copy()).permute(2, 0, 1).float() / 127.5 - 1)


def test_the_domains_may_lie_in_sets_of_their_own(tmp_path: Path) -> None:
    for domain, count in (("a", 2), ("b", 3)):
        images = [{f"{domain}.png": numbered(16, 16, 10 * number)} for number in range(count)]
        write_set(tmp_path / domain, "unpaired", images)
    batch = reader([tmp_path / "a", tmp_path / "b"], "unpaired", batch_size=6)[0]
    assert sorted(numbers(batch, "a")) == [0, 0, 0, 10, 10, 10]
    assert sorted(numbers(batch, "b")) == [0, 0, 10, 10, 20, 20]


def test_real_pairs(test_data: Path, tmp_path: Path) -> None:
    files = sorted((test_data / "i2i/edges2shoes/train").glob("*.jpg"))[:12]
    write_set(tmp_path, "paired", [{"ab.jpg": file.read_bytes()} for file in files], shard_samples=5)
    found = [
        reader(tmp_path, cache=cache, load_size=286, crop=256, batch_size=1) for cache in ("none", "ram", "device")
    ]
    for draw in range(12):
        expected = by_hand(tmp_path, "paired", draw, load=286, crop=256)
        for one in found:
            assert all(torch.equal(one[draw][name][0], expected[name]) for name in "ab")


# What is wrong with the configuration or the data.


def test_wrong_numbers_and_sets_are_named_with_a_remedy(sets: dict[str, Path], tmp_path: Path) -> None:
    fails(lambda: reader(sets["ab"], batch_size=3, ranks=2), "train.batch_size=3", "2 ranks", "use 2")
    fails(lambda: reader(sets["ab"], crop=21), "data.crop=21", "data.load_size=20", "use data.crop=20")
    fails(lambda: reader(sets["ab"], "unpaired"), str(sets["ab"]), "holds paired", "needs unpaired")
    fails(lambda: reader(sets["unpaired"]), str(sets["unpaired"]), "holds unpaired", "needs paired")
    fails(lambda: reader([]), "data.train")
    write_set(tmp_path / "hr", "lr-hr", [{"hr.png": noise(8, 8, 0)}])
    fails(lambda: reader(tmp_path / "hr"), "holds lr-hr", "needs paired")
    write_set(tmp_path / "empty", "paired", [])
    fails(lambda: reader(tmp_path / "empty"), str(tmp_path / "empty"), "no samples")


@pytest.mark.parametrize("domain", ["a", "b"])
def test_a_domain_without_images(tmp_path: Path, domain: str) -> None:
    write_set(tmp_path, "unpaired", [{f"{domain}.png": noise(8, 8, 0)}])
    missing = "b" if domain == "a" else "a"
    fails(lambda: reader(tmp_path, "unpaired", direction="BtoA"), str(tmp_path), f"no images of domain {missing}")


def test_what_should_be_a_pair_and_is_none(tmp_path: Path) -> None:
    good = {"a.png": noise(8, 8, 0), "b.png": noise(8, 8, 1)}
    write_set(tmp_path / "odd", "paired", [good, {"ab.png": noise(8, 17, 0)}])
    fails(lambda: reader(tmp_path / "odd"), "shard-00001.tar", "'image1' is 17x8", "odd width")
    write_set(tmp_path / "sizes", "paired", [good, {**good, "b.png": noise(9, 8, 0)}])
    fails(lambda: reader(tmp_path / "sizes"), "shard-00000.tar", "'image1'", "a of 8x8", "b of 8x9")
    write_set(tmp_path / "half", "paired", [good, {"a.png": noise(8, 8, 0)}])
    fails(lambda: reader(tmp_path / "half"), str(tmp_path / "half"), "'image1' has no image 'b'")
