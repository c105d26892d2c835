"""Shards streamed from folders and servers: exact images, each sample once a pass, one line for what is wrong."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
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
from streams import LUMA, PAIRED, RGB, SIDE, UNPAIRED, fails, lr_hr, numbers, same, stream

from hpcdistill.data.config import DataConfig
from hpcdistill.data.fetch import location
from hpcdistill.data.fetch.transfer import open_stream
from hpcdistill.data.index import load_index
from hpcdistill.data.needs import Needs
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.data.read.reader import PatchReader, TranslationReader
from hpcdistill.data.read.stream import StreamedShard, StreamReader, read_samples


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 numbered images in shards of 3, 3, 3 and 1."""
    folder = tmp_path_factory.mktemp("flat")
    write_set(folder, "lr-hr", lr_hr([numbered(SIDE, SIDE, n) for n in range(10)]), scales=(2, 4))
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two shards of three random images."""
    write_set(tmp_path / "set", "lr-hr", lr_hr([noise(16, 16, n) for n in range(6)]), scales=(2, 4))
    return tmp_path / "set"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr(location, "open_stream", partial(open_stream, pause=lambda seconds: None))


# What a batch holds.


@pytest.mark.parametrize("needs", [RGB, LUMA], ids=["rgb", "luma"])
def test_whole_images_come_exactly(tmp_path: Path, needs: Needs) -> None:
    images = [noise(SIDE, SIDE, n) for n in range(5)]
    write_set(tmp_path, "lr-hr", lr_hr(images), scales=(2, 4))
    reader = stream(tmp_path, needs, patch=SIDE, rotate=False, batch_size=5)
    assert reader.samples == 5
    values = [image.astype(np.float64) / 255 for image in images]
    if needs.channels == 1:
        values = [(16 + value @ [65.481, 128.553, 24.966])[:, :, None] / 255 for value in values]
    for batch in reader.loader(0, 3):
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            "hr": (5, needs.channels, 16, 16), "lr4": (5, needs.channels, 4, 4)
        }  # fmt: skip
        taken = []
        for hr, lr in zip(batch["hr"].numpy(), batch["lr4"].numpy(), strict=True):
            found = [n for n, value in enumerate(values) if np.abs(hr.transpose(1, 2, 0) - value).max() < 2e-7]
            taken += found
            assert np.abs(lr.transpose(1, 2, 0) - values[found[0]][::4, ::4]).max() < 2e-7
        assert sorted(taken) == [0, 1, 2, 3, 4]


def test_both_sides_of_a_pair_come_together(tmp_path: Path) -> None:
    a, b = ([numbered(SIDE, SIDE, 100 * domain + n) for n in range(5)] for domain in range(2))
    write_set(
        tmp_path,
        "paired",
        [
            {"ab.png": np.concatenate((a[n], b[n]), axis=1)} if n in (0, 3) else {"a.png": a[n], "b.png": b[n]}
            for n in range(5)
        ],
    )
    for direction, (source, target) in (("AtoB", "ab"), ("BtoA", "ba")):
        batch = next(iter(stream(tmp_path, PAIRED, direction=direction, batch_size=5).loader(0, 1)))
        assert sorted(numbers(batch, source)) == [0, 1, 2, 3, 4]
        assert numbers(batch, target) == [100 + n for n in numbers(batch, source)]


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


def test_sets_of_our_packer_are_streamed_by_us_and_by_webdataset(tmp_path: Path) -> None:
    """Its shards hold a note (json) beside each sample that the index does not list."""
    (tmp_path / "images").mkdir()
    images = [noise(16, 16, n) for n in range(5)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    pack(load_recipe("folder"), tmp_path / "images", tmp_path / "set", shard_samples=2)
    index = load_index(tmp_path / "set")
    paths = [str(tmp_path / "set" / shard.name) for shard in index.shards]
    for group, sample in zip(webdataset.WebDataset(paths, shardshuffle=False), index.samples, strict=True):
        content = Path(paths[sample.shard]).read_bytes()
        assert group["__key__"] == sample.key
        assert "json" in group
        for suffix, member in sample.members.items():
            assert group[suffix] == content[member.offset : member.offset + member.length]
    batch = next(iter(stream(tmp_path / "set", patch=16, rotate=False, batch_size=5).loader(0, 1)))
    found = (batch["hr"] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert sorted(one.tobytes() for one in found) == sorted(image.tobytes() for image in images)


# Which samples come when.


def slots_of(reader: Callable[..., StreamReader], ranks: int, workers: int, steps: int) -> list[list[list[int]]]:
    """Of each slot, the numbers it takes: [slot][domain][draw], without starting the workers."""
    found = []
    for rank, worker in itertools.product(range(ranks), range(workers)):
        one = reader(rank=rank, ranks=ranks, batch_size=ranks)
        batches = list(one._batches(range(worker, workers * steps, workers), worker, workers))
        found.append(
            [[numbers(batch, name)[0] for batch in batches] for name in ("hr", "a", "b") if name in batches[0]]
        )
    return found


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shards", [1, 3, 9])
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


@pytest.mark.parametrize("workers", [1, 4])
def test_each_image_of_both_domains_comes_once_in_a_pass(tmp_path: Path, workers: int) -> None:
    images: list[dict[str, Rgb]] = [{"a.png": numbered(SIDE, SIDE, n)} for n in range(8)]
    images += [{"b.png": numbered(SIDE, SIDE, 100 + n)} for n in range(5)]
    write_set(tmp_path, "unpaired", images, shard_samples=2)
    reader = partial(stream, tmp_path, UNPAIRED)
    assert reader().samples == 8
    slots = slots_of(reader, 1, workers, 8 // workers)
    assert sorted(number for slot in slots for number in slot[0]) == list(range(8))
    if workers == 1:  # the smaller domain is repeated until it suffices
        targets = slots[0][1]
        assert sorted(targets[:5]) == [100, 101, 102, 103, 104]
        assert len(set(targets[5:])) == 3
        assert set(targets) <= {100, 101, 102, 103, 104}


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("workers", [0, 3])
def test_workers_deliver_the_steps_in_order(flat: Path, workers: int) -> None:
    reader = stream(flat, batch_size=2)
    slots = max(1, workers)
    parts = [reader._batches(range(5 + slot, 12, slots), slot, slots) for slot in range(slots)]
    expected = [next(parts[number % slots]) for number in range(7)]
    loader = reader.loader(5, 12, workers)
    assert len(loader) == 7
    assert same(expected, list(loader))
    assert same(expected, list(loader))
    assert not multiprocessing.active_children()


def test_one_sample_suffices_for_many_readers(tmp_path: Path) -> None:
    write_set(tmp_path, "lr-hr", lr_hr([numbered(8, 8, 3)]), scales=(2, 4))
    assert slots_of(partial(stream, tmp_path), 2, 4, 9) == [[[3] * 9]] * 8


def test_several_sets_are_joined(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        images = [numbered(8, 8, 10 * number + n) for n in range(4)]
        write_set(tmp_path / name, "lr-hr", lr_hr(images), scales=(2, 4))
    reader = stream([tmp_path / "one", tmp_path / "two"], batch_size=8)
    assert reader.samples == 8
    for batch in reader.loader(0, 3):
        assert sorted(numbers(batch)) == [0, 1, 2, 3, 10, 11, 12, 13]


def taken_by(reader: StreamReader, first: int = 0, last: int = 20) -> list[int]:
    return [number for batch in reader.loader(first, last) for number in numbers(batch)]


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


def test_shards_come_in_another_order_in_each_pass_and_from_each_start(flat: Path) -> None:
    order = taken_by(stream(flat, shuffle_buffer=1), last=200)
    passes = {tuple(order[start : start + 10]) for start in range(0, 200, 10)}
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(passes) > 10  # of 24
    # Jobs that never end a pass: of 4 shards, from ten steps of the same pass.
    begins = {tuple(taken_by(stream(flat, shuffle_buffer=1), start, start + 3)) for start in range(10)}
    assert len({one[0] for one in begins}) > 2


def test_same_start_same_batches_and_a_resumed_run_does_not_begin_again(flat: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "patch": 4, "flip": True}
    begun, resumed = (list(stream(flat, **options).loader(first, first + 12)) for first in (0, 4))
    for first, batches in ((0, begun), (4, resumed)):
        assert same(batches, list(stream(flat, **options).loader(first, first + 12)))
    assert [numbers(batch) for batch in begun] != [numbers(batch) for batch in resumed]


# The loader.


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
    write_set(tmp_path, "lr-hr", lr_hr([numbered(8, 8, 0), noise(64, 64, 0)]), scales=(2, 4), shard_samples=1)
    small, large = ((tmp_path / shard.name).stat().st_size for shard in load_index(tmp_path).shards)
    assert small < large
    with Server(tmp_path) as server:
        readers = (stream(server.address(), shuffle_buffer=1, seed=seed) for seed in itertools.count())
        reader = next(one for one in readers if one._streams[0]._parts(0, 0, 1, 0)[0].shard.length == small)
        server.faults = Faults(hold_after=small)  # the other shard never comes whole
        batches = iter(reader.loader(0, 10, workers=1))
        next(batches)
        batches.close()
        assert not multiprocessing.active_children()


# From a server.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_gives_the_same_batches_as_the_folder(flat: Path, workers: int) -> None:
    with Server(flat) as server:
        remote = list(stream(server.address(), batch_size=2).loader(0, 12, workers))
    assert same(remote, list(stream(flat, batch_size=2).loader(0, 12, workers)))


def test_a_broken_connection_goes_on_where_it_was(small: Path, no_pauses: None) -> None:
    local = list(stream(small).loader(0, 3))
    with Server(small) as server:
        reader = stream(server.address())
        server.faults = Faults(break_after=4000, break_times=2)
        assert same(list(reader.loader(0, 3)), local)
        assert "bytes=4000-" in server.ranges()
        assert "bytes=8000-" in server.ranges()


@pytest.mark.parametrize(
    ("faults", "part"),
    [
        ({"wrong_bytes": True}, "its sha256 differs from the index"),
        ({"html": True}, "web page"),
        ({"status": 404}, "404"),
        ({"status": 503}, "503"),
        ({"endless": True}, "has more bytes instead of"),
        ({"break_after": 100}, "broke off"),
        ({"no_length": True, "break_after": 1024}, "has 1024 bytes instead of"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_server_that_misbehaves_is_named(small: Path, no_pauses: None, faults: dict[str, Any], part: str) -> None:
    with Server(small) as server:
        reader = stream(server.address(), shuffle_buffer=1)
        server.faults = Faults(**faults)
        fails(lambda: list(reader.loader(0, 10)), server.address("shard-0000"), part)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
def test_what_else_a_server_may_lack(flat: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "shard-00001.tar").unlink()
    with Server(small) as server:
        fails(lambda: list(stream(server.address()).loader(0, 10, 1)), server.address("shard-00001.tar"), "404")
        fails(lambda: stream(server.address("none")), server.address("none/index.json"), "404")
    with Server(flat) as server:
        stream(server.address(), batch_size=2, ranks=2).loader(0, 1, workers=2)
        assert "4 shards for" not in capsys.readouterr().err
        stream(server.address(), batch_size=2, ranks=2).loader(0, 1, workers=3)
        assert "4 shards for 6 readers" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("scheme", ["pipe:cat /etc/passwd", "file://", "s3://bucket/", "ftp://host/", "gs://bucket/"])
def test_only_http_and_folders_are_opened(flat: Path, scheme: str) -> None:
    place = scheme if scheme.startswith("pipe") else f"{scheme}{flat}"
    fails(lambda: stream(place), place.split("/")[0].split(" ")[0], "http")


# Shards that are not what the index says, or made to harm.


def rewrite(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change the first shard's bytes."""
    path = folder / "shard-00000.tar"
    path.write_bytes(change(path.read_bytes()))
    return path


def test_a_local_shard_that_is_missing_or_cut_is_said_at_once(small: Path) -> None:
    path = rewrite(small, lambda content: content[:-1024])
    fails(lambda: stream(small), str(path), "instead of the index's", f"python shards/verify.py {small}")
    path.unlink()
    fails(lambda: stream(small), str(path), "missing")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_under_the_reader_is_said(small: Path, workers: int) -> None:
    reader = stream(small)
    path = rewrite(small, lambda content: content[:2000])
    fails(lambda: list(reader.loader(0, 20, workers)), str(path), "has 2000 bytes instead of", "shards/verify.py")
    path.unlink()
    fails(lambda: list(reader.loader(0, 20, workers)), str(path), "No such file")


def test_one_flipped_bit_anywhere_is_found_before_a_sample_is_used(small: Path) -> None:
    size = (small / "shard-00000.tar").stat().st_size
    member = load_index(small).samples[0].members["lr2.png"]  # not even read: only the checksum tells
    for at in (0, member.offset + 40, size - 1):
        flip = lambda content, at=at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]  # noqa: E731
        path = rewrite(small, flip)
        fails(lambda: list(stream(small).loader(0, 6)), str(path), "sha256 differs")
        rewrite(small, flip)
    assert len(list(stream(small).loader(0, 20))) == 20


class Harm:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._path, "w")


@pytest.mark.parametrize("suffix", ["hr.pkl", "hr.png"])
def test_a_shard_made_to_harm_is_only_an_image_that_cannot_be_decoded(tmp_path: Path, suffix: str) -> None:
    """The index's checksum is of just this shard: a pickle, beside a link that leads out and a file of that name."""
    content = pickle.dumps(Harm(tmp_path / "harm"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo(f"000000.{suffix}")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
        for name, kind in (("out", tarfile.SYMTYPE), ("../evil", tarfile.REGTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, str(tmp_path)
            tar.addfile(entry)
    folder = tmp_path / "set"
    write_set(folder, "lr-hr", [{"hr.png": noise(16, 16, 0)}])
    (folder / "shard-00000.tar").write_bytes(buffer.getvalue())
    index = json.loads((folder / "index.json").read_text())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    index["shards"][0].update(length=len(buffer.getvalue()), sha256=sha256)
    index["samples"][0]["members"] = {suffix: {"offset": 512, "length": len(content), "height": 16, "width": 16}}
    (folder / "index.json").write_text(json.dumps(index))
    before = sorted(tmp_path.rglob("*"))
    reader = stream(folder, Needs(kind="lr-hr", channels=3))
    fails(lambda: list(reader.loader(0, 2)), "hr of sample 'image0'", "cannot be decoded")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_of_another_size_than_recorded_is_refused_before_it_is_decoded(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((small / "index.json").read_text())
    for sample in index["samples"]:
        sample["members"]["hr.png"]["height"] = 20
    (small / "index.json").write_text(json.dumps(index))
    monkeypatch.setattr("hpcdistill.data.images.read_rgb", lambda *_: pytest.fail("decoded"))
    fails(
        lambda: list(stream(small, shuffle_buffer=1).loader(0, 6)), "hr of sample 'image", "16x16", "the index's 16x20"
    )


# What the user did wrong.


def test_what_cannot_work_is_said(flat: Path, tmp_path: Path) -> None:
    """What both readers refuse is in test_reader.py and test_translation.py."""
    fails(lambda: stream(flat, cache="ram"), "data.cache=ram", "data.cache=none")
    fails(lambda: stream(flat, batch_size=10, ranks=4), "train.batch_size=10", "use 8")
    fails(lambda: stream(flat, patch=10), "data.patch=10", "multiple of 4")
    fails(lambda: stream(flat, PAIRED), str(flat), "lr-hr", "needs paired")
    fails(lambda: stream(tmp_path / "none"), str(tmp_path / "none"), "does not exist")
    write_set(tmp_path / "odd", "paired", [{"ab.png": noise(12, 25, 0)}])
    fails(lambda: stream(tmp_path / "odd", PAIRED), "'image0' is 25x12", "odd width")
    fails(lambda: stream(tmp_path / "odd", PAIRED, crop=99), "data.crop=99")


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, joined and cut: no second copy of a shard, and none of the one before it."""
    monkeypatch.setattr(location, "_SHARD_PIECE", 1 << 16)  # small beside these shards, as it is beside real ones
    images = [noise(256, 256, number) for number in range(36)]
    index = write_set(tmp_path, "paired", [{"ab.png": image} for image in images], shard_samples=12)
    largest = max(shard.length for shard in index.shards)
    shards = [
        StreamedShard(str(tmp_path), shard, tuple(sample for sample in index.samples if sample.shard == number))
        for number, shard in enumerate(index.shards)
    ]
    tracemalloc.start()
    assert sum(1 for _ in read_samples(shards, ["ab"])) == 36
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(shards) == 3
    assert peak < 1.5 * largest  # the shard, two images cut out of it, and a buffer that grows by an eighth


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
