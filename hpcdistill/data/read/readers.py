"""Choosing the reader that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from hpcdistill.data.config import DataConfig
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.fetch.transfer import shown
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.loader import Batch
from hpcdistill.data.read.reader import PatchReader
from hpcdistill.data.read.staging import stage
from hpcdistill.data.read.stream import StreamReader
from hpcdistill.data.read.translation import TranslationReader
from hpcdistill.errors import UserError


class Reader(Protocol):
    """Batches by optimizer step; `samples` draws are one pass over the data."""

    samples: int

    def loader(self, first: int, last: int, workers: int = 0, pin_memory: bool = False) -> Iterable[Batch]:
        """This rank's batches of the steps first .. last - 1."""
        ...


def open_reader(
    places: Sequence[str],
    needs: Needs,
    config: DataConfig,
    seed: int,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    stopping: Callable[[], bool] = lambda: False,
) -> Reader:
    """The reader of the data sets at `places` (folders, or http(s) addresses) that `config` and `needs` ask for.

    With `data.stage` they are copied to node-local scratch first and read from there. `batch_size` is global.
    Raises StagingStopped when `stopping` says so while they are copied, UserError for an address that the indexed
    reader cannot read, and what the readers raise.
    """
    if config.stage is not None:
        places = [str(stage(place, Path(config.stage), stopping)) for place in places]
    if config.reader == "stream":
        return StreamReader(places, needs, config, seed, batch_size, rank, ranks)
    for place in places:
        if is_remote(place):
            raise UserError(
                f"{shown(place)}: data.reader=indexed reads folders only; use data.reader=stream, or copy it here "
                "first with data.stage=FOLDER or `python shards/stage.py ADDRESS --to FOLDER`"
            )
    folders = [Path(place) for place in places]
    if needs.kind == "lr-hr":
        return PatchReader(folders, needs, config, seed, batch_size, rank, ranks)
    return TranslationReader(folders, needs, config, seed, batch_size, rank, ranks)
