"""One shard from a folder or an address to another folder: whole and with the index's sha256, or not at all."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from hpcdistill.data.fetch.download import open_stream
from hpcdistill.data.fetch.location import is_remote, join
from hpcdistill.data.fetch.transfer import shown
from hpcdistill.data.index import Shard
from hpcdistill.errors import UserError
from hpcdistill.storage import replacing, sha256_file

_PIECE = 4 << 20  # bytes read, hashed and written at a time


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

    Raises UserError when the source cannot be read or holds other bytes, OSError when `target` cannot be written, and
    Stopped once `stop` says so.
    """
    address = join(place, shard.name)
    digest, length = hashlib.sha256(), 0
    with replacing(target) as temporary, closing(_pieces(address)) as pieces:
        with open(temporary, "wb") as file:
            for piece in pieces:
                if stop():
                    raise Stopped
                length += len(piece)
                if length > shard.length:
                    break
                digest.update(piece)
                file.write(piece)
        if length != shard.length:
            more = "more" if length > shard.length else str(length)
            raise UserError(f"{called(address)}: has {more} bytes instead of {shard.length}; {_remedy(place)}")
        if digest.hexdigest() != shard.sha256:
            raise UserError(f"{called(address)}: its sha256 differs from the index; {_remedy(place)}")


def _pieces(address: str) -> Generator[bytes]:
    try:
        with open_stream(address) if is_remote(address) else open(address, "rb", buffering=0) as source:
            while piece := source.read(_PIECE):
                yield piece
    except FileNotFoundError:
        raise UserError(f"{address}: missing; complete the data set, or pack it again") from None
    except OSError as error:
        raise UserError(f"{address}: cannot be read ({error.strerror}); check the disk and the permissions") from None


def _remedy(place: str) -> str:
    if is_remote(place):
        return "it was packed again or is damaged on the server; try again, or take another copy"
    return f"mend it with `python shards/verify.py {shlex.quote(place)} --repair`"
