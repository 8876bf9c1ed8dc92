"""What may have happened to a file: cut short, mixed up, bits turned, or written by a program with other ideas.

A mutation follows from a seed and the file's bytes alone.
"""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

# Values that a writer may have meant otherwise: raw JSON, some of it none.
VALUES = (
    "-1", "0", "1", "1000000000", "1e9", "1e999", "-1e999", "NaN", "0.5", "9" * 400, "true", "false", "null",
    '"1"', '""', "[]", "{}", "[1]", '"\\ud800"', '"a\\u0000b"', '"../x"', '"/x"', '"' + "x" * 10_000 + '"',
    "[" * 5_000 + "]" * 5_000,
)  # fmt: skip
PLACE = "\0here\0"
Mutate = Callable[[bytes, Random], bytes]


def bits(data: bytes, rng: Random) -> bytes:
    """Cut, emptied, bytes changed, pieces exchanged, lost, twice, zeroed, or something behind the end."""
    out = bytearray(data)
    spot, length = rng.randrange(len(out) or 1), rng.choice((1, 2, 4, 16, 64, 512))
    match rng.randrange(8):
        case 0:
            del out[spot:]
        case 1:
            for _ in range(rng.choice((1, 1, 2, 8))):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 2:
            out[spot : spot + length] = rng.randbytes(len(out[spot : spot + length]))
        case 3:
            other = rng.randrange(len(out))
            for i in range(min(length, len(out) - max(spot, other))):
                out[spot + i], out[other + i] = out[other + i], out[spot + i]
        case 4:
            del out[spot : spot + length]
        case 5:
            out[spot:spot] = out[spot : spot + length]
        case 6:
            out[spot : spot + length] = bytes(len(out[spot : spot + length]))
        case _:
            out += rng.choice((b"\0", b"\n", b"x" * 100, bytes(4096)))
    return bytes(out)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in _places(one, (*path, key)))]


def retyped(data: bytes, rng: Random) -> bytes:
    """JSON, of which one value is another, lost, under another name, or named twice; every level is as likely."""
    value = json.loads(data)
    places = _places(value)
    depth = rng.choice(sorted({len(place) for place in places}))
    path = rng.choice([place for place in places if len(place) == depth])
    raw = rng.choice(VALUES)
    if not path:
        return raw.encode()
    group = value
    for key in path[:-1]:
        group = group[key]
    action = rng.randrange(8)
    if action == 0:
        del group[path[-1]]
    elif action == 1 and isinstance(group, dict):
        group[f"{path[-1]}_"] = group.pop(path[-1])
    elif action == 2 and isinstance(group, list):
        group.append(group[path[-1]])
    else:
        group[path[-1]] = PLACE
    return json.dumps(value).replace(json.dumps(PLACE), raw).encode()


def json_file(data: bytes, rng: Random) -> bytes:
    """A JSON file: mostly its values, sometimes its bytes."""
    return retyped(data, rng) if rng.random() < 0.75 else bits(data, rng)


def json_lines(data: bytes, rng: Random) -> bytes:
    """One line of a file of JSON lines."""
    lines = data.split(b"\n")
    number = rng.choice([i for i, line in enumerate(lines) if line])
    lines[number] = json_file(lines[number], rng)
    return b"\n".join(lines)


def safetensors(data: bytes, rng: Random) -> bytes:
    """The header's values, the header's length, or any byte."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.5:
        header = retyped(header, rng)
        return struct.pack("<Q", len(header)) + header + rest
    if rng.random() < 0.2:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, len(data), 2**32, 2**63))) + data[8:]
    return bits(data, rng)


def mutated(data: bytes, seed: int, how: Mutate) -> bytes:
    """The file that `seed` makes of `data`."""
    return how(data, Random(seed))
