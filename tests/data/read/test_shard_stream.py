"""Shards as they are streamed: whole, from a misbehaving server, damaged, or made to harm."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from packed_sets import noise, numbered, write_set
from PIL import Image
from serving import Faults, Server
from streams import PAIRED, SIDE, fails, lr_hr, same, stream, what_fails

from hpcdistill.data.fetch.transfer import open_stream
from hpcdistill.data.index import load_index
from hpcdistill.data.needs import Needs
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.data.read import shard_stream


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
    monkeypatch.setattr("hpcdistill.data.images.read_rgb", lambda *_: pytest.fail("decoded"))
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
