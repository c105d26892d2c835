"""Images that are there more than once are found by their pixels, in one data set and across several."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from damaged_sets import SCALES, script, with_lrs, write_small_set
from packed_sets import Rgb, noise, write_set
from PIL import Image

from hpcdistill.data.check.duplicates import find_duplicates
from hpcdistill.data.check.verify import verify


def encoded(image: Rgb, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


def test_repeated_in_other_encodings(tmp_path: Path) -> None:
    """PNG at two levels and lossless WebP have the same pixels; one pixel more, or other sides, is another image."""
    image = noise(12, 18, 0)
    other = image.copy()
    other[11, 17, 2] ^= 1
    files = {
        "a.png": encoded(image, format="PNG", compress_level=1),
        "a.webp": encoded(image, format="WEBP", lossless=True),
    }
    same = [files["a.png"], encoded(image, format="PNG", compress_level=9)]
    assert same[0] != same[1]
    samples = [
        {"a.png": same[0]},
        {"a.png": encoded(other, format="PNG")},
        {"a.png": encoded(image.reshape(18, 12, 3), format="PNG")},
        {"a.webp": files["a.webp"]},
        {"b.png": same[1]},
        {"b.png": noise(12, 18, 5)},
    ]
    write_set(tmp_path, "unpaired", samples)
    report = verify(tmp_path)
    assert report.faults == ()
    (duplicate,) = find_duplicates([report]).duplicates
    assert duplicate.kind == "repeated"
    assert [(place.key, place.role) for place in duplicate.occurrences] == [
        ("000000", "a"),
        ("000003", "a"),
        ("000004", "b"),
    ]
    assert duplicate.line() == f"repeated: train image 'image0' of {tmp_path} is also train image 'image3', and 1 more"


def test_gray_is_its_rgb(tmp_path: Path) -> None:
    gray = noise(9, 9, 0)[:, :, 0]
    rgb = np.repeat(gray[:, :, None], 3, axis=2)
    samples = [{"a.png": encoded(gray, format="PNG")}, {"a.png": rgb}, {"b.png": noise(9, 9, 3)}]
    write_set(tmp_path, "unpaired", samples)
    assert len(find_duplicates([verify(tmp_path)]).duplicates) == 1


def test_leaks_match_pairwise_comparison(tmp_path: Path) -> None:
    """Four sets that share images at random, against comparing all decoded images with all others."""
    chosen = random.Random(6)  # with equal images in z alone, in x and y alone, and across
    pool = [noise(8, 8, n) for n in range(14)]
    images: dict[tuple[str, int], Rgb] = {}
    for name, split in [("x", "train"), ("y", "train"), ("z", "test"), ("w", "all")]:
        picked = [pool[chosen.randrange(len(pool))] for _ in range(6)]
        samples = [with_lrs(image, n) for n, image in enumerate(picked)]
        write_set(tmp_path / name, "lr-hr", samples, scales=SCALES, split=split)
        images |= {(name, n): image for n, image in enumerate(picked)}
    expected = set()
    for one in images:
        group = frozenset(other for other in images if np.array_equal(images[one], images[other]))
        if len(group) > 1:
            names = {name for name, _ in group}
            expected.add((group, "repeated" if len(names) == 1 or names == {"x", "y"} else "leak"))
    assert {kind for _, kind in expected} == {"repeated", "leak"}
    findings = find_duplicates([verify(tmp_path / name) for name in "xyzw"])
    found = {
        (frozenset((place.folder.name, int(place.key)) for place in duplicate.occurrences), duplicate.kind)
        for duplicate in findings.duplicates
    }
    assert found == expected
    assert findings.count("leak") == sum(kind == "leak" for _, kind in expected)


def test_pairs_are_equal_as_a_whole(tmp_path: Path) -> None:
    """`ab` of one set against `a` and `b` of another; an equal edge map with another photograph is only counted."""
    edges, photos = [noise(8, 8, n) for n in range(5)], [noise(8, 8, 50 + n) for n in range(5)]
    pairs = list(zip(edges, photos, strict=True))
    joined = [*pairs[:3], (edges[1], photos[4])]  # the last one: an edge map again, its photograph is new
    write_set(tmp_path / "train", "paired", [{"ab.png": np.concatenate(pair, axis=1)} for pair in joined])
    single = [pairs[2], (edges[3], photos[0])]
    write_set(
        tmp_path / "test",
        "paired",
        [{"a.webp": encoded(a, format="WEBP", lossless=True), "b.png": b} for a, b in single],
        split="test",
    )
    findings = find_duplicates([verify(tmp_path / "train"), verify(tmp_path / "test")])
    (duplicate,) = findings.duplicates
    assert (duplicate.kind, [(p.split, p.key, p.role) for p in duplicate.occurrences]) == (
        "leak",
        [("train", "000002", "pair"), ("test", "000000", "pair")],
    )
    assert findings.sides == {"a": {"repeated": 1, "leak": 0}, "b": {"repeated": 0, "leak": 1}}


def test_a_copy_is_no_leak(tmp_path: Path) -> None:
    write_small_set(tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert find_duplicates([verify(tmp_path / "set"), verify(tmp_path / "copy")]).duplicates == ()


def test_strict_and_json_of_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = noise(16, 16, 9)
    write_set(tmp_path / "train", "lr-hr", [with_lrs(shared, 0), with_lrs(noise(16, 16, 1), 1)], scales=SCALES)
    write_set(
        tmp_path / "test", "lr-hr", [with_lrs(noise(16, 16, 2), 2), with_lrs(shared, 3)], scales=SCALES, split="test"
    )
    command = script("verify")
    assert command.main([str(tmp_path / "train"), str(tmp_path / "test")]) == 0
    printed = capsys.readouterr()
    assert f"leak: train image 'image0' of {tmp_path / 'train'} is also test image 'image1' of " in printed.err
    assert command.main([str(tmp_path), "--strict", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert [(one["split"], one["leaks"], one["repeated"]) for one in report["data_sets"]] == [
        ("test", 1, 0),
        ("train", 1, 0),
    ]
    (group,) = report["duplicates"]["groups"]
    assert [(image["split"], image["key"]) for image in group["images"]] == [("test", "000001"), ("train", "000000")]
    assert command.main([str(tmp_path / "train"), str(tmp_path / "train"), "--strict"]) == 0  # given twice
