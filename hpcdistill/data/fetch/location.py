"""Where a packed data set lies: a folder, or an http(s) address that serves one."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from hpcdistill.data.fetch.download import check_scheme, fetch_bytes
from hpcdistill.data.index import INDEX_NAME, Index, index_digest, load_index, parse_index

_INDEX_BYTES = 1 << 30  # five million samples


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


@lru_cache(maxsize=32)
def _fetched(address: str) -> bytes:
    """A run asks for the same index several times; it should see one content."""
    return fetch_bytes(address, limit=_INDEX_BYTES)
