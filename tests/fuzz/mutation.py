"""Changes bytes, JSON values and JSON documents at random, from a seeded generator."""

from __future__ import annotations

import copy
import math
from random import Random
from typing import Any

__all__ = ["changed_bytes", "changed_document", "odd_value"]

NUMBERS = (0, 1, -1, 2, 3, 7, 8, 127, 255, 1000, 2**16, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63, 2**64, 10**18)
FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-300, 1e38, 1e39, 1e300, math.inf, -math.inf, math.nan)
TEXTS = (
    *("", " ", ".", "..", "/", "../../etc/passwd", "/dev/zero", "a\nb", "a\0b", "\ud800", "é🙂", "%s%n", "x" * 300),
    *("true", "null", "1", "-1", "nan", "batch", "8*height", "float32", "int64", "unet", "decoder", "fp32", "[PAD]"),
)
BYTES = (
    b"",
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\x80" * 9,
    b"\xff" * 8,
    b"\n",
    b'"',
    b"{",
    b"[",
    b"location",
    b"../x",
)
MAX_CHANGES = 4


def odd_value(random: Random, depth: int = 0) -> Any:
    """A JSON value that is unusual in some place: extreme numbers, odd texts, other types, nested or long values."""
    kind = random.randrange(12 if depth < 3 else 8)
    if kind == 0:
        return None
    if kind == 1:
        return random.random() < 0.5
    if kind in (2, 3):
        return random.choice(NUMBERS)
    if kind == 4:
        return random.choice(FLOATS)
    if kind in (5, 6):
        return random.choice(TEXTS)
    if kind == 7:
        return random.choice(
            (10**400, -(10**4000), "y" * 10_000, random.randint(-(2**70), 2**70), random.gauss(0, 100))
        )
    if kind in (8, 9):
        return [odd_value(random, depth + 1) for _ in range(random.choice((0, 1, 2, 3, 40)))]
    return {str(random.choice(TEXTS)): odd_value(random, depth + 1) for _ in range(random.choice((0, 1, 3)))}


def changed_bytes(random: Random, content: bytes) -> bytes:
    """A copy of some bytes with 1 to 4 changes: bits flipped, parts replaced, removed, repeated, moved or cut off."""
    found = bytearray(content)
    for _ in range(random.randint(1, MAX_CHANGES)):
        start = random.randint(0, len(found))
        end = min(len(found), start + random.choice((0, 1, 1, 2, 4, 8, 64, 1024)))
        kind = random.randrange(7)
        if kind == 0 and start < len(found):
            found[start] ^= 1 << random.randrange(8)
        elif kind == 1:
            found[start:end] = random.choice(BYTES)
        elif kind == 2:
            found[start:end] = random.randbytes(end - start)
        elif kind == 3:
            del found[start:end]
        elif kind == 4:
            found[start:start] = found[start:end] * random.choice((1, 2, 50))
        elif kind == 5:
            other = random.randint(0, len(found))
            found[other:other] = found[start:end]
        elif random.random() < 0.3:
            del found[start:]
    return bytes(found)


def changed_document(random: Random, document: Any) -> Any:
    """A copy of a JSON document in which 1 to 4 values are replaced, removed, added, or exchanged with others of it."""
    found = copy.deepcopy(document)
    for _ in range(random.randint(1, MAX_CHANGES)):
        places = list(_places(found))
        if not places:
            return odd_value(random)
        container, key = random.choice(places)
        kind = random.randrange(10)
        if kind < 5:
            container[key] = odd_value(random)
        elif kind == 5:
            del container[key]
        elif kind == 6:
            other, other_key = random.choice(places)
            container[key] = copy.deepcopy(other[other_key])
        elif kind == 7 and type(container[key]) is int:
            container[key] *= random.choice((-1, 2, 1000))
        elif isinstance(container, dict):
            container[str(random.choice(TEXTS))] = odd_value(random)
        else:
            container.insert(key, odd_value(random))
    return found


def _places(value: Any) -> Any:
    """Every container and key inside a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
