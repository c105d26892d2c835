"""Files damaged in many ways, from a fixed seed, for the tests of those who read them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from hpcdistill.errors import UserError

EACH = 40
SWAPS: tuple[Any, ...] = (
    None,
    True,
    3,
    -5,
    0.5,
    1 << 62,
    10**18,
    10**400,
    -(10**30),
    "x",
    "",
    "../../x.tar",
    "/etc/passwd",
)
SWAPS += ("\0", "\ud800", [], {}, [[3]], {"x": [1]}, [None], float("inf"), float("nan"), "9" * 5000, 1 << 31)
BROKEN = (
    b"",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 10_000,
    b"null",
    b"[]",
    b"{}",
    b"3",
    b'"x"',
    b"\0",
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside `value`, its own first."""
    yield way
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*way, key))


def changed(value: Any, way: tuple[Any, ...], chance: random.Random) -> Any:
    """A copy with another value at `way`, or without it, or with it one level deeper."""
    if not way:
        return chance.choice(([value], {"x": value}, *SWAPS))
    top = copy.deepcopy(value)
    inner = top
    for key in way[:-1]:
        inner = inner[key]
    match chance.randrange(6):
        case 0:
            del inner[way[-1]]
        case 1:
            inner[way[-1]] = [inner[way[-1]]]
        case 2 if isinstance(inner, dict):
            inner[chance.choice(("another", "../x", "\0"))] = inner.pop(way[-1])
        case _:
            inner[way[-1]] = chance.choice(SWAPS)
    return top


def damages(content: bytes) -> Iterator[bytes]:
    """What `content`, JSON, may have become: cut off, overwritten, other types, huge numbers, nested otherwise."""
    chance = random.Random(1)
    yield from BROKEN
    for _ in range(EACH // 4):
        yield content[: chance.randrange(len(content))]
    for _ in range(EACH // 4):
        at = chance.randrange(len(content))
        yield content[:at] + chance.choice((b"\xff", b"\0", b"9", b"]", b'"')) + content[at + 1 :]
    value = json.loads(content)
    ways = list(places(value))
    for _ in range(2 * EACH):
        yield json.dumps(changed(value, chance.choice(ways), chance)).encode()


def ends_well(read: Callable[[], object]) -> bool:
    """True for success, False for one clear line; anything else fails the test."""
    try:
        read()
    except UserError as error:
        line = str(error)
    else:
        return True
    assert 20 < len(line) < 1500
    assert "\n" not in line
    assert "Traceback" not in line
    assert "object at 0x" not in line
    return False


def damaged(content: bytes, seed: int) -> bytes:
    """Flipped bits, a piece overwritten, cut off, cut out, doubled, or with something behind it."""
    chance = random.Random(seed)
    data = bytearray(content)
    at = chance.randrange(len(data))
    length = chance.choice((1, 8, 100, 2000))
    match chance.randrange(6):
        case 0:
            for _ in range(chance.choice((1, 3, 50))):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 1:
            data[at : at + length] = chance.randbytes(len(data[at : at + length]))
        case 2:
            del data[at:]
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length]
        case _:
            data += chance.randbytes(length)
    return bytes(data)
