"""The stream: batches against Pillow and the indexed readers, and passes over the samples counted by hand."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_sets import Rgb, noise, numbered, write_set
from PIL import Image
from serving import Faults, Server
from streams import LUMA, PAIRED, RGB, SIDE, UNPAIRED, fails, lr_hr, numbers, same, stream

from hpcdistill.data.config import DataConfig
from hpcdistill.data.index import load_index
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.reader import PatchReader, TranslationReader
from hpcdistill.data.read.stream import StreamReader


def unpaired(a: int, b: int) -> list[dict[str, Rgb]]:
    """Images of one colour; those of b count from 100."""
    return [{"a.png": numbered(SIDE, SIDE, n)} for n in range(a)] + [
        {"b.png": numbered(SIDE, SIDE, 100 + n)} for n in range(b)
    ]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 numbered images in shards of 3, 3, 3 and 1."""
    folder = tmp_path_factory.mktemp("flat")
    write_set(folder, "lr-hr", lr_hr([numbered(SIDE, SIDE, n) for n in range(10)]), scales=(2, 4))
    return folder


# What a batch holds.


@pytest.mark.parametrize("needs", [RGB, LUMA], ids=["rgb", "luma"])
def test_whole_images_come_exactly(tmp_path: Path, needs: Needs) -> None:
    images = [noise(SIDE, SIDE, n) for n in range(5)]
    write_set(tmp_path, "lr-hr", lr_hr(images), scales=(2, 4))
    reader = stream(tmp_path, needs, patch=SIDE, rotate=False, batch_size=5)
    assert reader.samples == 5
    for batch in reader.loader(0, 3):
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            "hr": (5, needs.channels, 16, 16), "lr4": (5, needs.channels, 4, 4)
        }  # fmt: skip
        taken = []
        for hr, lr in zip(batch["hr"].numpy(), batch["lr4"].numpy(), strict=True):
            values = [image.astype(np.float64) / 255 for image in images]
            if needs.channels == 1:
                values = [(16 + value @ [65.481, 128.553, 24.966])[:, :, None] / 255 for value in values]
            found = [n for n, value in enumerate(values) if np.abs(hr.transpose(1, 2, 0) - value).max() < 2e-7]
            taken += found
            assert np.abs(lr.transpose(1, 2, 0) - values[found[0]][::4, ::4]).max() < 2e-7
        assert sorted(taken) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
@pytest.mark.parametrize("how", ["pairs", "ab", "mixed", "unpaired"])
def test_whole_translation_images_come_exactly(tmp_path: Path, how: str, direction: str) -> None:
    a, b = ([noise(SIDE, SIDE, 10 * domain + n) for n in range(5)] for domain in range(2))
    joined = {"pairs": (), "ab": range(5), "mixed": (0, 3), "unpaired": ()}[how]
    samples: list[dict[str, Any]] = [
        {"ab.png": np.concatenate((a[n], b[n]), axis=1)} if n in joined else {"a.png": a[n], "b.png": b[n]}
        for n in range(5)
    ]
    if how == "unpaired":
        samples = [{"a.png": image} for image in a] + [{"b.png": image} for image in b]
    write_set(tmp_path, "unpaired" if how == "unpaired" else "paired", samples)
    needs = UNPAIRED if how == "unpaired" else PAIRED
    batch = next(iter(stream(tmp_path, needs, direction=direction, batch_size=5).loader(0, 1)))
    order = {}
    for name, images in zip("ab" if direction == "AtoB" else "ba", (a, b), strict=True):
        expected = np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1
        away = np.abs(batch[name].numpy()[:, None] - expected[None]).max(axis=(2, 3, 4))
        order[name] = away.argmin(axis=1).tolist()
        assert away.min(axis=1).max() < 2e-7
        assert sorted(order[name]) == [0, 1, 2, 3, 4]
    assert (order["a"] == order["b"]) == (how != "unpaired")


def test_images_are_resized_as_pillow_does(tmp_path: Path) -> None:
    images = [noise(24, 40, 0), noise(24, 40, 1)]
    write_set(tmp_path, "paired", [{"a.png": images[0], "b.png": images[1]}])
    batch = next(iter(stream(tmp_path, PAIRED).loader(0, 1)))
    for name, image in zip("ab", images, strict=True):
        small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        assert np.abs(batch[name][0].numpy().transpose(1, 2, 0) - (small / 127.5 - 1)).max() < 2e-7


def test_crops_and_turns_are_those_of_the_indexed_readers(tmp_path: Path) -> None:
    """With one sample the order cannot differ, so that each draw must be the same in every bit."""
    write_set(tmp_path / "sr", "lr-hr", lr_hr([noise(40, 32, 0)]), scales=(2, 4))
    write_set(tmp_path / "pair", "paired", [{"ab.jpg": noise(30, 60, 1)}])
    write_set(tmp_path / "two", "unpaired", [{"a.png": noise(30, 28, 2)}, {"b.png": noise(20, 24, 3)}])
    options: dict[str, Any] = {"patch": 8, "load_size": 20, "crop": 12, "flip": True, "direction": "BtoA"}
    for name, needs, kind in (
        ("sr", RGB, PatchReader), ("sr", LUMA, PatchReader),
        ("pair", PAIRED, TranslationReader), ("two", UNPAIRED, TranslationReader),
    ):  # fmt: skip
        for rank in range(2):
            indexed = kind([tmp_path / name], needs, DataConfig(**options), 5, 6, rank, 2)
            streamed = stream(tmp_path / name, needs, seed=5, batch_size=6, rank=rank, ranks=2, **options)
            assert same([indexed[step] for step in range(4, 9)], list(streamed.loader(4, 9)))


# Which samples come when.


def slots_of(reader: Callable[..., StreamReader], ranks: int, workers: int, steps: int) -> list[list[list[int]]]:
    """Of each slot, the numbers it takes: [slot][domain][draw]. Item k of a loader is of worker k modulo workers."""
    found = []
    for rank in range(ranks):
        each = max(1, workers)
        batches = list(reader(rank=rank, ranks=ranks, batch_size=ranks).loader(0, steps * each, workers))
        names = ["hr"] if "hr" in batches[0] else ["a", "b"]
        found += [[[numbers(b, name)[0] for b in batches[w::each]] for name in names] for w in range(each)]
    return found


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shards", [1, 3, 4, 9])
def test_each_sample_comes_once_in_each_pass(tmp_path: Path, shards: int, ranks: int, workers: int) -> None:
    count = 2 * shards - 1 if shards > 1 else 5  # uneven: the last shard is smaller
    images = [numbered(8, 8, n) for n in range(count)]
    write_set(tmp_path, "lr-hr", lr_hr(images), scales=(2, 4), shard_samples=2 if shards > 1 else 5)
    assert len(load_index(tmp_path).shards) == shards
    slots = slots_of(partial(stream, tmp_path), ranks, workers, 2 * count)
    domain = stream(tmp_path)._streams[0]
    ends = [0] * len(slots)
    for number in range(2):
        seen: Counter[int] = Counter()
        for slot, ((taken,), end) in enumerate(zip(slots, ends, strict=True)):
            size = sum(len(part.samples) for part in domain._parts(number, slot, len(slots), 0))
            assert 2 * count >= end + size
            seen.update(taken[end : end + size])
            ends[slot] += size
        assert seen == dict.fromkeys(range(count), 1)


@pytest.mark.parametrize("workers", [0, 4])
def test_each_image_of_both_domains_comes_once_in_a_pass(tmp_path: Path, workers: int) -> None:
    write_set(tmp_path, "unpaired", unpaired(8, 5), shard_samples=2)
    reader = partial(stream, tmp_path, UNPAIRED)
    assert reader().samples == 8
    slots = slots_of(reader, 1, workers, 8 if workers == 0 else 2)
    first = [number for slot in slots for number in slot[0]]
    assert sorted(first) == list(range(8))
    if workers == 0:  # the smaller domain is repeated until it suffices
        targets = slots[0][1]
        assert sorted(targets[:5]) == [100, 101, 102, 103, 104]
        assert len(set(targets[5:])) == 3
        assert set(targets) <= {100, 101, 102, 103, 104}


def test_one_sample_suffices_for_many_readers(tmp_path: Path) -> None:
    write_set(tmp_path, "lr-hr", lr_hr([numbered(8, 8, 3)]), scales=(2, 4))
    for rank in range(2):
        batches = list(stream(tmp_path, rank=rank, ranks=2, batch_size=4).loader(0, 9, workers=4))
        assert [numbers(batch) for batch in batches] == [[3, 3]] * 9


def test_several_sets_are_joined(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        images = [numbered(8, 8, 10 * number + n) for n in range(4)]
        write_set(tmp_path / name, "lr-hr", lr_hr(images), scales=(2, 4))
    reader = stream([tmp_path / "one", tmp_path / "two"], batch_size=8)
    assert reader.samples == 8
    for batch in reader.loader(0, 3):
        assert sorted(numbers(batch)) == [0, 1, 2, 3, 10, 11, 12, 13]


def taken_by(reader: StreamReader, first: int = 0, last: int = 20, workers: int = 0) -> list[int]:
    return [number for batch in reader.loader(first, last, workers) for number in numbers(batch)]


def test_buffer_and_seed_change_the_order(tmp_path: Path) -> None:
    write_set(tmp_path, "lr-hr", lr_hr([numbered(8, 8, n) for n in range(20)]), scales=(2, 4), shard_samples=20)
    assert taken_by(stream(tmp_path, shuffle_buffer=1)) == list(range(20))
    mixed = taken_by(stream(tmp_path))
    assert mixed != list(range(20))
    assert sorted(mixed) == list(range(20))
    assert taken_by(stream(tmp_path)) == mixed
    assert taken_by(stream(tmp_path, seed=1)) != mixed
    a_little = taken_by(stream(tmp_path, shuffle_buffer=3))
    assert a_little != list(range(20))
    assert all(number <= place + 2 for place, number in enumerate(a_little))  # three samples are known at most


def test_shards_come_in_another_order_in_each_pass(flat: Path) -> None:
    order = taken_by(stream(flat, shuffle_buffer=1), last=200)
    passes = {tuple(order[start : start + 10]) for start in range(0, 200, 10)}
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(passes) > 10  # of 24


@pytest.mark.parametrize("workers", [0, 2])
def test_same_start_same_batches_and_a_resumed_run_does_not_begin_again(flat: Path, workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 2, "patch": 4, "flip": True}
    begun = list(stream(flat, **options).loader(0, 12, workers))
    assert same(begun, list(stream(flat, **options).loader(0, 12, workers)))
    resumed = list(stream(flat, **options).loader(4, 16, workers))
    assert same(resumed, list(stream(flat, **options).loader(4, 16, workers)))
    orders = [[numbers(batch) for batch in batches] for batches in (begun, resumed)]
    assert orders[0] != orders[1]


def test_a_job_that_never_ends_a_pass_does_not_see_the_same_shards_again(flat: Path) -> None:
    begins = {tuple(taken_by(stream(flat, shuffle_buffer=1), start, start + 3)) for start in range(10)}
    assert len({one[0] for one in begins}) > 2  # of 4 shards, from ten steps of the same pass


# The loader.


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_loaders_end_after_their_last_step(flat: Path, workers: int, steps: int) -> None:
    loader = stream(flat).loader(5, 5 + steps, workers)
    assert len(loader) == len(list(loader)) == len(list(loader)) == steps
    assert not multiprocessing.active_children()


def test_a_worker_leaves_signals_to_the_trainer(flat: Path) -> None:
    batches = iter(stream(flat).loader(0, 30, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid or 0, number)
    assert len(list(batches)) == 29


@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_early_leaves_nothing_open(flat: Path, workers: int) -> None:
    before = {*Path("/proc/self/fd").iterdir()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        batches = iter(stream(flat).loader(0, 1000, workers))
        assert len(list(islice(batches, 3))) == 3
        del batches
        gc.collect()
    assert not [str(one.message) for one in caught if issubclass(one.category, ResourceWarning)]
    assert not multiprocessing.active_children()
    if workers == 0:
        assert {*Path("/proc/self/fd").iterdir()} <= before


def test_a_worker_that_waits_for_a_silent_server_does_not_keep_the_trainer(tmp_path: Path) -> None:
    write_set(tmp_path, "lr-hr", lr_hr([noise(32, 32, n) for n in range(3)]), scales=(2, 4))
    with Server(tmp_path) as server:
        reader = stream(server.address(), shuffle_buffer=1)
        server.faults = Faults(hold_after=load_index(tmp_path).samples[1].members["lr4.png"].offset)
        batches = iter(reader.loader(0, 10, workers=1))
        next(batches)  # the first image has come whole, the second has not
        batches.close()
        assert not multiprocessing.active_children()


# What the user did wrong.


def test_what_cannot_work_is_said(flat: Path, tmp_path: Path) -> None:
    fails(lambda: stream(flat, cache="ram"), "data.cache=ram", "data.cache=none")
    fails(lambda: stream(flat, batch_size=10, ranks=4), "train.batch_size=10", "use 8")
    fails(lambda: stream(flat, patch=10), "data.patch=10", "multiple of 4")
    fails(lambda: stream(flat, PAIRED), str(flat), "lr-hr", "needs paired")
    fails(lambda: stream(flat, Needs(kind="lr-hr", scale=3, lr_scales=(3,)), patch=9), "scale 3")
    fails(lambda: stream([]), "data.train")
    fails(lambda: stream(tmp_path / "none"), str(tmp_path / "none"), "does not exist")
    write_set(tmp_path / "odd", "paired", [{"ab.png": noise(12, 25, 0)}])
    fails(lambda: stream(tmp_path / "odd", PAIRED), "'image0' is 25x12", "odd width")
    write_set(tmp_path / "unequal", "paired", [{"a.png": noise(12, 12, 0), "b.png": noise(12, 14, 0)}])
    fails(lambda: stream(tmp_path / "unequal", PAIRED), "a of 12x12 and b of 14x12")
    fails(lambda: stream(tmp_path / "unequal", PAIRED, crop=99), "data.crop=99")
    write_set(tmp_path / "half", "unpaired", [{"a.png": noise(12, 12, 0)}])
    fails(lambda: stream(tmp_path / "half", UNPAIRED), "no images of domain b")


def test_images_smaller_than_the_patch_stop_or_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [16, 8, 16, 8, 8, 8, 16]  # shards: large small large, small small small, large
    write_set(tmp_path, "lr-hr", lr_hr([numbered(s, s, n) for n, s in enumerate(sides)]), scales=(2, 4))
    fails(lambda: stream(tmp_path, patch=12), str(tmp_path), "'image1' is 8x8", "(and 3 more)", "data.on_error=skip")
    (tmp_path / "shard-00001.tar").unlink()  # nothing of it is needed
    reader = stream(tmp_path, patch=12, on_error="skip", batch_size=3)
    assert "4 of 7 images" in capsys.readouterr().err
    assert reader.samples == 3
    for batch in reader.loader(0, 6, workers=0):
        assert sorted(numbers(batch)) == [0, 2, 6]
    assert {n for batch in reader.loader(0, 12, workers=4) for n in numbers(batch)} == {0, 2, 6}
