"""The reader that a configuration asks for, and where it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_sets import noise, write_set
from serving import Server

from hpcdistill.data.config import DataConfig
from hpcdistill.data.index import Kind
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.reader import PatchReader, Reader, TranslationReader, open_reader
from hpcdistill.data.read.stream import StreamReader
from hpcdistill.errors import UserError

SUFFIXES: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "lr-hr": (("hr.png",), ("hr.png",)),
    "paired": (("a.png", "b.png"), ("ab.png",)),
    "unpaired": (("a.png",), ("b.png",)),
}


@pytest.fixture(params=list(SUFFIXES))
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def packed(tmp_path: Path, kind: Kind) -> Path:
    """Four samples of random images, in a folder of the kind's name."""
    samples = [{name: noise(16, 16, n) for name in SUFFIXES[kind][n // 2]} for n in range(4)]
    write_set(tmp_path / kind, kind, samples, shard_samples=1)
    return tmp_path / kind


def opened(place: object, kind: Kind, **options: Any) -> Reader:
    config = DataConfig(**{"patch": 8, "load_size": 12, "crop": 8, **options})
    return open_reader([str(place)], Needs(kind=kind, channels=3), config, seed=3, batch_size=4, rank=1, ranks=2)


def test_reader_and_kind_choose(packed: Path, kind: Kind) -> None:
    indexed = opened(packed, kind)
    assert type(indexed) is (PatchReader if kind == "lr-hr" else TranslationReader)
    streamed = opened(packed, kind, reader="stream")
    assert type(streamed) is StreamReader
    assert indexed.samples == streamed.samples == (2 if kind == "unpaired" else 4)
    for reader in (indexed, streamed):
        batches = list(reader.loader(0, 3, workers=1))
        assert len(batches) == 3
        assert [tuple(tensor.shape) for tensor in batches[0].values()] == [(2, 3, 8, 8)] * len(batches[0])
        assert batches[0].keys() == ({"hr"} if kind == "lr-hr" else {"a", "b"})


@pytest.mark.parametrize("reader", ["indexed", "stream"])
def test_a_staged_set_gives_the_same_batches(packed: Path, kind: Kind, reader: str, tmp_path: Path) -> None:
    expected = list(opened(packed, kind, reader=reader).loader(0, 4))
    with Server(packed) as server:
        staged = opened(server.address(), kind, reader=reader, stage=str(tmp_path / "scratch"))
        asked = len(server.requests)
        found = list(staged.loader(0, 4))
        assert len(server.requests) == asked  # all is read from the copy
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_address_needs_the_stream(packed: Path, kind: Kind) -> None:
    with Server(packed) as server, pytest.raises(UserError) as caught:
        opened(server.address(), kind)
    message = str(caught.value)
    for part in (server.address(), "data.reader=stream", "data.stage=FOLDER", "shards/stage.py ADDRESS --to FOLDER"):
        assert part in message
    with pytest.raises(UserError, match="http"):
        opened("s3://bucket/set", kind)
