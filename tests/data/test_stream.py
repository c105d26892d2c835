"""The stream: batches against Pillow and the indexed readers, passes counted by hand, and shards that are not whole."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import json
import multiprocessing
import pickle
import random
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from packed_sets import Rgb, noise, numbered, write_set
from PIL import Image
from serving import Faults, Server

from hpcdistill.data import shard_stream
from hpcdistill.data.config import DataConfig
from hpcdistill.data.download import open_stream
from hpcdistill.data.index import load_index
from hpcdistill.data.needs import Needs
from hpcdistill.data.packing import pack
from hpcdistill.data.reader import PatchReader
from hpcdistill.data.recipes import load_recipe
from hpcdistill.data.stream import StreamReader
from hpcdistill.data.translation import TranslationReader
from hpcdistill.errors import UserError

RGB = Needs(kind="lr-hr", scale=4, lr_scales=(4,), channels=3)
LUMA = Needs(kind="lr-hr", scale=4, lr_scales=(4,))
PAIRED, UNPAIRED = Needs(kind="paired"), Needs(kind="unpaired")
SIDE = 16
Batch = dict[str, torch.Tensor]


def lr_hr(images: Sequence[Rgb]) -> list[dict[str, Rgb]]:
    return [{"hr.png": image, "lr2.png": image[::2, ::2], "lr4.png": image[::4, ::4]} for image in images]


def unpaired(a: int, b: int) -> list[dict[str, Rgb]]:
    """Images of one colour; those of b count from 100."""
    return [{"a.png": numbered(SIDE, SIDE, n)} for n in range(a)] + [
        {"b.png": numbered(SIDE, SIDE, 100 + n)} for n in range(b)
    ]


def stream(places: str | Path | Sequence[Path], needs: Needs = RGB, **options: Any) -> StreamReader:
    loop = {name: options.pop(name) for name in ("seed", "batch_size", "rank", "ranks") if name in options}
    config = DataConfig(**{"reader": "stream", "patch": 8, "load_size": SIDE, "crop": SIDE, "flip": False, **options})
    places = [places] if isinstance(places, str | Path) else places
    return StreamReader([str(place) for place in places], needs, config, **{"seed": 0, "batch_size": 1, **loop})


def numbers(batch: Batch, name: str = "hr") -> list[int]:
    """The numbers of `numbered` images, from pixels in [0, 1] or, of an image-to-image set, in [-1, 1]."""
    pixels = batch[name].double() if name == "hr" else (batch[name].double() + 1) / 2
    assert (pixels == pixels[:, :, :1, :1]).all()
    red, green, blue = (pixels[:, :, 0, 0] * 255).round().int().T.tolist()
    assert set(blue) == {77}
    return [high << 8 | low for high, low in zip(red, green, strict=True)]


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def what_fails(build: Callable[[], object]) -> str | None:
    """The message of the UserError, None when there is none."""
    try:
        build()
    except UserError as error:
        return str(error)
    return None


def fails(build: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    del caught  # it would hold the frames, and with them a loader's workers
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 numbered images in shards of 3, 3, 3 and 1."""
    folder = tmp_path_factory.mktemp("flat")
    write_set(folder, "lr-hr", lr_hr([numbered(SIDE, SIDE, n) for n in range(10)]), scales=(2, 4))
    return folder


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr(shard_stream, "open_stream", partial(open_stream, pause=lambda seconds: None))


# The shards themselves.


def test_webdataset_alone_reads_the_shards_with_the_bytes_of_the_index(tmp_path: Path) -> None:
    images = [noise(24, 20, n) for n in range(7)]
    index = write_set(tmp_path, "lr-hr", lr_hr(images), scales=(2, 4))
    paths = [str(tmp_path / shard.name) for shard in index.shards]
    found = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in index.samples]
    for group, sample, image in zip(found, index.samples, images, strict=True):
        content = (tmp_path / index.shards[sample.shard].name).read_bytes()
        assert {key for key in group if not key.startswith("__")} == sample.members.keys()
        for suffix, member in sample.members.items():
            assert group[suffix] == content[member.offset : member.offset + member.length]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(group["hr.png"]))), image)


def test_sets_of_our_packer_are_streamed(tmp_path: Path) -> None:
    """Its shards hold a note (json) beside each sample that the index does not list."""
    (tmp_path / "images").mkdir()
    images = [noise(16, 16, n) for n in range(5)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    pack(load_recipe("folder"), tmp_path / "images", tmp_path / "set", shard_samples=2)
    index = load_index(tmp_path / "set")
    paths = [str(tmp_path / "set" / shard.name) for shard in index.shards]
    for group, sample in zip(webdataset.WebDataset(paths, shardshuffle=False), index.samples, strict=True):
        content = (tmp_path / "set" / index.shards[sample.shard].name).read_bytes()
        assert "json" in group
        for suffix, member in sample.members.items():
            assert group[suffix] == content[member.offset : member.offset + member.length]
    batch = next(iter(stream(tmp_path / "set", patch=16, rotate=False, batch_size=5).loader(0, 1)))
    found = (batch["hr"] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert sorted(one.tobytes() for one in found) == sorted(image.tobytes() for image in images)


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
    domain = stream(tmp_path)._domains[0]
    ends = [0] * len(slots)
    for number in range(2):
        seen: Counter[int] = Counter()
        for slot, ((taken,), end) in enumerate(zip(slots, ends, strict=True)):
            size = sum(len(share.samples) for share in domain._shares(number, slot, len(slots), 0))
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


# The loader.


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_loaders_end_after_their_last_step(flat: Path, workers: int, steps: int) -> None:
    loader = stream(flat).loader(5, 5 + steps, workers)
    assert len(loader) == len(list(loader)) == len(list(loader)) == steps
    assert not multiprocessing.active_children()


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
        start = time.monotonic()
        batches.close()  # torch waits 5 s for its worker, then terminates it
        assert time.monotonic() - start < 9
        assert not multiprocessing.active_children()


# From a server.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_gives_the_same_batches_as_the_folder(flat: Path, workers: int) -> None:
    with Server(flat) as server:
        remote = list(stream(server.address(), batch_size=2).loader(0, 12, workers))
    assert same(remote, list(stream(flat, batch_size=2).loader(0, 12, workers)))


def test_a_broken_connection_goes_on_where_it_was(tmp_path: Path, no_pauses: None) -> None:
    write_set(tmp_path, "lr-hr", lr_hr([noise(32, 32, n) for n in range(3)]), scales=(2, 4))
    local = list(stream(tmp_path).loader(0, 3))
    with Server(tmp_path) as server:
        reader = stream(server.address())
        server.faults = Faults(break_after=4000, break_times=2)
        assert same(list(reader.loader(0, 3)), local)
        assert server.ranges()[-2:] == ["bytes=4000-", "bytes=8000-"]


@pytest.mark.parametrize(
    ("faults", "part"),
    [
        ({"wrong_bytes": True}, "damaged at byte 0"),
        ({"html": True}, "web page"),
        ({"status": 404}, "404"),
        ({"status": 503}, "503"),
        ({"endless": True}, "longer than the index's"),
        ({"break_after": 100}, "broke off"),
        ({"no_length": True, "break_after": 1024}, "ends after 1024 bytes"),
    ],
)
def test_a_server_that_misbehaves_is_named(tmp_path: Path, no_pauses: None, faults: dict[str, Any], part: str) -> None:
    write_set(tmp_path, "lr-hr", lr_hr([noise(16, 16, n) for n in range(3)]), scales=(2, 4))
    with Server(tmp_path) as server:
        reader = stream(server.address())
        server.faults = Faults(**faults)
        fails(lambda: list(reader.loader(0, 10)), server.address("shard-00000.tar"), part)
        fails(lambda: list(reader.loader(0, 10, workers=1)), server.address("shard-00000.tar"), part)


def test_a_missing_shard_or_index_on_a_server_is_named(tmp_path: Path) -> None:
    index = write_set(tmp_path, "lr-hr", lr_hr([noise(16, 16, n) for n in range(6)]), scales=(2, 4))
    (tmp_path / index.shards[1].name).unlink()
    with Server(tmp_path) as server:
        fails(lambda: list(stream(server.address()).loader(0, 10)), server.address("shard-00001.tar"), "404")
        fails(lambda: stream(server.address("none")), server.address("none/index.json"), "404")


def test_fewer_shards_than_readers_of_a_server_are_said(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(flat) as server:
        stream(server.address(), batch_size=2, ranks=2).loader(0, 1, workers=2)
        assert "4 shards for" not in capsys.readouterr().err
        stream(server.address(), batch_size=2, ranks=2).loader(0, 1, workers=3)
        assert "4 shards for 6 readers" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("scheme", ["pipe:cat /etc/passwd", "file://", "s3://bucket/", "ftp://host/", "gs://bucket/"])
def test_only_http_and_folders_are_opened(flat: Path, scheme: str) -> None:
    place = scheme if scheme.startswith("pipe") else f"{scheme}{flat}"
    fails(lambda: stream(place), place.split("/")[0].split(" ")[0], "http")


# Shards that are not what the index says.


def rewrite(folder: Path, change: Callable[[bytes], bytes], shard: int = 0, *, with_index: bool = False) -> Path:
    """Change a shard's bytes; `with_index`: the index then has its length and sha256, as if it had been packed so."""
    index = json.loads((folder / "index.json").read_text())
    path = folder / str(index["shards"][shard]["name"])
    content = change(path.read_bytes())
    path.write_bytes(content)
    if with_index:
        index["shards"][shard].update(length=len(content), sha256=hashlib.sha256(content).hexdigest())
        (folder / "index.json").write_text(json.dumps(index))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two shards of three random images."""
    write_set(tmp_path / "set", "lr-hr", lr_hr([noise(16, 16, n) for n in range(6)]), scales=(2, 4))
    return tmp_path / "set"


def test_a_local_shard_that_is_missing_or_cut_is_said_at_once(small: Path) -> None:
    path = rewrite(small, lambda content: content[:-1024])
    fails(lambda: stream(small), str(path), "instead of the index's", f"python shards/verify.py {small}")
    path.unlink()
    fails(lambda: stream(small), str(path), "missing")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_under_the_reader_is_said(small: Path, workers: int) -> None:
    reader = stream(small)
    path = rewrite(small, lambda content: content[:2000])
    fails(lambda: list(reader.loader(0, 20, workers)), str(path), "ends after 2000 bytes", "shards/verify.py")
    path.unlink()
    fails(lambda: list(reader.loader(0, 20, workers)), str(path), "No such file")


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_one_flipped_bit_anywhere_is_found(small: Path) -> None:
    size = (small / "shard-00000.tar").stat().st_size
    member = load_index(small).samples[0].members["lr2.png"]  # not even read: only the checksum tells
    for at, part in ((member.offset + 40, "sha256"), (size - 1, "sha256"), (0, "damaged at byte 0")):
        path = rewrite(small, flipped(at))
        fails(lambda: list(stream(small).loader(0, 20)), str(path), part)
        rewrite(small, flipped(at))
    assert len(list(stream(small).loader(0, 20))) == 20


def tar_of(files: Sequence[tuple[str, bytes]], **header: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in header.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def files_of(content: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(entry.name, tar.extractfile(entry).read()) for entry in tar]  # type: ignore[union-attr]


def sparse(content: bytes) -> bytes:
    """The first file is said to be sparse and of 8 GiB: a header's type, real size and checksum."""
    header = bytearray(content[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[257:265] = tarfile.GNU_MAGIC
    header[483:495] = b"%011o\0" % (8 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda content: gzip.compress(content), "damaged at byte 0"),
        (sparse, "no plain file"),
        (lambda content: tar_of(files_of(content), type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file"),
        (lambda content: tar_of([*files_of(content), ("../evil.png", b"x")]), "'../evil.png', which the index"),
        (lambda content: tar_of([*files_of(content), files_of(content)[0]]), "another place"),
        (lambda content: tar_of(files_of(content)[:-1]), "holds 8 of the index's 9 files"),
        (lambda content: tar_of([files_of(content)[n] for n in (3, 4, 5, 0, 1, 2, 6, 7, 8)]), "another place"),
        (lambda content: b"", "ends after 0 bytes"),
        (lambda content: bytes(len(content)), "holds 0 of the index's 9 files"),
    ],
    ids=["gzip", "sparse", "link", "unknown", "twice", "fewer", "order", "empty", "zeros"],
)
def test_a_shard_made_to_harm_is_refused_whatever_its_checksum(
    small: Path, change: Callable[[bytes], bytes], part: str
) -> None:
    path = rewrite(small, change, with_index=True)
    fails(lambda: list(stream(small).loader(0, 20)), str(path), part)


class Harm:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._path, "w")


@pytest.mark.parametrize("suffix", ["pkl", "hr.pkl", "hr.pyd", "pth"])
def test_nothing_is_unpickled(tmp_path: Path, suffix: str) -> None:
    content = pickle.dumps(Harm(tmp_path / "harm"))
    image = io.BytesIO()
    Image.fromarray(noise(16, 16, 0)).save(image, "PNG")
    tar = tar_of([(f"000000.{suffix}", content), ("000000.hr.png", image.getvalue())])
    folder = tmp_path / "set"
    write_set(folder, "lr-hr", [{"hr.png": noise(16, 16, 0)}])
    rewrite(folder, lambda _: tar, with_index=True)
    index = json.loads((folder / "index.json").read_text())
    place = 512 + len(content) + -len(content) % 512 + 512
    index["samples"][0]["members"] = {
        suffix: {"offset": 512, "length": len(content), "height": 16, "width": 16},
        "hr.png": {"offset": place, "length": len(image.getvalue()), "height": 16, "width": 16},
    }
    (folder / "index.json").write_text(json.dumps(index))
    reader = stream(folder, Needs(kind="lr-hr", channels=3))
    if suffix.startswith("hr"):
        fails(lambda: list(reader.loader(0, 2)), "hr of sample 'image0'", "cannot be decoded")
    else:
        assert len(list(reader.loader(0, 2))) == 2
    assert not (tmp_path / "harm").exists()


def test_an_image_of_another_size_than_recorded_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "lr-hr", lr_hr([noise(16, 16, 0)]), scales=(2, 4))
    index = json.loads((tmp_path / "index.json").read_text())
    index["samples"][0]["members"]["hr.png"]["height"] = 20
    (tmp_path / "index.json").write_text(json.dumps(index))
    monkeypatch.setattr("hpcdistill.data.stream_batches.read_rgb", lambda *_: pytest.fail("decoded"))
    fails(lambda: list(stream(tmp_path).loader(0, 1)), "hr of sample 'image0'", "16x16", "the index's 16x20")


def damages(count: int) -> Iterator[tuple[int, Callable[[bytes], bytes]]]:
    """Seeded ways to damage a file."""
    for seed in range(count):
        rng = random.Random(seed)

        def damage(content: bytes, rng: random.Random = rng) -> bytes:
            at, length = rng.randrange(len(content)), rng.randrange(1, 3000)
            return {
                "flip": lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
                "cut": lambda: content[:at],
                "gap": lambda: content[:at] + content[at + length :],
                "zeros": lambda: content[:at] + bytes(length) + content[at + length :],
                "noise": lambda: content[:at] + rng.randbytes(length) + content[at + length :],
                "insert": lambda: content[:at] + rng.randbytes(length) + content[at:],
                "header": lambda: content[: at // 512 * 512] + rng.randbytes(512) + content[at // 512 * 512 + 512 :],
                "more": lambda: content + rng.randbytes(length),
            }[rng.choice(("flip", "cut", "gap", "zeros", "noise", "insert", "header", "more"))]()

        yield seed, damage


def test_damaged_shards_end_in_success_or_one_line(tmp_path: Path) -> None:
    original, ended = tmp_path / "set", Counter[str]()
    write_set(original, "paired", [{"ab.jpg": noise(12, 24, n)} for n in range(6)])
    shard, content = original / "shard-00000.tar", (original / "shard-00000.tar").read_bytes()
    index = (original / "index.json").read_text()
    for seed, damage in damages(60):
        damaged = damage(content)
        recorded = seed % 3 == 0
        if recorded:  # as if the damage were right
            rewrite(original, lambda _, damaged=damaged: damaged, with_index=True)
            reader = stream(original, PAIRED)
        else:
            reader = stream(original, PAIRED)
            shard.write_bytes(damaged)
        fault = what_fails(lambda reader=reader: list(reader.loader(0, 12)))
        assert fault or recorded or damaged == content
        assert str(shard) in (fault or str(shard))
        ended["refused" if fault else "success"] += 1
        shard.write_bytes(content)
        (original / "index.json").write_text(index)
    assert ended["refused"] > 40
    assert ended["success"] > 5  # an image that is damaged where it does not matter, recorded so


def test_damaged_indices_end_in_success_or_one_line(tmp_path: Path) -> None:
    write_set(tmp_path, "paired", [{"ab.jpg": noise(12, 24, n)} for n in range(6)])
    content = (tmp_path / "index.json").read_bytes()
    rng = random.Random(1)
    faults = []
    for _ in range(60):
        at = rng.randrange(len(content))
        (tmp_path / "index.json").write_bytes(content[:at] + rng.choice(b'0129-."}ax').to_bytes() + content[at + 1 :])
        faults.append(what_fails(lambda: list(stream(tmp_path, PAIRED).loader(0, 12))))
    assert 30 < sum(fault is not None for fault in faults) < 60


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
