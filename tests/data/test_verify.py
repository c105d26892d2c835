"""Verification finds every kind of damage and names the shard; a whole data set passes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from hpcdistill.data.index import Index, Member, load_index
from hpcdistill.data.packing import pack
from hpcdistill.data.recipes import load_recipe
from hpcdistill.data.verify import data_sets, verify
from hpcdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (16 + number, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    pack(load_recipe("folder"), source, tmp_path / "packed", shard_samples=2)
    return tmp_path / "packed"


def faults(folder: Path) -> list[str]:
    found = list(verify(folder).faults)
    assert all("\n" not in fault for fault in found)
    return found


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


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


def test_flipped_byte_in_an_image(folder: Path) -> None:
    member = load_index(folder).samples[3].members["lr2.png"]
    flip(folder / "shard-00001.tar", member.offset + member.length // 2)
    (fault,) = faults(folder)
    assert "shard-00001.tar: its sha256 differs" in fault
    assert "1 of its 8 images are affected, first 000003.lr2.png" in fault
    assert "pack the data set again" in fault


def test_flipped_byte_in_padding(folder: Path) -> None:
    flip(folder / "shard-00002.tar", -1)
    (fault,) = faults(folder)
    assert "shard-00002.tar: its sha256 differs from the index; pack the data set again" in fault


def test_cut_shard(folder: Path) -> None:
    path = folder / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    (fault,) = faults(folder)
    assert "shard-00000.tar: has 3000 bytes instead of" in fault


def test_missing_and_additional_shard(folder: Path) -> None:
    (folder / "shard-00001.tar").rename(folder / "shard-00009.tar")
    missing, additional = sorted(faults(folder))
    assert "shard-00001.tar: missing; pack the data set again" in missing
    assert "shard-00009.tar: not in index.json" in additional


def test_index_with_another_size(folder: Path) -> None:
    edit_member(folder, 2, "hr.png", width=21)
    (fault,) = faults(folder)
    assert "shard-00001.tar: 000002.hr.png: is 20 x 18 pixels instead of 21 x 18" in fault


def test_index_with_another_offset(folder: Path) -> None:
    member = load_index(folder).samples[2].members["hr.png"]
    edit_member(folder, 2, "hr.png", offset=member.offset + 512)
    (fault,) = faults(folder)
    assert "000002.hr.png: no member begins at the recorded offset" in fault


def test_index_with_anothers_offset(folder: Path) -> None:
    other = load_index(folder).samples[2].members["lr2.png"]
    edit_member(folder, 2, "hr.png", offset=other.offset, length=other.length)
    (fault,) = faults(folder)
    assert "000002.hr.png: the member at its offset is 000002.lr2.png" in fault


def test_offset_beyond_the_end(folder: Path) -> None:
    edit_member(folder, 4, "lr4.png", offset=1 << 40)
    (fault,) = faults(folder)
    assert "000004.lr4.png: lies beyond the end of the shard" in fault


def test_splits_are_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "train")
    assert data_sets(tmp_path / "both") == [tmp_path / "both" / "train"]
    with pytest.raises(UserError, match="not a packed data set"):
        data_sets(tmp_path / "source")
    with pytest.raises(UserError, match="does not exist"):
        data_sets(tmp_path / "nothing")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shards_verify", ROOT / "shards" / "verify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = script()
    assert command.main([str(folder)]) == 0
    assert "shard-00002.tar" in capsys.readouterr().out
    flip(folder / "shard-00002.tar", -1)
    assert command.main([str(folder), "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert not report["ok"]
    assert [shard["shard"] for shard in report["data_sets"][0]["shards"] if shard["faults"]] == ["shard-00002.tar"]
    assert printed.err.count("fault: ") == 1
