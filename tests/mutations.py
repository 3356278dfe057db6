"""Hostile variants of a text: bytes are changed, and where the text is JSON, values, keys and depth are."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

MARK = "do-not-print-me"
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    -0.0,
    1e308,
    1 << 31,
    1 << 62,
    1 << 64,
    10**400,
    "",
    "0",
    "../../etc/passwd",
    "/dev/zero",
    "\x1b[31m",
    "a\nb",
    "\ud800",
    MARK * 200,
    [],
    {},
    [[]],
    [None] * 50,
    {"": {}},
    {"__class__": 1},
)
RAW = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"[" * 5000,
    b'{"a":' * 5000,
    b"9" * 5000,
    b"\xff\xfe",
    b"\x00",
    b'"',
    b"#",
    b"=",
)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Return a variant of ``content``."""
    if chance.random() < 0.6:
        try:
            data = json.loads(content)
        except ValueError:
            pass
        else:
            for _ in range(chance.choice((1, 1, 1, 2, 4))):
                data = _changed(data, chance)
            return json.dumps(data).encode()
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(found) + 1)
        kind = chance.randrange(5)
        if kind == 0:
            found[place : place + chance.choice((1, 4, 100))] = b""
        elif kind == 1:
            found[place:place] = chance.choice(RAW)
        elif kind == 2 and place < len(found):
            found[place] ^= 1 << chance.randrange(8)
        elif kind == 3:
            del found[place:]
        else:
            other = chance.randrange(len(found) + 1)
            found[place:place] = found[other : other + 40]
    return bytes(found)


def _value(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(VALUES))


def _changed(data: Any, chance: random.Random) -> Any:
    """Return ``data`` with one place below it changed."""
    if isinstance(data, dict) and data and chance.random() < 0.85:
        key = chance.choice(list(data))
        act = chance.random()
        if act < 0.1:
            del data[key]
        elif act < 0.2:
            data[chance.choice((MARK, "", "__init__", f"{key} "))] = _value(chance)
        else:
            data[key] = _changed(data[key], chance)
        return data
    if isinstance(data, list) and data and chance.random() < 0.85:
        index = chance.randrange(len(data))
        if chance.random() < 0.2:
            data.insert(index, _value(chance))
        elif chance.random() < 0.2:
            del data[index]
        else:
            data[index] = _changed(data[index], chance)
        return data
    return _value(chance)
