"""Batches of patches against the images they are cut from, their order, and the choice of the reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import Rgb, noise, write_set
from serving import Server
from streams import fails
from streams import same_batch as same

from hpcdistill.data.config import DataConfig
from hpcdistill.data.index import Kind
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.reader import PatchReader, Reader, TranslationReader, open_reader
from hpcdistill.data.read.stream import StreamReader
from hpcdistill.errors import UserError

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


@pytest.mark.parametrize("cache", ["none", "ram"])
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


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("needs", [LUMA, RGB], ids=["luma", "rgb"])
def test_values_are_one_of_the_symmetries_of_the_drawn_crop(
    packed: Path, images: list[np.ndarray], cache: str, needs: Needs
) -> None:
    loader = reader(packed, needs, cache=cache)
    batch = loader[3]["hr"].numpy()
    samples, tops, lefts, _ = loader.draws(24, 8)
    for found, sample, top, left in zip(batch, samples, tops, lefts, strict=True):
        crop = images[sample][top : top + 8, left : left + 8].astype(np.float64) / 255
        if needs.channels == 1:
            crop = (16 + crop @ [65.481, 128.553, 24.966])[:, :, None] / 255
        assert min(np.abs(found.transpose(1, 2, 0) - turned).max() for turned in dihedral(crop)) < 2e-7


def test_ram_and_none_give_the_same_bits(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (40, 52, 3), dtype=np.uint8) for _ in range(4)]
    folder = pack(tmp_path, noise)
    for needs in (LUMA, RGB):
        one, other = (reader(folder, needs, cache=cache, patch=16) for cache in ("none", "ram"))
        assert all(same(one[step], other[step]) for step in range(12))


@pytest.mark.parametrize(
    ("flip", "rotate", "chosen"),
    [(True, True, range(8)), (True, False, (0, 1)), (False, True, (0, 2, 4, 6)), (False, False, (0,))],
)
def test_symmetries_occur_equally_often(tmp_path: Path, flip: bool, rotate: bool, chosen: Sequence[int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)  # as large as the patch: one crop
    loader = reader(pack(tmp_path, [image]), RGB, flip=flip, rotate=rotate, cache="ram", batch_size=800)
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


# The order of the samples.


def global_batches(packed: Path, ranks: int, steps: int, **options: object) -> list[dict[str, torch.Tensor]]:
    readers = [reader(packed, rank=rank, ranks=ranks, **options) for rank in range(ranks)]
    parts = [[loader[step] for loader in readers] for step in range(steps)]
    return [{name: torch.cat([part[name] for part in step]) for name in step[0]} for step in parts]


def test_ranks_see_the_same_global_batches(packed: Path) -> None:
    alone = global_batches(packed, 1, 6)
    for ranks in (2, 4):
        assert all(same(a, b) for a, b in zip(alone, global_batches(packed, ranks, 6), strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
def test_two_ranks_and_any_workers_see_each_sample_once_in_one_global_order(tmp_path: Path) -> None:
    flat = [np.full((16, 16, 3), 10 * number, np.uint8) for number in range(12)]  # an image tells its number
    pack(tmp_path, flat)
    whole = reader(tmp_path, RGB, seed=5, batch_size=4)
    expected = [batch["hr"] for batch in whole.loader(0, 6)]
    for epoch in (expected[:3], expected[3:]):
        numbers = (torch.cat(epoch)[:, 0, 0, 0] * 25.5).round().int().tolist()
        assert sorted(numbers) == list(range(12)), "each sample once an epoch"
    for workers in (0, 2, 4):
        shares = [
            [
                batch["hr"]
                for batch in reader(tmp_path, RGB, seed=5, batch_size=4, rank=rank, ranks=2).loader(0, 6, workers)
            ]
            for rank in (0, 1)
        ]
        assert all(
            torch.equal(torch.cat(both), one) for both, one in zip(zip(*shares, strict=True), expected, strict=True)
        )


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_workers_and_resume_do_not_change_the_batches(packed: Path, cache: str) -> None:
    loader = reader(packed, cache=cache)
    expected = [loader[step] for step in range(9)]
    in_process = list(loader.loader(0, 9, workers=0))
    with_workers = loader.loader(0, 9, workers=2)
    assert len(with_workers) == 9
    for found in (in_process, list(with_workers), list(with_workers)):
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    # A new process that starts in the middle of an epoch (7 samples an epoch, step 4 begins with draw 32).
    resumed = list(reader(packed, cache=cache).loader(4, 9, workers=2))
    assert all(same(a, b) for a, b in zip(expected[4:], resumed, strict=True))


def test_each_image_once_in_an_epoch(tmp_path: Path) -> None:
    flat = [np.full((8, 8, 3), 10 * number, dtype=np.uint8) for number in range(12)]
    loader = reader([pack(tmp_path / "a", flat[:5]), pack(tmp_path / "b", flat[5:])], RGB, batch_size=4)
    assert loader.samples == 12
    seen = torch.cat([loader[step]["hr"][:, 0, 0, 0] for step in range(6)]) * 25.5
    first, second = seen[:12].round().int().tolist(), seen[12:].round().int().tolist()
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_draws_are_the_same_one_by_one_and_together(packed: Path) -> None:
    together = reader(packed).draws(0, 1500)
    loader = reader(packed)
    for first, count in ((0, 1), (1, 1), (511, 1), (512, 1), (1499, 1), (3, 1), (500, 100)):
        assert np.array_equal(loader.draws(first, count), together[:, first : first + count])


def test_samples_per_epoch_gives_several_crops_of_each(packed: Path) -> None:
    loader = reader(packed, samples_per_epoch=21, batch_size=21)
    assert np.bincount(loader.draws(21, 21)[0]).tolist() == [3] * 7


def test_seed_changes_order_and_augmentation(packed: Path) -> None:
    first, second = reader(packed, seed=0).draws(0, 64), reader(packed, seed=1).draws(0, 64)
    assert all((a != b).any() for a, b in zip(first, second, strict=True))


# What the user did wrong.


def test_wrong_numbers_are_named_with_a_valid_one(packed: Path) -> None:
    fails(lambda: reader(packed, batch_size=10, ranks=4), "train.batch_size=10", "4 ranks", "use 8")
    fails(lambda: reader(packed, batch_size=3, ranks=8), "use 8")
    fails(lambda: reader(packed, patch=10), "data.patch=10", "multiple of 4", "use 8")
    fails(lambda: reader(packed, patch=20), "'image2' is 16x16", "(and 1 more)", "data.patch=16 or less")
    three = Needs(kind="lr-hr", scale=3, lr_scales=(3,))
    fails(lambda: reader(packed, three, patch=9), str(packed), "scale 3", "it has: 2, 4")
    fails(lambda: reader([]), "data.train")


@pytest.mark.parametrize("cache", ["none", "ram"])
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


def test_ram_that_does_not_suffice_is_said_before_decoding(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = sum(height * width for height, width in SIZES)
    needed = 4 * (pixels + pixels // 4 + pixels // 16)
    available = SimpleNamespace(available=needed)
    monkeypatch.setattr("hpcdistill.data.read.cache.psutil.virtual_memory", lambda: available)
    reader(packed, cache="ram")
    available.available = needed - 1
    fails(lambda: reader(packed, cache="ram"), "data.cache=ram", "7 images", "data.cache=none")
    reader(packed, RGB, cache="ram")  # 3 bytes a pixel instead of 4
    available.available = needed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fails(lambda: reader(packed, cache="ram"), "on 2 ranks")


def test_config_takes_one_folder_or_several() -> None:
    assert DataConfig(train="a").train == ("a",)
    assert DataConfig(train=["a", "b"]).train == ("a", "b")


# The reader that a configuration asks for, and where it reads.

SUFFIXES: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "lr-hr": (("hr.png",), ("hr.png",)),
    "paired": (("a.png", "b.png"), ("ab.png",)),
    "unpaired": (("a.png",), ("b.png",)),
}


@pytest.fixture(params=list(SUFFIXES))
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def small_set(tmp_path: Path, kind: Kind) -> Path:
    """Four samples of random images, in a folder of the kind's name."""
    samples = [{name: noise(16, 16, n) for name in SUFFIXES[kind][n // 2]} for n in range(4)]
    write_set(tmp_path / kind, kind, samples, shard_samples=1)
    return tmp_path / kind


def opened(place: object, kind: Kind, **options: Any) -> Reader:
    config = DataConfig(**{"patch": 8, "load_size": 12, "crop": 8, **options})
    return open_reader([str(place)], Needs(kind=kind, channels=3), config, seed=3, batch_size=4, rank=1, ranks=2)


def test_reader_and_kind_choose(small_set: Path, kind: Kind) -> None:
    indexed = opened(small_set, kind)
    assert type(indexed) is (PatchReader if kind == "lr-hr" else TranslationReader)
    streamed = opened(small_set, kind, reader="stream")
    assert type(streamed) is StreamReader
    assert indexed.samples == streamed.samples == (2 if kind == "unpaired" else 4)
    for reader in (indexed, streamed):
        batches = list(reader.loader(0, 3, workers=1))
        assert len(batches) == 3
        assert [tuple(tensor.shape) for tensor in batches[0].values()] == [(2, 3, 8, 8)] * len(batches[0])
        assert batches[0].keys() == ({"hr"} if kind == "lr-hr" else {"a", "b"})


@pytest.mark.parametrize("reader", ["indexed", "stream"])
def test_a_staged_set_gives_the_same_batches(small_set: Path, kind: Kind, reader: str, tmp_path: Path) -> None:
    expected = list(opened(small_set, kind, reader=reader).loader(0, 4))
    with Server(small_set) as server:
        staged = opened(server.address(), kind, reader=reader, stage=str(tmp_path / "scratch"))
        asked = len(server.requests)
        found = list(staged.loader(0, 4))
        assert len(server.requests) == asked  # all is read from the copy
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_address_needs_the_stream(small_set: Path, kind: Kind) -> None:
    with Server(small_set) as server, pytest.raises(UserError) as caught:
        opened(server.address(), kind)
    message = str(caught.value)
    for part in (server.address(), "data.reader=stream", "data.stage=FOLDER", "shards/stage.py ADDRESS --to FOLDER"):
        assert part in message
    with pytest.raises(UserError, match="http"):
        opened("s3://bucket/set", kind)
