"""Batches of patches against the images they are cut from, their order, and the choice of the reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import Rgb, numbered, write_set
from serving import Server
from streams import fails, numbers
from streams import same_batch as same

from hpcdistill.data.config import DataConfig
from hpcdistill.data.index import Kind
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.reader import PatchReader, TranslationReader, open_reader
from hpcdistill.data.read.stream import StreamReader

LUMA = Needs(kind="lr-hr", scale=4, lr_scales=(2, 4))
RGB = Needs(kind="lr-hr", scale=4, lr_scales=(2, 4), channels=3)
SIZES = ((24, 32), (20, 28), (16, 16), (40, 24), (16, 20), (28, 20), (24, 24))


def pack(folder: Path, images: Sequence[Rgb], scales: Sequence[int] = (2, 4)) -> Path:
    """A packed set whose LR images are every s-th pixel of HR."""
    samples = [{"hr.png": image} | {f"lr{s}.png": image[::s, ::s] for s in scales} for image in images]
    write_set(folder, "lr-hr", samples, scales=scales)
    return folder


def blocks(height: int, width: int, seed: int) -> np.ndarray:
    """Random 4x4 blocks of one colour: an LR patch at the same place equals the HR patch, sampled; others do not."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=0).repeat(4, axis=1)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [blocks(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def packed(images: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("packed"), images)


def reader(folders: Path | Sequence[Path], needs: Needs = LUMA, **options: object) -> PatchReader:
    loop = {name: options.pop(name) for name in ("seed", "batch_size", "rank", "ranks") if name in options}
    config = DataConfig(**{"patch": 8, **options})
    folders = [folders] if isinstance(folders, Path) else list(folders)
    return PatchReader(folders, needs, config, **{"seed": 0, "batch_size": 8, **loop})


def dihedral(image: np.ndarray) -> list[np.ndarray]:
    """The square's eight symmetries by NumPy's own functions."""
    return [turned for k in range(4) for turned in (np.rot90(image, k), np.fliplr(np.rot90(image, k)))]


# What a batch holds.


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
def test_lr_patches_lie_where_the_hr_patch_lies(packed: Path, cache: str) -> None:
    loader = reader(packed, RGB, cache=cache)
    for step in range(20):
        batch = loader[step]
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            "hr": (8, 3, 8, 8), "lr2": (8, 3, 4, 4), "lr4": (8, 3, 2, 2)
        }  # fmt: skip
        assert torch.equal(batch["hr"][..., ::4, ::4], batch["lr4"])
        assert torch.equal(batch["hr"][..., ::2, ::2], batch["lr2"])
        assert torch.equal(batch["hr"], batch["lr4"].repeat_interleave(4, 2).repeat_interleave(4, 3))


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
@pytest.mark.parametrize("needs", [LUMA, RGB], ids=["luma", "rgb"])
def test_values_are_one_of_the_symmetries_of_the_drawn_crop(
    packed: Path, images: list[np.ndarray], cache: str, needs: Needs
) -> None:
    loader = reader(packed, needs, cache=cache)
    assert same(loader[3], reader(packed, needs)[3])
    batch = loader[3]["hr"].numpy()
    samples, tops, lefts, _ = loader.draws(24, 8)
    for found, sample, top, left in zip(batch, samples, tops, lefts, strict=True):
        crop = images[sample][top : top + 8, left : left + 8].astype(np.float64) / 255
        if needs.channels == 1:
            crop = (16 + crop @ [65.481, 128.553, 24.966])[:, :, None] / 255
        assert min(np.abs(found.transpose(1, 2, 0) - turned).max() for turned in dihedral(crop)) < 2e-7


@pytest.mark.parametrize("cache", ["ram", "device"])
@pytest.mark.parametrize(
    ("flip", "rotate", "chosen"),
    [(True, True, range(8)), (True, False, (0, 1)), (False, True, (0, 2, 4, 6)), (False, False, (0,))],
)
def test_symmetries_occur_equally_often(
    tmp_path: Path, flip: bool, rotate: bool, chosen: Sequence[int], cache: str
) -> None:
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)  # as large as the patch: one crop
    loader = reader(pack(tmp_path, [image]), RGB, flip=flip, rotate=rotate, cache=cache, batch_size=800)
    patches = (loader[0]["hr"] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    turned = dihedral(image)
    counts = [sum(np.array_equal(patch, expected) for patch in patches) for expected in turned]
    expected = 800 / len(chosen)
    assert [number for number, count in enumerate(counts) if count] == list(chosen)
    assert all(abs(counts[number] - expected) <= 5 * expected**0.5 for number in chosen)


def test_crops_reach_all_borders_and_are_uniform(tmp_path: Path) -> None:
    loader = reader(pack(tmp_path, [blocks(24, 36, 0)]), batch_size=1)
    _, tops, lefts, operations = loader.draws(0, 20_000)
    assert set(tops) == {0, 4, 8, 12, 16}
    assert set(lefts) == {0, 4, 8, 12, 16, 20, 24, 28}
    cells = np.zeros((5, 8, 8), dtype=int)
    np.add.at(cells, (np.array(tops) // 4, np.array(lefts) // 4, operations), 1)
    chi_square = ((cells - 62.5) ** 2 / 62.5).sum()  # 320 equally likely cells: independent as well as uniform
    assert abs(chi_square - 319) < 5 * (2 * 319) ** 0.5


def test_grid_is_common_to_all_scales(tmp_path: Path) -> None:
    needs = Needs(kind="lr-hr", scale=2, lr_scales=(2, 3))
    loader = reader(pack(tmp_path, [blocks(48, 48, 0)], scales=(2, 3)), needs, patch=12)
    assert set(loader.draws(0, 500)[1]) == {0, 6, 12, 18, 24, 30, 36}


def test_draws_are_the_same_one_by_one_and_together(packed: Path) -> None:
    together = reader(packed).draws(0, 1500)
    loader = reader(packed)
    for first, count in ((0, 1), (1, 1), (511, 1), (512, 1), (1499, 1), (3, 1), (500, 100)):
        assert np.array_equal(loader.draws(first, count), together[:, first : first + count])


# What holds for every kind of set: the order of the samples, the caches, the choice of the reader.

Samples = dict[str, Rgb]


def of_kind(name: str) -> tuple[Kind, list[Samples]]:
    """7 draws a pass; images of domain b count from 1000, and are 3 in the unpaired set."""
    a, b = ([numbered(16, 16, 1000 * domain + n) for n in range(7)] for domain in range(2))
    if name == "lr-hr":
        return "lr-hr", [{"hr.png": image, "lr2.png": image[::2, ::2], "lr4.png": image[::4, ::4]} for image in a]
    if name == "unpaired":
        return "unpaired", [{"a.png": image} for image in a] + [{"b.png": image} for image in b[:3]]
    joined = {"pairs": (), "ab": range(7)}[name]
    return "paired", [
        {"ab.png": np.concatenate((a[n], b[n]), axis=1)} if n in joined else {"a.png": a[n], "b.png": b[n]}
        for n in range(7)
    ]


NAMES = ("lr-hr", "pairs", "ab", "unpaired")
KINDS: dict[str, Kind] = {name: of_kind(name)[0] for name in NAMES}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    for name in NAMES:
        kind, samples = of_kind(name)
        write_set(folder / name, kind, samples, scales=(2, 4) if kind == "lr-hr" else (), shard_samples=2)
    return {name: folder / name for name in NAMES}


def opened(place: object, name: str, **options: Any) -> Any:
    loop = {key: options.pop(key) for key in ("seed", "batch_size", "rank", "ranks") if key in options}
    config = DataConfig(**{"patch": 8, "load_size": 12, "crop": 8, **options})
    needs = Needs("lr-hr", 4, (2, 4), 3) if KINDS[name] == "lr-hr" else Needs(KINDS[name])
    places = [str(one) for one in place] if isinstance(place, list) else [str(place)]
    return open_reader(places, needs, config, **{"seed": 3, "batch_size": 2, **loop})


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("cache", ["none", "ram", "device"])
@pytest.mark.parametrize("name", NAMES)
def test_any_ranks_and_workers_see_each_sample_once_in_one_global_order(
    sets: dict[str, Path], name: str, cache: str
) -> None:
    alone = opened(sets[name], name, cache=cache)
    assert alone.samples == 7
    expected = [alone[step] for step in range(7)]  # 14 draws: two epochs
    first = "hr" if name == "lr-hr" else "a"
    drawn = [number for batch in expected for number in numbers(batch, first)]
    assert sorted(drawn[:7]) == sorted(drawn[7:]) == list(range(7))
    assert drawn[:7] != drawn[7:]
    if name != "lr-hr":
        targets = [number - 1000 for batch in expected for number in numbers(batch, "b")]
        assert targets == drawn if name != "unpaired" else sorted(targets[:3]) == sorted(targets[3:6]) == [0, 1, 2]
    for workers in (0, 2):
        shares = [opened(sets[name], name, cache=cache, rank=rank, ranks=2).loader(0, 7, workers) for rank in (0, 1)]
        both = [{key: torch.cat((one[key], other[key])) for key in one} for one, other in zip(*shares, strict=True)]
        assert [len(share) for share in shares] == [7, 7]
        assert all(same(one, other) for one, other in zip(expected, both, strict=True))
    # A new process that starts in the middle of an epoch.
    resumed = list(opened(sets[name], name, cache=cache).loader(4, 7, workers=2))
    assert all(same(one, other) for one, other in zip(expected[4:], resumed, strict=True))


@pytest.mark.parametrize("name", ["lr-hr", "unpaired"])
def test_samples_per_epoch_and_seed(sets: dict[str, Path], name: str) -> None:
    draws = opened(sets[name], name, samples_per_epoch=21).draws(21, 21)
    assert np.bincount(draws[0]).tolist() == [3] * 7
    if name == "unpaired":
        assert np.bincount(draws[4]).tolist() == [7] * 3
    first, second = (opened(sets[name], name, seed=seed).draws(0, 64) for seed in (0, 1))
    assert all((one != other).any() for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["lr-hr", "pairs"])
def test_several_folders_are_joined(sets: dict[str, Path], name: str) -> None:
    found = opened([sets[name], sets[name]], name)
    assert found.samples == 14
    assert sorted(found.draws(0, 14)[0].tolist()) == list(range(14))


@pytest.mark.parametrize(
    ("name", "needed"),
    [("lr-hr", 7 * 3 * (16 * 16 + 8 * 8 + 4 * 4)), ("unpaired", 10 * 12 * 12 * 3)],
)
def test_ram_that_does_not_suffice_is_said_before_decoding(
    sets: dict[str, Path], name: str, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(available=needed)
    monkeypatch.setattr("hpcdistill.data.read.cache.psutil.virtual_memory", lambda: memory)
    opened(sets[name], name, cache="ram")
    memory.available = needed - 1
    images = "7 images" if name == "lr-hr" else "10 images"
    fails(lambda: opened(sets[name], name, cache="ram"), "data.cache=ram", images, "data.cache=none")
    memory.available = needed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fails(lambda: opened(sets[name], name, cache="ram"), "on 2 ranks")


@pytest.mark.parametrize("name", ["lr-hr", "ab", "unpaired"])
def test_reader_and_kind_choose(sets: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Also of a staged copy of what a server has, which gives the same batches."""
    for how, expected in (
        ("indexed", PatchReader if name == "lr-hr" else TranslationReader),
        ("stream", StreamReader),
    ):
        local = opened(sets[name], name, reader=how)
        assert type(local) is expected
        assert local.samples == 7
        batches = list(local.loader(0, 3, workers=1))
        assert batches[0].keys() == ({"hr", "lr2", "lr4"} if name == "lr-hr" else {"a", "b"})
        with Server(sets[name]) as server:
            staged = opened(server.address(), name, reader=how, stage=str(tmp_path / "scratch"))
            asked = len(server.requests)
            assert all(same(*both) for both in zip(batches, staged.loader(0, 3), strict=True))
            assert len(server.requests) == asked, "all is read from the copy"


def test_an_address_needs_the_stream(sets: dict[str, Path]) -> None:
    with Server(sets["lr-hr"]) as server:
        parts = ("data.reader=stream", "data.stage=FOLDER", "shards/stage.py ADDRESS --to FOLDER")
        fails(lambda: opened(server.address(), "lr-hr"), server.address(), *parts)
    fails(lambda: opened("s3://bucket/set", "lr-hr"), "http")


def test_config_takes_one_folder_or_several() -> None:
    assert DataConfig(train="a").train == ("a",)
    assert DataConfig(train=["a", "b"]).train == ("a", "b")


# What the user did wrong.


def test_wrong_numbers_are_named_with_a_valid_one(packed: Path) -> None:
    fails(lambda: reader(packed, batch_size=10, ranks=4), "train.batch_size=10", "4 ranks", "use 8")
    fails(lambda: reader(packed, batch_size=3, ranks=8), "use 8")
    fails(lambda: reader(packed, patch=10), "data.patch=10", "multiple of 4", "use 8")
    fails(lambda: reader(packed, patch=20), "'image2' is 16x16", "(and 1 more)", "data.patch=16 or less")
    three = Needs(kind="lr-hr", scale=3, lr_scales=(3,))
    fails(lambda: reader(packed, three, patch=9), str(packed), "scale 3", "it has: 2, 4")
    fails(lambda: reader([]), "data.train")


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
def test_small_images_are_left_out_and_named_on_request(
    packed: Path, images: list[np.ndarray], cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # A patch of 20 does not fit into samples 2 (16x16) and 4 (16x20).
    loader = reader(packed, RGB, patch=20, on_error="skip", cache=cache, batch_size=5)
    said = capsys.readouterr().err
    assert "2 of 7 images" in said
    assert "image2, image4" in said
    samples, tops, lefts, _ = loader.draws(0, 5)
    assert sorted(samples) == [0, 1, 3, 5, 6]
    for found, sample, top, left in zip(loader[0]["hr"].numpy(), samples, tops, lefts, strict=True):
        crop = images[sample][top : top + 20, left : left + 20] / 255
        assert min(np.abs(found.transpose(1, 2, 0) - turned).max() for turned in dihedral(crop)) < 2e-7
    fails(lambda: reader(packed, patch=400, on_error="skip"), "smaller than data.patch=400")


def test_missing_and_damaged_shards_are_named(images: list[np.ndarray], tmp_path: Path) -> None:
    folder = pack(tmp_path, images)
    shard = folder / "shard-00001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    fails(lambda: reader(folder), str(shard), "instead of the index's", "pack the data set again")
    shard.unlink()
    fails(lambda: reader(folder), str(shard), "missing")
    shard.write_bytes(b"\0" * len(content))  # right length, no images: found when it is decoded
    parts = (str(shard), "of sample 'image", "cannot be decoded", "shards/verify.py")
    fails(lambda: reader(folder, cache="ram"), *parts)
    broken = reader(folder)
    fails(lambda: [broken[step] for step in range(3)], *parts)
    fails(lambda: list(broken.loader(0, 3, workers=2)), *parts)


def test_image_of_another_size_than_recorded_is_refused(images: list[np.ndarray], tmp_path: Path) -> None:
    folder = pack(tmp_path, images)
    index = (folder / "index.json").read_text()
    assert '"height": 40' in index
    (folder / "index.json").write_text(index.replace('"height": 40', '"height": 44'))
    fails(lambda: reader(folder, cache="ram"), "'image3'", "instead of the index's")
