"""A packed data set where it lies, in a folder or at an http(s) address that serves one: its index and its shards."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Generator
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from hpcdistill.data.fetch.transfer import check_scheme, fetch_bytes, open_stream, shown
from hpcdistill.data.index import INDEX_NAME, Index, Shard, index_digest, load_index, parse_index
from hpcdistill.errors import UserError
from hpcdistill.storage import replacing, sha256_file

_INDEX_BYTES = 1 << 30  # five million samples
_SHARD_PIECE = 4 << 20  # bytes of a shard that are read, hashed and written at a time


def is_remote(place: str) -> bool:
    """True for an address, False for a folder; UserError for an address that is neither http nor https."""
    if "://" not in place and not place.startswith("pipe:"):
        return False
    check_scheme(place)
    return True


def join(place: str, name: str) -> str:
    """The file `name` in the data set at `place`."""
    return f"{place.rstrip('/')}/{name}" if is_remote(place) else str(Path(place) / name)


def index_at(place: str) -> Index:
    """The index of the data set at `place`; UserError when it cannot be had or is damaged."""
    if not is_remote(place):
        return load_index(Path(place))
    return parse_index(index_content(place), join(place, INDEX_NAME))


def digest_at(place: str) -> str:
    """Hex sha256 of the index at `place`: what the data set holds, wherever it lies."""
    if not is_remote(place):
        return index_digest(Path(place))
    index_at(place)  # a clear error for what is no index
    return hashlib.sha256(index_content(place)).hexdigest()


def index_content(place: str) -> bytes:
    """The bytes of the index at `place`."""
    return _fetched(join(place, INDEX_NAME)) if is_remote(place) else (Path(place) / INDEX_NAME).read_bytes()


class Stopped(Exception):
    """A copy was given up because another one failed."""


def called(place: str) -> str:
    """What messages call a folder or an address: the latter without a password."""
    return shown(place) if is_remote(place) else place


def is_whole(path: Path, shard: Shard) -> bool:
    """True when the file at `path` can be read and has the length and sha256 of `shard`."""
    try:
        return path.stat().st_size == shard.length and sha256_file(path) == shard.sha256
    except OSError:  # missing, or of a disk that cannot be read: to be copied again
        return False


def copy_shard(place: str, shard: Shard, target: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Copy `shard` of the data set at `place` to `target`, which is replaced only by the bytes the index promises.

    Raises what `read_shard` does, OSError when `target` cannot be written, and Stopped once `stop` says so.
    """
    with replacing(target) as temporary, closing(_verified(place, shard)) as pieces, open(temporary, "wb") as file:
        for piece in pieces:
            if stop():
                raise Stopped
            file.write(piece)


def read_shard(place: str, shard: Shard) -> bytearray:
    """All bytes of `shard`; UserError when it cannot be read or holds others than the index promises."""
    content = bytearray()  # grows in place: pieces that are joined at the end would be in memory twice
    for piece in _verified(place, shard):
        content += piece
    return content


def check_shard(place: str, shard: Shard) -> None:
    """UserError when a shard in the folder `place` is missing or of another length than in the index."""
    path = Path(place) / shard.name
    if not path.is_file():
        raise UserError(f"{path}: this shard of the data set is missing; {remedy(place)}")
    length = path.stat().st_size
    if length != shard.length:
        raise UserError(f"{path}: has {length} bytes instead of the index's {shard.length}; {remedy(place)}")


def _verified(place: str, shard: Shard) -> Generator[bytes]:
    """The bytes of `shard` as they come; UserError at the first one too many, or behind the last if one is wrong."""
    address = join(place, shard.name)
    digest, length = hashlib.sha256(), 0
    with closing(_pieces(address, remedy(place))) as pieces:
        for piece in pieces:
            length += len(piece)
            if length > shard.length:
                break
            digest.update(piece)
            yield piece
    if length != shard.length:
        more = "more" if length > shard.length else str(length)
        raise UserError(f"{called(address)}: has {more} bytes instead of {shard.length}; {remedy(place)}")
    if digest.hexdigest() != shard.sha256:
        raise UserError(f"{called(address)}: its sha256 differs from the index; {remedy(place)}")


@lru_cache(maxsize=32)
def _fetched(address: str) -> bytes:
    """A run asks for the same index several times; it should see one content."""
    return fetch_bytes(address, limit=_INDEX_BYTES)


def _pieces(address: str, todo: str) -> Generator[bytes]:
    try:
        with open_stream(address) if is_remote(address) else open(address, "rb", buffering=0) as source:
            while piece := source.read(_SHARD_PIECE):
                yield piece
    except OSError as error:
        raise UserError(f"{address}: cannot be read ({error.strerror}); {todo}") from None


def remedy(place: str) -> str:
    """What to do about a shard that is not what the index says."""
    if is_remote(place):
        return "it was packed again or is damaged on the server; try again, or take another copy"
    return f"mend it with `python shards/verify.py {shlex.quote(place)} --repair`, or pack the data set again"
