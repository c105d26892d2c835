"""Mending a packed data set: damaged shards from another copy of it, or by fetching and packing its recipe again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hpcdistill.console import say, warn
from hpcdistill.data.check.verify import Report
from hpcdistill.data.fetch.location import digest_at, index_at, index_content
from hpcdistill.data.fetch.shard_copy import called, copy_shard
from hpcdistill.data.index import INDEX_NAME, load_index
from hpcdistill.errors import UserError
from hpcdistill.storage import write_bytes


def repair_index(folder: Path, place: str) -> None:
    """Give `folder` the index.json of its copy at `place` if its own is missing or cannot be read.

    Raises UserError when the copy has none either.
    """
    try:
        load_index(folder)
        return
    except UserError:
        index_at(place)
    content = index_content(place)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / INDEX_NAME, content)
    digest = hashlib.sha256(content).hexdigest()
    say(f"{folder / INDEX_NAME}: taken from {called(place)}; its sha256 is {digest}")


def repair_shards(report: Report, place: str) -> list[str]:
    """Replace the damaged shards of a data set by those of its copy at `place`; returns the names of those mended.

    Only what is damaged is read there, and only the bytes that the index promises replace it. A shard that the copy
    does not have whole either is left, with a warning. Raises UserError when `place` holds another data set.
    """
    folder, theirs = report.folder, digest_at(place)
    if theirs != report.digest:
        raise UserError(
            f"{called(place)}: holds another data set than {folder} (index {theirs[:12]}, not {report.digest[:12]}); "
            f"give a copy of the same packed data set, or remove {folder / INDEX_NAME} to have it replaced too"
        )
    shards = {shard.name: shard for shard in load_index(folder).shards}
    mended = []
    for found in report.shards:
        if found.whole:
            continue
        try:
            copy_shard(place, shards[found.shard], folder / found.shard)
        except UserError as error:
            warn(str(error))
            continue
        say(f"{folder / found.shard}: mended from {called(place)}")
        mended.append(found.shard)
    return mended


def repair_by_fetching(report: Report) -> None:
    """Fetch the recipe of a damaged data set and pack it into the same folder; UserError when it has no address."""
    # The packers and their torch are for this case alone.
    from hpcdistill.data.pack.fetching import refetch

    refetch(report.folder)


def repair_by_name(folder: Path) -> bool:
    """Fetch and pack what a folder with a damaged index should hold by its name; False when no recipe gives it."""
    from hpcdistill.data.pack.fetching import refetch_named

    return refetch_named(folder)
