"""Verification finds every kind of damage and names the shard; a whole data set passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damaged_sets import ROOT, SCALES, flip, script, with_lrs, write_small_set
from packed_sets import Rgb, encode, noise, write_set

from hpcdistill.data.check.verify import data_sets, verify
from hpcdistill.data.index import Index, Kind, Member, load_index
from hpcdistill.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small_set(tmp_path / "packed")
    return tmp_path / "packed"


def faults(folder: Path) -> list[str]:
    found = list(verify(folder).faults)
    assert all("\n" not in fault for fault in found)
    return found


def edit_member(folder: Path, number: int, suffix: str, **values: int) -> None:
    """Let the index say something else of one member, with all checksums right."""
    index = load_index(folder)
    sample = index.samples[number]
    members: dict[str, Member] = {**sample.members, suffix: replace(sample.members[suffix], **values)}
    samples = [*index.samples[:number], replace(sample, members=members), *index.samples[number + 1 :]]
    edited: Index = replace(index, samples=tuple(samples))
    edited.save(folder)


def test_whole(folder: Path) -> None:
    report = verify(folder)
    assert report.faults == ()
    assert report.samples == 5
    assert [(shard.samples, shard.members) for shard in report.shards] == [(2, 8), (2, 8), (1, 4)]


def flip_in_an_image(folder: Path) -> None:
    member = load_index(folder).samples[3].members["lr2.png"]
    flip(folder / "shard-00001.tar", member.offset + member.length // 2)


def cut(folder: Path) -> None:
    path = folder / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:3000])


def record_another_offset(folder: Path) -> None:
    member = load_index(folder).samples[2].members["hr.png"]
    edit_member(folder, 2, "hr.png", offset=member.offset + 512)


def record_the_offset_of_another(folder: Path) -> None:
    other = load_index(folder).samples[2].members["lr2.png"]
    edit_member(folder, 2, "hr.png", offset=other.offset, length=other.length)


REMEDY = "; mend it with --repair, or pack the data set again with --overwrite"
DAMAGES: list[tuple[Callable[[Path], None], list[str]]] = [
    (
        flip_in_an_image,
        ["1.tar: its sha256 differs from the index; 1 of its 8 images is affected, first 000003.lr2.png" + REMEDY],
    ),
    (lambda folder: flip(folder / "shard-00002.tar", -1), ["2.tar: its sha256 differs from the index" + REMEDY]),
    (cut, ["0.tar: has 3000 bytes instead of "]),
    (
        lambda folder: (folder / "shard-00001.tar").rename(folder / "shard-00009.tar"),
        ["1.tar: missing" + REMEDY, "9.tar: not in index.json"],
    ),
    (
        lambda folder: edit_member(folder, 2, "hr.png", width=21),
        ["1.tar: 000002.hr.png: is 20 x 18 pixels instead of 21 x 18"],
    ),
    (record_another_offset, ["1.tar: 000002.hr.png: no member begins at the recorded offset"]),
    (record_the_offset_of_another, ["1.tar: 000002.hr.png: the member at its offset is '000002.lr2.png' of"]),
    (
        lambda folder: edit_member(folder, 4, "lr4.png", offset=1 << 40),
        ["2.tar: 000004.lr4.png: lies beyond the end of the shard"],
    ),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_a_damage_is_one_line(folder: Path, damage: Callable[[Path], None], expected: list[str]) -> None:
    damage(folder)
    for fault, start in zip(sorted(faults(folder)), expected, strict=True):
        assert fault.startswith(f"{folder}/shard-0000{start}")


def test_splits_are_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "train")
    assert data_sets(tmp_path / "both") == [tmp_path / "both" / "train"]
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match="not a packed data set"):
        data_sets(tmp_path / "source")
    with pytest.raises(UserError, match="does not exist"):
        data_sets(tmp_path / "nothing")


def test_lr_of_another_size(tmp_path: Path) -> None:
    good, bad = with_lrs(noise(17, 20, 0), 0), with_lrs(noise(17, 21, 1), 1)
    bad["lr3.png"] = noise(6, 7, 2)  # 17 / 3 rounded, not cut
    write_set(tmp_path, "lr-hr", [good, bad], scales=SCALES)
    (fault,) = faults(tmp_path)
    assert "000001.lr3.png: is 7 x 6 pixels, HR down-sampled by 3 is 7 x 5" in fault


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        (
            {"a.png": noise(8, 8, 0), "b.png": noise(8, 8, 1)},
            {"a.png": noise(8, 8, 2), "b.jpg": noise(8, 9, 3)},
            "000001.b.jpg: is 9 x 8 pixels, a of this pair is 8 x 8",
        ),
        (
            {"ab.jpg": noise(8, 16, 0)},
            {"ab.webp": noise(8, 15, 1)},
            "000001.ab.webp: is 15 x 8 pixels, an odd width",
        ),
        (
            {"ab.jpg": noise(8, 16, 0)},
            {"ab.jpg": encode(noise(64, 64, 0), "ab.jpg")[:1500]},  # with the right checksum
            "000001.ab.jpg: cannot be decoded",
        ),
    ],
    ids=["two files", "one file", "cut before it was packed"],
)
def test_pairs(tmp_path: Path, good: dict[str, Rgb], bad: dict[str, Any], fault: str) -> None:
    write_set(tmp_path, "paired", [good, bad])
    (found,) = faults(tmp_path)
    assert fault in found


def test_whole_translation_sets(tmp_path: Path) -> None:
    write_set(
        tmp_path / "paired", "paired", [{"a.png": noise(8, 8, n), "b.jpg": noise(8, 8, 50 + n)} for n in range(4)]
    )
    write_set(tmp_path / "ab", "paired", [{"ab.jpg": noise(8, 16, n)} for n in range(4)])
    unpaired = [{"a.jpg": noise(8, 8, n)} for n in range(4)] + [{"b.png": noise(9, 9, 50 + n)} for n in range(2)]
    write_set(tmp_path / "unpaired", "unpaired", unpaired)
    found = [verify(tmp_path / name) for name in ("paired", "ab", "unpaired")]
    assert [report.faults for report in found] == [(), (), ()]
    assert [report.images for report in found] == [{"a": 4, "b": 4}, {"ab": 4}, {"a": 4, "b": 2}]


@pytest.mark.parametrize(
    ("kind", "samples", "fault"),
    [
        (
            "lr-hr",
            [with_lrs(noise(16, 16, 0), 0), {"hr.png": noise(16, 16, 0), "lr2.png": noise(8, 8, 0)}],
            "1 of 2 samples have the images hr and lr2 in place of hr and lr2 and lr3 and lr4, first 000001",
        ),
        ("paired", [{"a.png": noise(8, 8, 0)}], "have the images a in place of a and b, or ab"),
        ("unpaired", [{"b.png": noise(8, 8, 0)}, {"a.png": noise(8, 8, 1)}], "shards of the domain b come before"),
        ("unpaired", [{"b.png": noise(8, 8, 0)}], "the domain a has no images"),
    ],
)
def test_roles(tmp_path: Path, kind: Kind, samples: list[dict[str, Rgb]], fault: str) -> None:
    write_set(tmp_path, kind, samples, scales=SCALES if kind == "lr-hr" else ())
    assert fault in faults(tmp_path)[0]


def test_many_faults_are_few_lines(tmp_path: Path) -> None:
    write_set(tmp_path, "paired", [{"ab.png": noise(8, 15, n)} for n in range(50)], shard_samples=50)
    found = faults(tmp_path)
    assert len(found) == 11
    assert "and 40 more such faults" in found[-1]


def test_an_index_that_leads_elsewhere(folder: Path) -> None:
    original = (folder / "index.json").read_text()
    for old, new in [
        ("shard-00001.tar", "../shard-00001.tar"),
        ("shard-00001.tar", "shard-00000.tar"),
        ('"recipe": "test"', '"recipe": "../../test"'),
        ('"split": "train"', '"split": null'),
        ('"key": "000001"', '"key": 1'),
        ('"height": 17', '"height": "17"'),
        ('"width": 20', '"width": -20'),
        ('"shard": 0', '"shard": 0.5'),
    ]:
        assert old in original
        (folder / "index.json").write_text(original.replace(old, new, 1))
        with pytest.raises(UserError, match=r"index.json: damaged \("):
            verify(folder)


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = script("verify")
    assert command.main([str(folder)]) == 0
    assert "shard-00002.tar" in capsys.readouterr().out
    flip(folder / "shard-00002.tar", -1)
    assert command.main([str(folder), "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert not report["ok"]
    assert [shard["shard"] for shard in report["data_sets"][0]["shards"] if shard["faults"]] == ["shard-00002.tar"]
    assert printed.err.count("fault: ") == 1


def test_json_is_not_coloured(folder: Path) -> None:
    """SLURM exports FORCE_COLOR, and JSON is for programs."""
    command = [sys.executable, str(ROOT / "shards/verify.py"), str(folder), "--json"]
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["ok"]


def test_usage(folder: Path) -> None:
    for arguments in ([], [str(folder), "--from", "x"], [str(folder), str(folder), "--repair", "--from", "x"]):
        with pytest.raises(UserError, match=r"; see .*verify --help"):
            script("verify").main(arguments)
