"""300 seeded damages to shards, archives and images: each ends in success or in one clear line, and nothing hangs."""

from __future__ import annotations

import io
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
from damages import damaged, ends_well
from packed_sets import encode, noise, write_set

from hpcdistill.data.check.verify import verify
from hpcdistill.data.config import DataConfig
from hpcdistill.data.index import load_index
from hpcdistill.data.needs import Needs
from hpcdistill.data.pack.fetching import fetch
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.data.read.reader import open_reader

EACH = 100


@pytest.mark.parametrize("kind", ["lr-hr", "paired", "unpaired"])
def test_damaged_shards(kind: str, tmp_path: Path) -> None:
    samples = {
        "lr-hr": [{"hr.png": noise(16, 16, n), "lr2.png": noise(8, 8, 50 + n)} for n in range(5)],
        "paired": [{"ab.jpg": noise(16, 32, n)} for n in range(5)],
        "unpaired": [{"a.jpg": noise(16, 16, n)} for n in range(3)] + [{"b.webp": noise(16, 16, n)} for n in range(3)],
    }
    folder = tmp_path / kind
    index = write_set(folder, kind, samples[kind], scales=(2,) if kind == "lr-hr" else ())  # type: ignore[arg-type]
    needs = Needs(kind, 2, (2,)) if kind == "lr-hr" else Needs(kind)  # type: ignore[arg-type]
    whole = {shard.name: (folder / shard.name).read_bytes() for shard in index.shards}

    def train(**settings: object) -> None:
        config = DataConfig(patch=8, load_size=12, crop=8, **settings)
        loader = open_reader([str(folder)], needs, config, seed=0, batch_size=2).loader(0, 4)
        assert len(list(loader)) == 4

    bad = 0
    for seed in range(EACH // 3 + 1):
        name = sorted(whole)[seed % len(whole)]
        (folder / name).write_bytes(damaged(whole[name], seed))
        report = verify(folder)
        changed = (folder / name).read_bytes() != whole[name]
        assert bool(report.faults) == changed, "verify misses a changed byte"
        ends = [ends_well(partial(train, cache=cache)) for cache in ("none", "ram", "device")]
        ends.append(ends_well(lambda: train(reader="stream")))
        bad += not all(ends)
        (folder / name).write_bytes(whole[name])
    assert bad > EACH // 6, "most damages should have been noticed by a reader"
    assert ends_well(lambda: train(cache="none"))
    assert ends_well(lambda: train(reader="stream"))


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_damaged_archives(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        f"horse2zebra/{split}{d}/{n}.jpg": noise(8, 8, n) for split in ("train", "test") for d in "AB" for n in (1, 2)
    }
    content = io.BytesIO()
    if suffix == "zip":
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, image in files.items():
                zipped.writestr(name, encode(image, name))
    else:
        with tarfile.open(fileobj=content, mode="w:gz" if suffix == "tar.gz" else "w") as tar:
            for name, image in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(encode(image, name))
                tar.addfile(entry, io.BytesIO(encode(image, name)))
    recipe = load_recipe("horse2zebra")
    # Without its checksum, which would stop every damage at the door.
    download = recipe.downloads[0].model_copy(update={"sha256": None, "bytes": None})
    recipe = recipe.model_copy(update={"downloads": (download,), "images": {}})
    good = 0
    for seed in range(EACH // 3 + 1):
        root = tmp_path / str(seed)
        root.mkdir()
        monkeypatch.setenv("HPCDISTILL_DATA", str(root / "data"))
        archive = root / f"horse2zebra.{suffix}"
        archive.write_bytes(damaged(content.getvalue(), seed))

        def get(archive: Path = archive, out: Path = root / "packed") -> None:
            pack(recipe, fetch(recipe, origin=archive), out, processes=1)

        if ends_well(get):
            good += 1
            assert len(load_index(root / "packed" / "train").samples) == 4
            unpacked = sorted(path.read_bytes() for path in (root / "data").rglob("*.jpg"))
            # zip and gzip carry checksums of all contents, a plain tar only of its headers
            assert suffix == "tar" or unpacked == sorted(encode(image, name) for name, image in files.items())
        inside = [path for path in root.rglob("*") if path.is_file() and ".partial" in str(path)]
        assert not inside, "a half unpacked archive was left behind"
    assert good < EACH // 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_damaged_images(suffix: str, tmp_path: Path) -> None:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(noise(24, 24, 1)).save(content, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    folders = {"lr-hr": ("folder", tmp_path / "one"), "unpaired": ("unpaired", tmp_path / "two")}
    for _, folder in folders.values():
        (folder / "A").mkdir(parents=True)
        (folder / "B").mkdir()
        (folder / "B" / "fine.png").write_bytes(encode(noise(24, 24, 2), "x.png"))
    for seed in range(EACH // 4):
        broken = damaged(content.getvalue(), seed)
        for kind, (name, folder) in folders.items():
            place = folder / "A" / f"image.{suffix}" if kind == "unpaired" else folder / f"image.{suffix}"
            place.write_bytes(broken)
            out = tmp_path / f"{kind} {seed}"
            if ends_well(lambda: pack(load_recipe(name), folder, out, processes=1)):  # noqa: B023 - called at once
                assert not verify(out).faults
            else:
                assert not (out / "index.json").exists()
            # With the bad image left out, what is fine is packed, or there is a line that nothing is left.
            ends_well(lambda: pack(load_recipe(name), folder, out, on_error="skip", processes=1))  # noqa: B023
